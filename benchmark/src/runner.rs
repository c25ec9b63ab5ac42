//! Drives the shards: attach, warm up if nobody did, then prefill and decode, batch size by batch size.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use proto::v3::input_chunk::Chunk;
use proto::v3::{
    Batch, CachedBatch, Input, InputChunk, NextTokenChooserParameters, Request, StoppingCriteriaParameters,
    WarmupRequest,
};
use proto::{ClientError, ShardedClient};

use crate::error::BenchmarkError;
use crate::measurements::{Decode, Prefill, Run, Shards};
use crate::prompt::Prompt;
use crate::settings::{Settings, chooser_parameters};

/// What happens, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Nobody had warmed the shards up, so that is done first; it may take a while.
    WarmingUp {
        /// Tokens of the largest prefill.
        prefill_tokens: u32,
    },
    /// The shards are ready to be measured.
    Attached(Shards),
    /// A batch size begins, with its unmeasured runs.
    BatchStarted {
        /// Index in the settings' batch sizes.
        batch: usize,
    },
    /// One measured run.
    RunDone {
        /// Index in the settings' batch sizes.
        batch: usize,
        /// What was measured.
        run: Run,
    },
}

/// The state of one benchmark.
pub(crate) struct Runner {
    settings: Settings,
    prompt: Prompt,
    client: ShardedClient,
    events: Sender<Event>,
    /// Set by others: end after the call under way.
    stop: Arc<AtomicBool>,
    /// Whether the shards may generate several tokens a step.
    is_speculative: bool,
}

impl Runner {
    /// Attaches and runs everything; leaves the shards' cache empty.
    ///
    /// # Errors
    /// The first failing call; [`BenchmarkError::Interrupted`] when `stop` was set before the end.
    pub(crate) async fn run(
        settings: Settings,
        prompt: Prompt,
        events: Sender<Event>,
        stop: Arc<AtomicBool>,
    ) -> Result<(), BenchmarkError> {
        let attach_error = |source| BenchmarkError::Attach { source };
        let mut client =
            ShardedClient::connect(&settings.master_shard_uds_path).await.map_err(attach_error)?;
        client.clear_cache(None).await.map_err(attach_error)?;
        let mut runner = Self { settings, prompt, client, events, stop, is_speculative: false };
        let shards = runner.identify().await?;
        runner.check_capacity(&shards)?;
        runner.is_speculative = shards.info.speculate > 0;
        runner.send(Event::Attached(shards));

        let outcome = runner.measure().await;
        if outcome.is_err() {
            // A run that was cut off leaves its batch behind; the error that matters is the first.
            let _ = runner.client.clear_cache(None).await;
        }
        outcome
    }

    async fn identify(&mut self) -> Result<Shards, BenchmarkError> {
        let attach_error = |source| BenchmarkError::Attach { source };
        let mut shards = Shards {
            world_size: self.client.world_size(),
            info: self.client.info().await.map_err(attach_error)?,
            ..Default::default()
        };
        let Some(master) = self.client.ranks().first() else { return Ok(shards) };
        let mut master = master.clone();
        // Only our shards have the control service. A shard of TGI's is taken for warmed up, as its own tool does.
        let (Ok(handshake), Ok(status)) = (master.handshake().await, master.status().await) else {
            return Ok(shards);
        };
        shards.model_id = handshake.model_id;
        shards.version = handshake.version;
        shards.cache_tokens = Some(status.blocks_total * u64::from(shards.info.block_size));
        if status.blocks_total == 0 {
            let started = Instant::now();
            shards.cache_tokens = self.warm_up().await?.map(u64::from);
            shards.warmup = Some(started.elapsed());
        }
        Ok(shards)
    }

    /// Does what a router does at its start; answers the size of the cache in tokens.
    async fn warm_up(&mut self) -> Result<Option<u32>, BenchmarkError> {
        let request = warmup_request(&self.settings);
        self.send(Event::WarmingUp { prefill_tokens: request.max_prefill_tokens });
        let limits = self.client.warmup(request).await.map_err(|source| BenchmarkError::Warmup { source })?;
        let wanted = self.settings.sequence_length + self.settings.decode_length;
        if wanted > limits.max_total_tokens || self.settings.sequence_length > limits.max_input_tokens {
            return Err(BenchmarkError::TooLarge(format!(
                "--sequence-length {} and --decode-length {} make {wanted} tokens a request, but the shard allows {} \
                 prompt tokens and {} in all",
                self.settings.sequence_length,
                self.settings.decode_length,
                limits.max_input_tokens,
                limits.max_total_tokens,
            )));
        }
        Ok(limits.max_supported_total_tokens)
    }

