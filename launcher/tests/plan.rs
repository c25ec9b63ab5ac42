//! What options mean together, by table: plans, refusals, and all mistakes at once.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use clap::Parser;
use hub::ModelConfig;
use launcher::args::Args;
use launcher::devices::Devices;
use launcher::machine::Machine;
use launcher::plan::{LaunchPlan, plan};

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 576, "num_attention_heads": 9,
    "num_key_value_heads": 3, "num_hidden_layers": 30, "max_position_embeddings": 8192}"#;

fn planned(words: &[&str]) -> Result<LaunchPlan, Vec<String>> {
    let mut args = Args::parse_from([&["launcher"], words].concat());
    // Set by container runtimes and shells; the tables must not depend on it.
    args.serving.hostname =
        if words.contains(&"--hostname") { args.serving.hostname } else { "0.0.0.0".to_owned() };
    let machine = Machine { cores: 2, ..Machine::default() };
    let config = ModelConfig::new(serde_json::from_str(CONFIG).unwrap());
    let devices = Devices::choose(&args, &machine).unwrap();
    plan(&args, Some(&config), &devices)
        .map_err(|mistakes| mistakes.iter().map(ToString::to_string).collect())
}

fn refusal(words: &[&str]) -> String {
    let mistakes = planned(words).unwrap_err();
    assert_eq!(mistakes.len(), 1, "{words:?}: {mistakes:?}");
    mistakes[0].clone()
}

#[test]
fn defaults_make_a_plan() {
    let plan = planned(&[]).unwrap();
    assert_eq!(plan.shard.num_shard, 1);
    assert_eq!(plan.bind, "0.0.0.0:3000".parse().unwrap());
    assert_eq!(plan.graceful_timeout.as_secs(), 90);
    assert_eq!(plan.uds_prefix, None);
    assert!(plan.notices.iter().any(|line| line.contains("running on the CPU")), "{:?}", plan.notices);
    assert!(plan.notices.iter().any(|line| line == "Default `max_batch_prefill_tokens` to 4096"));
}

#[test]
fn upstreams_argument_errors() {
    for (words, text) in [
        (
            &["--max-input-tokens", "10", "--max-input-length", "10"][..],
            "Both `max_input_tokens` (10) and `max_input_length` (10) are set",
        ),
        (
            &["--max-input-tokens", "10", "--max-total-tokens", "10"],
            "`max_input_tokens` must be < `max_total_tokens`. Given: 10 and 10",
        ),
        (
            &["--max-input-length", "11", "--max-total-tokens", "10"],
            "`max_input_tokens` must be < `max_total_tokens`. Given: 11 and 10",
        ),
        (&["--validation-workers", "0"], "`validation_workers` must be > 0"),
        (
            &["--max-total-tokens", "100", "--max-batch-total-tokens", "99"],
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 100 and 99",
        ),
        (
            &["--ngrok", "--ngrok-edge", "e"],
            "`ngrok-authtoken` must be set when using ngrok tunneling; add --ngrok-authtoken",
        ),
        (
            &["--ngrok", "--ngrok-authtoken", "t"],
            "`ngrok-edge` must be set when using ngrok tunneling; add --ngrok-edge",
        ),
        (&["--num-shard", "0"], "`num_shard` cannot be < 1"),
        (&["--sharded", "true", "--num-shard", "1"], "`sharded` is true but `num_shard` is 1"),
        (&["--sharded", "true"], "only found 0 CUDA devices"),
    ] {
        assert!(refusal(words).contains(text), "{words:?}: {}", refusal(words));
    }
}

