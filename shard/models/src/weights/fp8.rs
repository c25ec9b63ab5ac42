//! Checkpoints with weights of eight bits (E4M3) and scales beside them.
//!
//! A matrix `P.weight` has `P.weight_scale`, one number, one a row, or one a block, or `P.weight_scale_inv`, one a block: all of
//! them are multiplied in. Scales of activations (`P.input_scale`) are not needed: activations are rounded with scales of their
//! own where they are rounded at all. Tensors of other types stay as they are.

use std::collections::HashMap;
use std::ops::Range;

use backend::{DType, Fp8Matrix, HostMatrix, QuantizedMatrix};

use super::cache_scales::is_cache_scale;
use super::{TensorMeta, WeightSource, is_within, rows_and_cols, unusable};
use crate::ModelError;
use crate::quantization::Fp8Scheme;

/// What safetensors files call E4M3.
const STORED: &str = "F8_E4M3";
/// Scales of weights.
const SCALES: [&str; 2] = ["weight_scale", "weight_scale_inv"];
/// Scales of activations.
const OTHER_SCALES: [&str; 4] = ["input_scale", "input_scale_ub", "activation_scale", "output_scale"];

/// Another source's tensors, those of eight bits multiplied with their scales.
pub(super) struct Fp8Weights {
    source: Box<dyn WeightSource>,
    scaled: HashMap<String, Scaled>,
}

/// A matrix of eight bits.
struct Scaled {
    rows: usize,
    cols: usize,
    /// Rows and columns that share a scale.
    block: [usize; 2],
    /// Scales in a row of blocks.
    scale_cols: usize,
    /// Row by row.
    scales: Vec<f32>,
}

impl Fp8Weights {
    /// Reads the scales.
    ///
    /// # Errors
    /// A tensor of eight bits has none, or of another shape: one line each.
    pub(super) fn new(source: Box<dyn WeightSource>, scheme: Fp8Scheme) -> Result<Self, ModelError> {
        let mut scaled = HashMap::new();
        let mut mistakes = Vec::new();
        for name in source.names() {
            let Some(meta) = source.meta(name).filter(|meta| meta.stored == STORED) else { continue };
            match read_scales(source.as_ref(), name, &meta, scheme) {
                Ok(scales) => drop(scaled.insert(name.to_owned(), scales)),
                Err(mistake) => mistakes.push(mistake),
            }
        }
        mistakes.sort();
        mistakes.truncate(20);
        if mistakes.is_empty() { Ok(Self { source, scaled }) } else { Err(ModelError::Unusable(mistakes)) }
    }

    /// A window, its bytes borrowed.
    fn window(&self, name: &str, rows: &Range<usize>, cols: &Range<usize>) -> Option<Fp8Matrix<'_>> {
        let scaled = self.scaled.get(name)?;
        if !is_within(rows, cols, (scaled.rows, scaled.cols)) {
            return None;
        }
        let bytes = self.source.stored_bytes(name)?.get(rows.start * scaled.cols + cols.start..)?;
        let [block_rows, block_cols] = scaled.block;
        let has_row_scales = scaled.scale_cols == 1;
        let (first_group, end_group) = match has_row_scales {
            true => (0, 1),
            false => {
                (cols.start / block_cols, cols.end.div_ceil(block_cols).max(cols.start / block_cols + 1))
            }
        };
        let row = |row: usize| {
            let from = row / block_rows * scaled.scale_cols;
            scaled.scales[from + first_group..from + end_group].iter().copied()
        };
        Some(Fp8Matrix {
            rows: rows.len(),
            cols: cols.len(),
            row_stride: scaled.cols,
            bytes: bytes.into(),
            group: if has_row_scales { usize::MAX } else { block_cols },
            skipped: if has_row_scales { 0 } else { cols.start % block_cols },
            scales: rows.clone().flat_map(row).collect(),
        })
    }
}

