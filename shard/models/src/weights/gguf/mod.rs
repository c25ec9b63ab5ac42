//! GGUF files: plain tensors straight from the map, quantized ones as they are or to bfloat16, on several threads.

mod latent;
mod layout;
mod names;

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use backend::{DType, HostMatrix, QuantizedMatrix};
use hub::GgufFile;
use hub::gguf::GgmlType;

use super::blocks::{self, BlockFormat, Groups};
use latent::LatentUp;
use layout::{Layout, Place, RowOrder};

use super::spare_buffers::SpareBuffers;
use super::{QuantizedMeta, TensorMeta, WeightSource, borrowed_range, is_within, rows_and_cols, unusable};
use crate::ModelError;

/// Elements below which a thread costs more than it saves: some 50 microseconds of work.
const MIN_ELEMENTS_PER_THREAD: usize = 1 << 16;

/// The tensors of one file.
pub(super) struct GgufWeights {
    file: Arc<GgufFile>,
    tensors: HashMap<String, Tensor>,
    /// Of which two tensors hold the parts.
    latent_ups: HashMap<String, LatentUp>,
    threads: usize,
    spare_bytes: SpareBuffers<u8>,
    spare_floats: SpareBuffers<f32>,
}

/// A tensor under its Hugging Face name.
struct Tensor {
    ggml_type: GgmlType,
    /// As the file has it.
    shape: Vec<usize>,
    /// So many matrices, one below the other, of which the transposes are asked for, one below the other as well.
    transposed: Option<usize>,
    bytes: Range<usize>,
    order: RowOrder,
    /// Added to every element: what the converter took away.
    shift: f32,
}

impl GgufWeights {
    /// Takes the tensors of an open file.
    ///
    /// # Errors
    /// The heads or experts the file speaks of do not fit its tensors, or two tensors have one name.
    pub(super) fn new(file: Arc<GgufFile>, path: &Path, threads: usize) -> Result<Self, ModelError> {
        let problem = |problem: String| unusable(format!("{}: {problem}", path.display()));
        let layout = Layout::of(&file.header).map_err(problem)?;
        let mut tensors = HashMap::new();
        for info in &file.header.tensors {
            for place in layout.places(info).map_err(problem)? {
                if tensors.contains_key(&place.name) {
                    return Err(problem(format!("tensor {} is there twice", place.name)));
                }
                let (name, tensor) = Tensor::at(place, info.ggml_type);
                tensors.insert(name, tensor);
            }
        }
        let latent_ups = latent::take(&mut tensors);
        Ok(Self {
            file,
            tensors,
            latent_ups,
            threads: threads.max(1),
            spare_bytes: SpareBuffers::default(),
            spare_floats: SpareBuffers::default(),
        })
    }

    /// A window of a tensor, in the file's orientation.
    fn stored(
        &self,
        name: &str,
        tensor: &Tensor,
        (rows, cols): (Range<usize>, Range<usize>),
    ) -> Result<HostMatrix<'_>, ModelError> {
        let window = tensor.window(name, &rows, &cols)?;
        let bytes = &self.file.bytes()[tensor.bytes.clone()];
        match (plain_dtype(tensor.ggml_type), blocks::format(tensor.ggml_type)) {
            (Some(dtype), _) if tensor.shift != 0.0 => {
                Ok(shifted(&plain(tensor, dtype, bytes, window), tensor.shift))
            }
            (Some(dtype), _) => Ok(plain(tensor, dtype, bytes, window)),
            (None, Some(format))
                if tensor.shift == 0.0 && (tensor.shape.len() == 2 || tensor.order == RowOrder::Plain) =>
            {
                let blocks = Blocks { bytes, format, order: tensor.order };
                let out = self.spare_bytes.take(rows.len() * cols.len() * DType::BF16.size_bytes());
                let matrix = blocks.dequantize(&window, self.threads, out);
                self.file.release(tensor.bytes.clone());
                Ok(matrix)
            }
            _ => Err(unusable(format!(
                "tensor {name} of shape {:?} is stored as {}, expected {}",
                tensor.shape,
                tensor.ggml_type,
                if blocks::format(tensor.ggml_type).is_some() {
                    "F32, F16 or BF16"
                } else {
                    blocks::EXPECTED
                }
            ))),
        }
    }
}

