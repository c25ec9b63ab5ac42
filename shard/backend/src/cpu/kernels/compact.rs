//! bf16 weights without loss in 12 bits: sign and mantissa as a byte, the exponent as four bits relative to the largest of its
//! group. Decoding waits for memory, and these are three quarters of the bytes.
//!
//! Sixty-four inputs of one output make a group. Its base is its largest exponent (of finite weights); the four bits are 1 to 15
//! for the exponents from `base - 14` to `base`, and 0 for zero. What lies below or is no finite number is an [`Exception`]:
//! zero in the panel, and added to the sums afterwards. The sign of zero is not kept: sums begin with positive zero, which neither
//! adding a negative zero nor a positive one changes.
//!
//! Four steps of two inputs and sixteen outputs make a quad, three cache lines: the steps' bytes, 32 each, then 32 words with four
//! bits of each step. A step's bf16 bits are `(bytes widened with their sign ^ words shifted) & SIGN_EXPONENT_MANTISSA`, and where
//! that is not zero, plus the base. For that to be so few instructions everything that the exclusive or mixes in is
//! mixed in beforehand when weights are encoded: the sign into the exponent's bits, neighbours' exponents into sign and mantissa.

use super::matmul::{Bf16Pairs, MatmulArgs, Place, Weight, padded_tile};
use super::simd::{LANES, Simd};

/// Inputs that share a base.
pub(in crate::cpu) const GROUP: usize = 64;
/// Steps of a quad.
const QUAD: usize = 4;
/// bf16 weights of a step: sixteen pairs.
const PAIRS: usize = 2 * LANES;
/// Bytes of a quad of steps.
pub(in crate::cpu) const QUAD_BYTES: usize = 192;
/// Inputs of a quad.
pub(in crate::cpu) const QUAD_INPUTS: usize = 2 * QUAD;
/// Where a quad's exponents begin.
pub(super) const QUAD_EXPONENTS: usize = QUAD * PAIRS;
/// Quads of a group.
const GROUP_QUADS: usize = GROUP / QUAD_INPUTS;
/// Bits that a step has after the exclusive or: sign, four bits of exponent, mantissa.
pub(super) const SIGN_EXPONENT_MANTISSA: u16 = 0x87FF;
/// Exponents of a window, and the smallest base: so no exponent of the window is a denormal's.
pub(super) const WINDOW: u16 = 15;
/// Tiles that decode in registers, each anew; of more a panel is decoded into memory once.
const IN_REGISTERS_TILES: usize = 2;
/// How far ahead of the arithmetic a weight stream is asked for, as for other weights.
const PREFETCH_BYTES: usize = 2048;

/// A weight that four bits of exponent do not reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::cpu) struct Exception {
    pub(in crate::cpu) input: u32,
    /// Output within its panel.
    pub(in crate::cpu) lane: u16,
    /// Its bits.
    pub(in crate::cpu) value: half::bf16,
}

/// What belongs to panels beside their quads, from the first panel that a product gets on.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct CompactPanels<'a> {
    /// `[panel][group][16]`.
    pub(in crate::cpu) bases: &'a [u8],
    /// Of all panels of the layer.
    pub(in crate::cpu) exceptions: &'a [Exception],
    /// Where each panel's exceptions begin, and where the last one's end.
    pub(in crate::cpu) first_exceptions: &'a [u32],
}

impl<'a> CompactPanels<'a> {
    /// The bases of a panel of so many quads.
    pub(super) fn bases(&self, panel: usize, quads: usize) -> &'a [u8] {
        let len = bases_len(quads);
        &self.bases[panel * len..(panel + 1) * len]
    }

    fn exceptions(&self, panel: usize) -> &'a [Exception] {
        &self.exceptions[self.first_exceptions[panel] as usize..self.first_exceptions[panel + 1] as usize]
    }
}

