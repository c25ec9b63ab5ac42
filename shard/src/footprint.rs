//! `shard footprint`: what serving with the same options would take of each rank's memory and how it would split the model,
//! as JSON, from the headers of the files; nothing is loaded and no device is touched.

use std::io::Write as _;

use backend::{DType, DeviceInfo};
use models::{DeviceRules, Footprint, RankFootprint};
use serde_json::{Value, json};

use crate::device;
use crate::engine::{self, EngineOptions};
use crate::error::ShardError;
use crate::settings::{DeviceKind, ServeSettings};
use crate::startup;

/// What is known of the devices.
#[derive(Debug, Clone, Default)]
pub struct Room {
    /// Free bytes of each rank's device; one number is the memory that all ranks share. Empty: not known.
    pub free_bytes: Vec<usize>,
    /// The most prompt tokens of one step.
    pub max_prefill_tokens: usize,
}

/// Prints the JSON.
///
/// # Errors
/// The model cannot be found, read or split like this, or standard output is closed.
pub fn print(settings: &ServeSettings, room: &Room) -> Result<(), ShardError> {
    let value = describe(settings, room)?;
    writeln!(std::io::stdout(), "{value}")
        .map_err(|source| ShardError::System { action: "writing to standard output", source })
}

/// The JSON.
///
/// # Errors
/// The model cannot be found, read or split like this.
pub fn describe(settings: &ServeSettings, room: &Room) -> Result<Value, ShardError> {
    let files = hub::locate(&settings.model, &settings.hub)?;
    let kind = if settings.device == DeviceKind::Cuda { DeviceKind::Cuda } else { DeviceKind::Cpu };
    let rules = rules(kind);
    let footprint = models::footprint(&files, &device::load_options(settings), settings.world_size, &rules)?;
    let tokenizer_config = files.tokenizer_config()?;
    let model_max_length = tokenizer_config.model_max_length.and_then(|length| usize::try_from(length).ok());
    let options = startup::engine_options(settings, model_max_length);
    let max_context = model_max_length.unwrap_or(usize::MAX).min(footprint.max_position_embeddings);
    let ranks: Vec<Value> = (0..settings.world_size)
        .map(|rank| describe_rank(&footprint, rank, cache(&footprint, rank, (&options, room, kind))))
        .collect();
    Ok(json!({
        "device": if kind == DeviceKind::Cuda { "cuda" } else { "cpu" },
        "dtype": footprint.dtype.name(),
        "kv_dtype": footprint.kv_dtype.name(),
        "is_quantized": footprint.is_quantized,
        "num_layers": footprint.num_layers,
        "block_size": footprint.block_size,
        "max_context": max_context,
        "ranks": ranks,
    }))
}

fn describe_rank(footprint: &Footprint, rank: usize, cache: Value) -> Value {
    let RankFootprint {
        weight_bytes,
        workspace_bytes,
        logits_bytes,
        block_bytes,
        query_heads,
        kv_heads,
        feed_forward,
        vocabulary,
    } = &footprint.ranks[rank];
    json!({
        "weight_bytes": weight_bytes,
        "workspace_bytes": workspace_bytes,
        "logits_bytes": logits_bytes,
        "block_bytes": block_bytes,
        "query_heads": [query_heads.start, query_heads.end],
        "kv_heads": [kv_heads.start, kv_heads.end],
        "feed_forward": [feed_forward.start, feed_forward.end],
        "vocabulary": [vocabulary.start, vocabulary.end],
        "cache": cache,
    })
}

/// The KV cache that would be made, `null` where the free memory is not known, a text where it does not suffice.
fn cache(
    footprint: &Footprint,
    rank: usize,
    (options, room, kind): (&EngineOptions, &Room, DeviceKind),
) -> Value {
    let Some(&free) = room.free_bytes.get(rank).or(room.free_bytes.first()) else { return Value::Null };
    // On the processor all ranks load into the same memory before the first cache is made.
    let taken: usize = if kind == DeviceKind::Cuda {
        footprint.ranks[rank].fixed_bytes()
    } else {
        footprint.ranks.iter().map(RankFootprint::fixed_bytes).sum()
    };
    let device = DeviceInfo { device_type: "cpu", description: String::new(), is_asynchronous: false };
    let info = footprint.model_info(rank, device);
    match engine::forecast_cache(&info, options, room.max_prefill_tokens, free.saturating_sub(taken)) {
        Ok((num_blocks, limits)) => json!({
            "num_blocks": num_blocks,
            "total_tokens": limits.max_supported_total_tokens,
            "max_total_tokens": limits.max_total_tokens,
            "max_input_tokens": limits.max_input_tokens,
        }),
        Err(problem) => Value::String(problem),
    }
}

/// What the backends answer to the questions of the same names; a backend that could be asked would open its device.
fn rules(kind: DeviceKind) -> DeviceRules {
    if kind != DeviceKind::Cuda {
        return DeviceRules {
            default_dtype: |stored| stored,
            default_kv_dtype: |dtype| if dtype == DType::F32 { DType::F32 } else { DType::F16 },
            keeps_quantized: true,
            keeps_fp8: false,
            max_step_tokens: 512,
            max_rows_sampled: models::LoadOptions::default().max_rows_sampled,
            block_size: device::BLOCK_SIZE,
        };
    }
    DeviceRules {
        default_dtype: |stored| if stored == DType::F32 { DType::F16 } else { stored },
        default_kv_dtype: |dtype| dtype,
        keeps_quantized: false,
        keeps_fp8: true,
        max_step_tokens: device::cuda_step_tokens(),
        max_rows_sampled: device::CUDA_ROWS_SAMPLED,
        block_size: device::BLOCK_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use backend::Backend;
    use backend::collectives::Single;
    use backend::cpu::{CpuBackend, CpuOptions};

    use super::*;

    #[test]
    fn the_processors_rules_are_its_backends() {
        let backend =
            CpuBackend::new(CpuOptions { threads: 1, isa: None, pin_threads: false }, Box::new(Single))
                .unwrap();
        let rules = rules(DeviceKind::Cpu);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            assert_eq!((rules.default_dtype)(dtype), backend.default_dtype(dtype));
            assert_eq!((rules.default_kv_dtype)(dtype), backend.default_kv_dtype(dtype));
        }
        assert_eq!(rules.keeps_quantized, backend.keeps_quantized());
        assert_eq!(rules.keeps_fp8, backend.keeps_fp8());
        assert_eq!(rules.max_step_tokens, backend.max_step_tokens());
    }
}
