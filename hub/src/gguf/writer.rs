//! Writes small GGUF files in memory, sound and damaged, for tests only.

use super::{GgmlType, Value};
use crate::gguf::Array;

/// A GGUF file under construction.
#[derive(Clone, Default)]
pub(crate) struct GgufWriter {
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufWriter {
    pub(crate) fn set(&mut self, key: &str, value: Value) -> &mut Self {
        self.metadata.retain(|(known, _)| known != key);
        self.metadata.push((key.to_owned(), value));
        self
    }

    pub(crate) fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.set(key, Value::String(value.to_owned()))
    }

    pub(crate) fn number(&mut self, key: &str, value: u64) -> &mut Self {
        self.set(key, Value::Unsigned(value))
    }

    pub(crate) fn texts(&mut self, key: &str, values: &[&str]) -> &mut Self {
        self.set(key, Value::Array(Array::Strings(values.iter().map(|&text| text.to_owned()).collect())))
    }

    /// A tensor of zeros; `shape` is outermost first.
    pub(crate) fn tensor(&mut self, name: &str, shape: &[u64], ggml_type: GgmlType) -> &mut Self {
        let (elements, bytes) = ggml_type.block();
        let size = shape.iter().product::<u64>() / elements * bytes;
        self.tensor_data(name, shape, ggml_type, vec![0; size as usize])
    }

    pub(crate) fn tensor_data(
        &mut self,
        name: &str,
        shape: &[u64],
        kind: GgmlType,
        data: Vec<u8>,
    ) -> &mut Self {
        let code = (0..64).find(|&code| GgmlType::from_code(code) == Some(kind)).unwrap();
        self.tensors.push((name.to_owned(), shape.iter().rev().copied().collect(), code, data));
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(b"GGUF");
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut out, key);
            write_value(&mut out, value);
        }
        let mut data = Vec::new();
        for (name, dimensions, code, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            string(&mut out, name);
            out.extend((dimensions.len() as u32).to_le_bytes());
            out.extend(dimensions.iter().flat_map(|n| n.to_le_bytes()));
            out.extend(code.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn write_value(out: &mut Vec<u8>, value: &Value) {
    let (kind, bytes) = match value {
        Value::Unsigned(n) => (10_u32, n.to_le_bytes().to_vec()),
        Value::Signed(n) => (11, n.to_le_bytes().to_vec()),
        Value::F32(n) => (6, n.to_le_bytes().to_vec()),
        Value::F64(n) => (12, n.to_le_bytes().to_vec()),
        Value::Bool(value) => (7, vec![u8::from(*value)]),
        Value::String(text) => {
            let mut bytes = Vec::new();
            string(&mut bytes, text);
            (8, bytes)
        }
        Value::Array(array) => {
            let mut bytes = Vec::new();
            write_array(&mut bytes, array);
            (9, bytes)
        }
    };
    out.extend(kind.to_le_bytes());
    out.extend(bytes);
}

fn write_array(out: &mut Vec<u8>, array: &Array) {
    let mut begin = |kind: u32, count: usize| {
        out.extend(kind.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match array {
        Array::Unsigned(items) => {
            begin(10, items.len());
            out.extend(items.iter().flat_map(|n| n.to_le_bytes()));
        }
        Array::Signed(items) => {
            begin(5, items.len());
            out.extend(items.iter().flat_map(|&n| (n as i32).to_le_bytes()));
        }
        Array::Floats(items) => {
            begin(12, items.len());
            out.extend(items.iter().flat_map(|n| n.to_le_bytes()));
        }
        Array::Bools(items) => {
            begin(7, items.len());
            out.extend(items.iter().map(|&value| u8::from(value)));
        }
        Array::Strings(items) => {
            begin(8, items.len());
            items.iter().for_each(|text| string(out, text));
        }
        Array::Arrays(items) => {
            begin(9, items.len());
            items.iter().for_each(|item| write_array(out, item));
        }
    }
}

/// A small generator (xorshift) is enough here, and makes every failure repeatable.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// `count` copies of a file, each with one to four random injuries.
pub(crate) fn mutations(sound: &[u8], count: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    (0..count).map(move |_| {
        let mut bytes = sound.to_owned();
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] = random.below(256) as u8,
                1 => bytes[at] ^= 1 << random.below(8),
                2 => bytes.truncate(at.max(1)),
                _ => {
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].fill(0xff);
                }
            }
        }
        bytes
    })
}
