//! A weight stored as small integers with a scale and an offset for every few of them.

/// A row-major matrix `[rows, cols]` of which each row is cut into groups of `group_size` consecutive elements:
/// `w[r][c] = scales[r][c / group_size] * values[r][c] + offsets[r][c / group_size]`.
///
/// Every block format there is (ggml's, GPTQ's, AWQ's) is this with some `bits` and `group_size`. For a linear layer rows are
/// outputs and columns are inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedMatrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns, a multiple of `group_size`.
    pub cols: usize,
    /// Values are below `2^bits`; at most 8.
    pub bits: u32,
    /// Elements that share a scale and an offset.
    pub group_size: usize,
    /// `[rows, cols]`.
    pub values: Vec<u8>,
    /// `[rows, cols / group_size]`.
    pub scales: Vec<f32>,
    /// `[rows, cols / group_size]`.
    pub offsets: Vec<f32>,
}

impl QuantizedMatrix {
    /// Copies row `row` as f32 into `out` (`[cols]`).
    ///
    /// # Panics
    /// When `row` or `out.len()` does not fit the matrix.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} x {}", self.rows, self.cols);
        let groups = self.cols / self.group_size;
        let values = &self.values[row * self.cols..(row + 1) * self.cols];
        for (group, (out, values)) in
            out.chunks_mut(self.group_size).zip(values.chunks(self.group_size)).enumerate()
        {
            let (scale, offset) = (self.scales[row * groups + group], self.offsets[row * groups + group]);
            for (out, &value) in out.iter_mut().zip(values) {
                *out = scale * f32::from(value) + offset;
            }
        }
    }
}
