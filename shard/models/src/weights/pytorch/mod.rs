//! PyTorch's `.bin` files, mapped: both containers of `torch.save`, read without Python.

mod legacy;
mod zip;

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use backend::{DType, HostMatrix};
use memmap2::Mmap;

use super::pickle::{self, MAX_PICKLE_BYTES, Pickle, quote};
use super::{TensorMeta, WeightSource, is_within, map, release, rows_and_cols, unusable};
use crate::ModelError;

/// The tensors of one or several files.
pub(super) struct Pytorch {
    files: Vec<Mmap>,
    tensors: HashMap<String, Tensor>,
}

struct Tensor {
    file: usize,
    /// From the first element to the end of the storage; checked to hold all elements.
    bytes: Range<usize>,
    order: Order,
    meta: TensorMeta,
}

/// How the elements of a matrix lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Rows of neighbouring elements, so many elements apart.
    Rows(usize),
    /// Columns of neighbouring elements, so many elements apart: what `transpose` leaves.
    Columns(usize),
}

impl Pytorch {
    /// Maps the files and reads their pickles.
    ///
    /// # Errors
    /// A file cannot be mapped, is damaged or holds something besides tensors, or two files hold the same tensor.
    pub(super) fn open(paths: &[PathBuf]) -> Result<Self, ModelError> {
        let mut all = Self { files: Vec::new(), tensors: HashMap::new() };
        for path in paths {
            let map = map(path)?;
            let tensors = read_file(&map, all.files.len()).map_err(|problem| {
                unusable(format!("{}: not a usable PyTorch file: {problem}", path.display()))
            })?;
            for (name, tensor) in tensors {
                if let Some(other) = all.tensors.get(&name) {
                    return Err(twice(&name, &paths[other.file], path));
                }
                all.tensors.insert(name, tensor);
            }
            all.files.push(map);
        }
        Ok(all)
    }
}

fn twice(name: &str, one: &Path, other: &Path) -> ModelError {
    unusable(format!(
        "tensor {} is in {} and in {}, expected it once; remove the file that does not belong",
        quote(name),
        one.display(),
        other.display()
    ))
}

/// The tensors of the file with index `file`.
fn read_file(bytes: &[u8], file: usize) -> Result<Vec<(String, Tensor)>, String> {
    let (pickle, storages) = if bytes.starts_with(zip::LOCAL_HEADER) {
        read_zip(bytes)?
    } else if bytes.starts_with(legacy::MAGIC) {
        legacy::read(bytes)?
    } else {
        let begin = &bytes[..bytes.len().min(4)];
        return Err(format!(
            "it begins with {begin:02x?}, expected what torch.save writes; choose a revision with safetensors, or save \
             the model again"
        ));
    };
    let tensor = |(name, tensor): (&str, &pickle::Tensor<'_>)| {
        let storage = storages.get(tensor.storage.key).ok_or_else(|| {
            let key = quote(tensor.storage.key);
            format!(
                "tensor {} is in storage {key}, which is not there; the download may be incomplete",
                quote(name)
            )
        })?;
        let tensor =
            place(tensor, storage, file).map_err(|problem| format!("tensor {} {problem}", quote(name)))?;
        Ok((name.to_owned(), tensor))
    };
    pickle.tensors().map_err(|error| error.to_string())?.into_iter().map(tensor).collect()
}

/// The pickle of a zip archive, and where its storages are. All entries lie in one folder of any name.
fn read_zip(bytes: &[u8]) -> Result<(Pickle<'_>, HashMap<&str, Range<usize>>), String> {
    let entries = zip::entries(bytes)?;
    let mut pickles = entries.iter().filter_map(|(name, range)| {
        name.strip_suffix("data.pkl")
            .filter(|folder| folder.matches('/').count() == 1)
            .map(|folder| (folder, range))
    });
    let (Some((folder, range)), None) = (pickles.next(), pickles.next()) else {
        return Err("it has no data.pkl, or several, expected one".to_owned());
    };
    if range.len() > MAX_PICKLE_BYTES {
        return Err(format!("its data.pkl has {} bytes, expected at most {MAX_PICKLE_BYTES}", range.len()));
    }
    let order = entries.get(format!("{folder}byteorder").as_str()).map(|range| &bytes[range.clone()]);
    if order.is_some_and(|order| order != b"little") {
        return Err("its numbers are big-endian, expected little-endian".to_owned());
    }
    let pickle = Pickle::parse(&bytes[range.clone()]).map_err(|error| error.to_string())?;
    let prefix = format!("{folder}data/");
    let storages =
        entries.iter().filter_map(|(&name, range)| Some((name.strip_prefix(&prefix)?, range.clone())));
    Ok((pickle, storages.collect()))
}

