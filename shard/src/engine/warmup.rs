//! How large the KV cache is, and what a request may need of it.

use models::ModelInfo;

use super::request::{NewBatch, Prompt};

/// Share of the memory available to this rank that its KV cache takes at most. Half of the machine is left to the file
/// cache (weights are mapped files), to the router and to whatever else runs beside.
const CPU_MEMORY_SHARE: f64 = 0.5;

/// No more cache than this many sequences of full length can fill: beyond it a larger cache gains nothing.
const MAX_FULL_SEQUENCES: usize = 128;

/// Requests of the short pass; two, so that a batch is run and not only a sequence.
const NUM_SHORT_REQUESTS: usize = 2;

/// Prompt tokens of each. Enough to go through every weight once; the memory needed by longer prompts is known exactly
/// beforehand, so there is nothing to find out by running them.
const SHORT_PROMPT_TOKENS: usize = 8;

/// As much of a warm-up text as is certain to hold [`SHORT_PROMPT_TOKENS`] tokens of any tokenizer.
const SHORT_TEXT_BYTES: usize = 128;

/// What a router or benchmark knows before it starts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WarmupRequest {
    /// Requests to try; only their beginning is run.
    pub batch: NewBatch,
    /// The longest prompt; `None`: whatever fits.
    pub max_input_tokens: Option<usize>,
    /// The most prompt tokens of one step.
    pub max_prefill_tokens: usize,
    /// The longest prompt and answer; `None`: whatever fits.
    pub max_total_tokens: Option<usize>,
}

/// What the KV cache allows, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WarmupLimits {
    /// Tokens of all requests together, the reserved block included.
    pub max_supported_total_tokens: usize,
    /// Prompt of one request.
    pub max_input_tokens: usize,
    /// Prompt and answer of one request.
    pub max_total_tokens: usize,
}

/// What the size of the KV cache depends on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct CacheBudget {
    /// Memory that can still be allocated on this device.
    pub available_bytes: usize,
    /// `--cuda-memory-fraction`.
    pub memory_fraction: f64,
    /// Ranks that share the memory.
    pub local_world_size: usize,
    /// Longest text the tokenizer and the positions allow.
    pub max_context: usize,
}

/// A sized KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CachePlan {
    /// Blocks, the reserved one included.
    pub num_blocks: usize,
    /// What they allow.
    pub limits: WarmupLimits,
}

/// Sizes the KV cache.
///
/// # Errors
/// One line when the memory does not suffice, with the options that change it.
pub(super) fn plan(
    request: &WarmupRequest,
    model: &ModelInfo,
    budget: &CacheBudget,
) -> Result<CachePlan, String> {
    let share = budget.memory_fraction * CPU_MEMORY_SHARE / budget.local_world_size.max(1) as f64;
    let budget_bytes = (budget.available_bytes as f64 * share) as usize;
    let longest = request.max_total_tokens.unwrap_or(budget.max_context);
    let useful_tokens = request.max_prefill_tokens.max(MAX_FULL_SEQUENCES.saturating_mul(longest));
    // One more for the reserved block; slots are numbered in 32 bits.
    let useful_blocks =
        useful_tokens.div_ceil(model.block_size).min(u32::MAX as usize / model.block_size - 1) + 1;
    let num_blocks = useful_blocks.min(budget_bytes / model.block_bytes.max(1));
    let usable_tokens = num_blocks.saturating_sub(1) * model.block_size;
    let needed_tokens = request.max_total_tokens.unwrap_or(model.block_size).max(1);
    if usable_tokens < needed_tokens {
        let needed_blocks = needed_tokens.div_ceil(model.block_size) + 1;
        return Err(format!(
            "not enough memory for the KV cache: {needed_tokens} tokens need {} MiB, {} MiB are available to it ({} MiB \
             free x --cuda-memory-fraction {} x {CPU_MEMORY_SHARE} / {} ranks); lower --max-total-tokens, raise \
             --cuda-memory-fraction or free memory",
            mebibytes(needed_blocks * model.block_bytes),
            mebibytes(budget_bytes),
            mebibytes(budget.available_bytes),
            budget.memory_fraction,
            budget.local_world_size,
        ));
    }
    let max_total_tokens = request.max_total_tokens.unwrap_or(usable_tokens.min(budget.max_context));
    let max_input_tokens = request.max_input_tokens.unwrap_or(max_total_tokens.saturating_sub(1).max(1));
    Ok(CachePlan {
        num_blocks,
        limits: WarmupLimits {
            max_supported_total_tokens: num_blocks * model.block_size,
            max_input_tokens,
            max_total_tokens,
        },
    })
}

