//! Packed weights times activations: the one loop that a language model's time goes into.
//!
//! Weights are panels of sixteen outputs. In a panel the inputs follow one another, each with its sixteen weights, so that
//! lane `i` of an accumulator is output `i`: no sums across lanes, and memory is read in one straight line.
//! Activations are packed by tiles of tokens, `[step][token]`, so that a step's are side by side.

use std::marker::PhantomData;
use std::ops::Range;

use super::simd::{LANES, Simd, store_partial};

/// How far ahead of the arithmetic a weight stream is asked for: about 100 ns of reading at full speed.
const PREFETCH_BYTES: usize = 2048;

/// A way to multiply one step of a panel (one input, or two) with one token's activations.
///
/// # Safety
/// As for [`Simd`]; `from` is valid for `STEP_BYTES`, `x` for `STEP_INPUTS` elements.
pub(in crate::cpu) trait Weight<S: Simd>: 'static {
    /// A step's weights in registers.
    type Loaded: Copy;
    /// Inputs of a step, and 32-bit elements of its packed activations.
    const STEP_INPUTS: usize;
    /// Bytes of a step's weights.
    const STEP_BYTES: usize;
    unsafe fn load(from: *const u8) -> Self::Loaded;
    /// `acc + weights . activations`.
    unsafe fn dot(acc: S::V, w: Self::Loaded, x: *const u32) -> S::V;
    /// Packs the activations of a step; of one input the first is used.
    fn pack(x: [f32; 2]) -> [u32; 2];
}

/// Weights that are widened to f32, one input a step.
pub(super) struct Widened<E>(PhantomData<E>);
/// Marks f32 elements.
pub(super) struct F32;
/// Marks f16 elements.
pub(super) struct F16;
/// Marks bf16 elements.
pub(super) struct Bf16;

macro_rules! widened {
    ($element:ty, $bytes:literal, $load:ident) => {
        impl<S: Simd> Weight<S> for Widened<$element> {
            type Loaded = S::V;
            const STEP_INPUTS: usize = 1;
            const STEP_BYTES: usize = $bytes * LANES;
            #[inline(always)]
            unsafe fn load(from: *const u8) -> S::V {
                // SAFETY: the contract of `Weight`.
                unsafe { S::$load(from.cast()) }
            }
            #[inline(always)]
            unsafe fn dot(acc: S::V, w: S::V, x: *const u32) -> S::V {
                // SAFETY: the contract of `Weight`.
                unsafe { S::fma(w, S::splat(x.cast::<f32>().read()), acc) }
            }
            #[inline(always)]
            fn pack(x: [f32; 2]) -> [u32; 2] {
                x.map(f32::to_bits)
            }
        }
    };
}
widened!(F32, 4, load);
widened!(F16, 2, load_f16);
widened!(Bf16, 2, load_bf16);

/// Pairs of bf16 weights, widened to f32: the packing of `Bf16Dot` for processors without its instruction.
pub(super) struct Bf16Pairs;

impl<S: Simd> Weight<S> for Bf16Pairs {
    type Loaded = (S::V, S::V);
    const STEP_INPUTS: usize = 2;
    const STEP_BYTES: usize = 4 * LANES;
    #[inline(always)]
    unsafe fn load(from: *const u8) -> (S::V, S::V) {
        // SAFETY: the contract of `Weight`.
        unsafe { S::load_bf16_pairs(from.cast()) }
    }
    #[inline(always)]
    unsafe fn dot(acc: S::V, w: (S::V, S::V), x: *const u32) -> S::V {
        // SAFETY: the contract of `Weight`.
        unsafe {
            let x = x.cast::<f32>();
            let acc = S::fma(w.0, S::splat(x.read()), acc);
            S::fma(w.1, S::splat(x.add(1).read()), acc)
        }
    }
    #[inline(always)]
    fn pack(x: [f32; 2]) -> [u32; 2] {
        x.map(f32::to_bits)
    }
}

/// The number of tokens a tile of `n` is padded to.
pub(in crate::cpu) const fn padded_tile(n: usize) -> usize {
    match n {
        0..=4 | 6 => n,
        5 => 6,
        7..=8 => 8,
        9..=16 => 16,
        _ => 24,
    }
}

