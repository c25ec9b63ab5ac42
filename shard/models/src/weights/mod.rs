//! Weights as they lie in files: by name, in the files' own type, only the bytes this rank needs.

mod blocks;
mod cache_scales;
mod check;
mod fp8;
mod gguf;
mod pickle;
mod pytorch;
mod renamed;
mod safetensors;
mod spare_buffers;

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use backend::{DType, Fp8Matrix, HostMatrix, QuantizedMatrix};
use hub::{ModelFiles, WeightFiles};
use memmap2::{Mmap, UncheckedAdvice};

pub(crate) use cache_scales::check_cache_scales;
pub(crate) use check::{check_tensors, prevailing_dtype};
pub(crate) use renamed::with_names_of;

use crate::ModelError;
use crate::quantization::Fp8Scheme;

/// What a file says about a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorMeta {
    /// Outermost dimension first.
    pub(crate) shape: Vec<usize>,
    /// The type [`WeightSource::matrix`] delivers; none: a type that is not read.
    pub(crate) dtype: Option<DType>,
    /// The file's name for the type, for messages.
    pub(crate) stored: String,
    /// How it is quantized; none: [`WeightSource::quantized`] has nothing either.
    pub(crate) quantized: Option<QuantizedMeta>,
}

/// The form of a quantized tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QuantizedMeta {
    /// Bits of a value.
    pub(crate) bits: u32,
    /// Elements that share a scale and an offset.
    pub(crate) group_size: usize,
    /// The file holds the transpose of what Hugging Face's files do: rows and columns of [`WeightSource::quantized`] are those of
    /// the transpose.
    pub(crate) is_transposed: bool,
}

/// The tensors of a model, under Hugging Face's names whatever the file format.
pub(crate) trait WeightSource: Send + Sync {
    /// All names, in no particular order.
    fn names(&self) -> Vec<&str>;
    /// Shape and type.
    fn meta(&self, name: &str) -> Option<TensorMeta>;
    /// The window `rows` x `cols` of a matrix; a vector is a matrix of one row. Plain types come as they are stored,
    /// without a copy where the file allows it; quantized ones come rounded to bfloat16.
    ///
    /// # Errors
    /// There is no such tensor, its type is not read, or the window leaves it.
    fn matrix(
        &self,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'_>, ModelError>;

    /// The same window from the quantized blocks, nothing rounded; none where the tensor is stored plain or the columns cut
    /// a group.
    fn quantized(
        &self,
        _name: &str,
        _rows: Range<usize>,
        _cols: Range<usize>,
    ) -> Option<Result<QuantizedMatrix, ModelError>> {
        None
    }

    /// The bytes of a tensor as the file has them; none where they are not in one run.
    fn stored_bytes(&self, _name: &str) -> Option<&[u8]> {
        None
    }

    /// Whether a tensor is stored as E4M3 numbers with scales, which [`WeightSource::matrix`] multiplies in.
    fn is_fp8(&self, _name: &str) -> bool {
        false
    }

    /// The same window as stored, nothing rounded; none where the tensor is stored otherwise.
    fn fp8(
        &self,
        _name: &str,
        _rows: Range<usize>,
        _cols: Range<usize>,
    ) -> Option<Result<Fp8Matrix<'_>, ModelError>> {
        None
    }

    /// Takes back a matrix that is no longer needed. Its memory serves the next one, because fresh memory is cleared by the
    /// system first, which costs more than dequantizing; what it borrows of a mapped file leaves this process's memory.
    fn recycle(&self, _matrix: HostMatrix<'_>) {}

    /// The same for a quantized matrix.
    fn recycle_quantized(&self, _matrix: QuantizedMatrix) {}

    /// The elements `range` of a vector.
    ///
    /// # Errors
    /// As [`WeightSource::matrix`].
    fn vector(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, ModelError> {
        let row = self.matrix(name, 0..1, range)?;
        let mut values = vec![0.0; row.cols];
        row.read_row(0, &mut values);
        Ok(values)
    }
}

/// Opens the files of a model; `threads` is how many may dequantize, `fp8` how weights of eight bits are scaled where the
/// configuration says that there are some.
///
/// # Errors
/// A file cannot be read or is damaged.
pub(crate) fn open(
    files: &ModelFiles,
    threads: usize,
    fp8: Option<Fp8Scheme>,
) -> Result<Box<dyn WeightSource>, ModelError> {
    match &files.weights {
        WeightFiles::Safetensors(paths) => {
            let source = safetensors::Safetensors::open(paths)?;
            match fp8 {
                None => Ok(Box::new(source)),
                Some(scheme) => Ok(Box::new(fp8::Fp8Weights::new(Box::new(source), scheme)?)),
            }
        }
        WeightFiles::Pytorch(paths) => Ok(Box::new(pytorch::Pytorch::open(paths)?)),
        WeightFiles::Gguf(path) => match files.gguf()? {
            Some(file) => Ok(Box::new(gguf::GgufWeights::new(file, path, threads)?)),
            None => Err(unusable(format!("{}: no GGUF file", path.display()))),
        },
    }
}

/// Maps a file of weights.
fn map(path: &Path) -> Result<Mmap, ModelError> {
    let wrong = |error: std::io::Error| unusable(format!("cannot map {}: {error}", path.display()));
    let file = File::open(path).map_err(wrong)?;
    // SAFETY: the map is only read. A model file that is changed in place while it is served is not supported;
    // downloads replace files by renaming, which leaves this map alone.
    unsafe { Mmap::map(&file) }.map_err(wrong)
}

/// Takes the pages that `matrix` borrows from one of `maps` out of this process's memory: a model that is packed while it is
/// read would else take its size twice. They stay in the system's file cache.
fn release(maps: &[Mmap], matrix: &HostMatrix<'_>) {
    for map in maps {
        if let Some(range) = borrowed_range(map, matrix) {
            // SAFETY: the map is only read and nobody writes the file (see `map`): a page that is needed again comes back
            // from the file as it was. A refusal leaves everything as it is.
            let _ =
                unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
    }
}

/// The bytes of `file` that `matrix` borrows; none where it has its own or another's.
fn borrowed_range(file: &[u8], matrix: &HostMatrix<'_>) -> Option<Range<usize>> {
    let Cow::Borrowed(bytes) = matrix.bytes else { return None };
    let start =
        bytes.as_ptr().addr().checked_sub(file.as_ptr().addr()).filter(|start| *start < file.len())?;
    let elements = matrix.rows.saturating_sub(1) * matrix.row_stride + matrix.cols;
    Some(start..start + bytes.len().min(elements * matrix.dtype.size_bytes()))
}

/// Rows and columns of a shape: a vector is one row.
fn rows_and_cols(shape: &[usize]) -> Option<(usize, usize)> {
    match *shape {
        [cols] => Some((1, cols)),
        [rows, cols] => Some((rows, cols)),
        _ => None,
    }
}

/// Whether the window lies within the matrix.
fn is_within(rows: &Range<usize>, cols: &Range<usize>, (num_rows, num_cols): (usize, usize)) -> bool {
    rows.start <= rows.end && rows.end <= num_rows && cols.start <= cols.end && cols.end <= num_cols
}

/// At most 200 characters of somebody else's words, in one line.
fn one_line(text: &str) -> String {
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(200).map(visible).collect()
}

fn unusable(problem: impl Into<String>) -> ModelError {
    ModelError::Unusable(vec![problem.into()])
}
