//! The children's command lines, word by word in text-generation-inference's order.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::collections::BTreeMap;

use clap::Parser;
use launcher::args::Args;
use launcher::command::{Invocation, ShardRuntime};
use launcher::devices::Devices;
use launcher::machine::Machine;
use launcher::plan::{LaunchPlan, plan};

const NOTHING: &[&str] = &["--model-id", "org/model", "--hostname", "0.0.0.0"];
const EVERYTHING: &[&str] = &[
    "--model-id",
    "/models/m.gguf",
    "--revision",
    "refs/pr/1",
    "--dtype",
    "bfloat16",
    "--trust-remote-code",
    "--num-shard",
    "2",
    "--threads",
    "4",
    "--deterministic",
    "--max-input-length",
    "100",
    "--max-total-tokens",
    "200",
    "--max-batch-prefill-tokens",
    "300",
    "--max-batch-total-tokens",
    "400",
    "--max-batch-size",
    "8",
    "--waiting-served-ratio",
    "1.2",
    "--hostname",
    "127.0.0.1",
    "--port",
    "8080",
    "--cuda-graphs",
    "0,4,8",
    "--disable-custom-kernels",
    "--cuda-memory-fraction",
    "0.5",
    "--huggingface-hub-cache",
    "/cache",
    "--weights-cache-override",
    "/weights",
    "--enable-prefill-logprobs",
    "--disable-grammar-support",
    "--tokenizer-config-path",
    "/t.json",
    "--json-output",
    "--otlp-endpoint",
    "http://collector:4317",
    "--otlp-service-name",
    "svc",
    "--api-key",
    "key",
    "--cors-allow-origin",
    "http://a",
    "--cors-allow-origin",
    "http://b",
    "--usage-stats",
    "no-stack",
    "--hf-api-token",
    "token",
    "--compute-type",
    "1-cpu",
    "--ngrok",
    "--ngrok-authtoken",
    "secret",
    "--ngrok-edge",
    "edghts_1",
];

fn planned(words: &[&str]) -> LaunchPlan {
    let args = Args::parse_from([&["launcher"], words].concat());
    let machine = Machine { cores: 2, ..Machine::default() };
    plan(&args, None, &Devices::choose(&args, &machine).unwrap()).unwrap()
}

fn shard(words: &[&str], rank: usize) -> Invocation {
    let runtime = ShardRuntime {
        uds_prefix: "/run/s".to_owned(),
        instance_id: "abc".to_owned(),
        lifeline_fd: Some(9),
        logger_level: "INFO".to_owned(),
    };
    planned(words).shard.command(rank, &runtime)
}

fn environment(invocation: &Invocation) -> BTreeMap<&str, &str> {
    invocation.env.iter().map(|(name, value)| (*name, value.to_str().unwrap())).collect()
}

