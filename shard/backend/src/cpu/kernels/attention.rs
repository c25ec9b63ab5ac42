//! Attention of a tile of query rows over the keys and values of one KV head, with an online softmax
//! (arXiv:1805.02867, arXiv:2205.14135): the scores of 128 keys at a time are all that exists of the score matrix.

use super::matmul::{Weight, padded_tile, tile};
use super::simd::{LANES, Simd, exp, tanh};

/// Keys whose scores are held at a time: 24 rows of them take 12 KiB, which leaves room in a 32 KiB cache.
pub(in crate::cpu) const KEY_TILE: usize = 128;

/// 0 to 15.
const LANE_INDICES: [f32; LANES] = {
    let mut indices = [0.0; LANES];
    let mut lane = 0;
    while lane < LANES {
        indices[lane] = lane as f32;
        lane += 1;
    }
    indices
};

/// One head of one token.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct QueryRow {
    /// Index of its query vector's first element.
    pub(in crate::cpu) query: usize,
    /// Index of its result's first element.
    pub(in crate::cpu) out: usize,
    /// It sees the keys `first_key..end_key` of its sequence.
    pub(in crate::cpu) first_key: usize,
    /// See `first_key`; greater than it.
    pub(in crate::cpu) end_key: usize,
    /// A key `n` tokens before the row's own gets `-slope * n`; 0: no biases.
    pub(in crate::cpu) slope: f32,
}

/// Where the keys and values of one KV head of one sequence are.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct KeysValues<'a> {
    /// Start of the layer in the cache.
    pub(in crate::cpu) layer: *const u8,
    /// The sequence's blocks.
    pub(in crate::cpu) blocks: &'a [u32],
    /// Tokens of a block.
    pub(in crate::cpu) block_size: usize,
    /// Bytes from one block to the next.
    pub(in crate::cpu) block_stride: usize,
    /// Bytes from the start of a block to this head's keys.
    pub(in crate::cpu) key_offset: usize,
    /// Bytes from the start of a block to this head's values.
    pub(in crate::cpu) value_offset: usize,
}

/// What all heads share.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct AttentionConfig {
    pub(in crate::cpu) head_dim: usize,
    pub(in crate::cpu) scale: f32,
    pub(in crate::cpu) soft_cap: Option<f32>,
}

/// One tile of work.
pub(in crate::cpu) struct AttentionArgs<'a> {
    pub(in crate::cpu) config: AttentionConfig,
    /// At most `MAX_TILE` rows.
    pub(in crate::cpu) rows: &'a [QueryRow],
    pub(in crate::cpu) cache: KeysValues<'a>,
    /// The part of the keys to look at; starts at a multiple of 16.
    pub(in crate::cpu) keys: std::ops::Range<usize>,
    /// All packed queries, keys and values of the step.
    pub(in crate::cpu) qkv: &'a [f32],
    /// Where results go.
    pub(in crate::cpu) target: Target<'a>,
    /// At least [`scratch_len`] elements.
    pub(in crate::cpu) scratch: &'a mut [f32],
}

/// Where the results of a tile go.
pub(in crate::cpu) enum Target<'a> {
    /// All results of the step; the tile writes its rows' heads only.
    Out(*mut f32),
    /// Results over a part of the keys, to be merged: for each row [`partial_len`] elements, the maximum of the scores, the
    /// sum of their exponentials relative to it, and the values weighted by those.
    Partial(&'a mut [f32]),
}

/// Elements of one row of [`Target::Partial`].
pub(in crate::cpu) const fn partial_len(head_dim: usize) -> usize {
    2 + head_dim
}

/// Scratch of a tile: queries `[head_dim][24]`, sums `[24][padded head_dim]`, scores `[24][KEY_TILE]`.
pub(in crate::cpu) const fn scratch_len(head_dim: usize) -> usize {
    24 * (head_dim + head_dim.next_multiple_of(LANES) + KEY_TILE)
}

