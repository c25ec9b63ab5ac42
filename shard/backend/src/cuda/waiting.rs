//! Launches that wait for the next operation, because both may be one kernel.
//!
//! With one or two rows a norm is all launch, and so is adding a product to the residual stream. A product therefore waits whether its
//! result is added and normalised next, and a norm whether a product reads it. Whatever else is launched, copied or waited for sets
//! off what waits first, so that nobody sees another order.

use super::driver::DevicePtr;
use super::gemv;
use super::launch::{Launch, Queue, args};
use crate::BackendError;

/// Most rows of what waits: with more, every block of a product would normalise too much.
pub(super) const MOST_ROWS: usize = 2;
/// Longest row that a product normalises.
pub(super) const MOST_WIDTH: usize = 8192;

/// `out = rms_norm(stream)` of float32 rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct WaitingNorm {
    pub(super) launch: Launch,
    pub(super) stream: DevicePtr,
    pub(super) weight: DevicePtr,
    pub(super) eps: f32,
    pub(super) out: DevicePtr,
    pub(super) width: i32,
}

/// `out = x weight^T (+ bias)` of the activations' type.
#[derive(Debug, Clone, Copy)]
pub(super) struct WaitingProduct {
    pub(super) launch: Launch,
    pub(super) parameters: gemv::Parameters,
}

/// What waits.
#[derive(Debug, Clone, Copy)]
pub(super) enum Waiting {
    /// For a product that reads it.
    Norm(WaitingNorm),
    /// To be added to the residual stream.
    Product(WaitingProduct),
}

impl Waiting {
    /// Launches it by itself.
    pub(super) fn launch(&self, queue: &Queue) -> Result<(), BackendError> {
        match self {
            Waiting::Norm(norm) => {
                queue.launch(&norm.launch, args![norm.stream, norm.weight, norm.eps, norm.out, norm.width])
            }
            Waiting::Product(product) => product.launch(queue),
        }
    }
}

impl WaitingProduct {
    /// Launches it.
    pub(super) fn launch(&self, queue: &Queue) -> Result<(), BackendError> {
        queue.launch(&self.launch, args![self.parameters])
    }
}

/// Whether rows of that many elements may wait.
pub(super) fn may_wait(rows: usize, width: usize) -> bool {
    std::env::var("QX_NOWAIT").is_err() && rows <= MOST_ROWS && width <= MOST_WIDTH && width.is_multiple_of(8)
}
