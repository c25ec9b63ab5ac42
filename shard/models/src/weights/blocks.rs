//! ggml's block formats, brought to small integers with a scale and an offset per group.
//!
//! Every format here is `scale * value + offset` with values below 2^8 and one scale and offset for 16 or 32 consecutive
//! elements. Scales are kept exactly: in the K formats they are the product of a binary16 number and a 6-bit integer.

use half::f16;
use hub::gguf::GgmlType;

/// The types that are read, for messages.
pub(super) const EXPECTED: &str =
    "F32, F16, BF16, or in GGUF also Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K";
/// Elements of the longest block.
const MAX_BLOCK: usize = 256;
/// The most groups a block has.
const MAX_GROUPS: usize = 16;

/// How blocks of a type are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockFormat {
    /// Elements of a block.
    pub(super) elements: usize,
    /// Bytes of a block.
    pub(super) bytes: usize,
    /// Elements that share a scale and an offset.
    pub(super) group: usize,
    /// Values are below `2^bits`: 4 or 8, as backends pack them.
    pub(super) bits: u32,
    unpack: Unpack,
}

/// Unpacks one block.
type Unpack = fn(&[u8], Groups<'_>);

/// Where unpacked blocks go: `[elements]`, `[elements / group]`, `[elements / group]`.
pub(super) struct Groups<'a> {
    pub(super) values: &'a mut [u8],
    pub(super) scales: &'a mut [f32],
    pub(super) offsets: &'a mut [f32],
}

impl Groups<'_> {
    fn set(&mut self, group: usize, scale: f32, offset: f32) {
        (self.scales[group], self.offsets[group]) = (scale, offset);
    }
}

/// The format of a type; none for types that are plain or not read.
pub(super) fn format(ggml_type: GgmlType) -> Option<BlockFormat> {
    let (bits, group, unpack): (u32, usize, Unpack) = match ggml_type {
        GgmlType::Q4_0 => (4, 32, q4_0),
        GgmlType::Q4_1 => (4, 32, q4_1),
        GgmlType::Q5_0 => (8, 32, q5_0),
        GgmlType::Q5_1 => (8, 32, q5_1),
        GgmlType::Q8_0 => (8, 32, q8_0),
        GgmlType::Q2_K => (4, 16, q2_k),
        GgmlType::Q3_K => (4, 16, q3_k),
        GgmlType::Q4_K => (4, 32, q4_k),
        GgmlType::Q5_K => (8, 32, q5_k),
        GgmlType::Q6_K => (8, 16, q6_k),
        _ => return None,
    };
    let (elements, bytes) = ggml_type.block();
    Some(BlockFormat { elements: elements as usize, bytes: bytes as usize, group, bits, unpack })
}

impl BlockFormat {
    /// Unpacks the columns `from..from + out.values.len()` of a row; both ends are multiples of the group.
    pub(super) fn unpack_row(&self, row: &[u8], from: usize, out: Groups<'_>) {
        let mut own = Block::default();
        let (mut col, end, mut done) = (from, from + out.values.len(), 0);
        while col < end {
            let block = col / self.elements;
            let bytes = &row[block * self.bytes..(block + 1) * self.bytes];
            let skipped = col - block * self.elements;
            let count = (self.elements - skipped).min(end - col);
            let groups = done / self.group..(done + count) / self.group;
            let target = Groups {
                values: &mut out.values[done..done + count],
                scales: &mut out.scales[groups.clone()],
                offsets: &mut out.offsets[groups],
            };
            if count == self.elements {
                (self.unpack)(bytes, target);
            } else {
                (self.unpack)(bytes, own.groups(self));
                let first = skipped / self.group;
                let last = first + target.scales.len();
                target.values.copy_from_slice(&own.values[skipped..skipped + count]);
                target.scales.copy_from_slice(&own.scales[first..last]);
                target.offsets.copy_from_slice(&own.offsets[first..last]);
            }
            (col, done) = (col + count, done + count);
        }
    }

    /// Decodes the columns from `from` on, as many as `out` holds, to bfloat16.
    ///
    /// The value is computed in f32 and rounded once, to nearest, ties to even.
    pub(super) fn dequantize_row(&self, row: &[u8], from: usize, out: &mut [[u8; 2]]) {
        let mut own = Block::default();
        let mut decoded = [0_u16; MAX_BLOCK];
        let (mut col, end) = (from, from + out.len());
        let mut rest = out;
        while col < end {
            let block = col / self.elements;
            (self.unpack)(&row[block * self.bytes..(block + 1) * self.bytes], own.groups(self));
            own.to_bf16(self, &mut decoded);
            let skipped = col - block * self.elements;
            let count = (self.elements - skipped).min(end - col);
            let (now, later) = rest.split_at_mut(count);
            for (out, value) in now.iter_mut().zip(&decoded[skipped..skipped + count]) {
                *out = value.to_le_bytes();
            }
            (rest, col) = (later, col + count);
        }
    }
}