/// The kernels of compact weights.
///
/// Calling one is unsafe because it uses the instruction set.
#[derive(Debug)]
pub(in crate::cpu) struct CompactKernels {
    /// Encodes a panel.
    pub(in crate::cpu) encode: unsafe fn(&[u32], EncodedPanel<'_>),
    /// Multiplies panels by activations packed for bf16 weights, with memory for a panel of bf16 or none.
    pub(in crate::cpu) matmul: unsafe fn(&MatmulArgs<'_>, &CompactPanels<'_>, &mut [u32]),
    /// 32-bit elements of that memory, of the rows and of the quads of a panel; without it the product is the same, but slower.
    pub(in crate::cpu) scratch_elements: fn(usize, usize) -> usize,
}

/// Where an encoded panel goes.
pub(in crate::cpu) struct EncodedPanel<'a> {
    pub(in crate::cpu) quads: &'a mut [u8],
    /// Sixteen for each group.
    pub(in crate::cpu) bases: &'a mut [u8],
    pub(in crate::cpu) exceptions: &'a mut Vec<Exception>,
}

/// Bytes of the bases of a panel of so many quads.
pub(in crate::cpu) const fn bases_len(quads: usize) -> usize {
    quads.div_ceil(GROUP_QUADS) * LANES
}

/// Whether a layer is kept compact: the exceptions, each of which costs as much as a whole step, are at most 0.3 % of its weights.
pub(in crate::cpu) const fn is_worth_it(exceptions: usize, weights: usize) -> bool {
    exceptions <= max_exceptions(weights)
}

/// The largest number of exceptions for which [`is_worth_it`].
pub(in crate::cpu) const fn max_exceptions(weights: usize) -> usize {
    weights / 1000 * 3
}

/// A step's exponents at their place, the neighbours' around them.
#[inline(always)]
const fn shifted(exponents: u16, step: usize) -> u16 {
    match step {
        0 => exponents << 7,
        1 => exponents << 3,
        2 => exponents >> 1,
        _ => exponents >> 5,
    }
}

/// Encodes a panel of bf16 pairs, `[steps][16]` with a multiple of four steps.
#[inline(always)]
fn encode(panel: &[u32], out: EncodedPanel<'_>) {
    let groups = panel.chunks(GROUP_QUADS * QUAD * LANES).zip(out.bases.as_chunks_mut::<LANES>().0);
    for (index, (group, bases)) in groups.enumerate() {
        let steps: &[[u16; PAIRS]] = bytemuck::cast_slice(group);
        let lowest = lowest_exponents(steps, bases);
        let first = index * GROUP_QUADS;
        let encoded = out.quads.as_chunks_mut::<QUAD_BYTES>().0[first..].iter_mut();
        for (quad, (steps, encoded)) in steps.as_chunks::<QUAD>().0.iter().zip(encoded).enumerate() {
            if encode_quad(steps, &lowest, encoded) {
                find_exceptions(steps, &lowest, (first + quad) * QUAD_INPUTS, out.exceptions);
            }
        }
    }
}

/// The exponent below the window of each place of a step; stores the bases.
#[inline(always)]
fn lowest_exponents(steps: &[[u16; PAIRS]], bases: &mut [u8; LANES]) -> [u16; PAIRS] {
    let mut largest = [WINDOW; PAIRS];
    for step in steps {
        for (largest, &weight) in largest.iter_mut().zip(step) {
            let exponent = weight >> 7 & 0xFF;
            *largest = (*largest).max(if exponent == 0xFF { 0 } else { exponent });
        }
    }
    let mut lowest = [0; PAIRS];
    for (lane, base) in bases.iter_mut().enumerate() {
        let largest = largest[2 * lane].max(largest[2 * lane + 1]);
        *base = largest as u8;
        lowest[2 * lane] = largest - WINDOW;
        lowest[2 * lane + 1] = largest - WINDOW;
    }
    lowest
}

/// Whether four bits of exponent reach a weight.
#[inline(always)]
const fn fits(weight: u16, lowest: u16) -> bool {
    let exponent = weight >> 7 & 0xFF;
    exponent > lowest && exponent != 0xFF
}

