//! The executor on the CPU backend against a plain reference, on a model small enough to compute by hand.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod fixture;
mod mixtures;
mod reference;
mod relatives;
#[path = "../../src/testing.rs"]
mod testing;

use std::path::PathBuf;
use std::time::Duration;

use backend::collectives::Single;
use backend::collectives::shm::{Rendezvous, join};
use backend::cpu::{CpuBackend, CpuOptions};
use backend::sampling::{SamplingParams, SamplingRow};
use backend::{DType, KvDType, StepInput};
use fixture::{Fixture, Kind, Stored};
use models::{CausalLm, Decoder, DeviceRules, LoadOptions, Quantize, footprint, load};

type CpuDecoder = Decoder<CpuBackend>;

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 64;

/// How far logits of about 1 may be from the reference, by the type of weights and KV cache; measured worst in brackets.
fn tolerance(weights: DType, cache: DType) -> f64 {
    match (weights, cache) {
        (DType::F32, DType::F32) => 1e-5, // [2.4e-6]
        // bf16 kernels keep 16 bits of the activations' mantissa, an f16 cache 11.
        (DType::BF16, DType::F32) => 1e-4, // [4.6e-5]
        _ => 4e-3,                         // [2.2e-3]
    }
}

/// The same for a sequence that is computed in pieces of `sizes`. Processors with VNNI compute five rows and more in fixed
/// point, which keeps 16 bits below the norm of 64 neighbours, of bf16 weights and of their activations [5.3e-4].
fn tolerance_in_pieces(decoder: &CpuDecoder, sizes: &[usize], weights: DType, cache: DType) -> f64 {
    let description = &decoder.info().device.description;
    let is_fixed = ["VNNI kernels", "BF16 kernels"].iter().any(|kernels| description.contains(kernels))
        && sizes.iter().any(|&size| size >= 5);
    let strict = tolerance(weights, cache);
    if is_fixed && weights == DType::BF16 { strict.max(1e-3) } else { strict }
}

fn options() -> LoadOptions {
    LoadOptions { block_size: BLOCK_SIZE, max_rows_sampled: 3, threads: 2, ..LoadOptions::default() }
}