/// Attention of one tile.
///
/// # Safety
/// The processor has the instruction set; the cache holds the keys the rows see; nobody else writes the rows' results.
#[inline(always)]
pub(super) unsafe fn attention<S: Simd, W: Weight<S>>(args: AttentionArgs<'_>) {
    // SAFETY: the caller's contract is that of the callees.
    unsafe {
        match padded_tile(args.rows.len()) {
            1 => rows::<S, W, 1>(args),
            2 => rows::<S, W, 2>(args),
            3 => rows::<S, W, 3>(args),
            4 => rows::<S, W, 4>(args),
            6 if S::MAX_TILE >= 6 => rows::<S, W, 6>(args),
            8 if S::MAX_TILE >= 8 => rows::<S, W, 8>(args),
            16 if S::MAX_TILE >= 16 => rows::<S, W, 16>(args),
            _ if S::MAX_TILE >= 24 => rows::<S, W, 24>(args),
            _ => unreachable!("a tile has at most MAX_TILE rows"),
        }
    }
}

/// Attention of `T` rows, of which the last may be padding.
///
/// # Safety
/// As for [`attention`].
#[inline(always)]
unsafe fn rows<S: Simd, W: Weight<S>, const T: usize>(args: AttentionArgs<'_>) {
    let AttentionArgs { config, rows, cache, keys, qkv, target, scratch } = args;
    let head_dim = config.head_dim;
    let padded_dim = head_dim.next_multiple_of(LANES);
    let (queries, rest) = scratch.split_at_mut(24 * head_dim);
    let (sums, scores) = rest.split_at_mut(24 * padded_dim);
    queries[..T * head_dim].fill(0.0);
    for (t, row) in rows.iter().enumerate() {
        let query = &qkv[row.query..row.query + head_dim];
        for (packed, &q) in queries.chunks_exact_mut(T).zip(query) {
            packed[t] = q * config.scale;
        }
    }
    sums[..T * padded_dim].fill(0.0);
    let mut softmax = Softmax::<T> { maximum: [f32::NEG_INFINITY; T], total: [0.0; T] };
    let first_key = rows.iter().map(|row| row.first_key).min().unwrap_or(0).max(keys.start);
    let end_key = rows.iter().map(|row| row.end_key).max().unwrap_or(0).min(keys.end);

    let mut start = first_key / LANES * LANES;
    while start < end_key {
        let end = (start + KEY_TILE).min(end_key);
        let mut group = start;
        while group < end {
            // SAFETY: the group's keys are in the cache (its last ones perhaps unwritten, which are masked below).
            unsafe {
                let keys = cache.key_group::<S, W>(group, head_dim);
                let found = match T {
                    1 | 2 => tile::<S, W, T, 4>(keys, queries.as_ptr().cast(), head_dim),
                    3 | 4 => tile::<S, W, T, 2>(keys, queries.as_ptr().cast(), head_dim),
                    _ => tile::<S, W, T, 1>(keys, queries.as_ptr().cast(), head_dim),
                };
                for (t, &score) in found.iter().enumerate() {
                    S::store(scores[t * KEY_TILE + group - start..][..LANES].as_mut_ptr(), score);
                }
            }
            group += LANES;
        }
        // SAFETY: the processor has the instruction set, and the cache holds `start..end`.
        unsafe {
            softmax.weigh::<S>((rows, config.soft_cap), start..end, scores, (sums, padded_dim));
            values::<S, W, T>(&cache, start..end, scores, (sums, padded_dim));
        }
        start += KEY_TILE;
    }
    let sums = sums.chunks_exact(padded_dim).map(|sums| &sums[..head_dim]);
    match target {
        Target::Out(out) => {
            for ((row, sums), total) in rows.iter().zip(sums).zip(softmax.total) {
                for (d, &sum) in sums.iter().enumerate() {
                    // SAFETY: the row's result lies within `out` and is this tile's alone.
                    unsafe { out.add(row.out + d).write(sum / total) };
                }
            }
        }
        Target::Partial(partial) => {
            let partial = partial.chunks_exact_mut(partial_len(head_dim));
            for (((partial, sums), total), maximum) in
                partial.zip(sums).zip(softmax.total).zip(softmax.maximum)
            {
                partial[..2].copy_from_slice(&[maximum, total]);
                partial[2..].copy_from_slice(sums);
            }
        }
    }
}