#[test]
fn shard_by_default() {
    let shard = shard(NOTHING, 0);
    assert_eq!(
        shard.args.join(" "),
        "serve org/model --uds-path /run/s --logger-level INFO --json-output --otlp-service-name \
         text-generation-inference.router"
    );
    assert_eq!(shard.env_removed, ["LOG_LEVEL", "NGROK_AUTHTOKEN"]);
    let mut env = environment(&shard);
    env.remove("HF_HUB_ENABLE_HF_TRANSFER");
    let expected = [
        ("ATTENTION", "paged"),
        ("CUDA_MEMORY_FRACTION", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("PREFIX_CACHING", "0"),
        ("QUARTET_DEVICE", "cpu"),
        ("QUARTET_INSTANCE_ID", "abc"),
        ("QUARTET_LIFELINE_FD", "9"),
        ("RANK", "0"),
        ("SAFETENSORS_FAST_GPU", "1"),
        ("TORCH_NCCL_AVOID_RECORD_STREAMS", "1"),
        ("WORLD_SIZE", "1"),
    ];
    assert_eq!(env, BTreeMap::from(expected));
}

#[test]
fn each_rank_sees_its_own_device_only() {
    let gpu = |index: usize| launcher::machine::Gpu { uuid: format!("GPU-{index}"), ..Default::default() };
    let machine = Machine {
        has_cuda_kernels: true,
        has_cuda_device: true,
        cores: 8,
        gpus: (0..4).map(gpu).collect(),
        ..Machine::default()
    };
    let device = |words: &[&str], rank: usize| {
        let args = Args::parse_from([&["launcher"], NOTHING, words].concat());
        let plan = plan(&args, None, &Devices::choose(&args, &machine).unwrap()).unwrap();
        let runtime = ShardRuntime {
            uds_prefix: String::new(),
            instance_id: String::new(),
            lifeline_fd: None,
            logger_level: String::new(),
        };
        let shard = plan.shard.command(rank, &runtime);
        let env = environment(&shard);
        assert_eq!(env["QUARTET_CUDA_ORDINAL"], "0");
        env["CUDA_VISIBLE_DEVICES"].to_owned()
    };
    let words = ["--cuda-visible-devices", "3,1", "--num-shard", "2"];
    assert_eq!([device(&words, 0), device(&words, 1)], ["3", "1"]);
    let words = ["--nvidia-visible-devices", "all"];
    assert_eq!([device(&words, 0), device(&words, 3)], ["GPU-0", "GPU-3"]);
}

#[test]
fn rotary_scaling_travels_in_the_environment() {
    for (words, scaling, factor) in [
        (&["--rope-scaling", "dynamic"][..], "dynamic", "1"),
        (&["--rope-factor", "2.3"], "linear", "2.3"),
        (&["--rope-scaling", "dynamic", "--rope-factor", "4"], "dynamic", "4"),
    ] {
        let shard = shard(&[NOTHING, words].concat(), 0);
        let env = environment(&shard);
        assert_eq!((env["ROPE_SCALING"], env["ROPE_FACTOR"]), (scaling, factor), "{words:?}");
    }
}

#[test]
fn precisions_travel_on_the_command_line() {
    for (words, expected) in [
        (&["--quantize", "fp8"][..], "--quantize fp8"),
        (&["--quantize", "compressed-tensors"], "--quantize compressed-tensors"),
        (&["--kv-cache-dtype", "fp8_e4m3fn"], "--kv-cache-dtype fp8_e4m3fn"),
        (&["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype fp8_e5m2"),
    ] {
        let args = shard(&[NOTHING, words].concat(), 0).args.join(" ");
        assert!(args.contains(&format!(" {expected} ")), "{args}");
    }
}

#[test]
fn shard_with_everything() {
    let shard = shard(EVERYTHING, 1);
    assert_eq!(
        shard.args.join(" "),
        "serve /models/m.gguf --uds-path /run/s --logger-level INFO --json-output --trust-remote-code --sharded \
         --dtype bfloat16 --revision refs/pr/1 --otlp-endpoint http://collector:4317 \
         --otlp-service-name svc --max-input-tokens 100"
    );
    let env = environment(&shard);
    for (name, value) in [
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("CUDA_MEMORY_FRACTION", "0.5"),
        ("HF_TOKEN", "token"),
        ("MAX_TOTAL_TOKENS", "200"),
        ("MAX_BATCH_SIZE", "8"),
        ("REQUEST_LOGPROBS", "1"),
        ("HUGGINGFACE_HUB_CACHE", "/cache"),
        ("WEIGHTS_CACHE_OVERRIDE", "/weights"),
        ("CUDA_GRAPHS", "4,8"),
        ("DISABLE_CUSTOM_KERNELS", "True"),
        ("QUARTET_THREADS", "4"),
        ("QUARTET_DETERMINISTIC", "true"),
    ] {
        assert_eq!(env.get(name), Some(&value), "{name}");
    }
    let no_graphs = [NOTHING, &["--cuda-graphs", "0"]].concat();
    assert_eq!(environment(&self::shard(&no_graphs, 0))["CUDA_GRAPHS"], "0");
}

#[test]
fn router_by_default() {
    let router = planned(NOTHING).router.command("/run/s");
    assert_eq!(
        router.args.join(" "),
        "--max-client-batch-size 4 --max-concurrent-requests 128 --max-best-of 2 --max-stop-sequences 4 \
         --max-top-n-tokens 5 --max-batch-prefill-tokens 4096 --waiting-served-ratio 0.3 --max-waiting-tokens 20 \
         --validation-workers 2 --hostname 0.0.0.0 --port 3000 --prometheus-port 9000 --master-shard-uds-path /run/s-0 \
         --tokenizer-name org/model --payload-limit 2000000 --usage-stats on --otlp-service-name \
         text-generation-inference.router"
    );
    // It reads LOG_LEVEL itself; a token without a tunnel stays with the launcher.
    assert_eq!(router.env_removed, ["NGROK_AUTHTOKEN", "NGROK_EDGE"]);
}

#[test]
fn router_with_everything() {
    let router = planned(EVERYTHING).router.command("/run/s");
    let (_, optional) = router
        .args
        .join(" ")
        .split_once("--payload-limit 2000000 ")
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .unwrap();
    assert_eq!(
        optional,
        "--max-input-tokens 100 --max-total-tokens 200 --usage-stats no-stack --disable-grammar-support \
         --tokenizer-config-path /t.json --max-batch-total-tokens 400 --max-batch-size 8 --revision refs/pr/1 \
         --trust-remote-code --json-output --otlp-endpoint http://collector:4317 --otlp-service-name svc \
         --cors-allow-origin http://a --cors-allow-origin http://b --api-key key \
         --ngrok --ngrok-edge edghts_1"
    );
    let expected = [
        ("COMPUTE_TYPE", "1-cpu"),
        ("HF_TOKEN", "token"),
        ("HUGGINGFACE_HUB_CACHE", "/cache"),
        // Arguments are for everybody to read.
        ("NGROK_AUTHTOKEN", "secret"),
        ("QUARTET_LIVENESS_TIMEOUT", "120"),
        ("WEIGHTS_CACHE_OVERRIDE", "/weights"),
    ];
    assert_eq!(environment(&router), BTreeMap::from(expected));
}