/// Encodes four steps; whether there is an exception among them.
#[inline(always)]
fn encode_quad(steps: &[[u16; PAIRS]; QUAD], lowest: &[u16; PAIRS], out: &mut [u8; QUAD_BYTES]) -> bool {
    let (bytes, words) = out.split_at_mut(QUAD_EXPONENTS);
    let [bytes0, bytes1, bytes2, bytes3] = bytes.as_chunks_mut::<PAIRS>().0 else { return false };
    let words = words.as_chunks_mut::<2>().0;
    let mut lost = 0;
    for place in 0..PAIRS {
        let weights = [steps[0][place], steps[1][place], steps[2][place], steps[3][place]];
        let kept = weights.map(|weight| if fits(weight, lowest[place]) { weight } else { 0 });
        for i in 0..QUAD {
            lost |= (kept[i] ^ weights[i]) & 0x7FFF;
        }
        let exponent = kept.map(|weight| (weight >> 7 & 0xFF).saturating_sub(lowest[place]));
        // The sign fills the bits of the exponent too, unless the exponents shifted have a bit at its place.
        let fill = |negative: u16| 0u16.wrapping_sub(negative) & 0xF;
        let (sign3, sign2) = (kept[3] >> 15, kept[2] >> 15);
        let (exponent3, exponent2) = (exponent[3] ^ fill(sign3), exponent[2] ^ fill(sign2));
        let (sign1, sign0) = (kept[1] >> 15 ^ exponent3 & 1, kept[0] >> 15 ^ exponent2 & 1);
        let (exponent1, exponent0) = (exponent[1] ^ fill(sign1), exponent[0] ^ fill(sign0));
        let word = exponent0 | exponent1 << 4 | exponent2 << 8 | exponent3 << 12;
        words[place] = word.to_le_bytes();
        bytes0[place] = (sign0 << 7 | (kept[0] ^ shifted(word, 0)) & 0x7F) as u8;
        bytes1[place] = (sign1 << 7 | (kept[1] ^ shifted(word, 1)) & 0x7F) as u8;
        bytes2[place] = (sign2 << 7 | (kept[2] ^ shifted(word, 2)) & 0x7F) as u8;
        bytes3[place] = (sign3 << 7 | (kept[3] ^ shifted(word, 3)) & 0x7F) as u8;
    }
    lost != 0
}

/// Collects the exceptions of a quad whose first input is `input`.
#[cold]
fn find_exceptions(
    steps: &[[u16; PAIRS]; QUAD],
    lowest: &[u16; PAIRS],
    input: usize,
    exceptions: &mut Vec<Exception>,
) {
    for (step, weights) in steps.iter().enumerate() {
        for (place, (&weight, &lowest)) in weights.iter().zip(lowest).enumerate() {
            if weight & 0x7FFF != 0 && !fits(weight, lowest) {
                exceptions.push(Exception {
                    input: (input + 2 * step + place % 2) as u32,
                    lane: (place / 2) as u16,
                    value: half::bf16::from_bits(weight),
                });
            }
        }
    }
}

/// Input `input` of output `lane` of a panel, without its exceptions.
pub(in crate::cpu) fn decode(quads: &[u8], bases: &[u8], input: usize, lane: usize) -> half::bf16 {
    let quad = &quads[input / QUAD_INPUTS * QUAD_BYTES..][..QUAD_BYTES];
    let (step, place) = (input % QUAD_INPUTS / 2, 2 * lane + input % 2);
    let at = QUAD_EXPONENTS + 2 * place;
    let exponents = u16::from_le_bytes([quad[at], quad[at + 1]]);
    let base = bases[input / GROUP * LANES + lane];
    half::bf16::from_bits(decoded(quad[step * PAIRS + place], shifted(exponents, step), base))
}

/// A weight's bits from its byte, the shifted exponents, and its base.
#[inline(always)]
fn decoded(byte: u8, exponents: u16, base: u8) -> u16 {
    let bits = (i16::from(byte.cast_signed()).cast_unsigned() ^ exponents) & SIGN_EXPONENT_MANTISSA;
    if bits == 0 { 0 } else { bits + ((u16::from(base) - WINDOW) << 7) }
}

/// Decoding in registers.
///
/// # Safety
/// As for [`Simd`].
pub(in crate::cpu) trait CompactSimd: Simd {
    /// What the bases of a group add to the bits of a step.
    type Bases: Copy;
    /// The bf16 bits of a step, sixteen pairs.
    type Step: Copy;
    /// Reads sixteen bytes.
    unsafe fn bases(from: *const u8) -> Self::Bases;
    /// Reads a quad.
    unsafe fn quad(from: *const u8, bases: Self::Bases) -> [Self::Step; QUAD];
    /// The first of each pair, then the second.
    unsafe fn widen(step: Self::Step) -> (Self::V, Self::V);
    /// Writes 64 bytes.
    unsafe fn store_step(to: *mut u32, step: Self::Step);
}