/// Merges one row's results over `parts` parts of the keys. A part's row begins `stride` elements after the one before.
pub(in crate::cpu) fn merge(partial: &[f32], parts: usize, stride: usize, out: &mut [f32]) {
    let (maximum, sum) = (|part: usize| partial[part * stride], |part: usize| partial[part * stride + 1]);
    let highest = (0..parts).fold(f32::NEG_INFINITY, |highest, part| highest.max(maximum(part)));
    // A part of which the row sees nothing has a maximum of minus infinity, so a weight of 0.
    let weight = |part: usize| (maximum(part) - highest).exp();
    let total: f32 = (0..parts).map(|part| weight(part) * sum(part)).sum();
    out.fill(0.0);
    for part in 0..parts {
        let factor = weight(part) / total;
        out.iter_mut().zip(&partial[part * stride + 2..]).for_each(|(value, &sum)| *value += sum * factor);
    }
}

impl KeysValues<'_> {
    /// Keys `group..group + 16`, `[head_dim][16]`.
    ///
    /// # Safety
    /// The block of token `group` is in the table.
    #[inline(always)]
    unsafe fn key_group<S: Simd, W: Weight<S>>(&self, group: usize, head_dim: usize) -> *const u8 {
        let (block, offset) = (self.blocks[group / self.block_size] as usize, group % self.block_size);
        // SAFETY: as the caller says.
        unsafe {
            let block = self.layer.add(block * self.block_stride);
            block.add(self.key_offset + offset / LANES * head_dim * W::STEP_BYTES)
        }
    }

    /// The value of token `token`, `[padded head_dim]`.
    ///
    /// # Safety
    /// The block of the token is in the table.
    #[inline(always)]
    unsafe fn value<S: Simd, W: Weight<S>>(&self, token: usize, padded_dim: usize) -> *const u8 {
        let (block, offset) = (self.blocks[token / self.block_size] as usize, token % self.block_size);
        // SAFETY: as the caller says.
        unsafe {
            let block = self.layer.add(block * self.block_stride);
            block.add(self.value_offset + offset * padded_dim / LANES * W::STEP_BYTES)
        }
    }
}

/// The running maximum and sum of each row.
struct Softmax<const T: usize> {
    maximum: [f32; T],
    total: [f32; T],
}

impl<const T: usize> Softmax<T> {
    /// Turns the scores of `keys` into weights relative to the new maximum, and brings the older sums to it.
    ///
    /// # Safety
    /// The processor has the instruction set.
    #[inline(always)]
    unsafe fn weigh<S: Simd>(
        &mut self,
        (rows, soft_cap): (&[QueryRow], Option<f32>),
        keys: std::ops::Range<usize>,
        scores: &mut [f32],
        (sums, padded_dim): (&mut [f32], usize),
    ) {
        let padded_keys = keys.len().next_multiple_of(LANES);
        for (t, scores) in scores.chunks_exact_mut(KEY_TILE).take(T).enumerate() {
            let scores = &mut scores[..padded_keys];
            let Some(row) = rows.get(t) else {
                scores.fill(0.0);
                continue;
            };
            // SAFETY: arithmetic; chunks have 16 elements.
            unsafe {
                if let Some(cap) = soft_cap {
                    for chunk in scores.as_chunks_mut::<LANES>().0 {
                        let bent = tanh::<S>(S::mul(S::load(chunk.as_ptr()), S::splat(1.0 / cap)));
                        S::store(chunk.as_mut_ptr(), S::mul(bent, S::splat(cap)));
                    }
                }
                if row.slope != 0.0 {
                    for (chunk, key) in
                        scores.as_chunks_mut::<LANES>().0.iter_mut().zip((keys.start..).step_by(LANES))
                    {
                        // Relative to the row's own key: small numbers where the weights are large.
                        let first = key as f32 - (row.end_key - 1) as f32;
                        let distances = S::add(S::load(LANE_INDICES.as_ptr()), S::splat(first));
                        let biased = S::fma(distances, S::splat(row.slope), S::load(chunk.as_ptr()));
                        S::store(chunk.as_mut_ptr(), biased);
                    }
                }
                let first = row.first_key.saturating_sub(keys.start).min(padded_keys);
                let end = row.end_key.saturating_sub(keys.start).min(padded_keys);
                scores[..first].fill(f32::NEG_INFINITY);
                scores[end..].fill(f32::NEG_INFINITY);
                let highest = super::elementwise::maximum::<S>(scores).max(self.maximum[t]);
                if highest == f32::NEG_INFINITY {
                    // Nothing seen yet: the window begins later.
                    scores.fill(0.0);
                    continue;
                }
                let mut total = S::splat(0.0);
                for chunk in scores.as_chunks_mut::<LANES>().0 {
                    let weight = exp::<S>(S::sub(S::load(chunk.as_ptr()), S::splat(highest)));
                    S::store(chunk.as_mut_ptr(), weight);
                    total = S::add(total, weight);
                }
                let shrink = (self.maximum[t] - highest).exp();
                self.total[t] = self.total[t] * shrink + S::sum(total);
                if shrink != 1.0 {
                    for chunk in sums[t * padded_dim..][..padded_dim].as_chunks_mut::<LANES>().0 {
                        S::store(chunk.as_mut_ptr(), S::mul(S::load(chunk.as_ptr()), S::splat(shrink)));
                    }
                }
                self.maximum[t] = highest;
            }
        }
    }
}

