//! Operations on each element by itself.

use std::sync::Arc;

use super::CudaBuffer;
use super::driver::Context;
use super::launch::{Launch, Queue, args};
use super::module::{ByType, ByTypes, MIXED_TYPES, Module};
use crate::{Activation, BackendError, DType};

const THREADS: usize = 256;
/// Bytes a thread has.
const VECTOR: usize = 16;

/// Kernels.
pub(super) struct Elementwise {
    map: ByType,
    add: ByTypes,
    gated: ByType,
}

/// What happens to each element, numbered as in `elementwise.cu`.
#[derive(Debug, Clone, Copy)]
enum Map {
    Clamp(f32),
    Scale(f32),
    SoftCap(f32),
    Activate(Activation),
}

/// The number of an activation in `activation.cuh`.
pub(super) const fn activation_number(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
        Activation::Gelu => 2,
        Activation::Relu => 3,
    }
}

/// Enough threads for `count` elements of `size` bytes: one a vector, and one for each element left.
fn grid(count: usize, size: usize) -> [u32; 3] {
    let elements = VECTOR / size;
    [(count / elements + count % elements).div_ceil(THREADS) as u32, 1, 1]
}

impl Elementwise {
    /// Loads them.
    pub(super) fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let module = Module::load(context, "elementwise")?;
        Ok(Self {
            map: module.by_type("map")?,
            add: module.by_types("add", &MIXED_TYPES)?,
            gated: module.by_type("gated_activation")?,
        })
    }

    /// `x += y`.
    pub(super) fn add(&self, queue: &Queue, x: &mut CudaBuffer, y: &CudaBuffer) -> Result<(), BackendError> {
        assert!(x.width() == y.width() && x.rows() == y.rows(), "a sum of different shapes");
        let count = x.rows() * x.width();
        let function = self.add.of(x.dtype(), y.dtype())?;
        let size = x.dtype().size_bytes().max(y.dtype().size_bytes());
        let launch = Launch { function, grid: grid(count, size), block: THREADS as u32, shared_bytes: 0 };
        queue.launch(&launch, args![x.ptr(), y.ptr(), count as i64])
    }

    /// `x = min(max(x, -limit), limit)`.
    pub(super) fn clamp(&self, queue: &Queue, x: &mut CudaBuffer, limit: f32) -> Result<(), BackendError> {
        assert!(limit > 0.0, "a limit of {limit}");
        self.map(queue, x, Map::Clamp(limit))
    }

    /// `x *= factor`.
    pub(super) fn scale(&self, queue: &Queue, x: &mut CudaBuffer, factor: f32) -> Result<(), BackendError> {
        self.map(queue, x, Map::Scale(factor))
    }

    /// `x = cap * tanh(x / cap)`.
    pub(super) fn soft_cap(&self, queue: &Queue, x: &mut CudaBuffer, cap: f32) -> Result<(), BackendError> {
        assert!(cap > 0.0, "a soft cap of {cap}");
        self.map(queue, x, Map::SoftCap(cap))
    }

    /// `x = activation(x)`.
    pub(super) fn activate(
        &self,
        queue: &Queue,
        x: &mut CudaBuffer,
        activation: Activation,
    ) -> Result<(), BackendError> {
        self.map(queue, x, Map::Activate(activation))
    }

    fn map(&self, queue: &Queue, x: &mut CudaBuffer, map: Map) -> Result<(), BackendError> {
        let (number, value, activation) = match map {
            Map::Clamp(limit) => (0, limit, 0),
            Map::Scale(factor) => (1, factor, 0),
            Map::SoftCap(cap) => (2, cap, 0),
            Map::Activate(activation) => (3, 0.0, activation_number(activation)),
        };
        let count = x.rows() * x.width();
        let grid = grid(count, x.dtype().size_bytes());
        let launch =
            Launch { function: self.map.of(x.dtype()), grid, block: THREADS as u32, shared_bytes: 0 };
        queue.launch(&launch, args![x.ptr(), count as i64, number, value, activation])
    }

    /// `out = activation(gate) * up`.
    pub(super) fn gated(
        &self,
        queue: &Queue,
        gate_up: &CudaBuffer,
        activation: Activation,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let width = out.width();
        assert_eq!(gate_up.width(), 2 * width, "gate and up side by side have twice the width of the result");
        check_type("a gated activation", gate_up.dtype(), out.dtype())?;
        out.resize(gate_up.rows());
        let elements = VECTOR / out.dtype().size_bytes();
        let a_row = if width.is_multiple_of(elements) { width / elements } else { width };
        let launch = Launch {
            function: self.gated.of(out.dtype()),
            grid: [(out.rows() * a_row).div_ceil(THREADS) as u32, 1, 1],
            block: THREADS as u32,
            shared_bytes: 0,
        };
        let (rows, width, activation) = (out.rows() as i32, width as i32, activation_number(activation));
        queue.launch(&launch, args![gate_up.ptr(), out.ptr(), rows, width, activation])
    }
}

/// That input and result, or input and weight, have one element type.
pub(super) fn check_type(operation: &str, found: DType, expected: DType) -> Result<(), BackendError> {
    if found == expected {
        return Ok(());
    }
    Err(BackendError::Device {
        operation: operation.to_owned(),
        reason: format!("it has {found} and {expected}, expected one type"),
    })
}