/// The part of a warm-up batch that is run: a short prompt each and two tokens, so that a prefill and a decode step
/// are taken. Prompts stay the callers'; blocks are the engine's.
pub(super) fn short_batch(batch: NewBatch, usable_tokens: usize) -> NewBatch {
    // The second token is never stored.
    let tokens = (usable_tokens / NUM_SHORT_REQUESTS).saturating_sub(1).clamp(1, SHORT_PROMPT_TOKENS);
    let requests = batch.requests.into_iter().take(NUM_SHORT_REQUESTS).map(|mut request| {
        if let Prompt::Text { text, .. } = &mut request.prompt {
            let cut = text.len().saturating_sub(SHORT_TEXT_BYTES);
            let cut = (cut..=text.len()).find(|&index| text.is_char_boundary(index)).unwrap_or(0);
            text.drain(..cut);
        }
        request.truncate = tokens;
        request.stopping.max_new_tokens = 2;
        request.stopping.ignore_eos = true;
        request.cache_len = 0;
        request.chunk_len = None;
        request.blocks.clear();
        request.slots.clear();
        request
    });
    NewBatch { id: batch.id, requests: requests.collect() }
}

fn mebibytes(bytes: usize) -> usize {
    bytes.div_ceil(1024 * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{model_info, request};

    const BUDGET: CacheBudget =
        CacheBudget { available_bytes: 1 << 20, memory_fraction: 1.0, local_world_size: 1, max_context: 100 };

    fn warmup(max_input_tokens: Option<usize>, max_total_tokens: Option<usize>) -> WarmupRequest {
        WarmupRequest {
            max_input_tokens,
            max_total_tokens,
            max_prefill_tokens: 64,
            ..WarmupRequest::default()
        }
    }

    #[test]
    fn limits_follow_the_memory() {
        let model = ModelInfo { block_bytes: 1 << 15, block_size: 16, ..model_info() };
        let plan = plan(&warmup(None, None), &model, &CacheBudget { max_context: 4096, ..BUDGET }).unwrap();
        assert_eq!(plan.num_blocks, 16, "half of a MiB");
        assert_eq!(plan.limits.max_supported_total_tokens, 256);
        assert_eq!(plan.limits.max_total_tokens, 240, "one block is reserved");
        assert_eq!(plan.limits.max_input_tokens, 239);
    }

    #[test]
    fn limits_follow_the_model_and_the_flags() {
        let model = ModelInfo { block_bytes: 16, block_size: 16, ..model_info() };
        let unset = plan(&warmup(None, None), &model, &BUDGET).unwrap();
        assert_eq!((unset.limits.max_total_tokens, unset.limits.max_input_tokens), (100, 99));
        assert_eq!(unset.num_blocks, 801, "128 sequences of 100 tokens and block 0");
        let set = plan(&warmup(Some(30), Some(50)), &model, &BUDGET).unwrap();
        assert_eq!((set.limits.max_total_tokens, set.limits.max_input_tokens), (50, 30));
        assert_eq!(set.num_blocks, 401);
    }

    #[test]
    fn ranks_share_the_memory() {
        let model = ModelInfo { block_bytes: 1 << 14, block_size: 16, ..model_info() };
        let budget = CacheBudget { local_world_size: 2, memory_fraction: 0.5, max_context: 4096, ..BUDGET };
        assert_eq!(plan(&warmup(None, None), &model, &budget).unwrap().num_blocks, 8);
    }

    #[test]
    fn too_little_memory_names_what_to_change() {
        let model = ModelInfo { block_bytes: 1 << 18, block_size: 16, ..model_info() };
        let error = plan(&warmup(None, Some(64)), &model, &BUDGET).unwrap_err();
        assert!(error.contains("64 tokens need 2 MiB, 1 MiB are available"), "{error}");
        assert!(error.contains("--max-total-tokens") && error.contains("--cuda-memory-fraction"), "{error}");
        assert!(plan(&warmup(None, None), &ModelInfo { block_bytes: 1 << 19, ..model }, &BUDGET).is_err());
    }

    #[test]
    fn the_short_pass_is_short() {
        let mut long = request(3, 1000);
        long.prompt = Prompt::Text { text: "\u{e9}_test ".repeat(1000), add_special_tokens: true };
        let batch = NewBatch { id: 0, requests: vec![long; 5] };
        let short = short_batch(batch.clone(), 1000);
        assert_eq!(short.requests.len(), 2);
        assert_eq!((short.requests[0].truncate, short.requests[0].stopping.max_new_tokens), (8, 2));
        let Prompt::Text { text, .. } = &short.requests[0].prompt else { panic!("text stays text") };
        assert!(text.len() <= 128 && text.len() > 120);
        assert_eq!(short_batch(batch, 16).requests[0].truncate, 7);
    }
}