/// Weights that can be made from the bits of a step.
///
/// # Safety
/// As for [`Weight`].
pub(in crate::cpu) trait CompactWeight<S: CompactSimd>: Weight<S> {
    unsafe fn from_step(step: S::Step) -> Self::Loaded;
    /// The activation of a step's first or second input.
    unsafe fn activation(x: *const u32, input: usize) -> f32;
}

impl<S: CompactSimd> CompactWeight<S> for Bf16Pairs {
    #[inline(always)]
    unsafe fn from_step(step: S::Step) -> Self::Loaded {
        // SAFETY: the contract of the trait.
        unsafe { S::widen(step) }
    }
    #[inline(always)]
    unsafe fn activation(x: *const u32, input: usize) -> f32 {
        // SAFETY: a step has two elements.
        unsafe { x.cast::<f32>().add(input).read() }
    }
}

/// As [`CompactSimd`] says, a place at a time.
impl CompactSimd for super::portable::Portable {
    type Bases = [u8; LANES];
    type Step = [u16; PAIRS];
    #[inline(always)]
    unsafe fn bases(from: *const u8) -> Self::Bases {
        // SAFETY: the caller gives sixteen bytes.
        unsafe { from.cast::<Self::Bases>().read() }
    }
    #[inline(always)]
    unsafe fn quad(from: *const u8, bases: Self::Bases) -> [Self::Step; QUAD] {
        // SAFETY: the caller gives a quad.
        let (bytes, exponents) = unsafe {
            let bytes = from.cast::<[[u8; PAIRS]; QUAD]>().read();
            (bytes, from.add(QUAD_EXPONENTS).cast::<[u16; PAIRS]>().read_unaligned())
        };
        std::array::from_fn(|step| {
            std::array::from_fn(|place| {
                let exponents = shifted(u16::from_le(exponents[place]), step);
                decoded(bytes[step][place], exponents, bases[place / 2])
            })
        })
    }
    #[inline(always)]
    unsafe fn widen(step: Self::Step) -> (Self::V, Self::V) {
        let widened = |place: usize| f32::from_bits(u32::from(step[place]) << 16);
        (std::array::from_fn(|lane| widened(2 * lane)), std::array::from_fn(|lane| widened(2 * lane + 1)))
    }
    #[inline(always)]
    unsafe fn store_step(to: *mut u32, step: Self::Step) {
        // SAFETY: the caller gives 64 bytes.
        unsafe { to.cast::<Self::Step>().write_unaligned(step) }
    }
}

/// Computes some panels for all tokens. Tiles are decoded in registers, each anew; where there are several and memory for a panel, it
/// is decoded once.
///
/// # Safety
/// As for [`super::matmul::panels`] with compact panels as weights; `compact` is theirs, and `args.steps` whole quads.
#[inline(always)]
unsafe fn panels<S: CompactSimd, W: CompactWeight<S>>(
    args: &MatmulArgs<'_>,
    compact: &CompactPanels<'_>,
    scratch: &mut [u32],
) {
    let quads = args.steps / QUAD;
    for panel in args.panels.clone() {
        // SAFETY: the panel lies within what the caller gave.
        unsafe {
            let from = args.weights.add(panel * quads * QUAD_BYTES);
            let bases = compact.bases(panel, quads);
            if args.rows > IN_REGISTERS_TILES * S::MAX_TILE && scratch.len() >= args.steps * LANES {
                let restored = &mut scratch[..args.steps * LANES];
                restore::<S>(from, bases, compact.exceptions(panel), restored);
                super::matmul::panel::<S, W>(args, panel, restored.as_ptr().cast());
            } else {
                panel_in_registers::<S, W>(args, panel, (from, bases), compact.exceptions(panel));
            }
        }
    }
}

