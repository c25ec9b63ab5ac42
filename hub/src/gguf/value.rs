//! A metadata value: a scalar, a text, or a list.

use super::reader::Reader;
use super::{GgufError, quote};

/// Lists within lists occur in no file known; a few levels are allowed, a stack overflow is not.
const MAX_DEPTH: usize = 4;
/// The shortest list: kind and count.
const MIN_ARRAY_BYTES: u64 = 4 + 8;

/// A metadata value. Integers of all widths are one kind, likewise floats.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An unsigned integer.
    Unsigned(u64),
    /// A signed integer.
    Signed(i64),
    /// A 32-bit float; kept narrow, so that its shortest decimal spelling stays known.
    F32(f32),
    /// A 64-bit float.
    F64(f64),
    /// A boolean.
    Bool(bool),
    /// A text.
    String(String),
    /// A list.
    Array(Array),
}

/// A list of values of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    /// Unsigned integers.
    Unsigned(Vec<u64>),
    /// Signed integers.
    Signed(Vec<i64>),
    /// Floats.
    Floats(Vec<f64>),
    /// Booleans.
    Bools(Vec<bool>),
    /// Texts.
    Strings(Vec<String>),
    /// Lists.
    Arrays(Vec<Array>),
}

impl Value {
    /// As a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// As a number. A 32-bit float becomes the 64-bit one with the same shortest decimal spelling: a file's
    /// 1e-5 reads as 1e-5 and not as 9.999999747378752e-6, so that it equals what config.json would say.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::F32(n) if n.is_finite() => n.to_string().parse().ok(),
            Value::F32(n) => Some(f64::from(*n)),
            Value::F64(n) => Some(*n),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// As a boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// As a text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The value for a message, not arbitrarily long.
    pub(crate) fn describe(&self) -> String {
        match self {
            Value::Unsigned(n) => n.to_string(),
            Value::Signed(n) => n.to_string(),
            Value::F32(n) => n.to_string(),
            Value::F64(n) => n.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::String(text) => quote(text),
            Value::Array(_) => "a list".to_owned(),
        }
    }

    /// Reads kind and value of the entry `key`.
    pub(super) fn read(reader: &mut Reader<'_>, key: &str) -> Result<Self, GgufError> {
        let kind = reader.u32("the kind of a metadata value")?;
        let what = "a metadata value";
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(reader.array(what)?).into()),
            1 => Value::Signed(i8::from_le_bytes(reader.array(what)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(reader.array(what)?).into()),
            3 => Value::Signed(i16::from_le_bytes(reader.array(what)?).into()),
            4 => Value::Unsigned(reader.u32(what)?.into()),
            5 => Value::Signed(i32::from_le_bytes(reader.array(what)?).into()),
            6 => Value::F32(f32::from_le_bytes(reader.array(what)?)),
            7 => Value::Bool(reader.take(1, what)?[0] != 0),
            8 => Value::String(reader.string(what)?),
            9 => Value::Array(Array::read(reader, key, 1)?),
            10 => Value::Unsigned(reader.u64(what)?),
            11 => Value::Signed(i64::from_le_bytes(reader.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(reader.array(what)?)),
            _ => return Err(unknown_kind(kind, key)),
        })
    }
}

impl Array {
    fn read(reader: &mut Reader<'_>, key: &str, depth: usize) -> Result<Self, GgufError> {
        if depth > MAX_DEPTH {
            return Err(GgufError::new(format!("metadata key {} nests lists too deeply", quote(key))));
        }
        let kind = reader.u32("the kind of a list")?;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10 | 11 | 12 => 8,
            9 => MIN_ARRAY_BYTES,
            _ => return Err(unknown_kind(kind, key)),
        };
        let count = reader.count(width, "items of a list")?;
        Ok(match kind {
            0 => Array::Unsigned(numbers(reader, count, u8::from_le_bytes)?),
            1 => Array::Signed(numbers(reader, count, i8::from_le_bytes)?),
            2 => Array::Unsigned(numbers(reader, count, u16::from_le_bytes)?),
            3 => Array::Signed(numbers(reader, count, i16::from_le_bytes)?),
            4 => Array::Unsigned(numbers(reader, count, u32::from_le_bytes)?),
            5 => Array::Signed(numbers(reader, count, i32::from_le_bytes)?),
            6 => Array::Floats(numbers(reader, count, f32::from_le_bytes)?),
            7 => Array::Bools(reader.take(count, "a list")?.iter().map(|&byte| byte != 0).collect()),
            8 => {
                Array::Strings((0..count).map(|_| reader.string("a list's text")).collect::<Result<_, _>>()?)
            }
            9 => Array::Arrays(
                (0..count).map(|_| Array::read(reader, key, depth + 1)).collect::<Result<_, _>>()?,
            ),
            10 => Array::Unsigned(numbers(reader, count, u64::from_le_bytes)?),
            11 => Array::Signed(numbers(reader, count, i64::from_le_bytes)?),
            _ => Array::Floats(numbers(reader, count, f64::from_le_bytes)?),
        })
    }

    /// The integers of the list as non-negative ones; `None` when one is not, or for other kinds.
    pub fn to_u64s(&self) -> Option<Vec<u64>> {
        match self {
            Array::Unsigned(items) => Some(items.clone()),
            Array::Signed(items) => items.iter().map(|&n| u64::try_from(n).ok()).collect(),
            _ => None,
        }
    }
}

/// `count` numbers of `N` bytes; the caller has checked that they fit into the file.
fn numbers<T, U: From<T>, const N: usize>(
    reader: &mut Reader<'_>,
    count: usize,
    read: fn([u8; N]) -> T,
) -> Result<Vec<U>, GgufError> {
    (0..count).map(|_| Ok(U::from(read(reader.array("a list")?)))).collect()
}

fn unknown_kind(kind: u32, key: &str) -> GgufError {
    GgufError::new(format!("metadata key {} has kind {kind}, expected 0 to 12", quote(key)))
}
