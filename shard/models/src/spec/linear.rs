//! Linear layers: which tensor, and which part of it.

use std::ops::Range;

/// Where the weight and bias of a linear layer are. Its weight is `[out_features, in_features]`, possibly a part of a larger
/// tensor, possibly stored the other way round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// The tensor, `[total rows, total columns]`, transposed where [`LinearSpec::is_transposed`].
    pub weight: String,
    /// `[total rows]`, where there is one.
    pub bias: Option<String>,
    /// Which outputs of a tensor of several projections these are; none: all of one of its own.
    pub rows: Option<FusedRows>,
    /// Which inputs of a tensor of several projections these are; none: all of one of its own.
    pub columns: Option<FusedColumns>,
    /// The file holds `[in_features, out_features]`.
    pub is_transposed: bool,
}

/// The place of a projection's outputs in a tensor that holds those of several: runs of `run` rows whose starts are
/// `stride` apart. Together the projections of a tensor are all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedRows {
    /// Its first row.
    pub first: usize,
    /// Consecutive rows.
    pub run: usize,
    /// From the start of a run to the start of the next.
    pub stride: usize,
    /// Rows of the tensor.
    pub total: usize,
}

/// The place of a projection's inputs in a tensor that holds those of several, side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusedColumns {
    /// Its first column.
    pub first: usize,
    /// Columns of the tensor.
    pub total: usize,
}

impl LinearSpec {
    /// `PREFIX.weight`, and `PREFIX.bias` when `has_bias`.
    pub fn new(prefix: &str, has_bias: bool) -> Self {
        Self {
            weight: format!("{prefix}.weight"),
            bias: has_bias.then(|| format!("{prefix}.bias")),
            rows: None,
            columns: None,
            is_transposed: false,
        }
    }

    /// The tensor `name` itself: a table of which rows are looked up.
    pub fn table(name: &str) -> Self {
        Self { weight: name.to_owned(), ..Self::new("", false) }
    }

    /// Stored the other way round, as the convolutions of GPT-2 are.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { is_transposed: true, ..self }
    }

    /// Projections of `sizes` outputs that are one tensor, one after the other.
    pub fn fused<const N: usize>(prefix: &str, has_bias: bool, sizes: [usize; N]) -> [Self; N] {
        Self::interleaved(prefix, has_bias, sizes, 1)
    }

    /// Projections that are one tensor of `groups` groups; a group has `sizes` outputs of each, one after the other.
    pub fn interleaved<const N: usize>(
        prefix: &str,
        has_bias: bool,
        sizes: [usize; N],
        groups: usize,
    ) -> [Self; N] {
        let stride = sizes.iter().sum();
        let mut next = 0;
        sizes.map(|run| {
            let first = next;
            next += run;
            let rows = FusedRows { first, run, stride, total: stride * groups };
            Self { rows: Some(rows), ..Self::new(prefix, has_bias) }
        })
    }

    /// Where the outputs `range` are in the tensor: consecutive rows each, in order.
    pub(crate) fn row_runs(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let Some(FusedRows { first, run, stride, .. }) = self.rows else { return vec![range] };
        let mut runs = Vec::new();
        let mut next = range.start;
        while next < range.end {
            let (index, within) = (next / run, next % run);
            let len = (run - within).min(range.end - next);
            let start = first + index * stride + within;
            runs.push(start..start + len);
            next += len;
        }
        runs
    }

    /// Where the inputs `range` are in the tensor.
    pub(crate) fn column_range(&self, range: Range<usize>) -> Range<usize> {
        let first = self.columns.map_or(0, |columns| columns.first);
        first + range.start..first + range.end
    }

    /// Shape of the tensor that a projection of `out_features` x `in_features` is in.
    pub(crate) fn tensor_shape(&self, out_features: usize, in_features: usize) -> [usize; 2] {
        let rows = self.rows.map_or(out_features, |rows| rows.total);
        let columns = self.columns.map_or(in_features, |columns| columns.total);
        if self.is_transposed { [columns, rows] } else { [rows, columns] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_found_in_fused_tensors() {
        let [q, k, _] = LinearSpec::fused("qkv", false, [8, 4, 4]);
        assert_eq!(q.row_runs(2..6), std::slice::from_ref(&(2..6)));
        assert_eq!(k.row_runs(0..4), std::slice::from_ref(&(8..12)));
        assert_eq!(k.tensor_shape(4, 7), [16, 7]);
    }

    #[test]
    fn outputs_of_interleaved_heads_are_runs() {
        let [q, k, v] = LinearSpec::interleaved("qkv", true, [2, 2, 2], 4);
        assert_eq!(q.row_runs(0..8), [0..2, 6..8, 12..14, 18..20]);
        assert_eq!(k.row_runs(3..6), [9..10, 14..16]);
        assert_eq!(v.row_runs(0..0), Vec::<Range<usize>>::new());
        assert_eq!(v.transposed().tensor_shape(8, 5), [5, 24]);
    }
}
