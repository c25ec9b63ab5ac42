//! Quantized weights packed for the integer kernels.
//!
//! Sixteen outputs make a panel, as with other weights; [`GroupLayout`] says what lies in it. Values below 16 stay nibbles,
//! larger ones take a byte. Scales and offsets are f16 where that loses nothing. Where all offsets are the same multiple of their
//! scales (`-8` in Q4_0, `-128` in Q8_0) that multiple alone is kept, which saves memory and the rounding of large sums.

use std::sync::Mutex;

use super::arena::{Arena, Region};
use super::kernels::{GroupLayout, LANES, STEP, STEP_BYTES};
use super::threads::{SharedMut, Threads, part};
use crate::{BackendError, QuantizedMatrix};

/// Finest and coarsest groups the kernels have; larger ones are cut.
const GROUP_SIZES: [usize; 2] = [16, 32];

/// A packed quantized layer.
#[derive(Debug)]
pub(super) struct QuantizedLinear {
    pub(super) memory: Region,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    pub(super) layout: GroupLayout,
}

impl QuantizedLinear {
    /// Packs `parts`, stacked along their rows, in the finest groups and widest values of any.
    pub(super) fn pack(
        parts: &[QuantizedMatrix],
        (threads, arena): (&mut Threads, &mut Arena),
    ) -> Result<Self, BackendError> {
        let in_features = check(parts)?;
        let findings = parts.iter().map(|part| Findings::of(part, threads)).collect::<Vec<_>>();
        let (layout, shifts) = choose(parts, in_features, &findings)?;
        let out_features = parts.iter().map(|part| part.rows).sum::<usize>();
        let panels = out_features.div_ceil(LANES);
        let panel_bytes = layout.panel_bytes();
        let what = format!("a weight of {out_features} x {in_features} in {} bits", layout.bits);
        let memory = arena.region(panels * panel_bytes, &what)?;
        let mut packed = QuantizedLinear { memory, out_features, in_features, layout };
        let count = threads.count();
        let target = SharedMut::new(packed.memory.as_mut_slice::<u8>());
        threads.run(&|index| {
            for panel in part(panels, index, count) {
                // SAFETY: each panel is one thread's.
                let memory = unsafe { target.slice(panel * panel_bytes..(panel + 1) * panel_bytes) };
                for lane in 0..LANES.min(out_features - panel * LANES) {
                    let row = find_row(parts, &shifts, panel * LANES + lane);
                    row.pack(&layout, lane, memory);
                }
            }
        });
        Ok(packed)
    }

    /// Row `row` (the weights of output `row`) as f32.
    pub(super) fn read_row(&self, row: usize, out: &mut [f32]) {
        let layout = &self.layout;
        let (panel, lane) = (row / LANES, row % LANES);
        let panel = &self.memory.as_slice::<u8>()[panel * layout.panel_bytes()..][..layout.panel_bytes()];
        let groups = panel.chunks_exact(layout.group_bytes());
        for (group, out) in groups.zip(out.chunks_exact_mut(layout.group_size)) {
            let (factors, values) = group.split_at(layout.value_offset());
            let (scales, offsets) = factors.split_at(layout.factor_bytes());
            let scale = read_factor(scales, lane, layout.is_wide);
            let offset = if layout.has_offsets { read_factor(offsets, lane, layout.is_wide) } else { 0.0 };
            for (input, out) in out.iter_mut().enumerate() {
                let (step, place) = (input / STEP, lane * STEP + input % STEP);
                let value = if layout.bits == 4 {
                    values[step / 2 * STEP_BYTES + place] >> (step % 2 * 4) & 0x0F
                } else {
                    values[step * STEP_BYTES + place]
                };
                *out = scale * (i32::from(value) - layout.zero) as f32 + offset;
            }
        }
    }
}

fn refuse(reason: String) -> BackendError {
    BackendError::Device { operation: "packing a quantized weight".to_owned(), reason }
}