/// One unpacked block of any format.
struct Block {
    values: [u8; MAX_BLOCK],
    scales: [f32; MAX_GROUPS],
    offsets: [f32; MAX_GROUPS],
}

impl Default for Block {
    fn default() -> Self {
        Self { values: [0; MAX_BLOCK], scales: [0.0; MAX_GROUPS], offsets: [0.0; MAX_GROUPS] }
    }
}

impl Block {
    fn groups(&mut self, format: &BlockFormat) -> Groups<'_> {
        let groups = format.elements / format.group;
        Groups {
            values: &mut self.values[..format.elements],
            scales: &mut self.scales[..groups],
            offsets: &mut self.offsets[..groups],
        }
    }

    fn to_bf16(&self, format: &BlockFormat, out: &mut [u16; MAX_BLOCK]) {
        // Loops of a length the compiler knows vectorize.
        if format.group == 16 {
            self.groups_to_bf16::<16>(format, out);
        } else {
            self.groups_to_bf16::<32>(format, out);
        }
    }

    fn groups_to_bf16<const GROUP: usize>(&self, format: &BlockFormat, out: &mut [u16; MAX_BLOCK]) {
        let groups = out[..format.elements].as_chunks_mut::<GROUP>().0;
        let values = self.values[..format.elements].as_chunks::<GROUP>().0;
        for ((out, values), (scale, offset)) in
            groups.iter_mut().zip(values).zip(self.scales.iter().zip(&self.offsets))
        {
            for (out, &value) in out.iter_mut().zip(values) {
                *out = round_to_bf16(scale * f32::from(value) + offset);
            }
        }
    }
}

/// `d: f16, qs: [u8; 16]`: `d * (q - 8)`.
fn q4_0(block: &[u8], mut out: Groups<'_>) {
    let d = read_f16(block, 0);
    out.set(0, d, -8.0 * d);
    nibbles(&block[2..18], out.values);
}

/// `d: f16, m: f16, qs: [u8; 16]`: `d * q + m`.
fn q4_1(block: &[u8], mut out: Groups<'_>) {
    out.set(0, read_f16(block, 0), read_f16(block, 2));
    nibbles(&block[4..20], out.values);
}

/// `d: f16, qh: u32, qs: [u8; 16]`: `d * (q - 16)`, bit `i` of `qh` is the fifth of element `i`.
fn q5_0(block: &[u8], mut out: Groups<'_>) {
    let d = read_f16(block, 0);
    out.set(0, d, -16.0 * d);
    nibbles(&block[6..22], out.values);
    fifth_bits(&block[2..6], out.values);
}

/// `d: f16, m: f16, qh: u32, qs: [u8; 16]`: `d * q + m`.
fn q5_1(block: &[u8], mut out: Groups<'_>) {
    out.set(0, read_f16(block, 0), read_f16(block, 2));
    nibbles(&block[8..24], out.values);
    fifth_bits(&block[4..8], out.values);
}

/// `d: f16, qs: [i8; 32]`: `d * q`.
fn q8_0(block: &[u8], mut out: Groups<'_>) {
    let d = read_f16(block, 0);
    out.set(0, d, -128.0 * d);
    for (value, &q) in out.values.iter_mut().zip(&block[2..34]) {
        *value = q ^ 0x80;
    }
}

/// `scales: [u8; 16], qs: [u8; 64], d: f16, dmin: f16`: per 16 elements a 4-bit scale and a 4-bit minimum.
fn q2_k(block: &[u8], mut out: Groups<'_>) {
    let (d, dmin) = (read_f16(block, 80), read_f16(block, 82));
    for (group, &packed) in block[..16].iter().enumerate() {
        out.set(group, d * f32::from(packed & 15), -dmin * f32::from(packed >> 4));
    }
    two_bits(&block[16..80], out.values);
}

/// `hmask: [u8; 32], qs: [u8; 64], scales: [u8; 12], d: f16`: `d * (scale - 32) * (q - 4)` with 6-bit scales.
fn q3_k(block: &[u8], mut out: Groups<'_>) {
    let (high, packed, d) = (&block[..32], &block[96..108], read_f16(block, 108));
    for group in 0..16 {
        let low = packed[group % 8] >> (4 * (group / 8)) & 15;
        let top = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        let scale = d * (f32::from(low | top << 4) - 32.0);
        out.set(group, scale, -4.0 * scale);
    }
    two_bits(&block[32..96], out.values);
    for (part, values) in out.values.chunks_exact_mut(32).enumerate() {
        for (value, &bits) in values.iter_mut().zip(high) {
            *value |= (bits >> part & 1) << 2;
        }
    }
}