/// Decodes a panel into steps of bf16 pairs.
///
/// # Safety
/// The processor has the instruction set; `from` is valid for the quads that fill `out`.
#[inline(always)]
unsafe fn restore<S: CompactSimd>(from: *const u8, bases: &[u8], exceptions: &[Exception], out: &mut [u32]) {
    const STEP: usize = LANES * QUAD;
    let groups = out.chunks_mut(GROUP_QUADS * STEP).zip(bases.as_chunks::<LANES>().0);
    for (group, (out, bases)) in groups.enumerate() {
        // SAFETY: the quads lie within what the caller gave; each step has its sixteen elements.
        unsafe {
            let bases = S::bases(bases.as_ptr());
            for (quad, out) in out.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
                let from = from.add((group * GROUP_QUADS + quad) * QUAD_BYTES);
                prefetch_quad::<S>(from);
                for (step, weights) in S::quad(from, bases).into_iter().enumerate() {
                    S::store_step(out.as_mut_ptr().add(step * LANES), weights);
                }
            }
        }
    }
    let out: &mut [[u16; 2]] = bytemuck::cast_slice_mut(out);
    for exception in exceptions {
        let input = exception.input as usize;
        out[input / 2 * LANES + usize::from(exception.lane)][input % 2] = exception.value.to_bits();
    }
}

/// Asks for a quad further on.
#[inline(always)]
pub(super) unsafe fn prefetch_quad<S: Simd>(from: *const u8) {
    for line in 0..QUAD_BYTES / 64 {
        // SAFETY: a prefetch may point anywhere.
        unsafe { S::prefetch(from.wrapping_add(PREFETCH_BYTES + line * 64)) };
    }
}

/// One panel for all tokens, tile by tile.
///
/// # Safety
/// As for [`panels`].
#[inline(always)]
unsafe fn panel_in_registers<S: CompactSimd, W: CompactWeight<S>>(
    args: &MatmulArgs<'_>,
    panel: usize,
    (w, bases): (*const u8, &[u8]),
    exceptions: &[Exception],
) {
    let w = (w, args.steps / QUAD);
    let mut row = 0;
    while row < args.rows {
        let count = (args.rows - row).min(S::MAX_TILE);
        // SAFETY: the tile lies within what the caller gave.
        unsafe {
            let x = args.x.add(row * args.steps * W::STEP_INPUTS);
            let place = Place { args, panel, row, count };
            match padded_tile(count) {
                1 => place.store::<S, 1>(tile::<S, W, 1, 4>(w, bases, x)),
                // Two registers a vector leave no room for more accumulators.
                2 if S::MAX_TILE < 6 => place.store::<S, 2>(tile::<S, W, 2, 2>(w, bases, x)),
                2 => place.store::<S, 2>(tile::<S, W, 2, 4>(w, bases, x)),
                3 if S::MAX_TILE < 6 => place.store::<S, 3>(tile::<S, W, 3, 1>(w, bases, x)),
                4 if S::MAX_TILE < 6 => place.store::<S, 4>(tile::<S, W, 4, 1>(w, bases, x)),
                3 => place.store::<S, 3>(tile::<S, W, 3, 2>(w, bases, x)),
                4 => place.store::<S, 4>(tile::<S, W, 4, 2>(w, bases, x)),
                6 if S::MAX_TILE >= 6 => place.store::<S, 6>(tile::<S, W, 6, 1>(w, bases, x)),
                8 if S::MAX_TILE >= 8 => place.store::<S, 8>(tile::<S, W, 8, 1>(w, bases, x)),
                16 if S::MAX_TILE >= 16 => place.store::<S, 16>(tile::<S, W, 16, 1>(w, bases, x)),
                _ if S::MAX_TILE >= 24 => place.store::<S, 24>(tile::<S, W, 24, 1>(w, bases, x)),
                _ => unreachable!("a tile has at most MAX_TILE tokens"),
            }
            for exception in exceptions {
                let input = exception.input as usize;
                let x = x.add(input / 2 * padded_tile(count) * 2);
                let weight = exception.value.to_f32();
                place.add(usize::from(exception.lane), |t| weight * W::activation(x.add(2 * t), input % 2));
            }
        }
        row += count;
    }
}