/// The common number of columns; an error says which part does not fit.
fn check(parts: &[QuantizedMatrix]) -> Result<usize, BackendError> {
    let Some(first) = parts.first() else { return Err(refuse("no matrix was given".to_owned())) };
    for (index, part) in parts.iter().enumerate() {
        let QuantizedMatrix { rows, cols, group_size, .. } = *part;
        if cols != first.cols {
            return Err(refuse(format!("part {index} has {cols} columns, the first has {}", first.cols)));
        }
        if !group_size.is_power_of_two() || group_size < GROUP_SIZES[0] || !cols.is_multiple_of(group_size) {
            return Err(refuse(format!(
                "part {index} has groups of {group_size} in {cols} columns; groups of 16, 32, 64, ... that divide the columns \
                 are supported"
            )));
        }
        let (values, groups) = (rows.saturating_mul(cols), rows.saturating_mul(cols / group_size));
        if part.values.len() != values || part.scales.len() != groups || part.offsets.len() != groups {
            return Err(refuse(format!(
                "part {index} ({rows} x {cols}, groups of {group_size}) needs {values} values and {groups} scales and offsets, \
                 has {}, {} and {}",
                part.values.len(),
                part.scales.len(),
                part.offsets.len()
            )));
        }
    }
    if first.cols == 0 {
        return Err(refuse("it has no columns".to_owned()));
    }
    Ok(first.cols)
}

/// What all offsets of some groups are, as a multiple of their scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zero {
    /// Scales and offsets are 0.
    Any,
    /// `offset = -zero * scale`.
    Same(u8),
    /// Nothing so simple.
    None,
}

impl Zero {
    fn of(scale: f32, offset: f32) -> Zero {
        if scale == 0.0 && offset == 0.0 {
            return Zero::Any;
        }
        // The cast saturates, and what is no number becomes 0.
        let zero = (-offset / scale).round() as u8;
        if -(f32::from(zero) * scale) == offset { Zero::Same(zero) } else { Zero::None }
    }

    fn and(self, other: Zero) -> Zero {
        match (self, other) {
            (Zero::Any, zero) | (zero, Zero::Any) => zero,
            (a, b) if a == b => a,
            _ => Zero::None,
        }
    }
}

/// What the values, scales and offsets of a part need.
#[derive(Debug, Clone, Copy)]
struct Findings {
    largest: u8,
    scales_are_f16: bool,
    offsets_are_f16: bool,
    zero: Zero,
}

impl Findings {
    const NOTHING: Findings =
        Findings { largest: 0, scales_are_f16: true, offsets_are_f16: true, zero: Zero::Any };

    fn of(matrix: &QuantizedMatrix, threads: &mut Threads) -> Findings {
        let found = Mutex::new(Findings::NOTHING);
        let count = threads.count();
        threads.run(&|index| {
            let values = &matrix.values[part(matrix.values.len(), index, count)];
            let groups = part(matrix.scales.len(), index, count);
            let (scales, offsets) = (&matrix.scales[groups.clone()], &matrix.offsets[groups]);
            let own = Findings {
                largest: values.iter().fold(0, |a, &b| a.max(b)),
                scales_are_f16: scales.iter().all(|&x| is_f16(x)),
                offsets_are_f16: offsets.iter().all(|&x| is_f16(x)),
                zero: scales.iter().zip(offsets).fold(Zero::Any, |zero, (&scale, &offset)| match zero {
                    Zero::None => zero,
                    _ => zero.and(Zero::of(scale, offset)),
                }),
            };
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *found = found.and(own);
        });
        found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn and(self, other: Findings) -> Findings {
        Findings {
            largest: self.largest.max(other.largest),
            scales_are_f16: self.scales_are_f16 && other.scales_are_f16,
            offsets_are_f16: self.offsets_are_f16 && other.offsets_are_f16,
            zero: self.zero.and(other.zero),
        }
    }
}

/// Whether f16 holds `x` exactly.
fn is_f16(x: f32) -> bool {
    half::f16::from_f32(x).to_f32() == x
}

/// The layout that holds all parts exactly, and what is added to each part's values.
fn choose(
    parts: &[QuantizedMatrix],
    in_features: usize,
    findings: &[Findings],
) -> Result<(GroupLayout, Vec<u8>), BackendError> {
    for (index, (part, found)) in parts.iter().zip(findings).enumerate() {
        if part.bits == 0 || part.bits > 8 || u32::from(found.largest) >> part.bits != 0 {
            return Err(refuse(format!(
                "part {index} has values up to {} in {} bits; 1 to 8 bits that hold the values are supported",
                found.largest, part.bits
            )));
        }
    }
    let group_size = parts.iter().map(|part| part.group_size).min().unwrap_or(0).min(GROUP_SIZES[1]);
    let mut all = findings.iter().fold(Findings::NOTHING, |all, &found| all.and(found));
    let mut shifts = vec![0; parts.len()];
    if all.zero == Zero::None
        && let Some((zero, common)) = common_zero(findings)
    {
        shifts = common;
        all.zero = Zero::Same(zero);
        all.largest =
            findings.iter().zip(&shifts).map(|(found, shift)| found.largest + shift).max().unwrap_or(0);
    }
    let (has_offsets, zero) = match all.zero {
        Zero::Any => (false, 0),
        Zero::Same(zero) => (false, zero),
        Zero::None => (true, 0),
    };
    let layout = GroupLayout {
        bits: if all.largest < 16 { 4 } else { 8 },
        group_size,
        groups: in_features / group_size,
        is_wide: !all.scales_are_f16 || has_offsets && !all.offsets_are_f16,
        has_offsets,
        zero: i32::from(zero),
    };
    Ok((layout, shifts))
}

/// The largest zero of the parts and what must be added to each part's values for it to be theirs too; none where a part has no
/// zero or its values would not fit a byte.
fn common_zero(findings: &[Findings]) -> Option<(u8, Vec<u8>)> {
    let of = |found: &Findings| match found.zero {
        Zero::Any => Some(None),
        Zero::Same(zero) => Some(Some(zero)),
        Zero::None => None,
    };
    let zeros = findings.iter().map(of).collect::<Option<Vec<_>>>()?;
    let common = zeros.iter().copied().flatten().max()?;
    let shifts: Vec<u8> = zeros.iter().map(|zero| zero.map_or(0, |zero| common - zero)).collect();
    let fits = findings.iter().zip(&shifts).all(|(found, &shift)| found.largest.checked_add(shift).is_some());
    fits.then_some((common, shifts))
}

/// One row of a part.
struct Row<'a> {
    values: &'a [u8],
    scales: &'a [f32],
    offsets: &'a [f32],
    group_size: usize,
    /// Added to its values.
    shift: u8,
}

