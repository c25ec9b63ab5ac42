//! Weights on their way to the device.
//!
//! Files are mapped, and copying from mapped memory straight to the device reaches a tenth of the bus. So several threads copy
//! (and convert) pieces into page-locked buffers while the copy engine empties the others.

use std::cell::RefCell;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::driver::{Context, DevicePtr, PinnedMemory, Stream, check};
use crate::{BackendError, DType, HostMatrix};

/// Bytes of one buffer; a few of them keep the bus busy.
const PIECE: usize = 32 << 20;
const NUM_PIECES: usize = 3;

/// Longer than any copy of a buffer takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A buffer and the event that says that it may be written again.
struct Piece {
    memory: PinnedMemory,
    emptied: sys::CUevent,
}

// SAFETY: an event handle may be used from any thread.
unsafe impl Send for Piece {}

/// Copies matrices to the device, made for the time of loading.
pub(super) struct Uploader {
    stream: Stream,
    threads: usize,
    state: RefCell<State>,
}

struct State {
    pieces: Vec<Piece>,
    next: usize,
}

impl Uploader {
    /// Buffers and a stream of their own; `threads` fill a buffer together.
    pub(super) fn new(context: &Arc<Context>, threads: usize) -> Result<Self, BackendError> {
        Ok(Self {
            stream: Stream::new(context)?,
            threads: threads.max(1),
            state: RefCell::new(State { pieces: Vec::new(), next: 0 }),
        })
    }

    /// Writes `matrix` as `dtype` to `to`, `[rows, row_bytes]` with `row_bytes` from one row to the next. The bytes between the
    /// end of a row and the next are undefined. Done when [`Uploader::finish`] returns.
    pub(super) fn matrix(
        &self,
        matrix: &HostMatrix<'_>,
        dtype: DType,
        (to, row_bytes): (DevicePtr, usize),
    ) -> Result<(), BackendError> {
        self.rows(0..matrix.rows, &|row, out| convert_row(matrix, row, dtype, out), (to, row_bytes))
    }

    /// Writes what `fill` makes of each of `rows` to `to` and on, a row every `row_bytes`. Done when [`Uploader::finish`] returns.
    pub(super) fn rows(
        &self,
        rows: Range<usize>,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
        (to, row_bytes): (DevicePtr, usize),
    ) -> Result<(), BackendError> {
        let rows_a_piece = (PIECE / row_bytes.max(1)).max(1);
        for first in rows.clone().step_by(rows_a_piece) {
            let count = rows_a_piece.min(rows.end - first);
            let to = to + ((first - rows.start) * row_bytes) as DevicePtr;
            self.piece(to, count * row_bytes, &|index, out| fill(first + index, out), row_bytes)?;
        }
        Ok(())
    }

    /// The stream of the copies, for kernels that work on what has arrived.
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Writes bytes as they are.
    pub(super) fn bytes(&self, bytes: &[u8], to: DevicePtr) -> Result<(), BackendError> {
        for (index, part) in bytes.chunks(PIECE).enumerate() {
            let to = to + (index * PIECE) as DevicePtr;
            self.piece(to, part.len(), &|_, out| out.copy_from_slice(part), part.len())?;
        }
        Ok(())
    }

    /// Fills a buffer row by row on all threads and sends it off.
    fn piece(
        &self,
        to: DevicePtr,
        bytes: usize,
        fill: &(dyn Fn(usize, &mut [u8]) + Sync),
        row_bytes: usize,
    ) -> Result<(), BackendError> {
        let mut state = self.state.borrow_mut();
        let piece = state.next_piece(self.stream.context(), bytes)?;
        let target = &mut piece.memory.as_mut_slice()[..bytes];
        fill_rows(target, row_bytes, self.threads, fill);
        self.stream.upload(to, target)?;
        // SAFETY: event and stream are alive.
        check("recording an event", unsafe { sys::cuEventRecord(piece.emptied, self.stream.raw()) })
    }

    /// Waits until everything is on the device.
    pub(super) fn finish(&self) -> Result<(), BackendError> {
        self.stream.synchronize(PATIENCE)
    }
}

impl State {
    /// The buffer that has been waiting longest, empty, with room for `bytes`.
    fn next_piece(&mut self, context: &Arc<Context>, bytes: usize) -> Result<&mut Piece, BackendError> {
        if self.pieces.len() < NUM_PIECES {
            let memory = PinnedMemory::new(context, PIECE.max(bytes), "loading weights")?;
            let mut emptied = ptr::null_mut();
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            // SAFETY: a place for a handle.
            check("making an event", unsafe { sys::cuEventCreate(&raw mut emptied, flags) })?;
            self.pieces.push(Piece { memory, emptied });
            let last = self.pieces.len() - 1;
            return Ok(&mut self.pieces[last]);
        }
        let piece = &mut self.pieces[self.next];
        self.next = (self.next + 1) % NUM_PIECES;
        // SAFETY: the event is alive.
        check("waiting for a copy", unsafe { sys::cuEventSynchronize(piece.emptied) })?;
        if piece.memory.as_slice().len() < bytes {
            piece.memory = PinnedMemory::new(context, bytes, "loading weights")?;
        }
        Ok(piece)
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: made by `next_piece`.
        let _ = unsafe { sys::cuEventDestroy_v2(self.emptied) };
    }
}

/// Calls `fill` for each row of `target`, the rows split over `threads`.
fn fill_rows(target: &mut [u8], row_bytes: usize, threads: usize, fill: &(dyn Fn(usize, &mut [u8]) + Sync)) {
    let rows = target.len() / row_bytes.max(1);
    // Below a megabyte a thread costs more than it saves.
    let threads = threads.min(target.len() >> 20).clamp(1, rows.max(1));
    let rows_a_thread = rows.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (index, part) in target.chunks_mut(rows_a_thread * row_bytes).enumerate() {
            let mut run = move || {
                for (row, out) in part.chunks_mut(row_bytes).enumerate() {
                    fill(index * rows_a_thread + row, out);
                }
            };
            if threads == 1 { run() } else { drop(scope.spawn(run)) }
        }
    });
}

/// One row as `dtype`; what is past its end stays as it is.
pub(super) fn convert_row(matrix: &HostMatrix<'_>, row: usize, dtype: DType, out: &mut [u8]) {
    let size = matrix.dtype.size_bytes();
    if matrix.dtype == dtype {
        let start = row * matrix.row_stride * size;
        let bytes = matrix.cols * size;
        out[..bytes].copy_from_slice(&matrix.bytes[start..start + bytes]);
        return;
    }
    let mut values = vec![0.0; matrix.cols];
    matrix.read_row(row, &mut values);
    write_row(&values, dtype, out);
}

/// Values as `dtype`, little-endian.
pub(super) fn write_row(values: &[f32], dtype: DType, out: &mut [u8]) {
    match dtype {
        DType::F32 => {
            for (raw, value) in out.chunks_exact_mut(4).zip(values) {
                raw.copy_from_slice(&value.to_le_bytes());
            }
        }
        DType::BF16 => {
            for (raw, &value) in out.chunks_exact_mut(2).zip(values) {
                raw.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
            }
        }
        DType::F16 => {
            for (raw, &value) in out.chunks_exact_mut(2).zip(values) {
                raw.copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
            }
        }
    }
}
