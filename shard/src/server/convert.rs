//! From messages to the engine's types and back.

use std::time::Duration;

use backend::sampling::SamplingParams;
use models::ModelInfo;
use proto::v3;
use proto::v3::input_chunk::Chunk;

use crate::engine::{
    CachedBatch, FinishReason, Generation, NewBatch, NewRequest, Prompt, StepReply, StoppingParams, Tokens,
    WarmupLimits, WarmupRequest,
};

/// What a request is converted for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// To be answered: what cannot be honoured is refused.
    Answer,
    /// To be tried: a router's warm-up asks for everything there is, an image and a watermark included.
    Warmup,
}

/// A batch to prefill.
///
/// # Errors
/// One line about the first request that asks for something that is missing, wrong or not supported.
pub fn new_batch(batch: v3::Batch) -> Result<NewBatch, String> {
    convert_batch(batch, Purpose::Answer)
}

/// A warm-up.
///
/// # Errors
/// As [`new_batch`].
pub fn warmup_request(request: v3::WarmupRequest) -> Result<WarmupRequest, String> {
    Ok(WarmupRequest {
        batch: convert_batch(request.batch.unwrap_or_default(), Purpose::Warmup)?,
        max_input_tokens: request.max_input_tokens.map(|tokens| tokens as usize),
        max_prefill_tokens: request.max_prefill_tokens as usize,
        max_total_tokens: request.max_total_tokens.map(|tokens| tokens as usize),
    })
}

fn convert_batch(batch: v3::Batch, purpose: Purpose) -> Result<NewBatch, String> {
    let convert = |request: v3::Request| {
        let id = request.id;
        convert_request(request, purpose).map_err(|problem| format!("request {id}: {problem}"))
    };
    Ok(NewBatch {
        id: batch.id,
        requests: batch.requests.into_iter().map(convert).collect::<Result<_, _>>()?,
    })
}

fn convert_request(request: v3::Request, purpose: Purpose) -> Result<NewRequest, String> {
    let parameters = request.parameters.ok_or("parameters are missing, expected some")?;
    let stopping = request.stopping_parameters.ok_or("stopping_parameters are missing, expected some")?;
    if purpose == Purpose::Answer {
        refuse_unsupported(&parameters, request.adapter_id.as_deref())?;
    }
    let prompt = if request.input_ids.is_empty() {
        let text = prompt_text(request.inputs, request.input_chunks, purpose)?;
        Prompt::Text { text, add_special_tokens: request.add_special_tokens }
    } else {
        Prompt::Ids(request.input_ids)
    };
    Ok(NewRequest {
        id: request.id,
        prompt,
        generated: request.generated_ids,
        truncate: request.truncate as usize,
        sampling: sampling_params(&parameters)?,
        stopping: StoppingParams {
            max_new_tokens: stopping.max_new_tokens,
            stop_sequences: stopping.stop_sequences,
            ignore_eos: stopping.ignore_eos_token,
        },
        prefill_logprobs: request.prefill_logprobs,
        top_n: request.top_n_tokens,
        blocks: request.blocks,
        slots: request.slots,
        cache_len: request.cache_len as usize,
        chunk_len: request.chunk_len.map(|tokens| tokens as usize),
    })
}

fn refuse_unsupported(
    parameters: &v3::NextTokenChooserParameters,
    adapter_id: Option<&str>,
) -> Result<(), String> {
    if !parameters.grammar.is_empty() || parameters.grammar_type != v3::GrammarType::None as i32 {
        return Err("a grammar is given, but grammars are not supported".to_string());
    }
    if parameters.watermark {
        return Err("a watermark is asked for, but watermarks are not supported".to_string());
    }
    if let Some(adapter) = adapter_id.filter(|id| !id.is_empty()) {
        return Err(format!("adapter {adapter:?} is asked for, but adapters are not supported"));
    }
    Ok(())
}

/// The chunks one after the other when there are any, else the plain text.
fn prompt_text(inputs: String, chunks: Option<v3::Input>, purpose: Purpose) -> Result<String, String> {
    let chunks = chunks.map(|input| input.chunks).unwrap_or_default();
    if chunks.is_empty() {
        return Ok(inputs);
    }
    let mut text = String::new();
    for chunk in chunks {
        match chunk.chunk {
            Some(Chunk::Text(part)) => text.push_str(&part),
            Some(Chunk::Image(_)) if purpose == Purpose::Answer => {
                return Err("an image is given, but this model takes text only".to_string());
            }
            Some(Chunk::Image(_)) | None => {}
        }
    }
    Ok(text)
}

