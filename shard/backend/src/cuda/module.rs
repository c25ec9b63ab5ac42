//! Kernels of the embedded images.

use std::collections::HashMap;
use std::ffi::{CString, c_char};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Context, check, failed};
use crate::{BackendError, DType, Fp8Format, KvDType};

/// One image on the device. Modules live as long as the context.
pub(crate) struct Module {
    name: &'static str,
    raw: sys::CUmodule,
    // A module is gone with its context.
    _context: Arc<Context>,
}

// SAFETY: handles may be used from any thread.
unsafe impl Send for Module {}

/// A kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Function {
    pub(super) raw: sys::CUfunction,
    /// The driver's string, which lives as long as the module. Asked for when the kernel is found: a device that has failed tells
    /// no names.
    pub(super) name: *const c_char,
}

// SAFETY: a handle that may be used from any thread; its module lives as long as the backend.
unsafe impl Send for Function {}

impl Module {
    /// Loads the image of `cuda/{name}.cu`.
    pub(super) fn load(context: &Arc<Context>, name: &'static str) -> Result<Self, BackendError> {
        let missing = |reason: String| BackendError::Device {
            operation: format!("loading the {name} kernels"),
            reason,
        };
        let Some(image) = kernels::fatbin(name) else {
            return Err(missing(
                "this program was built without CUDA kernels; build it where nvcc 13.0 is (make nvcc), or use --device cpu"
                    .to_owned(),
            ));
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the image is a whole fatbin that nvcc made.
        match unsafe { sys::cuModuleLoadData(&raw mut raw, image.as_ptr().cast()) } {
            sys::CUresult::CUDA_SUCCESS => Ok(Self { name, raw, _context: Arc::clone(context) }),
            sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => {
                let (major, minor) = context.compute_capability()?;
                Err(missing(format!(
                    "this program has kernels for {}, the GPU is sm_{major}{minor}; rebuild it with \
                     QUARTET_CUDA_ARCHITECTURES=sm_{major}{minor}",
                    kernels::architectures().join(", ")
                )))
            }
            code => Err(failed(&format!("loading the {name} kernels"), code)),
        }
    }

    /// The kernel `name`.
    pub(super) fn function(&self, name: &str) -> Result<Function, BackendError> {
        let symbol = CString::new(name).unwrap_or_default();
        let mut raw = ptr::null_mut();
        // SAFETY: the module is loaded and the name ends with a zero.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut raw, self.raw, symbol.as_ptr()) };
        check(&format!("finding the kernel {name} of {}", self.name), code)?;
        let mut own_name = ptr::null();
        // SAFETY: a place for a pointer to a name that lives as long as the kernel.
        let code = unsafe { sys::cuFuncGetName(&raw mut own_name, raw) };
        check(&format!("asking the kernel {name} of {} for its name", self.name), code)?;
        Ok(Function { raw, name: own_name })
    }

    /// The instantiations `{name}_{a}_{b}` that there are, by two element types.
    pub(super) fn by_types(&self, name: &str, pairs: &[(DType, DType)]) -> Result<ByTypes, BackendError> {
        let function = |&(a, b): &(DType, DType)| {
            Ok(((a, b), self.function(&format!("{name}_{}_{}", suffix(a), suffix(b)))?))
        };
        Ok(ByTypes {
            name: name.to_owned(),
            functions: pairs.iter().map(function).collect::<Result<_, _>>()?,
        })
    }

    /// The instantiations `{name}_{a}_{c}` for every type of activations and every type of the KV cache.
    pub(super) fn by_cache(&self, name: &str) -> Result<ByCache, BackendError> {
        let activations = [DType::F32, DType::BF16, DType::F16];
        let caches = activations.map(KvDType::Plain).into_iter();
        let caches = caches.chain([Fp8Format::E4M3, Fp8Format::E5M2].map(KvDType::Fp8));
        let pairs = caches.flat_map(|cache| activations.map(|dtype| (dtype, cache)));
        let function = |(dtype, cache): (DType, KvDType)| {
            let name = format!("{name}_{}_{}", suffix(dtype), cache_suffix(cache));
            Ok(((dtype, cache), self.function(&name)?))
        };
        Ok(ByCache(pairs.map(function).collect::<Result<_, BackendError>>()?))
    }

    /// The instantiations `{name}_{f32,bf16,f16}`, by element type.
    pub(super) fn by_type(&self, name: &str) -> Result<ByType, BackendError> {
        Ok(ByType {
            f32: self.function(&format!("{name}_f32"))?,
            bf16: self.function(&format!("{name}_bf16"))?,
            f16: self.function(&format!("{name}_f16"))?,
        })
    }
}

/// A kernel for each element type.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ByType {
    f32: Function,
    bf16: Function,
    f16: Function,
}

