//! Matrix products of NVIDIA's library.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem;
use std::ptr;

use cudarc::cublaslt::sys as lt;
use lt::cublasLtMatmulDescAttributes_t as Description;
use lt::cublasLtMatmulPreferenceAttributes_t as Attribute;

use super::driver::{DevicePtr, Stream};
use crate::{BackendError, DType};

/// Room the library may use in between: what NVIDIA recommends for Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// How a product that is cut along its inputs may be put together: with its parts in float32. The library would also add
/// parts that were rounded to the result's type.
const SUMS: u32 = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// Plans that are kept; prompts have many lengths, and a plan takes a fifth of a millisecond.
const MAX_PLANS: usize = 4096;

/// A product `out[rows, outputs] = x[rows, inputs] weight[outputs, inputs]^T`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Elements from one row of the weight to the next.
    pub(super) weight_stride: usize,
    /// Of weight and activations, unless they are of eight bits.
    pub(super) dtype: DType,
    /// Of the result, and of a bias.
    pub(super) out_dtype: DType,
    /// Elements from one row of the result to the next.
    pub(super) out_stride: usize,
    /// Weight and activations are E4M3 with a scale for each row of either.
    pub(super) is_fp8: bool,
    /// A bias of each output is added before the result is rounded.
    pub(super) has_bias: bool,
}

/// Where its matrices are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub(super) x: DevicePtr,
    pub(super) weight: DevicePtr,
    /// Zero: none.
    pub(super) bias: DevicePtr,
    pub(super) out: DevicePtr,
    /// Of the rows of weight and activations where they are of eight bits, f32.
    pub(super) scales: [DevicePtr; 2],
}

/// The library's handle and what it has planned.
pub(super) struct CublasLt {
    handle: lt::cublasLtHandle_t,
    plans: HashMap<Product, Plan>,
}

// SAFETY: the handle and the descriptors may be used from any thread, one at a time.
unsafe impl Send for CublasLt {}

/// Descriptors of one product.
struct Plan {
    product: lt::cublasLtMatmulDesc_t,
    weight: lt::cublasLtMatrixLayout_t,
    x: lt::cublasLtMatrixLayout_t,
    out: lt::cublasLtMatrixLayout_t,
    algorithm: lt::cublasLtMatmulAlgo_t,
}

fn check(operation: &str, status: lt::cublasStatus_t) -> Result<(), BackendError> {
    match status {
        lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        other => Err(BackendError::Device {
            operation: format!("{operation} with cuBLASLt"),
            reason: format!("{other:?}"),
        }),
    }
}

fn data_type(dtype: DType) -> lt::cudaDataType {
    match dtype {
        DType::F32 => lt::cudaDataType::CUDA_R_32F,
        DType::F16 => lt::cudaDataType::CUDA_R_16F,
        DType::BF16 => lt::cudaDataType::CUDA_R_16BF,
    }
}

/// Sets an attribute of a product, whose type is the caller's to know.
fn describe<T>(
    product: lt::cublasLtMatmulDesc_t,
    attribute: Description,
    value: &T,
) -> Result<(), BackendError> {
    // SAFETY: the library copies as many bytes, and refuses another size than the attribute's.
    check("describing a product", unsafe {
        lt::cublasLtMatmulDescSetAttribute(product, attribute, ptr::from_ref(value).cast(), size_of::<T>())
    })
}

impl Product {
    fn in_type(&self) -> lt::cudaDataType {
        if self.is_fp8 { lt::cudaDataType::CUDA_R_8F_E4M3 } else { data_type(self.dtype) }
    }
}

/// Sets what plans have to keep to.
///
/// # Safety
/// `attribute` is of the type `T`.
unsafe fn set<T>(
    preference: lt::cublasLtMatmulPreference_t,
    attribute: Attribute,
    value: &T,
) -> Result<(), BackendError> {
    // SAFETY: the caller's.
    let status = unsafe {
        lt::cublasLtMatmulPreferenceSetAttribute(
            preference,
            attribute,
            ptr::from_ref(value).cast(),
            size_of::<T>(),
        )
    };
    check("planning", status)
}

