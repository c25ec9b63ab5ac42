//! What several tests need: numbers that look random and are the same everywhere.

/// A xorshift generator.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 32 random bits in the low half.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 32
    }

    /// `0..below`.
    pub(crate) fn below(&mut self, below: usize) -> usize {
        self.next() as usize % below
    }
}

/// A tensor for [`gguf_bytes`]: name, shape outermost first, ggml's type code, data.
pub(crate) type GgufTensor = (String, Vec<usize>, u32, Vec<u8>);

/// A GGUF file with an architecture, numbers and tensors.
pub(crate) fn gguf_bytes(
    architecture: &str,
    numbers: &[(&str, u64)],
    floats: &[(&str, f32)],
    tensors: &[GgufTensor],
) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(((1 + numbers.len() + floats.len()) as u64).to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(8_u32.to_le_bytes());
    text(&mut out, architecture);
    for (key, number) in numbers {
        text(&mut out, key);
        out.extend(10_u32.to_le_bytes());
        out.extend(number.to_le_bytes());
    }
    for (key, number) in floats {
        text(&mut out, key);
        out.extend(6_u32.to_le_bytes());
        out.extend(number.to_le_bytes());
    }
    let mut data = Vec::new();
    for (name, shape, code, bytes) in tensors {
        data.resize(usize::next_multiple_of(data.len(), 32), 0);
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        out.extend(shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        out.extend(code.to_le_bytes());
        out.extend((data.len() as u64).to_le_bytes());
        data.extend(bytes);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}
