//! Entries and step results, to and from the protocol's messages.

use proto::v3::{
    Batch, Generation, Input, InputChunk, NextTokenChooserParameters, Request, StoppingCriteriaParameters,
    Tokens, input_chunk::Chunk,
};

use super::entry::{Entry, GeneratedToken, PromptToken, Token};

/// The message for one entry. `chunk_len`: compute only so many of its known tokens now.
pub(super) fn request(id: u64, entry: &Entry, chunk_len: Option<u32>) -> Request {
    let request = &entry.request;
    let (blocks, slots) = match &entry.allocation {
        Some(allocation) => (allocation.blocks().to_vec(), allocation.slots()),
        None => (Vec::new(), Vec::new()),
    };
    Request {
        id,
        inputs: request.inputs.clone(),
        truncate: request.truncate,
        parameters: Some(request.parameters.clone()),
        stopping_parameters: Some(request.stopping_parameters.clone()),
        // They came with the first token.
        prefill_logprobs: request.prefill_logprobs && entry.generated.is_empty(),
        top_n_tokens: request.top_n_tokens,
        // TGI's shards read the prompt from here, and from `inputs` only when it is missing.
        input_chunks: Some(text_chunk(&request.inputs)),
        blocks,
        slots,
        adapter_id: None,
        cache_len: 0,
        add_special_tokens: request.add_special_tokens,
        chunk_len,
        input_ids: request.input_ids.clone(),
        generated_ids: entry.generated.clone(),
    }
}

/// A prompt without images.
pub fn text_chunk(text: &str) -> Input {
    Input { chunks: vec![InputChunk { chunk: Some(Chunk::Text(text.to_string())) }] }
}

/// The one-token batch of the liveness probe. It lives in block 0, which no request gets.
pub(super) fn liveness_batch() -> Batch {
    let request = Request {
        id: u64::MAX,
        inputs: "liveness".to_string(),
        input_chunks: Some(text_chunk("liveness")),
        truncate: 1,
        parameters: Some(NextTokenChooserParameters {
            temperature: 1.0,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            ..Default::default()
        }),
        stopping_parameters: Some(StoppingCriteriaParameters { max_new_tokens: 1, ..Default::default() }),
        blocks: vec![0],
        slots: vec![0],
        ..Default::default()
    };
    Batch { id: u64::MAX, requests: vec![request], size: 1, max_tokens: 2, max_blocks: 1 }
}

/// The prompt's tokens of a generation, if it has any.
pub(super) fn prompt_tokens(generation: &mut Generation) -> Option<Vec<PromptToken>> {
    let Tokens { ids, logprobs, texts, .. } = generation.prefill_tokens.take()?;
    let tokens = ids.into_iter().zip(texts).zip(logprobs);
    Some(tokens.map(|((id, text), logprob)| PromptToken { id, text, logprob }).collect())
}

/// The generated tokens of a generation, each with its alternatives: more than one only with speculation.
pub(super) fn generated_tokens(generation: &mut Generation) -> Vec<GeneratedToken> {
    let mut top_tokens = std::mem::take(&mut generation.top_tokens).into_iter();
    let chosen = generation.tokens.take().unwrap_or_default();
    tokens(chosen)
        .map(|token| GeneratedToken {
            token,
            top_tokens: top_tokens.next().map(|top| tokens(top).collect()).unwrap_or_default(),
        })
        .collect()
}

fn tokens(message: Tokens) -> impl Iterator<Item = Token> {
    let Tokens { ids, logprobs, texts, is_special } = message;
    ids.into_iter().zip(logprobs).zip(texts).zip(is_special).map(|(((id, logprob), text), special)| Token {
        id,
        text,
        logprob,
        special,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(ids: &[u32]) -> Tokens {
        Tokens {
            ids: ids.to_vec(),
            logprobs: ids.iter().map(|_| -0.5).collect(),
            texts: ids.iter().map(|id| format!("t{id}")).collect(),
            is_special: ids.iter().map(|id| *id == 2).collect(),
        }
    }

    #[test]
    fn tokens_keep_their_own_alternatives() {
        let mut generation = Generation {
            tokens: Some(message(&[1, 2])),
            top_tokens: vec![message(&[1, 5]), message(&[2])],
            ..Default::default()
        };
        let tokens = generated_tokens(&mut generation);
        assert_eq!(tokens.len(), 2);
        assert_eq!(tokens[0].top_tokens.len(), 2);
        assert_eq!(tokens[1].token, Token { id: 2, text: "t2".to_string(), logprob: -0.5, special: true });
        assert_eq!(tokens[1].top_tokens[0].id, 2);
    }

    #[test]
    fn prompt_tokens_need_no_special_flags() {
        let prefill = Tokens { is_special: Vec::new(), ..message(&[3, 4]) };
        let mut generation = Generation { prefill_tokens: Some(prefill), ..Default::default() };
        assert_eq!(prompt_tokens(&mut generation).unwrap().len(), 2);
        assert!(prompt_tokens(&mut generation).is_none());
    }

    #[test]
    fn the_liveness_batch_touches_block_zero_only() {
        let batch = liveness_batch();
        assert_eq!((batch.id, batch.size, batch.max_tokens, batch.max_blocks), (u64::MAX, 1, 2, 1));
        assert_eq!((batch.requests[0].blocks.as_slice(), batch.requests[0].truncate), ([0].as_slice(), 1));
    }
}