/// Checks a tensor against its storage.
fn place(tensor: &pickle::Tensor<'_>, storage: &Range<usize>, file: usize) -> Result<Tensor, String> {
    let pickle::Tensor { storage: claimed, offset, shape, strides } = tensor;
    let element = claimed.element;
    if claimed.len.checked_mul(element.num_bytes) != Some(storage.len()) {
        return Err(format!(
            "is in a storage of {} elements of {}, but {} bytes; the download may be incomplete",
            claimed.len,
            element.name,
            storage.len()
        ));
    }
    let num_elements = shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    let num_bytes = num_elements.and_then(|num| num.checked_mul(element.num_bytes));
    if num_bytes.is_none_or(|num_bytes| num_bytes > isize::MAX as usize) {
        return Err(format!("has shape {shape:?}; no such tensor can exist"));
    }
    let reach = if num_elements == Some(0) { Some(0) } else { reach(shape, strides) };
    if reach.and_then(|reach| reach.checked_add(*offset)).is_none_or(|end| end > claimed.len) {
        return Err(format!(
            "of shape {shape:?} with strides {strides:?} from {offset} on leaves its storage of {} elements",
            claimed.len
        ));
    }
    let order = order(shape, strides);
    Ok(Tensor {
        file,
        bytes: storage.start + offset * element.num_bytes..storage.end,
        order: order.unwrap_or(Order::Rows(0)),
        meta: TensorMeta {
            shape: shape.clone(),
            dtype: element.dtype.filter(|_| order.is_some()),
            quantized: None,
            stored: match order {
                Some(_) => element.name.to_owned(),
                None => format!("{} with strides {strides:?}", element.name),
            },
        },
    })
}

/// Elements from the first to after the last; no dimension is 0.
fn reach(shape: &[usize], strides: &[usize]) -> Option<usize> {
    shape
        .iter()
        .zip(strides)
        .try_fold(1_usize, |reach, (size, stride)| reach.checked_add((size - 1).checked_mul(*stride)?))
}

/// The order of the elements; none: neither rows nor columns lie together.
fn order(shape: &[usize], strides: &[usize]) -> Option<Order> {
    let row = shape.last().copied().unwrap_or(1);
    if is_dense(shape, strides) {
        return Some(Order::Rows(row));
    }
    match (shape, strides) {
        (&[_, cols], &[stride, 1]) if stride >= cols => Some(Order::Rows(stride)),
        (&[rows, _], &[1, stride]) if stride >= rows => Some(Order::Columns(stride)),
        _ => None,
    }
}

/// Whether the elements lie in the order of their indices without gaps. The stride of a single index does not matter.
fn is_dense(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1_usize;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size <= 1 || stride == expected;
        expected = expected.saturating_mul(size.max(1));
        fits
    })
}

impl WeightSource for Pytorch {
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
            is_within(&rows, &cols, shape).then_some((tensor, tensor.meta.dtype?))
        });
        let Some((tensor, dtype)) = window else {
            return Err(unusable(format!("tensor {name} has no window of rows {rows:?}, columns {cols:?}")));
        };
        let bytes = &self.files[tensor.file][tensor.bytes.clone()];
        match tensor.order {
            Order::Rows(stride) => {
                let start = (rows.start * stride + cols.start) * dtype.size_bytes();
                let bytes = Cow::Borrowed(bytes.get(start..).unwrap_or_default());
                Ok(HostMatrix { dtype, rows: rows.len(), cols: cols.len(), row_stride: stride, bytes })
            }
            Order::Columns(stride) => Ok(transposed(bytes, stride, dtype, rows, cols)),
        }
    }

    fn recycle(&self, matrix: HostMatrix<'_>) {
        release(&self.files, &matrix);
    }
}

/// The window of a matrix whose columns lie together, as rows.
fn transposed(
    bytes: &[u8],
    stride: usize,
    dtype: DType,
    rows: Range<usize>,
    cols: Range<usize>,
) -> HostMatrix<'static> {
    let size = dtype.size_bytes();
    let mut copy = Vec::with_capacity(rows.len() * cols.len() * size);
    for row in rows.clone() {
        for col in cols.clone() {
            let at = (col * stride + row) * size;
            copy.extend_from_slice(&bytes[at..at + size]);
        }
    }
    HostMatrix { dtype, rows: rows.len(), cols: cols.len(), row_stride: cols.len(), bytes: Cow::Owned(copy) }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(in crate::weights) mod writer;
