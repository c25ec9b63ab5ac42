//! GGUF files: plain tensors straight from the map, quantized ones to bfloat16 on several threads.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use backend::{DType, HostMatrix};
use hub::GgufFile;
use hub::gguf::GgmlType;

use super::dequantize::{self, BLOCK};
use super::gguf_names::{Projection, hugging_face_name, permuted};
use super::spare_buffers::SpareBuffers;
use super::{TensorMeta, WeightSource, is_within, rows_and_cols, unusable};
use crate::ModelError;

/// Elements below which a thread costs more than it saves: some 50 microseconds of work.
const MIN_ELEMENTS_PER_THREAD: usize = 1 << 16;

/// The tensors of one file.
pub(super) struct GgufWeights {
    file: Arc<GgufFile>,
    tensors: HashMap<String, Tensor>,
    threads: usize,
    spare: SpareBuffers,
}

struct Tensor {
    ggml_type: GgmlType,
    shape: Vec<usize>,
    bytes: Range<usize>,
    order: RowOrder,
}

/// Where in the file the rows of a tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RowOrder {
    /// As Hugging Face has them.
    Plain,
    /// Within each head, row `2 i + j` of the file is row `j * head_dim / 2 + i`: the rotation pairs neighbours.
    Interleaved { head_dim: usize },
}

impl RowOrder {
    fn row_in_file(self, row: usize) -> usize {
        match self {
            RowOrder::Plain => row,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (second, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + second
            }
        }
    }
}

impl GgufWeights {
    /// Takes the tensors of an open file.
    ///
    /// # Errors
    /// The heads the file speaks of do not fit its tensors.
    pub(super) fn new(file: Arc<GgufFile>, path: &Path, threads: usize) -> Result<Self, ModelError> {
        let mut tensors = HashMap::new();
        let heads = |key: &str| {
            let problem = |error| unusable(format!("{}: {error}", path.display()));
            file.header.u64(key).map_err(problem).map(|heads| heads.unwrap_or(0) as usize)
        };
        let is_llama = file.header.str("general.architecture").ok().flatten() == Some("llama");
        for tensor in &file.header.tensors {
            let order = match permuted(&tensor.name).filter(|_| is_llama) {
                None => RowOrder::Plain,
                Some(projection) => {
                    let num_heads = match projection {
                        Projection::Query => heads("llama.attention.head_count")?,
                        Projection::Key => match heads("llama.attention.head_count_kv")? {
                            0 => heads("llama.attention.head_count")?,
                            num_kv_heads => num_kv_heads,
                        },
                    };
                    let rows = tensor.shape[0];
                    if num_heads == 0 || rows % (2 * num_heads) != 0 {
                        return Err(unusable(format!(
                            "{}: tensor {} has {rows} rows, which {num_heads} heads cannot share in pairs",
                            path.display(),
                            tensor.name
                        )));
                    }
                    RowOrder::Interleaved { head_dim: rows / num_heads }
                }
            };
            let entry = Tensor {
                ggml_type: tensor.ggml_type,
                shape: tensor.shape.clone(),
                bytes: tensor.range.clone(),
                order,
            };
            let name = hugging_face_name(&tensor.name);
            if tensors.contains_key(&name) {
                return Err(unusable(format!("{}: tensor {name} is there twice", path.display())));
            }
            tensors.insert(name, entry);
        }
        Ok(Self { file, tensors, threads: threads.max(1), spare: SpareBuffers::default() })
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

impl WeightSource for GgufWeights {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        self.tensors.get(name).map(|tensor| TensorMeta {
            shape: tensor.shape.clone(),
            dtype: plain_dtype(tensor.ggml_type)
                .or_else(|| dequantize::decoder(tensor.ggml_type).map(|_| DType::BF16)),
            stored: tensor.ggml_type.to_string(),
        })
    }

    fn matrix(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'_>, ModelError> {
        let window = self.tensors.get(name).and_then(|tensor| {
            let (num_rows, num_cols) = rows_and_cols(&tensor.shape)?;
            is_within(&rows, &cols, (num_rows, num_cols)).then_some((tensor, num_cols))
        });
        let Some((tensor, num_cols)) = window else {
            return Err(unusable(format!("tensor {name} has no window of rows {rows:?}, columns {cols:?}")));
        };
        let bytes = &self.file.bytes()[tensor.bytes.clone()];
        match (plain_dtype(tensor.ggml_type), dequantize::decoder(tensor.ggml_type)) {
            (Some(dtype), _) => Ok(plain(tensor, dtype, bytes, Window { rows, cols, num_cols })),
            (None, Some((block_bytes, decode)))
                if tensor.shape.len() == 2 || tensor.order == RowOrder::Plain =>
            {
                let blocks = Blocks { bytes, block_bytes, decode, order: tensor.order };
                let out = self.spare.take(rows.len() * cols.len() * DType::BF16.size_bytes());
                Ok(blocks.dequantize(&Window { rows, cols, num_cols }, self.threads, out))
            }
            _ => Err(unusable(format!(
                "tensor {name} of shape {:?} is stored as {}, expected F32, F16, BF16, or for matrices Q4_0, Q4_1, Q8_0",
                tensor.shape, tensor.ggml_type
            ))),
        }
    }

    fn recycle(&self, matrix: HostMatrix<'_>) {
        if let Cow::Owned(bytes) = matrix.bytes {
            self.spare.give(bytes);
        }
    }
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

/// A tensor of quantized blocks.
struct Blocks<'a> {
    bytes: &'a [u8],
    block_bytes: usize,
    decode: dequantize::BlockDecoder,
    order: RowOrder,
}

impl Blocks<'_> {
    /// `out` has the size of the window.
    fn dequantize(&self, window: &Window, threads: usize, mut out: Vec<u8>) -> HostMatrix<'static> {
        let (num_rows, num_cols) = (window.rows.len(), window.cols.len());
        let row_bytes = num_cols * DType::BF16.size_bytes();
        let threads = threads.min((num_rows * num_cols).div_ceil(MIN_ELEMENTS_PER_THREAD)).max(1);
        let rows_per_thread = num_rows.div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            let mut parts = out.chunks_mut((rows_per_thread * row_bytes).max(1)).enumerate();
            // This thread takes the first part itself.
            let own = parts.next();
            for (part, out) in parts {
                scope.spawn(move || self.rows(window, window.rows.start + part * rows_per_thread, out));
            }
            if let Some((_, out)) = own {
                self.rows(window, window.rows.start, out);
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

    /// Rows from `first` on, as many as `out` holds.
    fn rows(&self, window: &Window, first: usize, out: &mut [u8]) {
        let blocks_per_row = window.num_cols / BLOCK;
        let cols = &window.cols;
        let mut values = [0_u16; BLOCK];
        for (row, out) in out.chunks_exact_mut(cols.len() * 2).enumerate() {
            let row = self.order.row_in_file(first + row);
            let mut out = out.as_chunks_mut::<2>().0.iter_mut();
            for block in cols.start / BLOCK..cols.end.div_ceil(BLOCK) {
                let at = (row * blocks_per_row + block) * self.block_bytes;
                (self.decode)(&self.bytes[at..at + self.block_bytes], &mut values);
                let wanted = cols.start.max(block * BLOCK)..cols.end.min((block + 1) * BLOCK);
                let wanted = wanted.start - block * BLOCK..wanted.end - block * BLOCK;
                for (value, out) in values[wanted].iter().zip(out.by_ref()) {
                    *out = value.to_le_bytes();
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;
