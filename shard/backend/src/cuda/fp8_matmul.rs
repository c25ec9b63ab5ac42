//! Matrix products with weights of eight bits.
//!
//! Few rows of activations keep their type: weights are widened exactly on their way to the multiplication. Many rows are rounded
//! to eight bits themselves, each with a scale of its own, for tensor cores that multiply eight bits (Hopper, by the library).
//! Whatever neither takes is multiplied with weights that are dequantized in between, some rows at a time.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::cublaslt::{CublasLt, Operands, Product, WORKSPACE_BYTES};
use super::driver::{Context, DeviceMemory, DevicePtr};
use super::fp8_hopper::{Fp8Hopper, Shape};
use super::fp8_linear::Rounding;
use super::fp8_skinny::Fp8Skinny;
use super::launch::{Argument, Launch, Queue, args};
use super::linear::NextWeight;
use super::matmul::{Task, out_type, task};
use super::module::{ByTypes, Function, Module};
use super::{CudaBuffer, CudaLinear, CudaVector, DeviceFacts};
use crate::{BackendError, DType};

const THREADS: u32 = 256;
/// Numbers that are read as one, and what the library wants sizes to be multiples of.
const PIECE: usize = 16;
/// Most rows of the kernel with a warp an output, and most for which it is taken.
const GEMV_MAX: usize = 4;
const GEMV_ROWS: usize = 1;
/// Outputs of a block of it.
const GEMV_OUTPUTS: usize = 8;
/// Shared memory that every GPU with bf16 products grants a block.
const MAX_SHARED_BYTES: usize = 96 << 10;
/// The same of its gated form.
const GATED_GEMV_ROWS: usize = 1;
/// Most rows for which every warp reads activations by itself, and the same of the gated form.
const FEW_ROWS: usize = 16;
const GATED_FEW_ROWS: usize = 16;
/// Most rows for which weights are streamed through shared memory where the library does not multiply eight bits.
const SKINNY_ROWS: usize = 64;
/// The same on Hopper, whose tensor cores multiply them; more rows are the library's.
const HOPPER_ROWS: usize = 32;
const WARPS: usize = 8;
/// What the library takes addresses to be multiples of.
const ALIGNMENT: usize = 256;
/// Rows of activations are rounded and multiplied in parts of multiples of this.
const PART_ROWS: usize = 128;

/// A way to compute a product with weights of eight bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8Kernel {
    /// A warp an output, for up to four rows of activations.
    Gemv,
    /// Weights widened into the operands of tensor cores, for up to 16 rows of activations.
    FewRows {
        /// Rows that an instantiation is made for.
        tokens: usize,
        /// Times 16 rows of weights a block.
        tiles: usize,
    },
    /// Weights streamed through shared memory in tiles of 128 rows, for up to 64 rows of activations.
    Skinny,
    /// Activations rounded to eight bits on their way to Hopper's tensor cores, for up to 32 rows of them.
    Hopper {
        /// Rows that an instantiation is made for.
        tokens: usize,
        /// Times 128 rows of weights a block.
        boxes: usize,
        /// Blocks that share a tile.
        cluster: usize,
    },
    /// Activations rounded to eight bits, then cuBLASLt.
    Library,
    /// Weights dequantized, then cuBLASLt.
    Dequantized,
}

/// `Fp8Gemv` of fp8_gemv.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct GemvParameters {
    weight: DevicePtr,
    scales: DevicePtr,
    x: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    inputs: i32,
    pitch: i32,
    outputs: i32,
}

/// `Fp8FewRows` of fp8_few_rows.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct FewRowsParameters {
    weight: DevicePtr,
    scales: DevicePtr,
    x: DevicePtr,
    bias: DevicePtr,
    out: DevicePtr,
    inputs: i32,
    pitch: i32,
    outputs: i32,
    rows: i32,
    out_type: i32,
    activation: i32,
}

impl Argument for GemvParameters {}
impl Argument for FewRowsParameters {}

