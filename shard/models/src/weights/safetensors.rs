//! Safetensors files, mapped: nothing is read before it is used.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ::safetensors::tensor::{Dtype, Metadata, SafeTensors};
use backend::{DType, HostMatrix};
use memmap2::Mmap;

use super::{TensorMeta, WeightSource, is_within, map, one_line, release, rows_and_cols, unusable};
use crate::ModelError;

/// Parsing costs a multiple of the header's size. The largest published headers, of thousands of tensors, have 2 MiB.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// The tensors of one or several files.
pub(super) struct Safetensors {
    files: Vec<Mmap>,
    tensors: HashMap<String, Tensor>,
}

struct Tensor {
    file: usize,
    /// Into the file; the parser has checked that it fits the shape and lies within.
    bytes: Range<usize>,
    meta: TensorMeta,
}

impl Safetensors {
    /// Maps the files and reads their headers.
    ///
    /// # Errors
    /// A file cannot be mapped or is damaged, or two files hold the same tensor.
    pub(super) fn open(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let mut all = Self { files: Vec::new(), tensors: HashMap::new() };
        for path in paths {
            let map = map(path)?;
            let (header_bytes, metadata) = read_header(path, &map)?;
            for (name, info) in metadata.tensors() {
                let start = size_of::<u64>() + header_bytes;
                let dtype = match info.dtype {
                    Dtype::F32 => Some(DType::F32),
                    Dtype::F16 => Some(DType::F16),
                    Dtype::BF16 => Some(DType::BF16),
                    _ => None,
                };
                let tensor = Tensor {
                    file: all.files.len(),
                    bytes: start + info.data_offsets.0..start + info.data_offsets.1,
                    meta: TensorMeta {
                        shape: info.shape.clone(),
                        dtype,
                        stored: format!("{:?}", info.dtype),
                        quantized: None,
                    },
                };
                if let Some(other) = all.tensors.insert(name.clone(), tensor) {
                    return Err(unusable(format!(
                        "tensor {name:?} is in {} and in {}, expected it once; remove the file that does not belong",
                        paths[other.file].display(),
                        path.display()
                    )));
                }
            }
            all.files.push(map);
        }
        Ok(all)
    }
}

impl WeightSource for Safetensors {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        self.tensors.get(name).map(|tensor| tensor.meta.clone())
    }

    fn matrix(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'_>, ModelError> {
        let window = self.tensors.get(name).and_then(|tensor| {
            let shape = rows_and_cols(&tensor.meta.shape)?;
            is_within(&rows, &cols, shape).then_some((tensor, tensor.meta.dtype?, shape.1))
        });
        let Some((tensor, dtype, row_stride)) = window else {
            return Err(unusable(format!("tensor {name} has no window of rows {rows:?}, columns {cols:?}")));
        };
        let bytes = &self.files[tensor.file][tensor.bytes.clone()];
        let start = (rows.start * row_stride + cols.start) * dtype.size_bytes();
        Ok(HostMatrix {
            dtype,
            rows: rows.len(),
            cols: cols.len(),
            row_stride,
            bytes: Cow::Borrowed(bytes.get(start..).unwrap_or_default()),
        })
    }

    fn stored_bytes(&self, name: &str) -> Option<&[u8]> {
        let tensor = self.tensors.get(name)?;
        self.files[tensor.file].get(tensor.bytes.clone())
    }

    fn recycle(&self, matrix: HostMatrix<'_>) {
        release(&self.files, &matrix);
    }
}

fn read_header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata), ModelError> {
    let wrong =
        |problem: String| unusable(format!("{}: not a usable safetensors file: {problem}", path.display()));
    let Some(length) = bytes.first_chunk::<8>().map(|&length| u64::from_le_bytes(length)) else {
        return Err(wrong(format!("it has {} bytes, expected a header", bytes.len())));
    };
    if length > MAX_HEADER_BYTES {
        return Err(wrong(format!("its header has {length} bytes, expected at most {MAX_HEADER_BYTES}")));
    }
    if length > bytes.len() as u64 - 8 {
        return Err(wrong(format!(
            "its header has {length} bytes, but the file ends at {}; the download may be incomplete",
            bytes.len()
        )));
    }
    SafeTensors::read_metadata(bytes).map_err(|error| {
        wrong(match error {
            ::safetensors::SafeTensorError::MetadataIncompleteBuffer => format!(
                "it has {} bytes, which is not what its header says; the download may be incomplete",
                bytes.len()
            ),
            // The parser's words may contain the file's.
            other => one_line(&other.to_string()),
        })
    })
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
