//! Numbers of eight bits (OCP 8-bit floating point): E4M3 for weights and activations, both for the KV cache.

/// A format of eight bits: sign, exponent, mantissa.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fp8Format {
    /// Four bits of exponent, three of mantissa; no infinities, up to 448.
    E4M3,
    /// Five bits of exponent, two of mantissa; up to 57344.
    E5M2,
}

impl Fp8Format {
    /// The largest finite number.
    pub const fn max(self) -> f32 {
        match self {
            Fp8Format::E4M3 => 448.0,
            Fp8Format::E5M2 => 57344.0,
        }
    }

    const fn mantissa_bits(self) -> u32 {
        match self {
            Fp8Format::E4M3 => 3,
            Fp8Format::E5M2 => 2,
        }
    }

    const fn bias(self) -> i32 {
        match self {
            Fp8Format::E4M3 => 7,
            Fp8Format::E5M2 => 15,
        }
    }

    const fn is_nan(self, magnitude: u8) -> bool {
        match self {
            Fp8Format::E4M3 => magnitude == 0x7f,
            Fp8Format::E5M2 => magnitude > 0x7c,
        }
    }

    /// What `bits` stands for.
    pub const fn decode(self, bits: u8) -> f32 {
        let magnitude = bits & 0x7f;
        let mantissa = self.mantissa_bits();
        let (exponent, fraction) =
            ((magnitude >> mantissa) as i32, (magnitude & ((1 << mantissa) - 1)) as f32);
        let unit = 1.0 / (1_u32 << mantissa) as f32;
        let value = if self.is_nan(magnitude) {
            f32::NAN
        } else if matches!(self, Fp8Format::E5M2) && magnitude == 0x7c {
            f32::INFINITY
        } else if exponent == 0 {
            fraction * unit * power_of_two(1 - self.bias())
        } else {
            (1.0 + fraction * unit) * power_of_two(exponent - self.bias())
        };
        if bits & 0x80 == 0 { value } else { -value }
    }

    /// The nearest number, ties to even; what is beyond the largest becomes the largest.
    pub fn encode(self, value: f32) -> u8 {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        if value.is_nan() {
            return sign | 0x7f;
        }
        let magnitude = value.abs().min(self.max());
        // The step between neighbours: of the value's power of two, or of the smallest normal number's.
        let exponent = (magnitude.to_bits() >> 23) as i32 - 127;
        let exponent = exponent.max(1 - self.bias());
        let step = power_of_two(exponent - self.mantissa_bits() as i32);
        // At most 16 steps, a number that f32 has exactly.
        let steps = (magnitude / step).round_ties_even() as u32;
        let normal = 1 << self.mantissa_bits();
        // A normal number has `normal` steps or more. One that was rounded up to the next power of two has twice as many, which
        // carries into the exponent.
        let raised = (exponent + self.bias()) as u32;
        let bits = if steps < normal { steps } else { (raised << self.mantissa_bits()) + (steps - normal) };
        sign | bits as u8
    }
}

/// `2^exponent` of a normal f32.
const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

const fn decoded(format: Fp8Format) -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        table[bits] = format.decode(bits as u8);
        bits += 1;
    }
    table
}

/// What each byte stands for.
const E4M3: [f32; 256] = decoded(Fp8Format::E4M3);

/// A row-major matrix `[rows, cols]` of E4M3 numbers with a scale for each row, or for each few columns of each row:
/// `w[r][c] = scales[r][(skipped + c) / group] * value[r][c]`. Possibly a window into a larger one.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Matrix<'a> {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns of the window.
    pub cols: usize,
    /// Elements from the start of one row to the start of the next, at least `cols`.
    pub row_stride: usize,
    /// At least `(rows - 1) * row_stride + cols` elements.
    pub bytes: std::borrow::Cow<'a, [u8]>,
    /// Columns that share a scale; `usize::MAX`: all.
    pub group: usize,
    /// Columns of the first group that lie before the window.
    pub skipped: usize,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
}