/// The scales of one tensor.
fn read_scales(
    source: &dyn WeightSource,
    name: &str,
    meta: &TensorMeta,
    scheme: Fp8Scheme,
) -> Result<Scaled, String> {
    let Some((rows, cols)) = rows_and_cols(&meta.shape).filter(|&(rows, cols)| rows * cols > 0) else {
        return Err(format!(
            "tensor {name} is stored as {STORED} with shape {:?}, expected a matrix",
            meta.shape
        ));
    };
    let prefix = name.strip_suffix("weight").unwrap_or(name);
    let found = SCALES.iter().find_map(|suffix| {
        let scales = format!("{prefix}{suffix}");
        source.meta(&scales).map(|meta| (scales, meta))
    });
    let Some((scales, scale_meta)) = found else {
        return Err(format!(
            "tensor {name} is stored as {STORED}, expected a scale {prefix}weight_scale with it"
        ));
    };
    let [block_rows, block_cols] = scheme.block;
    let grid = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
    let count = scale_meta.shape.iter().fold(1_usize, |count, &size| count.saturating_mul(size));
    let (block, scale_cols) = match scale_meta.shape[..] {
        _ if count == 1 => ([rows, cols], 1),
        [size] | [size, 1] if size == rows => ([1, cols], 1),
        [a, b] if [a, b] == grid => (scheme.block, b),
        _ => {
            return Err(format!(
                "tensor {scales} has shape {:?}, expected [1], [{rows}, 1] or {grid:?} (blocks of {block_rows} x {block_cols}) \
                 beside a weight of {rows} x {cols}",
                scale_meta.shape
            ));
        }
    };
    let (matrix_rows, matrix_cols) = rows_and_cols(&scale_meta.shape).unwrap_or((1, 1));
    let matrix = source.matrix(&scales, 0..matrix_rows, 0..matrix_cols);
    let matrix = matrix.map_err(|_| {
        format!("tensor {scales} is stored as {}, expected F32, BF16 or F16", scale_meta.stored)
    })?;
    let mut values = vec![0.0; count];
    for (row, out) in values.chunks_exact_mut(matrix_cols.max(1)).enumerate() {
        matrix.read_row(row, out);
    }
    if let Some(scale) = values.iter().find(|scale| !scale.is_finite()) {
        return Err(format!("tensor {scales} has the scale {scale}, expected finite numbers"));
    }
    Ok(Scaled { rows, cols, block, scale_cols, scales: values })
}

fn is_scale(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    // Those of the KV cache have a check of their own.
    !is_cache_scale(name) && (SCALES.contains(&last) || OTHER_SCALES.contains(&last))
}

impl WeightSource for Fp8Weights {
    fn names(&self) -> Vec<&str> {
        self.source.names().into_iter().filter(|name| !is_scale(name)).collect()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        let meta = self.source.meta(name)?;
        let dtype = if self.scaled.contains_key(name) { Some(DType::F32) } else { meta.dtype };
        Some(TensorMeta { dtype, ..meta })
    }

    fn matrix(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'_>, ModelError> {
        match self.fp8(name, rows.clone(), cols.clone()) {
            Some(matrix) => Ok(matrix?.dequantized()),
            None => self.source.matrix(name, rows, cols),
        }
    }