/// `T` tokens times one panel of so many quads, of which `U` steps at a time have accumulators of their own.
///
/// # Safety
/// `w` is valid for its quads, `x` for the steps of `T` tokens.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices with constant bounds are unrolled into registers"
)]
unsafe fn tile<S: CompactSimd, W: CompactWeight<S>, const T: usize, const U: usize>(
    (mut w, quads): (*const u8, usize),
    bases: &[u8],
    mut x: *const u32,
) -> [S::V; T] {
    // SAFETY: all offsets are below the sizes the caller vouches for.
    unsafe {
        let mut acc = [[S::splat(0.0); T]; U];
        let mut rest = quads;
        for bases in bases.as_chunks::<LANES>().0 {
            let bases = S::bases(bases.as_ptr());
            for _ in 0..rest.min(GROUP_QUADS) {
                prefetch_quad::<S>(w);
                let steps = S::quad(w, bases);
                for step in 0..QUAD {
                    let loaded = W::from_step(steps[step]);
                    for t in 0..T {
                        let x = x.add((step * T + t) * W::STEP_INPUTS);
                        acc[step % U][t] = W::dot(acc[step % U][t], loaded, x);
                    }
                }
                w = w.add(QUAD_BYTES);
                x = x.add(QUAD * T * W::STEP_INPUTS);
            }
            rest -= rest.min(GROUP_QUADS);
        }
        let mut total = acc[0];
        for part in &acc[1..] {
            for t in 0..T {
                total[t] = S::add(total[t], part[t]);
            }
        }
        total
    }
}

/// The kernels of one instruction set: `name, Simd type, bf16 weight type, scratch, features`.
macro_rules! compact_kernels {
    ($name:ident, $module:ident, $simd:ty, $weight:ty, $scratch:expr $(, $feature:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])?
            unsafe fn encode(panel: &[u32], out: EncodedPanel<'_>) {
                super::encode(panel, out);
            }

            $(#[target_feature(enable = $feature)])?
            unsafe fn matmul(args: &MatmulArgs<'_>, compact: &CompactPanels<'_>, scratch: &mut [u32]) {
                // SAFETY: the function enables the instruction set; the rest is the caller's contract.
                unsafe { panels::<$simd, $weight>(args, compact, scratch) }
            }

            pub(in crate::cpu::kernels) static KERNELS: CompactKernels =
                CompactKernels { encode, matmul, scratch_elements: $scratch };
        }
        pub(super) use $module::KERNELS as $name;
    };
}