    /// Better now than after minutes of smaller batches.
    fn check_capacity(&self, shards: &Shards) -> Result<(), BenchmarkError> {
        let Some(cache_tokens) = shards.cache_tokens.filter(|&tokens| tokens > 0) else { return Ok(()) };
        let batch_size = self.settings.largest_batch();
        // The last generated token is never written to the cache.
        let request_tokens = self.settings.sequence_length + self.settings.decode_steps();
        let wanted = u64::from(batch_size) * u64::from(request_tokens);
        if wanted <= cache_tokens {
            return Ok(());
        }
        Err(BenchmarkError::TooLarge(format!(
            "--batch-size {batch_size} with --sequence-length {} and --decode-length {} needs {wanted} tokens of KV \
             cache, the shard has {cache_tokens}",
            self.settings.sequence_length, self.settings.decode_length,
        )))
    }

    async fn measure(&mut self) -> Result<(), BenchmarkError> {
        for (batch, batch_size) in self.settings.batch_sizes.clone().into_iter().enumerate() {
            self.send(Event::BatchStarted { batch });
            for _ in 0..self.settings.warmups {
                self.run_once(batch_size).await?;
            }
            for _ in 0..self.settings.runs {
                let run = self.run_once(batch_size).await?;
                self.send(Event::RunDone { batch, run });
            }
        }
        Ok(())
    }

    async fn run_once(&mut self, batch_size: u32) -> Result<Run, BenchmarkError> {
        let (prefill, cached) = self.prefill(batch_size).await?;
        let decode = self.decode(batch_size, cached).await?;
        Ok(Run { prefill, decode })
    }

    async fn prefill(&mut self, batch_size: u32) -> Result<(Prefill, Option<CachedBatch>), BenchmarkError> {
        self.check_stop()?;
        let batch = batch(&self.settings, &self.prompt, batch_size);
        let started = Instant::now();
        let step = self.client.prefill(batch, None).await.map_err(call_error("prefill", batch_size))?;
        let latency = started.elapsed();
        let tokens = f64::from(batch_size) * f64::from(self.settings.sequence_length);
        Ok((Prefill { latency, throughput: tokens / latency.as_secs_f64() }, step.next_batch))
    }

    async fn decode(
        &mut self,
        batch_size: u32,
        mut cached: Option<CachedBatch>,
    ) -> Result<Option<Decode>, BenchmarkError> {
        let mut steps = 0;
        let started = Instant::now();
        while let Some(batch) = cached {
            self.check_stop()?;
            cached =
                self.client.decode(vec![batch]).await.map_err(call_error("decode", batch_size))?.next_batch;
            steps += 1;
            if steps > self.settings.decode_steps() {
                break;
            }
        }
        let latency = started.elapsed();
        self.check_steps(batch_size, steps)?;
        Ok((steps > 0).then(|| decode_figures(batch_size, steps, latency)))
    }

    /// Times of answers that were cut short would look like speed.
    fn check_steps(&self, batch_size: u32, steps: u32) -> Result<(), BenchmarkError> {
        let expected = self.settings.decode_steps();
        let is_right = if self.is_speculative { steps <= expected } else { steps == expected };
        if is_right {
            return Ok(());
        }
        let when = if steps < expected { "early" } else { "late" };
        Err(BenchmarkError::WrongLength { batch_size, steps, expected, when })
    }

    fn check_stop(&self) -> Result<(), BenchmarkError> {
        if self.stop.load(Ordering::Relaxed) { Err(BenchmarkError::Interrupted) } else { Ok(()) }
    }

    fn send(&self, event: Event) {
        // Nobody listens any more only when the program is about to end.
        let _ = self.events.send(event);
    }
}

fn call_error(call: &'static str, batch_size: u32) -> impl Fn(ClientError) -> BenchmarkError {
    move |source| BenchmarkError::Call { call, batch_size, source }
}

fn decode_figures(batch_size: u32, steps: u32, latency: Duration) -> Decode {
    Decode {
        steps,
        latency,
        token_latency: latency / steps,
        throughput: f64::from(batch_size) * f64::from(steps) / latency.as_secs_f64(),
    }
}

/// The batch as TGI's tool sends it, and the prompt as token ids beside its text.
fn batch(settings: &Settings, prompt: &Prompt, batch_size: u32) -> Batch {
    let request = Request {
        id: 0,
        inputs: prompt.text.clone(),
        input_chunks: Some(text_chunks(&prompt.text)),
        truncate: settings.sequence_length,
        parameters: Some(chooser_parameters(&settings.sampling)),
        stopping_parameters: Some(StoppingCriteriaParameters {
            max_new_tokens: settings.decode_length,
            stop_sequences: Vec::new(),
            ignore_eos_token: true,
        }),
        top_n_tokens: settings.sampling.top_n_tokens.unwrap_or(0),
        add_special_tokens: true,
        input_ids: prompt.input_ids.clone(),
        ..Default::default()
    };
    Batch {
        id: 0,
        requests: (0..batch_size).map(|id| Request { id: u64::from(id), ..request.clone() }).collect(),
        size: batch_size,
        max_tokens: batch_size * (settings.sequence_length + settings.decode_length),
        max_blocks: 0,
    }
}