/// `d: f16, dmin: f16, scales: [u8; 12], qs: [u8; 128]`: per 32 elements a 6-bit scale and a 6-bit minimum.
fn q4_k(block: &[u8], mut out: Groups<'_>) {
    scales_and_minima(block, &mut out);
    nibble_pairs(&block[16..144], out.values);
}

/// `d: f16, dmin: f16, scales: [u8; 12], qh: [u8; 32], qs: [u8; 128]`: the same with a fifth bit, of group `g` in bit `g`.
fn q5_k(block: &[u8], mut out: Groups<'_>) {
    scales_and_minima(block, &mut out);
    nibble_pairs(&block[48..176], out.values);
    for (group, values) in out.values.chunks_exact_mut(32).enumerate() {
        for (value, &bits) in values.iter_mut().zip(&block[16..48]) {
            *value |= (bits >> group & 1) << 4;
        }
    }
}

/// `ql: [u8; 128], qh: [u8; 64], scales: [i8; 16], d: f16`: `d * scale * (q - 32)`.
fn q6_k(block: &[u8], mut out: Groups<'_>) {
    let d = read_f16(block, 208);
    for (group, &scale) in block[192..208].iter().enumerate() {
        let scale = d * f32::from(scale.cast_signed());
        out.set(group, scale, -32.0 * scale);
    }
    for (half, values) in out.values.chunks_exact_mut(128).enumerate() {
        let (low, high) = (&block[half * 64..half * 64 + 64], &block[128 + half * 32..160 + half * 32]);
        // Four runs of 32: low halves of the first and the second 32 bytes, then the high halves.
        for (run, values) in values.chunks_exact_mut(32).enumerate() {
            let low = &low[run % 2 * 32..run % 2 * 32 + 32];
            for ((value, &low), &high) in values.iter_mut().zip(low).zip(high) {
                *value = low >> (4 * (run / 2)) & 15 | (high >> (2 * run) & 3) << 4;
            }
        }
    }
}

/// The low halves of the bytes are the first 16 elements, the high halves the others.
fn nibbles(bytes: &[u8], values: &mut [u8]) {
    let (low, high) = values.split_at_mut(bytes.len());
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// Runs of 32 bytes, each with the low halves of a group and then the high halves of the next.
fn nibble_pairs(bytes: &[u8], values: &mut [u8]) {
    for (bytes, values) in bytes.chunks_exact(32).zip(values.chunks_exact_mut(64)) {
        nibbles(bytes, values);
    }
}

fn fifth_bits(bits: &[u8], values: &mut [u8]) {
    for (values, &bits) in values.chunks_exact_mut(8).zip(bits) {
        for (bit, value) in values.iter_mut().enumerate() {
            *value |= (bits >> bit & 1) << 4;
        }
    }
}

/// Runs of 32 bytes; the first two bits of all are 32 elements, the next two bits the next 32, and so on.
fn two_bits(bytes: &[u8], values: &mut [u8]) {
    for (bytes, values) in bytes.chunks_exact(32).zip(values.chunks_exact_mut(128)) {
        for (part, values) in values.chunks_exact_mut(32).enumerate() {
            for (value, &byte) in values.iter_mut().zip(bytes) {
                *value = byte >> (2 * part) & 3;
            }
        }
    }
}

/// Of the 12 bytes after `d` and `dmin`: the first four groups have scale and minimum in six bits of a byte; the two bits left
/// over in each are the highest of the other groups.
fn scales_and_minima(block: &[u8], out: &mut Groups<'_>) {
    let (d, dmin, packed) = (read_f16(block, 0), read_f16(block, 2), &block[4..16]);
    for group in 0..4 {
        out.set(group, d * f32::from(packed[group] & 63), -dmin * f32::from(packed[group + 4] & 63));
        let scale = packed[group + 8] & 15 | packed[group] >> 6 << 4;
        let minimum = packed[group + 8] >> 4 | packed[group + 4] >> 6 << 4;
        out.set(group + 4, d * f32::from(scale), -dmin * f32::from(minimum));
    }
}

fn read_f16(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The bits of the nearest bfloat16, ties to even; a NaN stays one. Free of branches, unlike `half`'s, so that it
/// vectorizes.
pub(super) fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    (if value.is_nan() { nan } else { rounded }) as u16
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