fn plain_dtype(ggml_type: GgmlType) -> Option<DType> {
    match ggml_type {
        GgmlType::F32 => Some(DType::F32),
        GgmlType::F16 => Some(DType::F16),
        GgmlType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

impl Tensor {
    fn at(place: Place, ggml_type: GgmlType) -> (String, Self) {
        let Place { name, shape, bytes, order, transposed, shift } = place;
        (name, Self { ggml_type, shape, transposed, bytes, order, shift })
    }

    /// The window, unless it leaves the tensor.
    fn window(&self, name: &str, rows: &Range<usize>, cols: &Range<usize>) -> Result<Window, ModelError> {
        rows_and_cols(&self.shape)
            .filter(|&shape| is_within(rows, cols, shape))
            .map(|(_, num_cols)| Window { rows: rows.clone(), cols: cols.clone(), num_cols })
            .ok_or_else(|| no_window(name, rows, cols))
    }

    /// Where the rows and columns of the one of its matrices are whose columns these are, counted over all matrices; none where
    /// they are of several. A tensor that is not transposed is one matrix.
    fn within_one(&self, rows: Range<usize>, cols: Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
        let (Some(count), &[num_rows, num_cols]) = (self.transposed, self.shape.as_slice()) else {
            return Some((rows, cols));
        };
        let num_rows = num_rows / count.max(1);
        let index = (cols.start / num_cols.max(1)).min(count.saturating_sub(1));
        let first = index * num_cols;
        let is_one = rows.end <= num_rows && cols.start >= first && cols.end <= first + num_cols;
        let rows = rows.start + index * num_rows..rows.end + index * num_rows;
        is_one.then(|| (rows, cols.start - first..cols.end - first))
    }

    /// The type it is read as; none: it is not read.
    fn dtype(&self) -> Option<DType> {
        plain_dtype(self.ggml_type).or_else(|| blocks::format(self.ggml_type).map(|_| DType::BF16))
    }

    /// How its blocks are read where its rows are kept as they are; none for plain types and vectors.
    fn blocks(&self) -> Option<BlockFormat> {
        blocks::format(self.ggml_type).filter(|_| self.shape.len() == 2 && self.shift == 0.0)
    }
}

impl WeightSource for GgufWeights {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().chain(self.latent_ups.keys()).map(String::as_str).collect()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        if let Some(up) = self.latent_ups.get(name) {
            return Some(up.meta());
        }
        self.tensors.get(name).map(|tensor| TensorMeta {
            shape: match (tensor.transposed, tensor.shape.as_slice()) {
                (Some(count), &[rows, cols]) => vec![count * cols, rows / count.max(1)],
                (_, shape) => shape.to_vec(),
            },
            dtype: tensor.dtype(),
            stored: tensor.ggml_type.to_string(),
            quantized: tensor.blocks().map(|format| QuantizedMeta {
                bits: format.bits,
                group_size: format.group,
                is_transposed: tensor.transposed.is_some(),
            }),
        })
    }

    fn matrix(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'_>, ModelError> {
        if let Some(up) = self.latent_ups.get(name) {
            return up.matrix(self, name, rows, cols);
        }
        let tensor = self.tensors.get(name).ok_or_else(|| no_window(name, &rows, &cols))?;
        if tensor.transposed.is_none() {
            return self.stored(name, tensor, (rows, cols));
        }
        let window =
            tensor.within_one(cols.clone(), rows.clone()).ok_or_else(|| no_window(name, &rows, &cols))?;
        let matrix = self.stored(name, tensor, window)?;
        let transposed = matrix.transposed();
        self.recycle(matrix);
        Ok(transposed)
    }

    fn quantized(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Option<Result<QuantizedMatrix, ModelError>> {
        let tensor = self.tensors.get(name)?;
        let format = tensor.blocks()?;
        if !cols.start.is_multiple_of(format.group) || !cols.end.is_multiple_of(format.group) {
            return None;
        }
        let Some((rows, cols)) = tensor.within_one(rows.clone(), cols.clone()) else {
            return Some(Err(no_window(name, &rows, &cols)));
        };
        Some(tensor.window(name, &rows, &cols).map(|window| {
            let blocks =
                Blocks { bytes: &self.file.bytes()[tensor.bytes.clone()], format, order: tensor.order };
            let elements = rows.len() * cols.len();
            let groups = elements / format.group;
            let out = QuantizedMatrix {
                rows: rows.len(),
                cols: cols.len(),
                bits: format.bits,
                group_size: format.group,
                values: self.spare_bytes.take(elements),
                scales: self.spare_floats.take(groups),
                offsets: self.spare_floats.take(groups),
            };
            let matrix = blocks.unpack(&window, self.threads, out);
            self.file.release(tensor.bytes.clone());
            matrix
        }))
    }

    fn recycle(&self, matrix: HostMatrix<'_>) {
        match matrix.bytes {
            Cow::Owned(bytes) => self.spare_bytes.give(bytes),
            Cow::Borrowed(_) => {
                if let Some(range) = borrowed_range(self.file.bytes(), &matrix) {
                    self.file.release(range);
                }
            }
        }
    }

    fn recycle_quantized(&self, matrix: QuantizedMatrix) {
        self.spare_bytes.give(matrix.values);
        self.spare_floats.give(matrix.scales);
        self.spare_floats.give(matrix.offsets);
    }
}

fn no_window(name: &str, rows: &Range<usize>, cols: &Range<usize>) -> ModelError {
    unusable(format!("tensor {name} has no window of rows {rows:?}, columns {cols:?}"))
}

/// Part of a matrix of `num_cols` columns.
struct Window {
    rows: Range<usize>,
    cols: Range<usize>,
    num_cols: usize,
}

/// A tensor whose elements are stored one by one.
fn plain<'a>(tensor: &Tensor, dtype: DType, bytes: &'a [u8], window: Window) -> HostMatrix<'a> {
    let Window { rows, cols, num_cols } = window;
    let size = dtype.size_bytes();
    let at = |row: usize, col: usize| (row * num_cols + col) * size;
    if tensor.order == RowOrder::Plain {
        let start = at(rows.start, cols.start);
        return HostMatrix {
            dtype,
            rows: rows.len(),
            cols: cols.len(),
            row_stride: num_cols,
            bytes: Cow::Borrowed(bytes.get(start..).unwrap_or_default()),
        };
    }
    let mut copy = Vec::with_capacity(rows.len() * cols.len() * size);
    if tensor.shape.len() == 1 {
        // A bias: its elements are the reordered rows.
        for col in cols.clone() {
            let start = at(0, tensor.order.row_in_file(col));
            copy.extend_from_slice(&bytes[start..start + size]);
        }
    } else {
        for row in rows.clone() {
            let row = tensor.order.row_in_file(row);
            copy.extend_from_slice(&bytes[at(row, cols.start)..at(row, cols.end)]);
        }
    }
    HostMatrix { dtype, rows: rows.len(), cols: cols.len(), row_stride: cols.len(), bytes: Cow::Owned(copy) }
}

