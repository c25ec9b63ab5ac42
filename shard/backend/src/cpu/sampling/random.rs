//! Random numbers without a state: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
//! with the seed as key and the position as counter.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let wide = [0, 1].map(|i| u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]));
        let high = wide.map(|x| (x >> 32) as u32);
        let low = wide.map(|x| x as u32);
        counter = [high[1] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], low[0]];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// A number in `[0, 1)` with 53 random bits.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let halves = |x: u64| [x as u32, (x >> 32) as u32];
    let [low, high] = halves(position);
    let drawn = philox([low, high, 0, 0], halves(seed));
    let bits = u64::from(drawn[0]) << 32 | u64::from(drawn[1]);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_known_answers_of_its_authors() {
        let expected = [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8];
        assert_eq!(philox([0; 4], [0; 2]), expected);
        let expected = [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD];
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), expected);
    }

    #[test]
    fn numbers_spread_over_the_interval() {
        let mut counts = [0u32; 10];
        (0..10_000).for_each(|position| counts[(uniform(7, position) * 10.0) as usize] += 1);
        assert!(counts.iter().all(|&count| (880..1120).contains(&count)), "{counts:?}");
    }
}