/// Rows that the library multiplies.
#[derive(Clone, Copy)]
struct Part {
    x: DevicePtr,
    x_dtype: DType,
    rows: usize,
    out: DevicePtr,
    out_dtype: DType,
    /// Bytes behind the library's workspace that may be used.
    room: usize,
    /// Of rows that are rounded already.
    scales: Option<DevicePtr>,
}

/// A kernel for bf16 and for f16.
type Both = [Function; 2];

/// Kernels of one number of rows.
struct Gemv {
    to_same: Both,
    to_f32: Both,
    gated: Both,
}

struct FewRows {
    tokens: usize,
    tiles: usize,
    plain: Both,
    gated: Both,
}

/// Most rows and tiles of the instantiations, those first that are taken.
const SHAPES: [(usize, usize); 4] = [(8, 1), (8, 2), (16, 1), (16, 2)];

/// Kernels.
pub(super) struct Fp8Matmuls {
    gemvs: Vec<Gemv>,
    few_rows: Vec<FewRows>,
    skinny: Fp8Skinny,
    hopper: Option<Fp8Hopper>,
    pub(super) rounding: Rounding,
    convert: ByTypes,
    /// Whether the library multiplies eight bits with a scale a row.
    has_library: bool,
}

impl Fp8Matmuls {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>, facts: DeviceFacts) -> Result<Self, BackendError> {
        let gemv = Module::load(context, "fp8_gemv")?;
        let few_rows = Module::load(context, "fp8_few_rows")?;
        let both = |module: &Module, name: String, suffix: [&str; 2]| {
            let functions = [
                module.function(&format!("{name}_bf16{}", suffix[0]))?,
                module.function(&format!("{name}_f16{}", suffix[1]))?,
            ];
            for function in functions {
                function.allow_shared_memory(MAX_SHARED_BYTES as u32)?;
            }
            Ok::<_, BackendError>(functions)
        };
        let gemvs = (1..=GEMV_MAX).map(|rows| {
            Ok(Gemv {
                to_same: both(&gemv, format!("fp8_gemv_{rows}"), ["_bf16", "_f16"])?,
                to_f32: both(&gemv, format!("fp8_gemv_{rows}"), ["_f32"; 2])?,
                gated: both(&gemv, format!("fp8_gemv_gated_{rows}"), [""; 2])?,
            })
        });
        let few_rows = SHAPES.into_iter().map(|(tokens, tiles)| {
            Ok(FewRows {
                tokens,
                tiles,
                plain: both(&few_rows, format!("fp8_few_rows_{tokens}_{tiles}"), [""; 2])?,
                gated: both(&few_rows, format!("fp8_few_rows_gated_{tokens}_{tiles}"), [""; 2])?,
            })
        });
        let matmul = Module::load(context, "matmul")?;
        let most_shared =
            context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Self {
            gemvs: gemvs.collect::<Result<_, BackendError>>()?,
            few_rows: few_rows.collect::<Result<_, BackendError>>()?,
            skinny: Fp8Skinny::load(context, facts, usize::try_from(most_shared).unwrap_or(0))?,
            hopper: Fp8Hopper::load(context, facts)?,
            rounding: Rounding::load(context)?,
            convert: matmul.by_types("convert", &[(DType::F32, DType::BF16), (DType::F32, DType::F16)])?,
            has_library: facts.capability == (9, 0),
        })
    }

    /// Whether the library multiplies eight bits with a scale a row.
    pub(super) fn has_library(&self) -> bool {
        self.has_library
    }

    /// The kernel for a product, by what whole steps took.
    pub(super) fn choose(&self, task: Task<'_>, x: DType, workspace: &DeviceMemory) -> Fp8Kernel {
        let kernels = self.kernels(task, x, workspace);
        let is_taken = |kernel: &Fp8Kernel| match kernel {
            Fp8Kernel::Gemv => task.rows <= GEMV_ROWS,
            Fp8Kernel::FewRows { .. } => task.rows <= FEW_ROWS,
            // Alone it is quicker than the library up to 32 rows, between attention and norms it was slower.
            Fp8Kernel::Skinny => !self.has_library && task.rows <= SKINNY_ROWS,
            Fp8Kernel::Hopper { .. } => true,
            Fp8Kernel::Library | Fp8Kernel::Dequantized => true,
        };
        kernels.into_iter().find(is_taken).unwrap_or(Fp8Kernel::Dequantized)
    }

    /// Whether as many rows of `dtype` are rounded to eight bits before they are multiplied with this weight.
    pub(super) fn rounds(&self, rows: usize, next: &NextWeight, dtype: DType) -> bool {
        self.has_library
            && next.is_fp8
            && next.dtype == dtype
            && rows > HOPPER_ROWS
            && [next.in_features, next.out_features].iter().all(|size| size.is_multiple_of(PIECE))
    }

    /// All that can compute it.
    pub(super) fn kernels(&self, task: Task<'_>, x: DType, workspace: &DeviceMemory) -> Vec<Fp8Kernel> {
        let (weight, rows) = (task.weight, task.rows);
        let mut kernels = Vec::new();
        if takes_activations(task, x) {
            if (1..=GEMV_MAX).contains(&rows) && shared_bytes(task) <= MAX_SHARED_BYTES {
                kernels.push(Fp8Kernel::Gemv);
            }
            let fitting = self.few_rows.iter().filter(|shape| fits(shape, rows));
            kernels
                .extend(fitting.map(|&FewRows { tokens, tiles, .. }| Fp8Kernel::FewRows { tokens, tiles }));
            if self.skinny.accepts(task, workspace) {
                kernels.push(Fp8Kernel::Skinny);
            }
            if self.hopper.is_some() {
                let shapes = Fp8Hopper::shapes(rows, weight.out_features).into_iter();
                kernels.extend(shapes.map(|Shape { tokens, boxes, cluster, .. }| Fp8Kernel::Hopper {
                    tokens,
                    boxes,
                    cluster,
                }));
            }
        }
        let sizes = [weight.in_features, weight.out_features];
        if self.has_library && sizes.iter().all(|size| size.is_multiple_of(PIECE)) {
            kernels.push(Fp8Kernel::Library);
        }
        kernels.push(Fp8Kernel::Dequantized);
        kernels
    }

    /// `out = x weight^T (+ bias)`, rounded once.
    pub(super) fn multiply(
        &self,
        (queue, workspace, library): (&Queue, &DeviceMemory, &mut CublasLt),
        kernel: Fp8Kernel,
        (x, weight, bias): (&CudaBuffer, &CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) -> Result<(), BackendError> {
        match kernel {
            Fp8Kernel::Gemv => {
                let kernels = &self.gemvs[x.rows() - 1];
                let functions = if out.dtype() == DType::F32 { kernels.to_f32 } else { kernels.to_same };
                let parameters = gemv_parameters(x, (weight, bias), out, weight.out_features);
                let launch = gemv_launch(of_type(functions, weight), x, weight.out_features);
                queue.launch(&launch, args![parameters])
            }
            Fp8Kernel::FewRows { tokens, tiles } => {
                let shape = self.few_rows.iter().find(|shape| (shape.tokens, shape.tiles) == (tokens, tiles));
                let Some(shape) = shape else { return Ok(()) };
                let outputs = weight.out_features;
                let parameters = few_rows_parameters(x, (weight, bias), out, (outputs, 0));
                let launch = few_rows_launch(of_type(shape.plain, weight), shape, outputs);
                queue.launch(&launch, args![parameters])
            }
            Fp8Kernel::Skinny => {
                self.skinny.multiply(queue, workspace, task(x, (weight, bias), out), None).map(|_| ())
            }
            Fp8Kernel::Hopper { tokens, boxes, cluster } => {
                let task = task(x, (weight, bias), out);
                let mut shapes = Fp8Hopper::shapes(task.rows, weight.out_features).into_iter();
                let is_meant =
                    |shape: &Shape| (shape.tokens, shape.boxes, shape.cluster) == (tokens, boxes, cluster);
                match (&self.hopper, shapes.find(is_meant)) {
                    (Some(hopper), Some(shape)) => hopper.multiply(queue, shape, task),
                    _ => Ok(()),
                }
            }
            Fp8Kernel::Library | Fp8Kernel::Dequantized => {
                let is_rounded = kernel == Fp8Kernel::Library;
                let tools = (queue, workspace, library);
                self.multiply_by_library(tools, is_rounded, (x, weight, bias), out)
            }
        }
    }

    /// `out = activation(gate) * up` of the product's halves; false: this product is for others.
    pub(super) fn multiply_gated(
        &self,
        (queue, workspace): (&Queue, &DeviceMemory),
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        activation: i32,
        out: &CudaBuffer,
    ) -> Result<bool, BackendError> {
        let task = task(x, (weight, bias), out);
        if !takes_activations(task, x.dtype()) || out.dtype() != x.dtype() {
            return Ok(false);
        }
        let outputs = weight.out_features / 2;
        if (1..=GATED_GEMV_ROWS).contains(&x.rows()) && shared_bytes(task) <= MAX_SHARED_BYTES {
            let parameters = gemv_parameters(x, (weight, bias), out, outputs);
            let launch = gemv_launch(of_type(self.gemvs[x.rows() - 1].gated, weight), x, outputs);
            queue.launch(&launch, args![parameters, activation])?;
            return Ok(true);
        }
        let shape = self.few_rows.iter().find(|shape| fits(shape, x.rows()));
        if let Some(shape) = shape.filter(|_| x.rows() <= GATED_FEW_ROWS) {
            let parameters = few_rows_parameters(x, (weight, bias), out, (outputs, activation));
            let launch = few_rows_launch(of_type(shape.gated, weight), shape, outputs);
            queue.launch(&launch, args![parameters])?;
            return Ok(true);
        }
        if let Some(hopper) = &self.hopper {
            return hopper.multiply_gated(queue, task, activation);
        }
        if self.has_library || x.rows() > SKINNY_ROWS {
            return Ok(false);
        }
        self.skinny.multiply(queue, workspace, task, Some(activation))
    }

    /// By NVIDIA's library: a bias is added to sums of float32, so that results are rounded once.
    fn multiply_by_library(
        &self,
        (queue, workspace, library): (&Queue, &DeviceMemory, &mut CublasLt),
        is_rounded: bool,
        (x, weight, bias): (&CudaBuffer, &CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) -> Result<(), BackendError> {
        let (width, outputs) = (x.width(), weight.out_features);
        let room = workspace.bytes() - WORKSPACE_BYTES;
        let has_sums = bias.is_some() && out.dtype() != DType::F32;
        let room = if has_sums { room / 2 / ALIGNMENT * ALIGNMENT } else { room };
        let rows_at_once = match has_sums {
            true => part_rows(x.rows(), (room / (outputs * size_of::<f32>())).max(1)),
            false => x.rows().max(1),
        };
        for first in (0..x.rows()).step_by(rows_at_once) {
            let rows = rows_at_once.min(x.rows() - first);
            let to = out.ptr() + (first * outputs * out.dtype().size_bytes()) as DevicePtr;
            let sums = if has_sums { workspace.ptr() + (WORKSPACE_BYTES + room) as DevicePtr } else { to };
            let size = if x.rounded().is_some() { 1 } else { x.dtype().size_bytes() };
            let scales = x.rounded().map(|(_, scales)| scales + (first * size_of::<f32>()) as DevicePtr);
            let part = Part {
                x: x.ptr() + (first * width * size) as DevicePtr,
                scales,
                x_dtype: x.dtype(),
                rows,
                out: sums,
                out_dtype: if has_sums { DType::F32 } else { out.dtype() },
                room,
            };
            if is_rounded {
                self.multiply_rounded(queue, workspace, library, weight, part)?;
            } else {
                self.multiply_dequantized(queue, workspace, library, weight, part)?;
            }
            if let Some(bias) = bias {
                self.rounding.add_bias(queue, (sums, bias.ptr()), [rows, outputs], (to, out.dtype()))?;
            }
        }
        Ok(())
    }

    /// Rounds the activations, as many rows at a time as the workspace has room for, and multiplies eight bits.
    fn multiply_rounded(
        &self,
        queue: &Queue,
        workspace: &DeviceMemory,
        library: &mut CublasLt,
        weight: &CudaLinear,
        part: Part,
    ) -> Result<(), BackendError> {
        let Part { x, x_dtype, rows: all, out, out_dtype, room, scales } = part;
        let (width, outputs) = (weight.in_features, weight.out_features);
        let product = |rows: usize| Product {
            rows,
            outputs,
            inputs: width,
            weight_stride: weight.row_stride,
            dtype: weight.dtype,
            out_dtype,
            out_stride: outputs,
            is_fp8: true,
            has_bias: false,
        };
        let of_weight = weight.scales().unwrap_or_default();
        if let Some(scales) = scales {
            let operands = Operands { x, weight: weight.ptr(), bias: 0, out, scales: [of_weight, scales] };
            return library.multiply(queue.stream(), workspace.ptr(), product(all), operands);
        }
        let most = (room / (width + size_of::<f32>())).max(1);
        let at_once = part_rows(all, most);
        let rounded = workspace.ptr() + WORKSPACE_BYTES as DevicePtr;
        let scales = rounded + (at_once * width).next_multiple_of(PIECE) as DevicePtr;
        for first in (0..all).step_by(at_once) {
            let rows = at_once.min(all - first);
            let from = x + (first * width * x_dtype.size_bytes()) as DevicePtr;
            self.rounding.quantize(queue, (from, x_dtype), [rows, width], (rounded, scales))?;
            let to = out + (first * outputs * out_dtype.size_bytes()) as DevicePtr;
            let operands =
                Operands { x: rounded, weight: weight.ptr(), bias: 0, out: to, scales: [of_weight, scales] };
            library.multiply(queue.stream(), workspace.ptr(), product(rows), operands)?;
        }
        Ok(())
    }

    /// Dequantizes some rows of the weight at a time. Activations of another type are converted, some rows at a time.
    fn multiply_dequantized(
        &self,
        queue: &Queue,
        workspace: &DeviceMemory,
        library: &mut CublasLt,
        weight: &CudaLinear,
        part: Part,
    ) -> Result<(), BackendError> {
        let (width, outputs, size) = (weight.in_features, weight.out_features, weight.dtype.size_bytes());
        let Part { x, x_dtype, rows: all, out, out_dtype, room, .. } = part;
        let room = room / 2;
        let plain = workspace.ptr() + WORKSPACE_BYTES as DevicePtr;
        let converted = plain + room as DevicePtr;
        let stride = width.next_multiple_of(PIECE);
        let weights_at_once = part_rows(outputs, (room / (stride * size)).max(1));
        let is_converted = x_dtype != weight.dtype;
        let rows_at_once = if is_converted { part_rows(all, (room / (width * size)).max(1)) } else { all };
        for first_row in (0..all).step_by(rows_at_once) {
            let rows = rows_at_once.min(all - first_row);
            let mut from = x + (first_row * width * x_dtype.size_bytes()) as DevicePtr;
            if is_converted {
                let count = rows * width;
                let function = self.convert.of(x_dtype, weight.dtype)?;
                let blocks = count.div_ceil(THREADS as usize).min(4096) as u32;
                let launch = Launch { function, grid: [blocks, 1, 1], block: THREADS, shared_bytes: 0 };
                let count = count as i64;
                queue.launch(&launch, args![from, converted, count])?;
                from = converted;
            }
            for first in (0..outputs).step_by(weights_at_once) {
                let count = weights_at_once.min(outputs - first);
                self.rounding.dequantize(queue, weight, (first, count), (plain, stride))?;
                let product = Product {
                    rows,
                    outputs: count,
                    inputs: width,
                    weight_stride: stride,
                    dtype: weight.dtype,
                    out_dtype,
                    out_stride: outputs,
                    is_fp8: false,
                    has_bias: false,
                };
                let to = out + ((first_row * outputs + first) * out_dtype.size_bytes()) as DevicePtr;
                let operands = Operands { x: from, weight: plain, bias: 0, out: to, scales: [0; 2] };
                library.multiply(queue.stream(), workspace.ptr(), product, operands)?;
            }
        }
        Ok(())
    }
}

/// Whether weights are widened beside such activations.
fn takes_activations(task: Task<'_>, x: DType) -> bool {
    let weight = task.weight;
    x == weight.dtype
        && weight.dtype != DType::F32
        && weight.in_features.is_multiple_of(PIECE)
        && (task.out_dtype == DType::F32 || task.out_dtype == weight.dtype)
}

/// Shared memory of a block of the kernel with a warp an output.
fn shared_bytes(task: Task<'_>) -> usize {
    task.rows * task.weight.in_features * task.weight.dtype.size_bytes()
}

/// Whether an instantiation is the smallest that is enough.
fn fits(shape: &FewRows, rows: usize) -> bool {
    rows >= 1
        && rows <= shape.tokens
        && SHAPES.iter().all(|&(tokens, _)| tokens >= shape.tokens || tokens < rows)
}

/// Rows of a part when at most `most` are computed at a time: parts of about the same size.
fn part_rows(rows: usize, most: usize) -> usize {
    if rows <= most {
        return rows.max(1);
    }
    let even = rows.div_ceil(rows.div_ceil(most));
    if most < PART_ROWS { even } else { even.next_multiple_of(PART_ROWS).min(most / PART_ROWS * PART_ROWS) }
}

fn of_type(functions: Both, weight: &CudaLinear) -> Function {
    functions[usize::from(weight.dtype == DType::F16)]
}

fn gemv_parameters(
    x: &CudaBuffer,
    (weight, bias): (&CudaLinear, Option<&CudaVector>),
    out: &CudaBuffer,
    outputs: usize,
) -> GemvParameters {
    GemvParameters {
        weight: weight.ptr(),
        scales: weight.scales().unwrap_or_default(),
        x: x.ptr(),
        bias: bias.map_or(0, CudaVector::ptr),
        out: out.ptr(),
        inputs: weight.in_features as i32,
        pitch: weight.row_stride as i32,
        outputs: outputs as i32,
    }
}

fn gemv_launch(function: Function, x: &CudaBuffer, outputs: usize) -> Launch {
    Launch {
        function,
        grid: [outputs.div_ceil(GEMV_OUTPUTS) as u32, 1, 1],
        block: THREADS,
        shared_bytes: (x.rows() * x.width() * x.dtype().size_bytes()) as u32,
    }
}

fn few_rows_parameters(
    x: &CudaBuffer,
    (weight, bias): (&CudaLinear, Option<&CudaVector>),
    out: &CudaBuffer,
    (outputs, activation): (usize, i32),
) -> FewRowsParameters {
    FewRowsParameters {
        weight: weight.ptr(),
        scales: weight.scales().unwrap_or_default(),
        x: x.ptr(),
        bias: bias.map_or(0, CudaVector::ptr),
        out: out.ptr(),
        inputs: weight.in_features as i32,
        pitch: weight.row_stride as i32,
        outputs: outputs as i32,
        rows: x.rows() as i32,
        out_type: out_type(out.dtype()),
        activation,
    }
}

fn few_rows_launch(function: Function, shape: &FewRows, outputs: usize) -> Launch {
    let rows = shape.tiles * 16;
    Launch {
        function,
        grid: [outputs.div_ceil(rows) as u32, 1, 1],
        block: THREADS,
        shared_bytes: (WARPS * shape.tokens * (rows + 4) * size_of::<f32>()) as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even_and_fit() {
        assert_eq!(part_rows(100, 2000), 100);
        assert_eq!(part_rows(8192, 8184), 4096);
        assert_eq!(part_rows(4096, 2339), 2048);
        assert_eq!(part_rows(5000, 2339), 1792);
        assert_eq!(part_rows(300, 100), 100);
        for (rows, most) in [(8192, 2339), (7777, 1000), (129, 128), (1, 1)] {
            let part = part_rows(rows, most);
            assert!((1..=most).contains(&part), "{rows} {most}: {part}");
        }
    }

    #[test]
    fn shared_memory_of_sums_is_granted() {
        for (tokens, tiles) in SHAPES {
            assert!(WARPS * tokens * (tiles * 16 + 4) * 4 <= MAX_SHARED_BYTES);
        }
    }
}