fn sampling_params(parameters: &v3::NextTokenChooserParameters) -> Result<SamplingParams, String> {
    let positive = |name: &str, value: f32| {
        if value > 0.0 && value.is_finite() {
            Ok(value)
        } else {
            Err(format!("{name} is {value}, expected more than 0; 1 turns it off"))
        }
    };
    let share = |name: &str, value: f32| {
        if value > 0.0 && value <= 1.0 {
            Ok(value)
        } else {
            Err(format!("{name} is {value}, expected more than 0 and at most 1; 1 turns it off"))
        }
    };
    if !parameters.frequency_penalty.is_finite() {
        return Err(format!("frequency_penalty is {}, expected a number", parameters.frequency_penalty));
    }
    Ok(SamplingParams {
        temperature: positive("temperature", parameters.temperature)?,
        top_k: parameters.top_k,
        top_p: share("top_p", parameters.top_p)?,
        typical_p: share("typical_p", parameters.typical_p)?,
        do_sample: parameters.do_sample,
        seed: parameters.seed,
        repetition_penalty: positive("repetition_penalty", parameters.repetition_penalty)?,
        frequency_penalty: parameters.frequency_penalty,
    })
}

/// What the model is.
pub(super) fn info(model: &ModelInfo) -> v3::InfoResponse {
    v3::InfoResponse {
        requires_padding: false,
        dtype: format!("torch.{}", model.dtype),
        device_type: model.device.device_type.to_string(),
        window_size: None,
        speculate: 0,
        support_chunking: true,
        use_prefix_caching: false,
        attention_impl: "paged".to_string(),
        block_size: saturate(model.block_size),
        supports_resume: true,
    }
}

pub(super) fn warmup_response(limits: WarmupLimits) -> v3::WarmupResponse {
    v3::WarmupResponse {
        max_supported_total_tokens: Some(saturate(limits.max_supported_total_tokens)),
        max_input_tokens: saturate(limits.max_input_tokens),
        max_total_tokens: saturate(limits.max_total_tokens),
    }
}

pub(super) fn cached_batch(batch: CachedBatch) -> v3::CachedBatch {
    v3::CachedBatch {
        id: batch.id,
        size: saturate(batch.request_ids.len()),
        request_ids: batch.request_ids,
        max_tokens: saturate(batch.max_tokens),
        current_tokens: saturate(batch.current_tokens),
    }
}

pub(super) fn prefill_response(step: StepReply) -> v3::PrefillResponse {
    v3::PrefillResponse {
        generations: step.generations.into_iter().map(generation).collect(),
        batch: step.batch.map(cached_batch),
        forward_ns: nanos(step.timings.forward),
        decode_ns: nanos(step.timings.decode),
        total_ns: nanos(step.timings.total),
        concat_ns: step.timings.concat.map(nanos),
    }
}

pub(super) fn decode_response(step: StepReply) -> v3::DecodeResponse {
    let v3::PrefillResponse { generations, batch, forward_ns, decode_ns, total_ns, concat_ns } =
        prefill_response(step);
    v3::DecodeResponse { generations, batch, forward_ns, decode_ns, total_ns, concat_ns }
}

fn generation(generation: Generation) -> v3::Generation {
    v3::Generation {
        request_id: generation.request_id,
        prefill_tokens: generation.prompt_tokens.map(tokens),
        tokens: Some(tokens(generation.tokens)),
        generated_text: generation.generated_text.map(|text| v3::GeneratedText {
            text: text.text,
            generated_tokens: text.generated_tokens,
            finish_reason: finish_reason(text.finish_reason) as i32,
            seed: text.seed,
        }),
        top_tokens: generation.top_tokens.into_iter().map(tokens).collect(),
    }
}

fn tokens(tokens: Tokens) -> v3::Tokens {
    let Tokens { ids, logprobs, texts, is_special } = tokens;
    v3::Tokens { ids, logprobs, texts, is_special }
}

fn finish_reason(reason: FinishReason) -> v3::FinishReason {
    match reason {
        FinishReason::Length => v3::FinishReason::Length,
        FinishReason::EosToken => v3::FinishReason::EosToken,
        FinishReason::StopSequence => v3::FinishReason::StopSequence,
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn saturate(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
