//! The GGUF container: metadata and the places of tensors, from bytes nobody vouches for.
//!
//! Every count and length is checked against the bytes that are left before anything is allocated for it, so a
//! hostile file costs at most a small multiple of its own size and yields an error, never a panic.
//! Read are versions 2 and 3 in little-endian order, which is what all current writers produce.

mod ggml_type;
mod reader;
mod value;

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

pub use ggml_type::GgmlType;
use reader::Reader;
pub use value::{Array, Value};

/// The first four bytes of every GGUF file.
const MAGIC: [u8; 4] = *b"GGUF";
/// What data is aligned to when the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Writers use 32 or 64; a page and far beyond is still plausible, more is damage.
const MAX_ALIGNMENT: u64 = 1 << 20;
/// ggml's own limit on dimensions.
const MAX_DIMENSIONS: u32 = 4;
/// The shortest metadata entry: length of the key, kind, one byte of value.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;
/// The shortest tensor entry: length of the name, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Why bytes are not a usable GGUF file: what was found and what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GgufError(pub(crate) String);

impl GgufError {
    pub(crate) fn new(problem: impl Into<String>) -> Self {
        Self(problem.into())
    }
}

/// The header of a GGUF file.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Everything the file says about itself, by key such as `llama.block_count`.
    pub metadata: BTreeMap<String, Value>,
    /// The tensors in file order; their data neither overlaps nor leaves the file.
    pub tensors: Vec<TensorInfo>,
}

/// Where one tensor is and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Outermost dimension first, `[rows, columns]`: the reverse of the order in the file.
    pub shape: Vec<usize>,
    /// Format of the data.
    pub ggml_type: GgmlType,
    /// Bytes of the data within the file.
    pub range: Range<usize>,
}

impl Gguf {
    /// Reads the header of a whole GGUF file.
    ///
    /// # Errors
    /// The bytes are no GGUF file of version 2 or 3, are damaged, or end early.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        let mut reader = Reader::new(bytes);
        let version = read_version(&mut reader)?;
        let num_tensors = reader.count(MIN_TENSOR_BYTES, "tensors")?;
        // The tensor entries come after the metadata, so both counts are bounded by the bytes left.
        let num_entries = reader.count(MIN_ENTRY_BYTES, "metadata entries")?;
        let metadata = read_metadata(&mut reader, num_entries)?;
        let alignment = read_alignment(&metadata)?;
        let tensors = read_tensors(&mut reader, num_tensors, alignment)?;
        check_overlap(&tensors)?;
        Ok(Self { version, metadata, tensors })
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// A non-negative integer; `None` when absent.
    ///
    /// # Errors
    /// The value has another type or is negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a non-negative integer", Value::as_u64)
    }

    /// A number; `None` when absent.
    ///
    /// # Errors
    /// The value has another type.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a number", Value::as_f64)
    }

    /// A boolean; `None` when absent.
    ///
    /// # Errors
    /// The value has another type.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    /// A text; `None` when absent.
    ///
    /// # Errors
    /// The value has another type.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a text", Value::as_str)
    }

    /// A list of texts; `None` when absent.
    ///
    /// # Errors
    /// The value has another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "a list of texts", |value| match value {
            Value::Array(Array::Strings(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match read(value) {
            Some(found) => Ok(Some(found)),
            None => Err(GgufError::new(format!("{key} is {}, expected {expected}", value.describe()))),
        }
    }
}

fn read_version(reader: &mut Reader<'_>) -> Result<u32, GgufError> {
    let magic = reader.take(4, "the magic number")?;
    if magic != MAGIC {
        return Err(GgufError::new(format!("it begins with {magic:02x?}, expected \"GGUF\"")));
    }
    match reader.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        1 => Err(GgufError::new("version 1 is no longer read, expected 2 or 3; convert the file again")),
        version if version != 0 && version.trailing_zeros() >= 16 => {
            Err(GgufError::new("the file is big-endian, expected little-endian"))
        }
        version => Err(GgufError::new(format!("version {version}, expected 2 or 3"))),
    }
}

fn read_metadata(reader: &mut Reader<'_>, count: usize) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = reader.string("a metadata key")?;
        let value = Value::read(reader, &key)?;
        if metadata.contains_key(&key) {
            return Err(GgufError::new(format!("metadata key {} appears twice", quote(&key))));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn read_alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        Some(n) if n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&n) => Ok(n),
        _ => Err(GgufError::new(format!(
            "general.alignment is {}, expected a power of two from 8 to {MAX_ALIGNMENT}",
            value.describe()
        ))),
    }
}

