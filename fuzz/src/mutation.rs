//! Changes to inputs, the same ones in every run: what a damaged disk, a cut download or a hostile author may do to a file.

/// Numbers that are the last good or the first bad ones of something.
const INTERESTING: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    u64::MAX,
];
/// The same in text, and more that only text has.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "1",
    "0.5",
    "1e999",
    "1e300",
    "-1e300",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "1e-320",
    "99999999999999999999999999",
];
/// Values in the place of other values.
const VALUES: [&str; 10] =
    ["null", "true", "[]", "{}", "\"\"", "\"a\\nb\"", "[[]]", "{\"a\":1}", "\"\\u0000\"", "NaN"];
/// The longest input that is made.
const MAX_LEN: usize = 1 << 18;

/// A source of changes: SplitMix64.
#[derive(Debug)]
pub struct Mutator {
    state: u64,
}

impl Mutator {
    /// The same seed makes the same changes.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.state;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// Less than `end`; 0 if that is 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn choose<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }

    /// `input` with one to four changes; `other` is where foreign parts come from.
    pub fn mutate(&mut self, input: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = input.to_vec();
        for _ in 0..=self.below(4) {
            self.change(&mut bytes, other);
        }
        bytes.truncate(MAX_LEN);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        if bytes.is_empty() {
            bytes.extend_from_slice(other);
            return;
        }
        let at = self.below(bytes.len());
        let range = at..bytes.len().min(at + 1 + self.below(64));
        match self.below(11) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = self.next() as u8,
            2 => self.overwrite_number(bytes, at),
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(range)),
            5 => {
                let part = bytes[range].to_vec();
                bytes.splice(at..at, part);
            }
            6 => {
                let part = bytes[range].repeat(1 << self.below(12));
                bytes.splice(at..at, part);
            }
            7 => {
                let from = self.below(other.len());
                let part = &other[from..other.len().min(from + self.below(128))];
                bytes.splice(at..at, part.iter().copied());
            }
            8 | 9 => self.replace_text_number(bytes, at),
            _ => self.replace_text_value(bytes, at),
        }
    }

    /// A little-endian number over the bytes from `at` on.
    fn overwrite_number(&mut self, bytes: &mut [u8], at: usize) {
        let value = INTERESTING[self.below(INTERESTING.len())].wrapping_add(self.next() % 3).to_le_bytes();
        let width = [1, 2, 4, 8][self.below(4)];
        for (byte, new) in bytes[at..].iter_mut().zip(&value[..width]) {
            *byte = *new;
        }
    }

    /// Another number for the next one after `at` that is written in digits.
    fn replace_text_number(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let is_digit = |byte: &u8| byte.is_ascii_digit();
        let Some(start) = bytes[at..].iter().position(is_digit).map(|offset| at + offset) else { return };
        let end =
            bytes[start..].iter().position(|byte| !is_digit(byte)).map_or(bytes.len(), |len| start + len);
        let number = self.choose(&NUMBERS);
        bytes.splice(start..end, number.bytes());
    }

    /// Another value for what follows the next `:` after `at`, up to the next comma or bracket.
    fn replace_text_value(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let Some(start) = bytes[at..].iter().position(|&byte| byte == b':').map(|offset| at + offset + 1)
        else {
            return;
        };
        let is_end = |byte: &u8| matches!(byte, b',' | b'}' | b']');
        let end = bytes[start..].iter().position(is_end).map_or(bytes.len(), |len| start + len);
        let value = self.choose(&VALUES);
        bytes.splice(start..end, value.bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_changes() {
        let make = |seed| {
            let mut mutator = Mutator::new(seed);
            (0..200).map(|_| mutator.mutate(b"{\"a\": 12, \"b\": [3]}", b"foreign")).collect::<Vec<_>>()
        };
        assert_eq!(make(1), make(1));
        assert_ne!(make(1), make(2));
        let changed = make(1);
        assert!(changed.iter().all(|bytes| bytes.len() <= MAX_LEN));
        assert!(changed.iter().any(|bytes| bytes.windows(5).any(|part| part == b"1e999")));
        assert!(changed.iter().any(Vec::is_empty) || changed.iter().any(|bytes| bytes.len() < 19));
    }

    #[test]
    fn nothing_becomes_something() {
        assert!((0..20).all(|seed| !Mutator::new(seed).mutate(b"", b"other").is_empty() || seed > 0));
    }
}