/// Runs `body` on every rank, threads instead of processes.
fn on_ranks<T: Send>(
    fixture: &Fixture,
    world_size: usize,
    options: &LoadOptions,
    body: impl Fn(&mut CpuDecoder) -> T + Sync,
) -> Vec<T> {
    let socket: PathBuf = fixture.folder().join(format!("rendezvous-{world_size}"));
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                let (socket, body) = (socket.clone(), &body);
                scope.spawn(move || {
                    let rendezvous = Rendezvous {
                        socket,
                        rank,
                        world_size,
                        fingerprint: String::new(),
                        timeout: Duration::from_secs(20),
                    };
                    let communicator = Box::new(join(&rendezvous).unwrap());
                    let backend = CpuBackend::new(
                        CpuOptions { threads: 2, isa: None, pin_threads: false },
                        communicator,
                    )
                    .unwrap();
                    let mut decoder = load(backend, &fixture.files(), options).unwrap();
                    decoder.allocate_kv_cache(NUM_BLOCKS).unwrap();
                    body(&mut decoder)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn alone<T: Send>(fixture: &Fixture, options: &LoadOptions, body: impl Fn(&mut CpuDecoder) -> T + Sync) -> T {
    on_ranks(fixture, 1, options, body).remove(0)
}

/// A sequence in a step: all its tokens so far, and how many of them are new.
#[derive(Clone, Copy)]
struct Part<'a> {
    tokens: &'a [u32],
    num_new: usize,
    /// Its blocks are `first_block`, `first_block + 3` and so on.
    first_block: u32,
    /// Of its whole prompt.
    prompt_len: usize,
}

/// A step that wants the logits of every token.
fn step(parts: &[Part<'_>]) -> StepInput {
    let max_blocks = parts.iter().map(|part| part.tokens.len().div_ceil(BLOCK_SIZE)).max().unwrap();
    let mut step = StepInput { cu_seqlens_q: vec![0], max_blocks, ..StepInput::default() };
    for part in parts {
        let table: Vec<u32> = (0..max_blocks as u32).map(|index| part.first_block + 3 * index).collect();
        for position in part.tokens.len() - part.num_new..part.tokens.len() {
            step.input_ids.push(part.tokens[position]);
            step.position_ids.push(position as u32);
            let block = table[position / BLOCK_SIZE] as usize;
            step.slot_mapping.push((block * BLOCK_SIZE + position % BLOCK_SIZE) as u32);
        }
        step.cu_seqlens_q.push(step.input_ids.len() as u32);
        step.context_lens.push(part.tokens.len() as u32);
        step.prompt_lens.push(part.prompt_len as u32);
        step.block_tables.extend(table);
    }
    step.logits_rows = (0..step.input_ids.len() as u32).collect();
    step
}

/// Runs a step and reads the logits of all its tokens, one row each.
fn run(decoder: &mut CpuDecoder, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
    let step = step(parts);
    decoder.forward(&step).unwrap();
    let logits = decoder.read_logits(&step.logits_rows).unwrap();
    logits.chunks_exact(decoder.info().vocab_size).map(<[f32]>::to_vec).collect()
}

/// The logits after every token of `tokens`, computed in pieces of the given sizes; what is left goes one by one.
fn in_pieces(decoder: &mut CpuDecoder, tokens: &[u32], sizes: &[usize]) -> Vec<Vec<f32>> {
    let mut logits = Vec::new();
    for &size in sizes.iter().chain(std::iter::repeat(&1)) {
        let end = logits.len() + size;
        if end > tokens.len() {
            return logits;
        }
        logits.extend(run(
            decoder,
            &[Part { tokens: &tokens[..end], num_new: size, first_block: 1, prompt_len: tokens.len() }],
        ));
    }
    logits
}

/// What the footprint says must be what a load takes, but for padding and what products in fixed point keep beside weights. Of bf16
/// it is an upper bound: some processors keep it in 12 bits.
#[test]
fn a_footprint_is_what_a_load_takes() {
    let rules = DeviceRules {
        default_dtype: |stored| stored,
        default_kv_dtype: |dtype| if dtype == DType::F32 { DType::F32 } else { DType::F16 },
        keeps_quantized: true,
        keeps_fp8: false,
        max_step_tokens: 512,
        max_rows_sampled: options().max_rows_sampled,
        block_size: BLOCK_SIZE,
    };
    let fixtures = [
        Fixture::plain(Stored::F32),
        Fixture::plain(Stored::Bf16),
        Fixture::of(Kind::Experts, Stored::Bf16, false),
        Fixture::of(Kind::Latent, Stored::F32, false),
    ];
    for (index, fixture) in fixtures.iter().enumerate() {
        // Experts this narrow are mostly padding on two ranks.
        let world_sizes = if fixture.kind == Kind::Llama { &[1, 2][..] } else { &[1] };
        for &world_size in world_sizes {
            let loaded = on_ranks(fixture, world_size, &options(), |decoder| decoder.info().clone());
            let foreseen = footprint(&fixture.files(), &LoadOptions::default(), world_size, &rules).unwrap();
            for (rank, (loaded, foreseen)) in loaded.iter().zip(&foreseen.ranks).enumerate() {
                let bytes = |name: &str| loaded.memory.iter().find(|entry| entry.0 == name).unwrap().1;
                let context = format!("fixture {index}, rank {rank} of {world_size}");
                assert_eq!(foreseen.workspace_bytes, bytes("workspace"), "{context}");
                assert_eq!(foreseen.logits_bytes, bytes("logits"), "{context}");
                assert_eq!(foreseen.block_bytes, loaded.block_bytes, "{context}");
                let (weights, taken) = (foreseen.weight_bytes as f64, bytes("weights") as f64);
                // The fixtures' matrices are narrow, so a share of each panel of 16 is padding.
                let least = if fixture.stored == Stored::Bf16 { 0.75 * weights } else { weights };
                assert!(least <= taken && taken <= 1.3 * weights + 2048.0, "{context}: {weights} {taken}");
            }
        }
    }
}

#[track_caller]
fn assert_close<A: Copy + Into<f64>>(found: &[Vec<f32>], expected: &[Vec<A>], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).flat_map(|(found, expected)| {
        assert_eq!(found.len(), expected.len());
        found.iter().zip(expected).map(|(&found, &expected)| (f64::from(found) - expected.into()).abs())
    });
    let worst = differences.fold(0.0, f64::max);
    assert!(worst <= tolerance, "worst difference {worst:e}, allowed {tolerance:e}");
}

#[test]
fn prefill_decode_and_chunks_equal_the_reference() {
    for (stored, kv_dtype, weights) in [
        (Stored::F32, None, DType::F32),
        (Stored::Bf16, Some(DType::F32), DType::BF16),
        (Stored::Bf16, None, DType::BF16),
    ] {
        for fixture in [Fixture::plain(stored), Fixture::tied_with_biases(stored)] {
            let tokens = fixture.tokens(37, 5);
            let expected = reference::logits(&fixture, &tokens);
            let spread = expected.iter().flatten().map(|logit| logit.abs()).fold(0.0, f64::max);
            assert!((0.5..20.0).contains(&spread), "logits up to {spread} hide or invent differences");
            let options =
                LoadOptions { kv_dtype: kv_dtype.map(Into::into), dtype: Some(weights), ..options() };
            let cache = kv_dtype.unwrap_or(if weights == DType::F32 { DType::F32 } else { DType::F16 });
            alone(&fixture, &options, |decoder| {
                for sizes in [&[37][..], &[20], &[5, 1, 16, 15], &[]] {
                    let tolerance = tolerance_in_pieces(decoder, sizes, weights, cache);
                    assert_close(&in_pieces(decoder, &tokens, sizes), &expected, tolerance);
                }
            });
        }
    }
}

/// Scales a row and scales a block, also where a rank's window cuts a block.
#[test]
fn weights_of_eight_bits_are_numbers_times_scales_on_any_ranks() {
    let fixture = Fixture::plain(Stored::Fp8);
    let tokens = fixture.tokens(37, 5);
    let expected = reference::logits(&fixture, &tokens);
    for quantize in [None, Some(Quantize::Fp8)] {
        let options = LoadOptions { quantize, ..options() };
        for world_size in 1..=3 {
            let all =
                on_ranks(&fixture, world_size, &options, |decoder| in_pieces(decoder, &tokens, &[20, 9]));
            assert_close(&all[0], &expected, tolerance(DType::F32, DType::F32));
        }
    }
}

#[test]
fn eight_bits_that_the_processor_does_not_keep_are_refused() {
    let fixture = Fixture::plain(Stored::Bf16);
    let refusal = |options: &LoadOptions| {
        let backend =
            CpuBackend::new(CpuOptions { threads: 1, isa: None, pin_threads: false }, Box::new(Single))
                .unwrap();
        match load(backend, &fixture.files(), options) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        }
    };
    let quantized = refusal(&LoadOptions { quantize: Some(Quantize::Fp8), ..options() });
    assert_eq!(
        quantized,
        "--quantize fp8 rounds weights for a GPU, and this is the CPU: leave it out, or use --device cuda"
    );
    let kv_dtype = KvDType::from_fp8_name("fp8_e4m3fn");
    let cached = refusal(&LoadOptions { kv_dtype, ..options() });
    assert!(cached.starts_with("--kv-cache-dtype fp8_e4m3fn: ") && !cached.contains('\n'), "{cached}");
}

/// Scales that a checkpoint has for keys and values are not used, so they must be 1 where the cache has eight bits.
#[test]
fn scales_of_keys_and_values_are_one_or_the_cache_is_plain() {
    let rules = DeviceRules {
        default_dtype: |stored| stored,
        default_kv_dtype: |dtype| dtype,
        keeps_quantized: false,
        keeps_fp8: true,
        max_step_tokens: 512,
        max_rows_sampled: options().max_rows_sampled,
        block_size: BLOCK_SIZE,
    };
    for stored in [Stored::F32, Stored::Fp8] {
        let mut fixture = Fixture::plain(stored);
        let tokens = fixture.tokens(9, 5);
        let logits =
            |fixture: &Fixture| alone(fixture, &options(), |decoder| in_pieces(decoder, &tokens, &[9]));
        let before = logits(&fixture);
        for name in ["self_attn.k_scale", "self_attn.v_proj.output_scale"] {
            fixture.add(&format!("model.layers.1.{name}"), &[1]);
        }
        let set = |fixture: &mut Fixture, scales: [f32; 2]| {
            let count = fixture.tensors.len();
            for (tensor, scale) in fixture.tensors[count - 2..].iter_mut().zip(scales) {
                tensor.values = vec![scale];
            }
            fixture.write();
        };
        let e4m3 = LoadOptions { kv_dtype: KvDType::from_fp8_name("fp8_e4m3fn"), ..options() };
        let asked = |fixture: &Fixture, options: &LoadOptions| {
            footprint(&fixture.files(), options, 1, &rules).map(drop).map_err(|error| error.to_string())
        };
        set(&mut fixture, [1.0, 1.0]);
        assert_eq!(asked(&fixture, &e4m3), Ok(()));
        set(&mut fixture, [1.0, 0.25]);
        assert_eq!(asked(&fixture, &options()), Ok(()));
        assert!(logits(&fixture) == before);
        assert_eq!(
            asked(&fixture, &e4m3).unwrap_err(),
            "tensor model.layers.1.self_attn.v_proj.output_scale is 0.25, expected 1: --kv-cache-dtype fp8_e4m3fn stores keys \
             and values with a scale of 1; leave it out for a cache that needs no scales"
        );
    }
}

#[test]
fn a_sequence_is_the_same_alone_and_in_a_batch() {
    let fixture = Fixture::plain(Stored::F32);
    let [a, b, c] = [(19, 1), (35, 2), (22, 3)].map(|(len, seed)| fixture.tokens(len, seed));
    alone(&fixture, &options(), |decoder| {
        let expected = [&a, &b, &c].map(|tokens| in_pieces(decoder, tokens, &[tokens.len()]));
        // Prefill of one, a chunk of another and decode of the third in the same step.
        run(decoder, &[Part { tokens: &b[..34], num_new: 34, first_block: 2, prompt_len: 35 }]);
        run(decoder, &[Part { tokens: &c[..14], num_new: 14, first_block: 3, prompt_len: 22 }]);
        let together = run(
            decoder,
            &[
                Part { tokens: &a, num_new: 19, first_block: 1, prompt_len: 19 },
                Part { tokens: &b, num_new: 1, first_block: 2, prompt_len: 35 },
                Part { tokens: &c, num_new: 8, first_block: 3, prompt_len: 22 },
            ],
        );
        let expected: Vec<_> =
            [&expected[0][..], &expected[1][34..], &expected[2][14..]].concat().into_iter().collect();
        assert_close(&together, &expected, tolerance(DType::F32, DType::F32));
    });
}

#[test]
fn any_number_of_ranks_computes_the_same() {
    // Six heads on three KV heads: uneven on two ranks, one each on three, replicated on four to six.
    for fixture in [Fixture::plain(Stored::F32), Fixture::tied_with_biases(Stored::F32)] {
        let tokens = fixture.tokens(17, 9);
        let expected = reference::logits(&fixture, &tokens);
        for world_size in 1..=6 {
            let all =
                on_ranks(&fixture, world_size, &options(), |decoder| in_pieces(decoder, &tokens, &[9, 4]));
            assert_close(&all[0], &expected, tolerance(DType::F32, DType::F32));
            assert!(all.iter().all(|logits| *logits == all[0]), "{world_size} ranks are not bitwise equal");
        }
    }
}

#[test]
fn samples_and_prompt_logprobs_take_more_rows_than_fit_at_once() {
    let fixture = Fixture::plain(Stored::F32);
    let tokens = fixture.tokens(11, 4);
    let greedy = SamplingParams {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        do_sample: false,
        seed: 0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
    };
    for world_size in [1, 2] {
        on_ranks(&fixture, world_size, &options(), |decoder| {
            let logits =
                run(decoder, &[Part { tokens: &tokens, num_new: 11, first_block: 1, prompt_len: 11 }]);
            let logprobs: Vec<_> = logits.iter().map(|row| log_softmax(row)).collect();
            let rows: Vec<_> = (0..tokens.len())
                .map(|last| SamplingRow { params: &greedy, history: &tokens[..=last], top_n: 0 })
                .collect();
            for (sampled, logprobs) in decoder.sample(&rows).unwrap().iter().zip(&logprobs) {
                let best = (0..logprobs.len()).max_by(|&a, &b| logprobs[a].total_cmp(&logprobs[b])).unwrap();
                assert_eq!(sampled.id as usize, best);
                assert!((f64::from(sampled.logprob) - logprobs[best]).abs() < 1e-5);
            }
            let found = decoder.token_logprobs(&(0..10).collect::<Vec<_>>(), &tokens[1..]).unwrap();
            for (index, logprob) in found.into_iter().enumerate() {
                assert!((f64::from(logprob) - logprobs[index][tokens[index + 1] as usize]).abs() < 1e-5);
            }
        });
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - sum.ln()).collect()
}

#[test]
fn a_gguf_file_is_the_same_model() {
    for fixture in [Fixture::plain(Stored::F32), Fixture::tied_with_biases(Stored::Bf16)] {
        let tokens = fixture.tokens(9, 6);
        let run = |fixture: &Fixture| alone(fixture, &options(), |decoder| in_pieces(decoder, &tokens, &[9]));
        assert!(run(&fixture) == run(&fixture.as_gguf()));
    }
}

#[test]
fn impossible_steps_are_refused_and_the_next_one_works() {
    let fixture = Fixture::plain(Stored::F32);
    alone(&fixture, &options(), |decoder| {
        let part = Part { tokens: &[1, 2, 3], num_new: 3, first_block: 1, prompt_len: 3 };
        let good = step(&[part]);
        let mut bad = good.clone();
        bad.input_ids[1] = fixture.vocab_size as u32;
        assert!(decoder.forward(&bad).unwrap_err().to_string().contains("token id 131, expected less than"));
        assert!(decoder.read_logits(&[0]).is_err(), "there is no last step");
        bad = good.clone();
        bad.logits_rows = vec![3];
        assert!(decoder.forward(&bad).is_err());
        assert!(decoder.forward(&StepInput::default()).is_err());
        decoder.forward(&good).unwrap();
        assert!(decoder.sample(&[]).is_err(), "three rows are to be sampled");
        assert!(decoder.token_logprobs(&[0], &[131]).is_err());
    });
}

#[test]
fn tensors_that_do_not_fit_are_listed_at_once() {
    let mut fixture = Fixture::plain(Stored::F32);
    fixture.tensors.retain(|tensor| !tensor.name.ends_with("layers.1.self_attn.k_proj.weight"));
    fixture.tensors[0].shape.swap(0, 1);
    fixture.add("model.layers.0.self_attn.rotary_emb.inv_freq", &[4]);
    fixture.add("model.layers.3.mlp.up_proj.weight", &[4, 4]);
    fixture.write();
    let communicator = Box::new(backend::collectives::Single);
    let backend =
        CpuBackend::new(CpuOptions { threads: 1, isa: None, pin_threads: false }, communicator).unwrap();
    let error = load(backend, &fixture.files(), &options()).err().unwrap().to_string();
    assert_eq!(
        error.lines().collect::<Vec<_>>(),
        [
            "tensor model.layers.1.self_attn.k_proj.weight is missing, expected shape [36, 40]",
            "tensor model.embed_tokens.weight has shape [40, 131], expected [131, 40] after config.json",
            "tensor model.layers.3.mlp.up_proj.weight is not part of the model config.json describes",
        ]
    );
}