#[test]
fn mistakes_in_what_is_not_available_are_told_too() {
    for (words, texts) in [
        (&["--lora-adapters", "a/b@1@2, c/d@1"][..], &["`a/b@1@2`: expected one `@` at most"][..]),
        (
            &["--quantize", "exl2", "--num-shard", "2"],
            &["Sharding is currently not supported with `exl2` quantization"],
        ),
    ] {
        let mistakes = planned(words).unwrap_err();
        for text in texts {
            assert!(mistakes.iter().any(|mistake| mistake.contains(text)), "{words:?}: {mistakes:?}");
        }
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_name() {
    for words in [
        &["--quantize", "bitsandbytes-nf4"][..],
        &["--quantize", "gptq"],
        &["--speculate", "2"],
        &["--lora-adapters", "a/b"],
        &["--watermark-gamma", "0.5"],
        &["--watermark-delta", "2.0"],
    ] {
        let text = refusal(words);
        assert!(text.starts_with(words[0]) && text.contains("not available yet; "), "{text}");
    }
}

#[test]
fn values_out_of_range_are_refused_with_their_flag() {
    for words in [
        &["--port", "0"][..],
        &["--threads", "0"],
        &["--max-batch-size", "0"],
        &["--max-batch-prefill-tokens", "0"],
        &["--max-concurrent-requests", "0"],
        &["--max-best-of", "0"],
        &["--max-client-batch-size", "0"],
        &["--max-input-tokens", "0"],
        &["--waiting-served-ratio", "NaN"],
        &["--api-key", ""],
        &["--cuda-memory-fraction", "1.5"],
        &["--cuda-memory-fraction", "0"],
        &["--rope-factor", "0.5"],
        &["--rope-factor", "NaN"],
        &["--num-shard", "10"],
        &["--otlp-endpoint", "ftp://collector"],
    ] {
        let text = refusal(words);
        assert!(text.contains(words[0]) && text.contains("expected"), "{text}");
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let words = ["--validation-workers", "0", "--speculate", "3", "--num-shard", "0", "--port", "0"];
    assert_eq!(planned(&words).unwrap_err().len(), 4);
}

#[test]
fn options_without_effect_are_accepted_with_a_line() {
    for (words, named) in [
        (&["--trust-remote-code"][..], "--trust-remote-code"),
        (&["--disable-custom-kernels"], "--disable-custom-kernels"),
        (&["--cuda-graphs", "1,2"], "--cuda-graphs"),
        (&["--master-port", "1234"], "--master-port"),
        (&["--attention", "flashinfer"], "ATTENTION"),
        (&["--prefix-caching", "true"], "PREFIX_CACHING"),
        (&["--use-prefix-caching", "1"], "PREFIX_CACHING"),
        (&["--flash-decoding", "1"], "ATTENTION"),
        (&["--disable-usage-stats"], "--disable-usage-stats"),
        (&["--ngrok-edge", "e"], "--ngrok-edge"),
        (&["--disable-crash-reports"], "--disable-crash-reports"),
    ] {
        let notices = planned(words).unwrap().notices;
        assert!(
            notices.iter().any(|line| line.contains(named) && line.contains("nothing")),
            "{words:?}: {notices:?}"
        );
    }
    // It scales the KV cache on the CPU too, so a line that says otherwise would be wrong.
    let notices = planned(&["--cuda-memory-fraction", "0.8"]).unwrap().notices;
    assert!(!notices.iter().any(|line| line.contains("--cuda-memory-fraction")), "{notices:?}");
    for harmless in [
        &["--speculate", "0"][..],
        &["--lora-adapters", " "],
        &["--usage-stats", "off"],
        &["--ngrok", "--ngrok-authtoken", "t", "--ngrok-edge", "e"],
    ] {
        planned(harmless).unwrap();
    }
}

#[test]
fn a_rotary_scaling_makes_the_context_longer() {
    let prefill = |context: usize, words: &[&str]| {
        let args = Args::parse_from([&["launcher", "--hostname", "0.0.0.0"], words].concat());
        let raw = serde_json::json!({"model_type": "llama", "max_position_embeddings": context});
        let config = ModelConfig::new(raw.as_object().unwrap().clone());
        let machine = Machine { cores: 2, ..Machine::default() };
        let devices = Devices::choose(&args, &machine).unwrap();
        plan(&args, Some(&config), &devices).unwrap().notices.join(" ")
    };
    assert!(prefill(1024, &[]).contains("`max_batch_prefill_tokens` to 1024"));
    assert!(prefill(1024, &["--rope-factor", "2"]).contains("`max_batch_prefill_tokens` to 2048"));
    assert!(prefill(1024, &["--rope-scaling", "dynamic"]).contains("`max_batch_prefill_tokens` to 1024"));
}

#[test]
fn addresses_and_shards() {
    assert_eq!(planned(&["--hostname", "::1", "-p", "81"]).unwrap().bind, "[::1]:81".parse().unwrap());
    assert_eq!(planned(&["--hostname", "localhost"]).unwrap().bind, "127.0.0.1:3000".parse().unwrap());
    assert_eq!(planned(&["--hostname", "pod-7"]).unwrap().bind, "0.0.0.0:3000".parse().unwrap());
    assert_eq!(planned(&["--num-shard", "9"]).unwrap().shard.num_shard, 9);
}