/// A tensor entry as it is written: the offset counts from the start of the data section.
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    ggml_type: GgmlType,
    num_bytes: u64,
    offset: u64,
}

fn read_tensors(reader: &mut Reader<'_>, count: usize, alignment: u64) -> Result<Vec<TensorInfo>, GgufError> {
    let raw = (0..count).map(|_| read_tensor(reader, alignment)).collect::<Result<Vec<_>, _>>()?;
    let file_end = reader.len();
    let data_start = reader.position().next_multiple_of(alignment);
    let mut names = HashSet::with_capacity(raw.len());
    for tensor in &raw {
        if !names.insert(tensor.name.as_str()) {
            return Err(GgufError::new(format!("tensor {} appears twice", quote(&tensor.name))));
        }
    }
    raw.into_iter()
        .map(|tensor| {
            let start = data_start.checked_add(tensor.offset);
            let end = start.and_then(|start| start.checked_add(tensor.num_bytes));
            match (start, end) {
                (Some(start), Some(end)) if end <= file_end => Ok(TensorInfo {
                    name: tensor.name,
                    shape: tensor.shape,
                    ggml_type: tensor.ggml_type,
                    // Both are at most the length of a slice, so they fit.
                    range: start as usize..end as usize,
                }),
                _ => Err(GgufError::new(format!(
                    "tensor {} has {} bytes at offset {} of the data, but the file ends at {file_end}; \
                     the download may be incomplete",
                    quote(&tensor.name),
                    tensor.num_bytes,
                    tensor.offset
                ))),
            }
        })
        .collect()
}

fn read_tensor(reader: &mut Reader<'_>, alignment: u64) -> Result<RawTensor, GgufError> {
    let name = reader.string("a tensor name")?;
    let wrong = |problem: String| GgufError::new(format!("tensor {} {problem}", quote(&name)));
    let num_dimensions = reader.u32("a tensor's number of dimensions")?;
    if num_dimensions == 0 || num_dimensions > MAX_DIMENSIONS {
        return Err(wrong(format!("has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")));
    }
    let mut shape = Vec::with_capacity(num_dimensions as usize);
    let mut num_elements = 1_u64;
    for _ in 0..num_dimensions {
        let dimension = reader.u64("a tensor's dimension")?;
        num_elements = num_elements
            .checked_mul(dimension)
            .filter(|&n| n > 0 && n <= i64::MAX as u64)
            .ok_or_else(|| wrong(format!("has a dimension of {dimension}; no such tensor can exist")))?;
        shape.push(usize::try_from(dimension).map_err(|_| wrong("is larger than memory".to_owned()))?);
    }
    let row = shape[0] as u64;
    shape.reverse();
    let code = reader.u32("a tensor's type")?;
    let ggml_type = GgmlType::from_code(code).ok_or_else(|| wrong(format!("has the unknown type {code}")))?;
    let (block, block_bytes) = ggml_type.block();
    if !row.is_multiple_of(block) {
        return Err(wrong(format!("has rows of {row}, expected a multiple of {block} for {ggml_type}")));
    }
    let num_bytes = (num_elements / block)
        .checked_mul(block_bytes)
        .ok_or_else(|| wrong("is larger than memory".to_owned()))?;
    let offset = reader.u64("a tensor's offset")?;
    if !offset.is_multiple_of(alignment) {
        return Err(wrong(format!("is at offset {offset}, expected a multiple of {alignment}")));
    }
    Ok(RawTensor { name, shape, ggml_type, num_bytes, offset })
}

fn check_overlap(tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut by_start: Vec<_> = tensors.iter().collect();
    by_start.sort_by_key(|tensor| tensor.range.start);
    match by_start.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
        None => Ok(()),
        Some(pair) => Err(GgufError::new(format!(
            "the data of tensors {} and {} overlaps",
            quote(&pair[0].name),
            quote(&pair[1].name)
        ))),
    }
}

/// A name from the file for a message: escaped, and not arbitrarily long.
pub(crate) fn quote(name: &str) -> String {
    let short: String = name.chars().take(64).collect();
    let dots = if short.len() < name.len() { "…" } else { "" };
    format!("{short:?}{dots}")
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

#[cfg(test)]
#[path = "writer.rs"]
pub(crate) mod writer;
