//! Spreads operations that go row by row over the threads.

use std::ops::Range;

use super::buffer::CpuBuffer;
use super::threads::{SharedMut, Threads, part};

/// Elements below which one thread alone is quicker than waking the others: about a microsecond's work.
pub(super) const SMALL: usize = 8192;

/// Calls `task` with ranges that cover `0..rows`, on all threads when `rows` of `width` elements are worth it.
pub(super) fn for_rows(
    threads: &mut Threads,
    rows: usize,
    width: usize,
    task: &(dyn Fn(Range<usize>) + Sync),
) {
    if rows * width < SMALL {
        task(0..rows);
    } else {
        let count = threads.count();
        threads.run(&|index| task(part(rows, index, count)));
    }
}

/// What is done to a row: its index and its elements.
type RowTask<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;
/// What is done to a row of two buffers.
type TwoRowsTask<'a> = dyn Fn(usize, &mut [f32], &mut [f32]) + Sync + 'a;

/// Calls `task` with each row's index and elements.
pub(super) fn for_each_row(threads: &mut Threads, x: &mut CpuBuffer, task: &RowTask<'_>) {
    let (num_rows, width) = (x.rows(), x.width());
    let all = SharedMut::new(x.as_mut_slice());
    for_rows(threads, num_rows, width, &|rows| {
        for row in rows {
            // SAFETY: each row is one thread's.
            task(row, unsafe { all.slice(row * width..(row + 1) * width) });
        }
    });
}

/// Calls `task` with each row's index and its elements in both buffers, which have as many rows.
pub(super) fn for_each_row_of_two(
    threads: &mut Threads,
    (x, y): (&mut CpuBuffer, &mut CpuBuffer),
    task: &TwoRowsTask<'_>,
) {
    assert_eq!(x.rows(), y.rows(), "two buffers of different numbers of rows");
    let width = y.width();
    let all = SharedMut::new(y.as_mut_slice());
    for_each_row(threads, x, &|row, x| {
        // SAFETY: each row is one thread's.
        task(row, x, unsafe { all.slice(row * width..(row + 1) * width) });
    });
}