impl CublasLt {
    /// Opens the library.
    ///
    /// # Errors
    /// It is not there: one line that says what provides it.
    pub(super) fn open() -> Result<Self, BackendError> {
        // SAFETY: only looks for the library.
        if !unsafe { lt::is_culib_present() } {
            return Err(BackendError::Device {
                operation: "starting CUDA".to_owned(),
                reason: "there is no cuBLASLt (libcublasLt.so.13) here; it is part of the CUDA 13 toolkit and of the PyPI \
                         package nvidia-cublas, and LD_LIBRARY_PATH says where it is searched"
                    .to_owned(),
            });
        }
        let mut handle = ptr::null_mut();
        // SAFETY: the library is there; a place for a handle.
        check("starting", unsafe { lt::cublasLtCreate(&raw mut handle) })?;
        // SAFETY: takes nothing.
        let version = unsafe { lt::cublasLtGetVersion() };
        tracing::debug!("cuBLASLt {}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
        Ok(Self { handle, plans: HashMap::new() })
    }

    /// Computes a product in stream order, with [`WORKSPACE_BYTES`] of room in between.
    pub(super) fn multiply(
        &mut self,
        stream: &Stream,
        workspace: DevicePtr,
        product: Product,
        operands: Operands,
    ) -> Result<(), BackendError> {
        if !self.plans.contains_key(&product) {
            if self.plans.len() >= MAX_PLANS {
                self.plans.clear();
            }
            let plan = Plan::new(self.handle, product, operands)?;
            self.plans.insert(product, plan);
        }
        let plan = &self.plans[&product];
        plan.set_addresses(product, operands)?;
        plan.launch(self.handle, (stream, workspace), operands)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made by `open`.
        let _ = unsafe { lt::cublasLtDestroy(self.handle) };
    }
}

impl Plan {
    /// Row-major matrices are the library's column-major ones transposed: `out^T = weight x^T`, with the weight's rows as its
    /// columns.
    fn new(handle: lt::cublasLtHandle_t, product: Product, operands: Operands) -> Result<Self, BackendError> {
        let Product { rows, outputs, inputs, weight_stride, .. } = product;
        let (in_type, out_type) = (product.in_type(), data_type(product.out_dtype));
        let layout = |data_type, rows: usize, cols: usize, stride: usize| {
            let mut layout = ptr::null_mut();
            // SAFETY: a place for a handle.
            let status = unsafe {
                lt::cublasLtMatrixLayoutCreate(
                    &raw mut layout,
                    data_type,
                    rows as u64,
                    cols as u64,
                    stride as i64,
                )
            };
            check("describing a matrix", status).map(|()| layout)
        };
        let mut description = ptr::null_mut();
        // SAFETY: a place for a handle; float32 is summed in float32, never in TF32.
        check("describing a product", unsafe {
            lt::cublasLtMatmulDescCreate(
                &raw mut description,
                lt::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                lt::cudaDataType::CUDA_R_32F,
            )
        })?;
        // CUBLAS_OP_T, which the bindings of this library lack.
        describe(description, Description::CUBLASLT_MATMUL_DESC_TRANSA, &1_i32)?;
        if product.is_fp8 {
            let rows = lt::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32;
            describe(description, Description::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &rows)?;
            describe(description, Description::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &rows)?;
        }
        if product.has_bias {
            let added = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            describe(description, Description::CUBLASLT_MATMUL_DESC_EPILOGUE, &added)?;
        }
        let weight = layout(in_type, inputs, outputs, weight_stride)?;
        let x = layout(in_type, inputs, rows, inputs)?;
        let out = layout(out_type, outputs, rows, product.out_stride)?;
        // SAFETY: plain data that `choose` fills.
        let algorithm = unsafe { mem::zeroed() };
        let mut plan = Self { product: description, weight, x, out, algorithm };
        plan.set_addresses(product, operands)?;
        plan.choose(handle).map_err(|error| BackendError::Device {
            operation: format!("planning {product:?}"),
            reason: error.to_string(),
        })?;
        Ok(plan)
    }

    /// Where the bias, and the scales of weight and activations, are.
    fn set_addresses(&self, product: Product, operands: Operands) -> Result<(), BackendError> {
        if product.has_bias {
            describe(self.product, Description::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
        }
        if product.is_fp8 {
            let [weight, x] = operands.scales;
            describe(self.product, Description::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &weight)?;
            describe(self.product, Description::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x)?;
        }
        Ok(())
    }

    /// Launches it.
    fn launch(
        &self,
        handle: lt::cublasLtHandle_t,
        (stream, workspace): (&Stream, DevicePtr),
        operands: Operands,
    ) -> Result<(), BackendError> {
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: the descriptors fit the matrices, which the caller vouches for; the workspace is used by one operation at a
        // time.
        let status = unsafe {
            lt::cublasLtMatmul(
                handle,
                self.product,
                ptr::from_ref(&one).cast(),
                operands.weight as *const c_void,
                self.weight,
                operands.x as *const c_void,
                self.x,
                ptr::from_ref(&zero).cast(),
                operands.out as *const c_void,
                self.out,
                operands.out as *mut c_void,
                self.out,
                &raw const self.algorithm,
                workspace as *mut c_void,
                WORKSPACE_BYTES,
                stream.raw().cast(),
            )
        };
        check("multiplying", status)
    }

    /// Takes the algorithm that the library thinks best: timing eight of them at the shapes of prompts gained nothing.
    fn choose(&mut self, handle: lt::cublasLtHandle_t) -> Result<(), BackendError> {
        let mut preference = ptr::null_mut();
        let mut count = 0;
        // SAFETY: places for what the library makes; the attributes are of these types.
        unsafe {
            // What it may assume of addresses: buffers begin at multiples of 256.
            check("planning", lt::cublasLtMatmulPreferenceCreate(&raw mut preference))?;
            let set = set(preference, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)
                .and_then(|()| set(preference, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &SUMS));
            let mut result: lt::cublasLtMatmulHeuristicResult_t = mem::zeroed();
            let found = lt::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.product,
                self.weight,
                self.x,
                self.out,
                self.out,
                preference,
                1,
                &raw mut result,
                &raw mut count,
            );
            let _ = lt::cublasLtMatmulPreferenceDestroy(preference);
            set?;
            check("planning", found)?;
            self.algorithm = result.algo;
        }
        if count == 0 {
            return Err(BackendError::Device {
                operation: "planning with cuBLASLt".to_owned(),
                reason: "it has no algorithm for this product".to_owned(),
            });
        }
        Ok(())
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe {
            let _ = lt::cublasLtMatmulDescDestroy(self.product);
            let _ = lt::cublasLtMatrixLayoutDestroy(self.weight);
            let _ = lt::cublasLtMatrixLayoutDestroy(self.x);
            let _ = lt::cublasLtMatrixLayoutDestroy(self.out);
        }
    }
}