/// Activations to pack.
pub(in crate::cpu) struct PackArgs<'a> {
    /// `[rows, width]`.
    pub(in crate::cpu) x: &'a [f32],
    /// Inputs.
    pub(in crate::cpu) width: usize,
    /// At most `MAX_TILE` elements' worth of tokens: one tile.
    pub(in crate::cpu) rows: usize,
    /// `[steps][padded_tile(rows)][STEP_INPUTS]`; steps beyond the width become zero.
    pub(in crate::cpu) out: &'a mut [u32],
}

/// Packs one tile of activations.
///
/// # Safety
/// The processor has the instruction set.
#[inline(always)]
pub(super) unsafe fn pack<S: Simd, W: Weight<S>>(args: PackArgs<'_>) {
    let tile = padded_tile(args.rows);
    let step_elements = tile * W::STEP_INPUTS;
    if args.rows < tile || args.out.len() > args.width.div_ceil(W::STEP_INPUTS) * step_elements {
        args.out.fill(0);
    }
    for (t, row) in args.x.chunks_exact(args.width).take(args.rows).enumerate() {
        let offset = t * W::STEP_INPUTS;
        for (inputs, out) in row.chunks(W::STEP_INPUTS).zip(args.out.chunks_exact_mut(step_elements)) {
            let packed = W::pack([inputs[0], inputs.get(1).copied().unwrap_or(0.0)]);
            out[offset..offset + W::STEP_INPUTS].copy_from_slice(&packed[..W::STEP_INPUTS]);
        }
    }
}

/// Packed weights times packed activations for some of the panels.
pub(in crate::cpu) struct MatmulArgs<'a> {
    /// All panels.
    pub(in crate::cpu) weights: *const u8,
    /// Which panels to compute.
    pub(in crate::cpu) panels: Range<usize>,
    /// Steps of a panel.
    pub(in crate::cpu) steps: usize,
    /// Packed activations, tile after tile.
    pub(in crate::cpu) x: *const u32,
    /// Tokens.
    pub(in crate::cpu) rows: usize,
    /// `[rows, out_width]`.
    pub(in crate::cpu) out: *mut f32,
    /// Outputs.
    pub(in crate::cpu) out_width: usize,
    /// `[out_width]`, or none.
    pub(in crate::cpu) bias: Option<&'a [f32]>,
}

/// Computes some panels for all tokens. A panel stays in the cache while the tiles of tokens pass.
///
/// # Safety
/// The processor has the instruction set; pointers are valid for the sizes given, and nobody else writes the columns of
/// these panels.
#[inline(always)]
pub(super) unsafe fn panels<S: Simd, W: Weight<S>>(args: &MatmulArgs<'_>) {
    for panel in args.panels.clone() {
        // SAFETY: the panel lies within what the caller gave.
        unsafe { self::panel::<S, W>(args, panel, args.weights.add(panel * args.steps * W::STEP_BYTES)) };
    }
}

/// One panel for all tokens, whose weights are at `w`.
///
/// # Safety
/// As for [`panels`].
#[inline(always)]
pub(super) unsafe fn panel<S: Simd, W: Weight<S>>(args: &MatmulArgs<'_>, panel: usize, w: *const u8) {
    let mut row = 0;
    while row < args.rows {
        let count = (args.rows - row).min(S::MAX_TILE);
        // SAFETY: the tile lies within what the caller gave.
        unsafe {
            let x = args.x.add(row * args.steps * W::STEP_INPUTS);
            let place = Place { args, panel, row, count };
            match padded_tile(count) {
                1 => place.store::<S, 1>(tile::<S, W, 1, 8>(w, x, args.steps)),
                // Two registers a vector leave no room for more accumulators.
                2 if S::MAX_TILE < 6 => place.store::<S, 2>(tile::<S, W, 2, 2>(w, x, args.steps)),
                3 if S::MAX_TILE < 6 => place.store::<S, 3>(tile::<S, W, 3, 1>(w, x, args.steps)),
                4 if S::MAX_TILE < 6 => place.store::<S, 4>(tile::<S, W, 4, 1>(w, x, args.steps)),
                2 => place.store::<S, 2>(tile::<S, W, 2, 4>(w, x, args.steps)),
                3 => place.store::<S, 3>(tile::<S, W, 3, 2>(w, x, args.steps)),
                4 => place.store::<S, 4>(tile::<S, W, 4, 2>(w, x, args.steps)),
                6 if S::MAX_TILE >= 6 => place.store::<S, 6>(tile::<S, W, 6, 1>(w, x, args.steps)),
                8 if S::MAX_TILE >= 8 => place.store::<S, 8>(tile::<S, W, 8, 1>(w, x, args.steps)),
                16 if S::MAX_TILE >= 16 => place.store::<S, 16>(tile::<S, W, 16, 1>(w, x, args.steps)),
                _ if S::MAX_TILE >= 24 => place.store::<S, 24>(tile::<S, W, 24, 1>(w, x, args.steps)),
                _ => unreachable!("a tile has at most MAX_TILE tokens"),
            }
        }
        row += count;
    }
}

