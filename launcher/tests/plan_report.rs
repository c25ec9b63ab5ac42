//! `launcher plan` of the real launcher, with a machine from a file and a shard that answers for a made-up model.

#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::path::Path;
use std::process::{Command, Output};

/// Directory with the fake children, a model and a machine with two GPUs, one of them in use.
fn stage() -> tempfile::TempDir {
    let fake = Path::new(env!("CARGO_BIN_EXE_launcher")).with_file_name("examples").join("fake_child");
    assert!(fake.exists(), "{} is missing: run the tests without --test", fake.display());
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(&fake, dir.path().join("shard")).unwrap();
    std::os::unix::fs::symlink(&fake, dir.path().join("router")).unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let config = r#"{"model_type": "llama", "num_attention_heads": 12, "max_position_embeddings": 8192}"#;
    std::fs::write(model.join("config.json"), config).unwrap();
    std::fs::write(model.join("model.safetensors"), vec![0_u8; 3 << 20]).unwrap();
    let gpu = |index: u64, processes: serde_json::Value| {
        serde_json::json!({"uuid": format!("GPU-{index}"), "name": "NVIDIA H100", "memory_bytes": 80_u64 << 30,
            "free_bytes": (79 - index) << 30, "processes": processes})
    };
    let holder = serde_json::json!([{"pid": 4321, "name": "python3", "bytes": 1 << 30}]);
    let machine = serde_json::json!({"has_cuda_kernels": true, "has_cuda_device": true, "cores": 8,
        "driver": "580.65.06", "cuda_version": 13000, "gpus": [gpu(0, serde_json::json!([])), gpu(1, holder)]});
    std::fs::write(dir.path().join("machine.json"), machine.to_string()).unwrap();
    dir
}

fn plan(stage: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_launcher"))
        .env_clear()
        .env("QUARTET_BIN_DIR", stage)
        .env("QUARTET_MACHINE", stage.join("machine.json"))
        .env("FAKE_DIR", stage)
        .env("HF_TOKEN", "hunter2")
        .args(["plan", "--hostname", "127.0.0.1"])
        .args(words)
        .output()
        .unwrap()
}

#[test]
fn text_shows_devices_memory_split_limits_and_commands() {
    let stage = stage();
    let model = stage.path().join("model").display().to_string();
    let output = plan(stage.path(), &["--model-id", &model, "--num-shard", "2", "--api-key", "hunter3"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    for part in [
        "4 layers, bfloat16, KV cache bfloat16, context 8192",
        "(1 weight file, 3 MiB)",
        "Shards   2 on cuda",
        "query heads  000000000000000000000000111111111111111111111111  0-5 | 6-11",
        "prompt (max-input-tokens)                      8191",
        "all running requests (max-batch-total-tokens)  16000",
        "process 4321 (python3), which holds 1024 of its 81920 MiB",
        "RANK=1",
        "CUDA_VISIBLE_DEVICES=GPU-1",
        "--master-shard-uds-path /tmp/text-generation-server-0",
    ] {
        assert!(text.contains(part), "no {part}:\n{text}");
    }
    assert!(!text.contains("hunter"), "{text}");
    // Columns: the numbers of both ranks end below their headings.
    let at = text.lines().position(|line| line.contains("weights")).unwrap();
    let rows: Vec<&str> = text.lines().skip(at).take(3).collect();
    assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{rows:#?}");
    assert!(rows[2].contains("GPU-1") && rows[2].contains(&(78 << 10).to_string()), "{rows:#?}");
}

#[test]
fn json_has_the_same() {
    let stage = stage();
    let model = stage.path().join("model").display().to_string();
    let output = plan(stage.path(), &["--json", "--model-id", &model, "--cuda-visible-devices", "1"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["devices"].as_array().unwrap().len(), 1);
    assert_eq!(report["devices"][0]["id"], "1");
    assert_eq!(report["devices"][0]["free_bytes"], 78_u64 << 30);
    assert_eq!(report["footprint"]["ranks"][0]["cache"]["num_blocks"], 78 << 10);
    assert_eq!(report["limits"]["max_total_tokens"], 8192);
    assert_eq!(report["limits"]["max_batch_prefill_tokens"], 4096);
    let commands = report["commands"].as_array().unwrap();
    assert_eq!(
        commands.iter().map(|command| command["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["shard rank 0", "router"]
    );
    assert_eq!(commands[0]["args"][0], "serve");
    assert!(!stage.path().join("shard-0.pid").exists(), "nothing may be started");
}

#[test]
fn a_model_that_is_not_here_is_planned_without_its_memory_and_mistakes_are_those_of_serving() {
    let stage = stage();
    let cache = stage.path().join("cache").display().to_string();
    let words = ["--model-id", "org/name", "--huggingface-hub-cache", &cache];
    let output = plan(stage.path(), &words);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    for part in
        ["not on this disk", "Memory and tensor split are not known", "org/name", "measured at warm-up"]
    {
        assert!(text.contains(part), "no {part}:\n{text}");
    }
    let output = plan(stage.path(), &["--num-shard", "3", "--validation-workers", "0"]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("shows 2 devices") && text.contains("`validation_workers` must be > 0"), "{text}");
    assert!(output.stdout.is_empty());
}