impl ByType {
    /// The one for `dtype`.
    pub(super) fn of(&self, dtype: DType) -> Function {
        match dtype {
            DType::F32 => self.f32,
            DType::BF16 => self.bf16,
            DType::F16 => self.f16,
        }
    }
}

/// A kernel for some pairs of element types.
#[derive(Debug)]
pub(crate) struct ByTypes {
    name: String,
    functions: Vec<((DType, DType), Function)>,
}

impl ByTypes {
    /// The one for `a` and `b`.
    pub(super) fn of(&self, a: DType, b: DType) -> Result<Function, BackendError> {
        let found = self.functions.iter().find(|(types, _)| *types == (a, b));
        found.map(|(_, function)| *function).ok_or_else(|| BackendError::Device {
            operation: self.name.clone(),
            reason: format!(
                "there is no kernel for {a} and {b}; expected one type, or float32 for one of them"
            ),
        })
    }
}

/// A kernel for every type of activations and of the KV cache.
#[derive(Debug)]
pub(crate) struct ByCache(HashMap<(DType, KvDType), Function>);

impl ByCache {
    /// The one for activations of `dtype` and a cache of `cache`.
    pub(super) fn of(&self, dtype: DType, cache: KvDType) -> Function {
        self.0[&(dtype, cache)]
    }
}

/// What kernels of a cache's element type are called after.
pub(super) fn cache_suffix(dtype: KvDType) -> &'static str {
    match dtype {
        KvDType::Plain(dtype) => suffix(dtype),
        KvDType::Fp8(Fp8Format::E4M3) => "e4m3",
        KvDType::Fp8(Fp8Format::E5M2) => "e5m2",
    }
}

/// What kernels of an element type are called after.
fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
    }
}

/// Every type with every type.
pub(super) const ALL_TYPES: [(DType, DType); 9] = [
    (DType::F32, DType::F32),
    (DType::F32, DType::BF16),
    (DType::F32, DType::F16),
    (DType::BF16, DType::F32),
    (DType::BF16, DType::BF16),
    (DType::BF16, DType::F16),
    (DType::F16, DType::F32),
    (DType::F16, DType::BF16),
    (DType::F16, DType::F16),
];

/// Pairs of equal types and of float32 with another: what kernels of two types are compiled for.
pub(super) const MIXED_TYPES: [(DType, DType); 7] = [
    (DType::F32, DType::F32),
    (DType::F32, DType::BF16),
    (DType::F32, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::BF16, DType::F32),
    (DType::F16, DType::F16),
    (DType::F16, DType::F32),
];

/// Shared memory of a tile of `rows` rows on tensor cores, see `Tensor` in `tile.cuh`: three stages of 64 columns of two bytes,
/// of the rows and of 128 weight rows.
pub(super) const fn tensor_tile_bytes(rows: usize) -> u32 {
    (3 * (rows + 128) * 128) as u32
}

/// Shared memory of a tile of `tokens` rows by warpgroups, see `Tile` in `warpgroup.cuh`: four stages of 64 columns of two bytes, of
/// the rows and of 128 weight rows, and what aligning them takes.
pub(super) const fn warpgroup_tile_bytes(tokens: usize) -> u32 {
    (4 * (tokens + 128) * 128 + 1024) as u32
}

impl Function {
    /// Whether its code was compiled for Hopper or a later architecture, and not from portable code by the driver.
    pub(super) fn is_for_hopper_or_later(self) -> Result<bool, BackendError> {
        let mut version = 0;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION;
        // SAFETY: the function's module is loaded; a place for a number.
        let code = unsafe { sys::cuFuncGetAttribute(&raw mut version, attribute, self.raw) };
        check("asking what a kernel was compiled for", code)?;
        Ok(version >= 90)
    }

    /// Bytes of shared memory of a block that the kernel declares itself.
    pub(super) fn static_shared_memory(self) -> Result<usize, BackendError> {
        let mut bytes = 0;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function's module is loaded; a place for a number.
        let code = unsafe { sys::cuFuncGetAttribute(&raw mut bytes, attribute, self.raw) };
        check("asking for a kernel's shared memory", code)?;
        Ok(usize::try_from(bytes).unwrap_or(0))
    }

    /// Allows it `bytes` of shared memory where that is more than the 48 KiB every kernel may have.
    pub(super) fn allow_shared_memory(self, bytes: u32) -> Result<(), BackendError> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        // SAFETY: the function's module is loaded.
        check("raising a kernel's shared memory", unsafe {
            sys::cuFuncSetAttribute(self.raw, attribute, bytes)
        })
    }
}
