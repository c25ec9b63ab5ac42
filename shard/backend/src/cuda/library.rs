//! Products by NVIDIA's library, with what it cannot do by itself: activations of another type than the weight's, biases that
//! its type does not hold, and sums that do not depend on the number of rows.

use std::cell::RefCell;
use std::sync::Arc;

use super::cublaslt::{CublasLt, Operands, Product, WORKSPACE_BYTES};
use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::{Launch, Queue, args};
use super::module::{ByTypes, MIXED_TYPES, Module};
use super::{CudaBuffer, CudaLinear, CudaOptions, CudaVector};
use crate::{BackendError, DType};

const THREADS: usize = 256;
/// Most blocks of a conversion.
const MOST_BLOCKS: usize = 4096;
/// Rows of every product of batch-invariant arithmetic: with one shape there is one algorithm, which adds up a row in one
/// order. Few enough that weights are still what takes the time, so that a decode step costs little more.
pub(super) const PIECE: usize = 128;

/// What the library takes addresses to be multiples of.
const ALIGNMENT: usize = 256;

/// From the type of activations to the weight's, from float32 sums to results, and plain copies.
const CONVERSIONS: [(DType, DType); 7] = MIXED_TYPES;

/// The library and what is beside it.
pub(super) struct Library {
    blaslt: CublasLt,
    convert: ByTypes,
    /// Whether a row's result must not depend on how many there are.
    is_deterministic: bool,
    /// Then: a piece of activations and one of results. Grows while weights are made; its address is then fixed.
    pieces: RefCell<Option<DeviceMemory>>,
}

/// Rows of a matrix that are computed together: where they are, and how they get there.
struct Part {
    x: DevicePtr,
    out: DevicePtr,
    rows: usize,
}

impl Library {
    /// Opens it.
    pub(super) fn load(module: &Module, options: &CudaOptions) -> Result<Self, BackendError> {
        let is_deterministic = options.is_deterministic;
        Ok(Self {
            blaslt: CublasLt::open()?,
            convert: module.by_types("convert", &CONVERSIONS)?,
            is_deterministic,
            pieces: RefCell::new(None),
        })
    }

    /// NVIDIA's library by itself.
    pub(super) fn blaslt(&mut self) -> &mut CublasLt {
        &mut self.blaslt
    }

    /// Whether a row's result must not depend on how many there are: as in [`Library::multiply`].
    pub(super) fn is_deterministic(&self) -> bool {
        self.is_deterministic
    }

    /// Makes room for pieces of products with `weight`; true: recorded addresses have changed.
    pub(super) fn prepare(&self, context: &Arc<Context>, weight: &CudaLinear) -> Result<bool, BackendError> {
        let elements = weight.in_features.next_multiple_of(4) + weight.out_features;
        let bytes = PIECE * elements * size_of::<f32>();
        let mut pieces = self.pieces.borrow_mut();
        if !self.is_deterministic || pieces.as_ref().is_some_and(|memory| memory.bytes() >= bytes) {
            return Ok(false);
        }
        *pieces = None;
        *pieces = Some(DeviceMemory::zeroed(context, bytes, "pieces of products")?);
        Ok(true)
    }

    /// `out = x weight^T (+ bias)`, rounded once.
    pub(super) fn multiply(
        &mut self,
        queue: &Queue,
        workspace: &DeviceMemory,
        x: &CudaBuffer,
        (weight, bias): (&CudaLinear, Option<&CudaVector>),
        out: &CudaBuffer,
    ) -> Result<(), BackendError> {
        // The library adds a bias of the result's type. One of more bits is added in float32.
        let exact = bias.map_or(Some(0), |bias| bias.exactly_as(out.dtype()));
        let out_dtype = if exact.is_some() { out.dtype() } else { DType::F32 };
        let product = Product {
            rows: if self.is_deterministic { PIECE } else { x.rows() },
            outputs: weight.out_features,
            inputs: weight.in_features,
            weight_stride: weight.row_stride,
            dtype: weight.dtype,
            out_dtype,
            out_stride: weight.out_features,
            is_fp8: false,
            has_bias: bias.is_some(),
        };
        let bias = exact.unwrap_or(bias.map_or(0, CudaVector::ptr));
        let (is_converted, is_rounded) = (x.dtype() != weight.dtype, out_dtype != out.dtype());
        let x_bytes = product.inputs.next_multiple_of(4) * size_of::<f32>();
        let (room, rows_at_once) = if self.is_deterministic {
            (self.pieces.borrow().as_ref().map_or(0, DeviceMemory::ptr), PIECE)
        } else if is_converted || is_rounded {
            let row_bytes = usize::from(is_converted) * x_bytes
                + usize::from(is_rounded) * product.outputs * size_of::<f32>();
            let room = workspace.ptr() + WORKSPACE_BYTES as DevicePtr;
            (room, ((workspace.bytes() - WORKSPACE_BYTES - ALIGNMENT) / row_bytes).max(1))
        } else {
            (0, x.rows())
        };
        let x_room = usize::from(is_converted || self.is_deterministic) * rows_at_once * x_bytes;
        let room_for_results = room + x_room.next_multiple_of(ALIGNMENT) as DevicePtr;
        for first in (0..x.rows()).step_by(rows_at_once) {
            let part = Part {
                x: x.ptr() + (first * product.inputs * x.dtype().size_bytes()) as DevicePtr,
                out: out.ptr() + (first * product.outputs * out.dtype().size_bytes()) as DevicePtr,
                rows: rows_at_once.min(x.rows() - first),
            };
            // The rows of a piece that are not there lie in its room, where nothing is read of what they give.
            let is_short = self.is_deterministic && part.rows < PIECE;
            let mut from = part.x;
            if is_converted || is_short {
                from = room;
                let types = (x.dtype(), weight.dtype);
                self.convert(queue, types, (part.x, from), part.rows * product.inputs)?;
            }
            let to = if is_rounded || is_short { room_for_results } else { part.out };
            let rows = if self.is_deterministic { PIECE } else { part.rows };
            let operands = Operands { x: from, weight: weight.ptr(), bias, out: to, scales: [0; 2] };
            self.blaslt.multiply(queue.stream(), workspace.ptr(), Product { rows, ..product }, operands)?;
            if to != part.out {
                let types = (out_dtype, out.dtype());
                self.convert(queue, types, (to, part.out), part.rows * product.outputs)?;
            }
        }
        Ok(())
    }

    /// `count` elements in another type, or as they are.
    fn convert(
        &self,
        queue: &Queue,
        (from_type, to_type): (DType, DType),
        (from, to): (DevicePtr, DevicePtr),
        count: usize,
    ) -> Result<(), BackendError> {
        let launch = Launch {
            function: self.convert.of(from_type, to_type)?,
            grid: [count.div_ceil(THREADS).min(MOST_BLOCKS) as u32, 1, 1],
            block: THREADS as u32,
            shared_bytes: 0,
        };
        queue.launch(&launch, args![from, to, count as i64])
    }
}