    fn quantized(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Option<Result<QuantizedMatrix, ModelError>> {
        self.source.quantized(name, rows, cols)
    }

    fn is_fp8(&self, name: &str) -> bool {
        self.scaled.contains_key(name)
    }

    fn fp8(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Option<Result<Fp8Matrix<'_>, ModelError>> {
        let outside = || unusable(format!("tensor {name} has no window of rows {rows:?}, columns {cols:?}"));
        self.is_fp8(name).then(|| self.window(name, &rows, &cols).ok_or_else(outside))
    }

    fn recycle(&self, matrix: HostMatrix<'_>) {
        self.source.recycle(matrix);
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;

    /// Tensors in memory: name, shape, the file's type, bytes.
    struct Stored(Vec<(&'static str, Vec<usize>, &'static str, Vec<u8>)>);

    impl WeightSource for Stored {
        fn names(&self) -> Vec<&str> {
            self.0.iter().map(|tensor| tensor.0).collect()
        }

        fn meta(&self, name: &str) -> Option<TensorMeta> {
            let (_, shape, stored, _) = self.0.iter().find(|tensor| tensor.0 == name)?;
            let dtype = (*stored == "F32").then_some(DType::F32);
            Some(TensorMeta { shape: shape.clone(), dtype, stored: (*stored).to_owned(), quantized: None })
        }

        fn matrix(
            &self,
            name: &str,
            rows: Range<usize>,
            cols: Range<usize>,
        ) -> Result<HostMatrix<'_>, ModelError> {
            let tensor = self.0.iter().find(|tensor| tensor.0 == name && tensor.2 == "F32");
            let (_, shape, _, bytes) = tensor.ok_or_else(|| unusable(name))?;
            let width = shape.last().copied().unwrap_or(1);
            let bytes = Cow::Borrowed(&bytes[(rows.start * width + cols.start) * 4..]);
            Ok(HostMatrix { dtype: DType::F32, rows: rows.len(), cols: cols.len(), row_stride: width, bytes })
        }

        fn stored_bytes(&self, name: &str) -> Option<&[u8]> {
            self.0.iter().find(|tensor| tensor.0 == name).map(|tensor| tensor.3.as_slice())
        }
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// 1, 2, 4 and -1 in the columns of each of three rows, with scales of the given shape.
    fn weights(scale: &'static str, shape: &[usize], scales: &[f32]) -> Result<Fp8Weights, String> {
        let bytes = [0x38, 0x40, 0x48, 0xb8].repeat(3);
        let source = Stored(vec![
            ("a.weight", vec![3, 4], STORED, bytes),
            (scale, shape.to_vec(), "F32", floats(scales)),
            ("a.input_scale", vec![1], "F32", floats(&[9.0])),
            ("norm.weight", vec![4], "F32", floats(&[0.5; 4])),
        ]);
        Fp8Weights::new(Box::new(source), Fp8Scheme { block: [2, 3] }).map_err(|error| error.to_string())
    }

    fn values(source: &Fp8Weights, name: &str, rows: Range<usize>, cols: Range<usize>) -> Vec<f32> {
        let matrix = source.matrix(name, rows, cols).unwrap();
        let mut values = vec![0.0; matrix.rows * matrix.cols];
        for (row, out) in values.chunks_exact_mut(matrix.cols).enumerate() {
            matrix.read_row(row, out);
        }
        values
    }

    #[test]
    fn scales_of_every_shape_are_multiplied_in() {
        for shape in [&[][..], &[1], &[1, 1]] {
            let source = weights("a.weight_scale", shape, &[0.5]).unwrap();
            assert_eq!(values(&source, "a.weight", 1..3, 1..3), [1.0, 2.0, 1.0, 2.0], "{shape:?}");
        }
        for shape in [&[3][..], &[3, 1]] {
            let source = weights("a.weight_scale", shape, &[1.0, 2.0, 3.0]).unwrap();
            assert_eq!(values(&source, "a.weight", 1..3, 0..2), [2.0, 4.0, 3.0, 6.0], "{shape:?}");
        }
        let source = weights("a.weight_scale_inv", &[2, 2], &[1.0, 10.0, 100.0, 1000.0]).unwrap();
        assert_eq!(values(&source, "a.weight", 0..1, 0..4), [1.0, 2.0, 4.0, -10.0]);
        assert_eq!(values(&source, "a.weight", 1..3, 2..4), [4.0, -10.0, 400.0, -1000.0]);
        assert_eq!(values(&source, "a.weight", 2..3, 3..4), [-1000.0]);
        assert_eq!(values(&source, "norm.weight", 0..1, 0..2), [0.5, 0.5]);
    }

    #[test]
    fn scales_are_no_tensors_of_the_model() {
        let source = weights("a.weight_scale", &[1], &[0.5]).unwrap();
        assert_eq!(source.names(), ["a.weight", "norm.weight"]);
        assert_eq!(source.meta("a.weight").unwrap().dtype, Some(DType::F32));
        assert!(source.is_fp8("a.weight") && !source.is_fp8("norm.weight"));
        assert!(source.fp8("norm.weight", 0..1, 0..4).is_none());
        assert!(source.fp8("a.weight", 0..4, 0..4).unwrap().is_err());
        let window = source.fp8("a.weight", 1..3, 1..3).unwrap().unwrap();
        assert_eq!((window.row_stride, window.scales.as_slice()), (4, &[0.5, 0.5][..]));
    }

    #[test]
    fn missing_and_wrong_scales_are_named() {
        let line = |result: Result<Fp8Weights, String>| match result {
            Ok(_) => panic!("accepted"),
            Err(line) => line,
        };
        assert_eq!(
            line(weights("b.weight_scale", &[1], &[0.5])),
            "tensor a.weight is stored as F8_E4M3, expected a scale a.weight_scale with it"
        );
        assert_eq!(
            line(weights("a.weight_scale", &[2], &[0.5, 0.5])),
            "tensor a.weight_scale has shape [2], expected [1], [3, 1] or [2, 2] (blocks of 2 x 3) beside a weight of 3 x 4"
        );
        assert_eq!(
            line(weights("a.weight_scale", &[1], &[f32::NAN])),
            "tensor a.weight_scale has the scale NaN, expected finite numbers"
        );
    }
}