impl Fp8Matrix<'_> {
    /// Scales of a row.
    pub fn groups(&self) -> usize {
        self.skipped.saturating_add(self.cols).div_ceil(self.group.max(1)).max(1)
    }

    /// Whether a row has one scale.
    pub fn has_row_scales(&self) -> bool {
        self.groups() == 1
    }

    /// Copies row `row` as f32 into `out` (`[cols]`).
    ///
    /// # Panics
    /// When `row` or `out.len()` does not fit the matrix.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} x {}", self.rows, self.cols);
        let groups = self.groups();
        let bytes = &self.bytes[row * self.row_stride..][..self.cols];
        let scales = &self.scales[row * groups..][..groups];
        let mut first = 0;
        for (index, &scale) in scales.iter().enumerate() {
            let end = self.group.saturating_mul(index + 1).saturating_sub(self.skipped).min(self.cols);
            for (out, &byte) in out[first..end].iter_mut().zip(&bytes[first..end]) {
                *out = scale * E4M3[usize::from(byte)];
            }
            first = end;
        }
    }

    /// The same numbers in f32.
    pub fn dequantized(&self) -> crate::HostMatrix<'static> {
        let mut values = vec![0.0_f32; self.rows * self.cols];
        for (row, out) in values.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.read_row(row, out);
        }
        crate::HostMatrix {
            dtype: crate::DType::F32,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.cols,
            bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_standard() {
        let e4m3 = |bits| Fp8Format::E4M3.decode(bits);
        assert_eq!([e4m3(0x00), e4m3(0x38), e4m3(0x7e), e4m3(0xb8)], [0.0, 1.0, 448.0, -1.0]);
        assert_eq!([e4m3(0x01), e4m3(0x07), e4m3(0x08)], [1.0 / 512.0, 7.0 / 512.0, 1.0 / 64.0]);
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        let e5m2 = |bits| Fp8Format::E5M2.decode(bits);
        assert_eq!(
            [e5m2(0x3c), e5m2(0x7b), e5m2(0x01), e5m2(0x7c)],
            [1.0, 57344.0, 2_f32.powi(-16), f32::INFINITY]
        );
        assert!(e5m2(0x7d).is_nan());
    }

    #[test]
    fn every_number_is_its_own_nearest() {
        for format in [Fp8Format::E4M3, Fp8Format::E5M2] {
            for bits in 0..=255_u8 {
                let value = format.decode(bits);
                if value.is_finite() {
                    assert_eq!(format.encode(value), bits, "{format:?} {value}");
                }
            }
            assert!(format.decode(format.encode(f32::NAN)).is_nan());
            assert_eq!(format.decode(format.encode(f32::INFINITY)), format.max());
            assert_eq!(format.decode(format.encode(-1e30)), -format.max());
        }
    }

    #[test]
    fn what_lies_between_goes_to_the_nearest_and_ties_to_even() {
        for format in [Fp8Format::E4M3, Fp8Format::E5M2] {
            for bits in 0..0x7f_u8 {
                let (low, high) = (format.decode(bits), format.decode(bits + 1));
                if !high.is_finite() {
                    break;
                }
                let middle = (low + high) / 2.0;
                let even = if bits % 2 == 0 { bits } else { bits + 1 };
                assert_eq!(format.encode(middle), even, "{format:?} {middle}");
                assert_eq!(format.encode(middle.next_down()), bits, "{format:?} below {middle}");
                assert_eq!(format.encode(middle.next_up()), bits + 1, "{format:?} above {middle}");
            }
        }
    }

    #[test]
    fn a_window_keeps_its_scales() {
        let matrix = Fp8Matrix {
            rows: 2,
            cols: 3,
            row_stride: 4,
            bytes: vec![0x38, 0x38, 0x38, 0, 0x38, 0x40, 0xb8].into(),
            group: 2,
            skipped: 1,
            scales: vec![1.0, 2.0, 3.0, 4.0],
        };
        assert_eq!(matrix.groups(), 2);
        let mut row = [0.0; 3];
        matrix.read_row(0, &mut row);
        assert_eq!(row, [1.0, 2.0, 2.0]);
        matrix.read_row(1, &mut row);
        assert_eq!(row, [3.0, 8.0, -4.0]);
        let whole = Fp8Matrix { group: usize::MAX, scales: vec![5.0, 6.0], ..matrix };
        assert!(whole.has_row_scales());
        whole.read_row(1, &mut row);
        assert_eq!(row, [6.0, 12.0, -6.0]);
    }
}
