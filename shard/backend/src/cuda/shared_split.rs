//! How a multiprocessor's memory is split between shared memory and the first-level cache while a step runs.
//!
//! By itself the driver gives each kernel the split that suits it best. A multiprocessor changes its split only when it is empty,
//! which it never is while launches overlap. So it keeps the one that attention needs, nearly all shared memory, and products
//! that read weights into registers then have a cache of 28 KiB for their loads and run at half speed on most of the
//! multiprocessors. Hence all kernels of a step ask for one split, but for the smallest steps.

/// Most rows for which each kernel's own split is quicker (8B, one sequence: 5.56 ms, with one split 5.65).
const OWN_SPLIT_ROWS: usize = 2;
/// Most rows of a step whose products read weights into registers (`gemv.cu`, `few_rows.cu`).
pub(super) const REGISTER_ROWS: usize = 16;
/// Share of shared memory in such a step: 132 of 228 KiB on an H100, enough for a block of the attention.
pub(super) const REGISTER_PERCENT: usize = 58;

/// Percent of a multiprocessor's memory that kernels of a step ask for as shared memory; none: each what the driver thinks best.
pub(super) fn percent(num_tokens: usize, is_decode: bool) -> Option<u32> {
    match num_tokens {
        0..=OWN_SPLIT_ROWS => None,
        rows if rows <= REGISTER_ROWS => Some(REGISTER_PERCENT as u32),
        // The library's products want all of it.
        _ if is_decode => Some(100),
        _ => None,
    }
}

/// Bytes of shared memory that the blocks of the attention on a multiprocessor share in a step of `seqs` sequences, with
/// `most` bytes in all.
pub(super) fn attention_bytes(seqs: usize, most: usize) -> usize {
    if (OWN_SPLIT_ROWS + 1..=REGISTER_ROWS).contains(&seqs) { most * REGISTER_PERCENT / 100 } else { most }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kernels_of_a_step_have_one_split() {
        assert_eq!(percent(1, true), None);
        assert_eq!(percent(8, true), Some(58));
        assert_eq!(percent(128, true), Some(100));
        assert_eq!(percent(8192, false), None);
        // The split of 132 KiB that an H100 has.
        assert!(attention_bytes(8, 228 << 10) >= 132 << 10);
        assert_eq!(attention_bytes(17, 228 << 10), 228 << 10);
    }
}
