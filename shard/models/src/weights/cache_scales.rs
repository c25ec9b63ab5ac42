//! Scales for a KV cache of eight bits that a checkpoint brings along. Here such a cache has a scale of 1, and any other cache has
//! none, so these are checked and then left alone.

use backend::KvDType;

use super::{WeightSource, one_line, rows_and_cols};
use crate::ModelError;

/// What they are called, whatever comes before.
const NAMES: [&str; 3] = ["k_scale", "v_scale", "kv_scale"];
/// What compressed-tensors calls them: scales of what these projections put out.
const PROJECTIONS: [&str; 3] = ["k_proj.output_scale", "v_proj.output_scale", "qkv_proj.output_scale"];

/// Whether this is a scale of keys or values.
pub(super) fn is_cache_scale(name: &str) -> bool {
    let is_named = |suffix: &&str| name.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.'));
    NAMES.iter().chain(&PROJECTIONS).any(is_named)
}

/// Compares what the files say of the scales with what a cache of `kv_dtype` does; none: a plain one.
///
/// # Errors
/// The cache has eight bits and a scale is not 1: one line, with the first of them.
pub(crate) fn check_cache_scales(
    source: &dyn WeightSource,
    kv_dtype: Option<KvDType>,
) -> Result<(), ModelError> {
    let Some(kv_dtype) = kv_dtype.filter(|kv_dtype| matches!(kv_dtype, KvDType::Fp8(_))) else {
        return Ok(());
    };
    let mut names: Vec<_> = source.names().into_iter().filter(|name| is_cache_scale(name)).collect();
    names.sort_unstable();
    let other = names.into_iter().find_map(|name| Some((name, other_than_one(source, name)?)));
    let Some((name, found)) = other else { return Ok(()) };
    Err(ModelError::Unusable(vec![format!(
        "tensor {} is {found}, expected 1: --kv-cache-dtype {kv_dtype} stores keys and values with a scale of 1; leave it out for \
         a cache that needs no scales",
        one_line(name)
    )]))
}

/// What the tensor holds, if that is not 1.
fn other_than_one(source: &dyn WeightSource, name: &str) -> Option<String> {
    let meta = source.meta(name)?;
    let (rows, cols) = rows_and_cols(&meta.shape).unwrap_or((1, 1));
    let Ok(matrix) = source.matrix(name, 0..rows, 0..cols) else {
        return Some(format!("stored as {}", one_line(&meta.stored)));
    };
    let mut row = vec![0.0; cols];
    let rows = (0..rows).map(|index| {
        matrix.read_row(index, &mut row);
        row.iter().copied().find(|&scale| scale != 1.0)
    });
    rows.flatten().next().map(|scale| scale.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_of_keys_and_values_are_known_by_their_names() {
        for name in [
            "model.layers.0.self_attn.k_scale",
            "model.layers.0.self_attn.k_proj.k_scale",
            "model.layers.0.self_attn.attn.v_scale",
            "model.layers.0.self_attn.kv_scale",
            "model.layers.0.self_attn.v_proj.output_scale",
        ] {
            assert!(is_cache_scale(name), "{name}");
        }
        for name in
            ["k_scale", "a.rank_scale", "a.q_proj.output_scale", "a.k_proj.weight_scale", "a.k_scale.b"]
        {
            assert!(!is_cache_scale(name), "{name}");
        }
    }
}