/// `sums += weights . values` for the tokens of `keys`.
///
/// # Safety
/// The processor has the instruction set and the cache holds the tokens.
#[inline(always)]
unsafe fn values<S: Simd, W: Weight<S>, const T: usize>(
    cache: &KeysValues<'_>,
    keys: std::ops::Range<usize>,
    weights: &[f32],
    (sums, padded_dim): (&mut [f32], usize),
) {
    debug_assert!(weights.len() >= T * KEY_TILE && sums.len() >= T * padded_dim);
    let mut column = 0;
    while column < padded_dim {
        // Few rows have few accumulators: several columns at a time hide the latency, and each value is read once.
        let wide = if T <= 4 {
            4
        } else if T <= 8 {
            2
        } else {
            1
        };
        let columns = if column + wide * LANES <= padded_dim { wide } else { 1 };
        // SAFETY: the caller's contract; columns end at `padded_dim`.
        unsafe {
            match columns {
                4 => value_columns::<S, W, T, 4>(cache, keys.clone(), weights, (sums, padded_dim, column)),
                2 => value_columns::<S, W, T, 2>(cache, keys.clone(), weights, (sums, padded_dim, column)),
                _ => value_columns::<S, W, T, 1>(cache, keys.clone(), weights, (sums, padded_dim, column)),
            }
        }
        column += columns * LANES;
    }
}

/// `P` vectors of columns of [`values`].
///
/// # Safety
/// As for [`values`].
#[inline(always)]
#[expect(
    clippy::needless_range_loop,
    reason = "plain indices with constant bounds are unrolled into registers"
)]
unsafe fn value_columns<S: Simd, W: Weight<S>, const T: usize, const P: usize>(
    cache: &KeysValues<'_>,
    keys: std::ops::Range<usize>,
    weights: &[f32],
    (sums, padded_dim, column): (&mut [f32], usize, usize),
) {
    // SAFETY: `weights` has T rows of KEY_TILE, `sums` T rows of `padded_dim`; the cache holds the tokens.
    unsafe {
        let mut acc = [[S::splat(0.0); P]; T];
        for t in 0..T {
            for p in 0..P {
                acc[t][p] = S::load(sums.as_ptr().add(t * padded_dim + column + p * LANES));
            }
        }
        let row_bytes = padded_dim / LANES * W::STEP_BYTES;
        let mut token = keys.start;
        while token < keys.end {
            let group_end = (token + LANES).min(keys.end);
            let mut value = cache.value::<S, W>(token, padded_dim).add(column / LANES * W::STEP_BYTES);
            for token in token..group_end {
                let weight = weights.as_ptr().add(token - keys.start).cast::<u32>();
                let mut loaded = [W::load(value); P];
                for p in 1..P {
                    loaded[p] = W::load(value.add(p * W::STEP_BYTES));
                }
                for t in 0..T {
                    for p in 0..P {
                        acc[t][p] = W::dot(acc[t][p], loaded[p], weight.add(t * KEY_TILE));
                    }
                }
                value = value.add(row_bytes);
            }
            token = group_end;
        }
        for t in 0..T {
            for p in 0..P {
                S::store(sums.as_mut_ptr().add(t * padded_dim + column + p * LANES), acc[t][p]);
            }
        }
    }
}