/// What a router would send, sized for the largest batch of this benchmark.
fn warmup_request(settings: &Settings) -> WarmupRequest {
    let limits = settings.warmup;
    let max_prefill_tokens =
        limits.max_batch_prefill_tokens.unwrap_or(settings.largest_batch() * settings.sequence_length);
    let longest = limits.max_input_tokens.unwrap_or(u32::MAX).max(1);
    let mut requests = Vec::new();
    let mut rest = max_prefill_tokens;
    while rest > 0 {
        let truncate = rest.min(longest);
        rest -= truncate;
        let max_new_tokens = limits.max_total_tokens.map_or(1, |total| total.saturating_sub(truncate).max(1));
        requests.push(warmup_prompt(requests.len() as u64, truncate, max_new_tokens));
    }
    WarmupRequest {
        batch: Some(Batch {
            id: 0,
            size: requests.len() as u32,
            requests,
            max_tokens: limits.max_input_tokens.unwrap_or(0),
            max_blocks: 0,
        }),
        max_input_tokens: limits.max_input_tokens,
        max_prefill_tokens,
        max_total_tokens: limits.max_total_tokens,
    }
}

/// Uses every feature at once, so that none allocates for the first time later.
fn warmup_prompt(id: u64, truncate: u32, max_new_tokens: u32) -> Request {
    let inputs = "_test ".repeat(truncate as usize);
    Request {
        id,
        input_chunks: Some(text_chunks(&inputs)),
        inputs,
        truncate,
        parameters: Some(NextTokenChooserParameters {
            temperature: 0.9,
            top_k: 10,
            top_p: 0.9,
            typical_p: 0.9,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            watermark: true,
            ..Default::default()
        }),
        stopping_parameters: Some(StoppingCriteriaParameters {
            max_new_tokens,
            stop_sequences: Vec::new(),
            ignore_eos_token: true,
        }),
        prefill_logprobs: true,
        top_n_tokens: 20,
        add_special_tokens: true,
        ..Default::default()
    }
}

fn text_chunks(text: &str) -> Input {
    Input { chunks: vec![InputChunk { chunk: Some(Chunk::Text(text.to_string())) }] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::tests::settings;

    #[test]
    fn a_batch_is_what_tgis_tool_sends() {
        let prompt = Prompt { text: "a b".to_string(), input_ids: vec![5, 6] };
        let batch = batch(&settings(&["-s", "2", "-d", "4", "--top-n-tokens", "3"]), &prompt, 2);
        assert_eq!((batch.id, batch.size, batch.max_tokens, batch.max_blocks), (0, 2, 12, 0));
        let request = &batch.requests[1];
        assert_eq!((request.id, request.truncate, request.top_n_tokens), (1, 2, 3));
        assert_eq!(request.input_ids, [5, 6]);
        assert!(request.blocks.is_empty() && request.slots.is_empty() && !request.prefill_logprobs);
        let stopping = request.stopping_parameters.as_ref().unwrap();
        assert!(stopping.ignore_eos_token && stopping.max_new_tokens == 4);
    }

    #[test]
    fn the_warmup_fills_the_largest_batch() {
        let request = warmup_request(&settings(&["-b", "4", "-s", "100"]));
        assert_eq!(request.max_prefill_tokens, 400);
        assert_eq!((request.max_input_tokens, request.max_total_tokens), (None, None));
        assert_eq!(request.batch.unwrap().requests.len(), 1);
    }

    #[test]
    fn the_warmup_respects_given_limits() {
        let limits =
            ["--max-batch-prefill-tokens", "250", "--max-input-tokens", "100", "--max-total-tokens", "120"];
        let request = warmup_request(&settings(&limits));
        let batch = request.batch.unwrap();
        let lengths: Vec<u32> = batch.requests.iter().map(|request| request.truncate).collect();
        assert_eq!(lengths, [100, 100, 50]);
        let new_tokens =
            |index: usize| batch.requests[index].stopping_parameters.as_ref().unwrap().max_new_tokens;
        assert_eq!((new_tokens(0), new_tokens(2)), (20, 70));
        assert_eq!(batch.max_tokens, 100);
    }

    #[test]
    fn decode_figures_count_steps_and_requests() {
        let figures = decode_figures(4, 8, Duration::from_millis(80));
        assert_eq!(figures.token_latency, Duration::from_millis(10));
        assert_eq!(figures.throughput, 400.0);
    }
}