/// `T` tokens times one panel. `U` steps at a time have accumulators of their own, so that enough of them are under way
/// to hide the latency of a multiplication.
///
/// # Safety
/// `w` is valid for `steps * STEP_BYTES` bytes, `x` for `steps * T * STEP_INPUTS` elements.
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices with constant bounds are unrolled into registers"
)]
pub(super) unsafe fn tile<S: Simd, W: Weight<S>, const T: usize, const U: usize>(
    w: *const u8,
    x: *const u32,
    steps: usize,
) -> [S::V; T] {
    // SAFETY: all offsets are below the sizes the caller vouches for; a prefetch may point anywhere.
    unsafe {
        let mut acc = [[S::splat(0.0); T]; U];
        let x_step = T * W::STEP_INPUTS;
        let mut step = 0;
        while step + U <= steps {
            for u in 0..U {
                let from = w.add((step + u) * W::STEP_BYTES);
                S::prefetch(from.wrapping_add(PREFETCH_BYTES));
                let loaded = W::load(from);
                for t in 0..T {
                    let x = x.add((step + u) * x_step + t * W::STEP_INPUTS);
                    acc[u][t] = W::dot(acc[u][t], loaded, x);
                }
            }
            step += U;
        }
        while step < steps {
            let loaded = W::load(w.add(step * W::STEP_BYTES));
            for t in 0..T {
                acc[0][t] = W::dot(acc[0][t], loaded, x.add(step * x_step + t * W::STEP_INPUTS));
            }
            step += 1;
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

/// Where a tile's results go.
pub(super) struct Place<'a> {
    pub(super) args: &'a MatmulArgs<'a>,
    pub(super) panel: usize,
    pub(super) row: usize,
    pub(super) count: usize,
}

impl Place<'_> {
    /// Adds to the results of output `lane` of the panel, of each token what `f` says.
    ///
    /// # Safety
    /// As for [`panels`].
    #[inline(always)]
    pub(super) unsafe fn add(&self, lane: usize, f: impl Fn(usize) -> f32) {
        let column = self.panel * LANES + lane;
        if column >= self.args.out_width {
            return;
        }
        for t in 0..self.count {
            // SAFETY: within the rows and columns.
            unsafe { *self.args.out.add((self.row + t) * self.args.out_width + column) += f(t) };
        }
    }

    /// # Safety
    /// As for [`panels`].
    #[inline(always)]
    #[expect(
        clippy::needless_range_loop,
        reason = "plain indices with constant bounds are unrolled into registers"
    )]
    pub(super) unsafe fn store<S: Simd, const T: usize>(&self, values: [S::V; T]) {
        let column = self.panel * LANES;
        let lanes = (self.args.out_width - column).min(LANES);
        // SAFETY: `lanes` keeps within the row; `count` within the rows.
        unsafe {
            let bias = match self.args.bias {
                Some(bias) => super::simd::load_partial::<S>(bias[column..column + lanes].as_ptr(), lanes),
                None => S::splat(0.0),
            };
            for t in 0..T {
                if t < self.count {
                    let to = self.args.out.add((self.row + t) * self.args.out_width + column);
                    let value = S::add(values[t], bias);
                    if lanes == LANES { S::store(to, value) } else { store_partial::<S>(to, value, lanes) }
                }
            }
        }
    }
}
