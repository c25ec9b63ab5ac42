//! Which rank owns what: pure functions, uneven where the sizes do not divide.
//!
//! Query heads go with their KV head, so attention needs no exchange; feed-forward widths and vocabularies are cut
//! between tiles, so that every rank's kernels work on whole ones. Lower ranks get the remainder.

use std::ops::Range;

use crate::ModelError;

/// Widest unit that widths and vocabularies are cut in: a multiple of every kernel's tile.
const TILE: usize = 64;

/// One rank's heads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadSplit {
    /// Query heads; every one belongs to exactly one rank.
    pub query: Range<usize>,
    /// KV heads that those query heads read; on more ranks than KV heads, several ranks keep the same one.
    pub kv: Range<usize>,
    /// Ranks that keep these KV heads, this one included.
    pub kv_copies: usize,
}

/// This rank's heads. Ranks share KV heads only when there are more ranks than KV heads.
///
/// # Errors
/// There are more ranks than query heads.
pub fn split_heads(
    num_heads: usize,
    num_kv_heads: usize,
    rank: usize,
    world_size: usize,
) -> Result<HeadSplit, ModelError> {
    if world_size > num_heads {
        return Err(too_many_ranks(world_size, num_heads, "query heads"));
    }
    let group = num_heads / num_kv_heads;
    if world_size <= num_kv_heads {
        let kv = share(num_kv_heads, rank, world_size);
        return Ok(HeadSplit { query: kv.start * group..kv.end * group, kv, kv_copies: 1 });
    }
    // Every KV head has a run of ranks, and those share its query heads.
    let (head, ranks) = (0..num_kv_heads)
        .map(|head| (head, share(world_size, head, num_kv_heads)))
        .find(|(_, ranks)| ranks.contains(&rank))
        .unwrap_or((0, 0..world_size));
    let query = share(group, rank - ranks.start, ranks.len());
    Ok(HeadSplit {
        query: head * group + query.start..head * group + query.end,
        kv: head..head + 1,
        kv_copies: ranks.len(),
    })
}

/// This rank's part of `len` rows or columns, cut between tiles of 64, or of fewer when there are fewer tiles than ranks;
/// never empty.
///
/// # Errors
/// There are more ranks than elements.
pub fn split_tiles(
    len: usize,
    what: &'static str,
    rank: usize,
    world_size: usize,
) -> Result<Range<usize>, ModelError> {
    if world_size > len {
        return Err(too_many_ranks(world_size, len, what));
    }
    let mut tile = TILE;
    while len.div_ceil(tile) < world_size {
        tile /= 2;
    }
    let tiles = share(len.div_ceil(tile), rank, world_size);
    Ok((tiles.start * tile).min(len)..(tiles.end * tile).min(len))
}

/// Part `index` of `len` things over `count` owners; the first `len % count` get one more.
fn share(len: usize, index: usize, count: usize) -> Range<usize> {
    let (each, extra) = (len / count, len % count);
    let start = index * each + index.min(extra);
    start..start + each + usize::from(index < extra)
}

fn too_many_ranks(world_size: usize, len: usize, what: &str) -> ModelError {
    ModelError::Unusable(vec![format!(
        "{world_size} ranks for {len} {what}, expected at most {len} ranks; lower --num-shard"
    )])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smollm2_runs_on_one_two_and_three_ranks() {
        let split = |rank, world_size| split_heads(9, 3, rank, world_size).unwrap();
        assert_eq!(split(0, 1), HeadSplit { query: 0..9, kv: 0..3, kv_copies: 1 });
        assert_eq!(split(0, 2), HeadSplit { query: 0..6, kv: 0..2, kv_copies: 1 });
        assert_eq!(split(1, 2), HeadSplit { query: 6..9, kv: 2..3, kv_copies: 1 });
        assert_eq!(split(2, 3), HeadSplit { query: 6..9, kv: 2..3, kv_copies: 1 });
    }

    #[test]
    fn more_ranks_than_kv_heads_replicate_them() {
        let splits: Vec<_> = (0..5).map(|rank| split_heads(8, 2, rank, 5).unwrap()).collect();
        assert_eq!(
            splits.iter().map(|split| split.query.clone()).collect::<Vec<_>>(),
            [0..2, 2..3, 3..4, 4..6, 6..8]
        );
        assert_eq!(splits.iter().map(|split| split.kv.start).collect::<Vec<_>>(), [0, 0, 0, 1, 1]);
        assert_eq!(splits.iter().map(|split| split.kv_copies).collect::<Vec<_>>(), [3, 3, 3, 2, 2]);
    }

    #[test]
    fn every_query_head_has_one_owner_and_its_kv_head() {
        for num_kv_heads in 1..=9 {
            for group in 1..=7 {
                let num_heads = num_kv_heads * group;
                for world_size in 1..=num_heads.min(17) {
                    let mut next = 0;
                    for rank in 0..world_size {
                        let split = split_heads(num_heads, num_kv_heads, rank, world_size).unwrap();
                        assert_eq!(split.query.start, next, "{num_heads}/{num_kv_heads} on {world_size}");
                        assert!(!split.query.is_empty());
                        next = split.query.end;
                        assert_eq!(split.query.len() % split.kv.len(), 0);
                        let local_group = split.query.len() / split.kv.len();
                        for (local, head) in split.query.clone().enumerate() {
                            assert_eq!(split.kv.start + local / local_group, head / group);
                        }
                    }
                    assert_eq!(next, num_heads);
                }
            }
        }
    }

    #[test]
    fn every_element_has_one_owner() {
        for len in (1..300).chain([1536, 49152, 50257, 32003]) {
            for world_size in 1..=len.min(9) {
                let mut next = 0;
                for rank in 0..world_size {
                    let part = split_tiles(len, "columns", rank, world_size).unwrap();
                    assert_eq!(part.start, next, "{len} on {world_size}");
                    assert!(!part.is_empty(), "{len} on {world_size}, rank {rank}");
                    assert!(part.end == len || len < TILE * world_size || part.end.is_multiple_of(TILE));
                    next = part.end;
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn too_many_ranks_are_refused_with_the_limit() {
        let error = split_heads(4, 2, 0, 5).unwrap_err().to_string();
        assert_eq!(error, "5 ranks for 4 query heads, expected at most 4 ranks; lower --num-shard");
        assert!(split_tiles(2, "rows", 0, 3).is_err());
    }
}