/// The same numbers plus `shift`, as f32: norms are small and are not rounded.
fn shifted(matrix: &HostMatrix<'_>, shift: f32) -> HostMatrix<'static> {
    let mut row = vec![0.0; matrix.cols];
    let mut bytes = Vec::with_capacity(matrix.rows * matrix.cols * size_of::<f32>());
    for index in 0..matrix.rows {
        matrix.read_row(index, &mut row);
        bytes.extend(row.iter().flat_map(|value| (value + shift).to_le_bytes()));
    }
    HostMatrix {
        dtype: DType::F32,
        rows: matrix.rows,
        cols: matrix.cols,
        row_stride: matrix.cols,
        bytes: Cow::Owned(bytes),
    }
}

/// A tensor of quantized blocks.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    bytes: &'a [u8],
    format: BlockFormat,
    order: RowOrder,
}

impl<'a> Blocks<'a> {
    /// The blocks of a row in Hugging Face's order.
    fn row(&self, row: usize, window: &Window) -> &'a [u8] {
        let row_bytes = window.num_cols / self.format.elements * self.format.bytes;
        let row = self.order.row_in_file(row);
        &self.bytes[row * row_bytes..(row + 1) * row_bytes]
    }

    /// `out` has the size of the window, in bfloat16.
    fn dequantize(&self, window: &Window, threads: usize, mut out: Vec<u8>) -> HostMatrix<'static> {
        let (num_rows, num_cols) = (window.rows.len(), window.cols.len());
        let row_bytes = num_cols * DType::BF16.size_bytes();
        let rows_per_thread = rows_per_thread(window, threads);
        let parts = out.chunks_mut((rows_per_thread * row_bytes).max(1));
        on_threads(parts, |part, out: &mut [u8]| {
            let first = window.rows.start + part * rows_per_thread;
            for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                let out = out.as_chunks_mut::<2>().0;
                self.format.dequantize_row(self.row(first + row, window), window.cols.start, out);
            }
        });
        HostMatrix {
            dtype: DType::BF16,
            rows: num_rows,
            cols: num_cols,
            row_stride: num_cols,
            bytes: Cow::Owned(out),
        }
    }

    /// `out` has the size of the window.
    fn unpack(&self, window: &Window, threads: usize, mut out: QuantizedMatrix) -> QuantizedMatrix {
        let (num_cols, num_groups) = (out.cols, out.cols / out.group_size);
        let rows_per_thread = rows_per_thread(window, threads);
        let groups_per_thread = (rows_per_thread * num_groups).max(1);
        let parts = out
            .values
            .chunks_mut((rows_per_thread * num_cols).max(1))
            .zip(out.scales.chunks_mut(groups_per_thread))
            .zip(out.offsets.chunks_mut(groups_per_thread));
        on_threads(parts, |part, ((values, scales), offsets)| {
            let first = window.rows.start + part * rows_per_thread;
            let rows = values
                .chunks_exact_mut(num_cols)
                .zip(scales.chunks_exact_mut(num_groups))
                .zip(offsets.chunks_exact_mut(num_groups));
            for (row, ((values, scales), offsets)) in rows.enumerate() {
                let out = Groups { values, scales, offsets };
                self.format.unpack_row(self.row(first + row, window), window.cols.start, out);
            }
        });
        out
    }
}

/// Rows that each of at most `threads` threads takes, so that none has too little to do.
fn rows_per_thread(window: &Window, threads: usize) -> usize {
    let elements = window.rows.len() * window.cols.len();
    let threads = threads.min(elements.div_ceil(MIN_ELEMENTS_PER_THREAD)).max(1);
    window.rows.len().div_ceil(threads).max(1)
}

/// Runs `work` on every part, each on a thread of its own but for the first, which this thread takes.
fn on_threads<T: Send>(parts: impl Iterator<Item = T>, work: impl Fn(usize, T) + Sync) {
    let work = &work;
    std::thread::scope(|scope| {
        let mut parts = parts.enumerate();
        let own = parts.next();
        for (index, part) in parts {
            scope.spawn(move || work(index, part));
        }
        if let Some((index, part)) = own {
            work(index, part);
        }
    });
}

#[cfg(test)]
mod tests;