/// Row `row` of the stacked parts.
fn find_row<'a>(parts: &'a [QuantizedMatrix], shifts: &[u8], mut row: usize) -> Row<'a> {
    for (part, &shift) in parts.iter().zip(shifts) {
        if row < part.rows {
            let groups = part.cols / part.group_size;
            let range = row * groups..(row + 1) * groups;
            return Row {
                values: &part.values[row * part.cols..(row + 1) * part.cols],
                scales: &part.scales[range.clone()],
                offsets: &part.offsets[range],
                group_size: part.group_size,
                shift,
            };
        }
        row -= part.rows;
    }
    unreachable!("the rows of the parts were counted")
}

impl Row<'_> {
    /// Writes the row to lane `lane` of its zeroed panel.
    fn pack(&self, layout: &GroupLayout, lane: usize, panel: &mut [u8]) {
        let groups = panel.chunks_exact_mut(layout.group_bytes());
        for (group, (values, memory)) in self.values.chunks_exact(layout.group_size).zip(groups).enumerate() {
            let source = group * layout.group_size / self.group_size;
            let (factors, places) = memory.split_at_mut(layout.value_offset());
            for (step, four) in values.as_chunks::<STEP>().0.iter().enumerate() {
                let four = four.map(|value| value + self.shift);
                if layout.bits == 4 {
                    let place = &mut places[step / 2 * STEP_BYTES + lane * STEP..][..STEP];
                    place.iter_mut().zip(four).for_each(|(place, x)| *place |= x << (step % 2 * 4));
                } else {
                    places[step * STEP_BYTES + lane * STEP..][..STEP].copy_from_slice(&four);
                }
            }
            let (scales, offsets) = factors.split_at_mut(layout.factor_bytes());
            write_factor(scales, lane, layout.is_wide, self.scales[source]);
            if layout.has_offsets {
                write_factor(offsets, lane, layout.is_wide, self.offsets[source]);
            }
        }
    }
}

/// One of sixteen scales or offsets.
fn read_factor(factors: &[u8], lane: usize, is_wide: bool) -> f32 {
    if is_wide {
        f32::from_ne_bytes(std::array::from_fn(|i| factors[4 * lane + i]))
    } else {
        half::f16::from_ne_bytes([factors[2 * lane], factors[2 * lane + 1]]).to_f32()
    }
}

fn write_factor(factors: &mut [u8], lane: usize, is_wide: bool, x: f32) {
    if is_wide {
        factors[4 * lane..4 * lane + 4].copy_from_slice(&x.to_ne_bytes());
    } else {
        factors[2 * lane..2 * lane + 2].copy_from_slice(&half::f16::from_f32(x).to_ne_bytes());
    }
}