#[cfg(target_arch = "x86_64")]
compact_kernels!(
    AVX2,
    avx2_kernels,
    crate::cpu::kernels::avx2::Avx2,
    Bf16Pairs,
    |rows, quads| {
        if rows > IN_REGISTERS_TILES * crate::cpu::kernels::avx2::Avx2::MAX_TILE {
            quads * QUAD * LANES
        } else {
            0
        }
    },
    "avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
compact_kernels!(
    AVX512_BF16,
    avx512_bf16_kernels,
    crate::cpu::kernels::avx512::Avx512,
    crate::cpu::kernels::avx512::Bf16Dot,
    |_, _| 0,
    "avx512f,avx512bf16,avx512vnni,avx512bw,avx512vl,avx2,fma,f16c"
);
#[cfg(test)]
compact_kernels!(PORTABLE, portable_kernels, super::super::portable::Portable, Bf16Pairs, |_, _| 0);

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits of weights in the window below `base`, zeros among them, from a generator of numbers.
    fn window(state: &mut u64, base: u16) -> u16 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let bits = (*state >> 33) as u16;
        let exponent = base - (*state >> 50) as u16 % WINDOW;
        if bits.is_multiple_of(17) { 0 } else { bits & 0x807F | exponent << 7 }
    }

    /// A panel of `quads` quads and what it is encoded to.
    fn panel(quads: usize, weight: impl FnMut(usize) -> u16) -> (Vec<u16>, Vec<u8>, Vec<u8>, Vec<Exception>) {
        let weights: Vec<u16> = (0..quads * QUAD * PAIRS).map(weight).collect();
        let (mut encoded, mut bases) = (vec![0; quads * QUAD_BYTES], vec![0; bases_len(quads)]);
        let mut exceptions = Vec::new();
        let out = EncodedPanel { quads: &mut encoded, bases: &mut bases, exceptions: &mut exceptions };
        encode(bytemuck::cast_slice(&weights), out);
        (weights, encoded, bases, exceptions)
    }

    fn at(weights: &[u16], input: usize, lane: usize) -> u16 {
        weights[input / 2 * PAIRS + 2 * lane + input % 2]
    }

    #[test]
    fn weights_in_the_window_are_kept_to_the_last_bit() {
        let mut state = 1;
        for (quads, base) in [(1, 15), (8, 120), (9, 200), (20, 254)] {
            let (weights, encoded, bases, exceptions) = panel(quads, |_| window(&mut state, base));
            assert_eq!(exceptions, []);
            for input in 0..quads * QUAD_INPUTS {
                for lane in 0..LANES {
                    let found = decode(&encoded, &bases, input, lane).to_bits();
                    assert_eq!(
                        found,
                        at(&weights, input, lane),
                        "base {base}, input {input} of output {lane}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_the_window_does_not_reach_is_an_exception_and_zero() {
        let hostile =
            [0x7F80, 0xFF80, 0x7FC1, 0x0001, 0x807F, 0x8000, 0x0000, 0x3C80, 0x3880, 0x3F80, 0xBF81];
        let (weights, encoded, bases, exceptions) = panel(9, |index| hostile[index % hostile.len()]);
        let mut expected = 0;
        for input in 0..9 * QUAD_INPUTS {
            for lane in 0..LANES {
                let weight = at(&weights, input, lane);
                let exception = exceptions
                    .iter()
                    .find(|found| (found.input as usize, usize::from(found.lane)) == (input, lane));
                let found = decode(&encoded, &bases, input, lane).to_bits();
                // 1.0 is the largest finite one: 2^-6 is in its window, 2^-14 the smallest there.
                if [0x3C80, 0x3880, 0x3F80, 0xBF81].contains(&weight) {
                    assert_eq!((found, exception), (weight, None));
                } else if weight & 0x7FFF == 0 {
                    assert_eq!((found, exception), (0, None));
                } else {
                    expected += 1;
                    assert_eq!((found, exception.map(|found| found.value.to_bits())), (0, Some(weight)));
                }
            }
        }
        assert_eq!(exceptions.len(), expected);
    }

    #[test]
    fn few_exceptions_are_worth_it_and_many_are_not() {
        assert!(is_worth_it(0, 10) && !is_worth_it(1, 10));
        assert!(is_worth_it(3000, 1_000_000) && !is_worth_it(3001, 1_000_000));
    }

    /// Every instruction set's decoding, in registers and into memory, gives what the portable one gives.
    #[test]
    fn all_instruction_sets_agree() {
        let mut kernels = vec![&PORTABLE];
        #[cfg(target_arch = "x86_64")]
        if crate::cpu::isa::Isa::Avx2.is_available() {
            kernels.push(&AVX2);
        }
        let (quads, rows) = (11, 9);
        let mut state = 5;
        let (_, encoded, bases, exceptions) =
            panel(quads, |index| if index == 77 { 0x3123 } else { window(&mut state, 130) });
        let steps = quads * QUAD;
        let mut results = Vec::new();
        for kernels in kernels {
            for scratch_len in [0, steps * LANES] {
                let mut x = vec![0u32; rows * steps * 2];
                for tile in (0..rows).step_by(4) {
                    let count = (rows - tile).min(4);
                    for index in 0..count * steps * 2 {
                        let row = tile + index / 2 % count;
                        let input = index / (2 * count) * 2 + index % 2;
                        let value = if (input * 7 + row) % 23 == 0 { 0.5f32 } else { 0.0 };
                        x[tile * steps * 2 + index] = value.to_bits();
                    }
                }
                let mut out = vec![f32::NAN; rows * LANES];
                let compact = CompactPanels {
                    bases: &bases,
                    exceptions: &exceptions,
                    first_exceptions: &[0, exceptions.len() as u32],
                };
                let args = MatmulArgs {
                    weights: encoded.as_ptr(),
                    panels: 0..1,
                    steps,
                    x: x.as_ptr(),
                    rows,
                    out: out.as_mut_ptr(),
                    out_width: LANES,
                    bias: None,
                };
                // SAFETY: the processor has the instruction set, and all sizes are as the kernels take them.
                unsafe { (kernels.matmul)(&args, &compact, &mut vec![0; scratch_len]) };
                results.push(out);
            }
        }
        for result in &results[1..] {
            for (found, expected) in result.iter().zip(&results[0]) {
                // A few products of up to 8.
                assert!((found - expected).abs() <= 1e-5, "{found} for {expected}");
            }
        }
    }
}
