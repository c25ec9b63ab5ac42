//! The program in scripts: exit codes, standard output, standard error, and what the shard is asked.

use std::path::Path;
use std::process::{Command, Output};

use crate::TOKENIZER;
use crate::fake_shard::{Behaviour, FakeShard};

/// A folder with a tokenizer, and whatever a run leaves there.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), TOKENIZER).unwrap();
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, socket: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_benchmark"));
        // What the developer's own shell sets must not reach the program.
        command.env_clear().arg("-t").arg(self.path()).arg("-m").arg(socket).args(arguments);
        command
    }

    fn run(&self, shard: &FakeShard, arguments: &[&str]) -> Output {
        self.command(&shard.path, arguments).output().unwrap()
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn every_batch_size_is_run_and_reported() {
    let (shard, folder) = (FakeShard::start(Behaviour::default()), Folder::new());
    let json = folder.path().join("report.json");
    let arguments = ["-b", "2", "-b", "3", "-s", "150", "-d", "5", "-r", "4", "-w", "2", "--output-json"];
    let output = folder.run(&shard, &[&arguments[..], &[json.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));

    let tables = stdout(&output);
    assert_eq!(tables.matches("\n| Parameter ").count(), 1, "{tables}");
    assert_eq!(tables.matches("\n| Step ").count(), 2, "{tables}");
    assert!(tables.contains("| Decode (total) | 2 ") && !tables.contains("NaN"), "{tables}");
    let progress = stderr(&output);
    assert!(progress.contains("attached to 1 rank at "), "{progress}");
    assert!(progress.contains("batch size 3 (2 of 2): 2 warm-ups, 4 runs"), "{progress}");

    let seen = shard.seen.lock().unwrap();
    let sizes: Vec<u32> = seen.prefills.iter().map(|batch| batch.size).collect();
    assert_eq!(sizes, [2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3], "two warm-ups and four runs each");
    assert_eq!(seen.decodes, 12 * 4, "the first of five tokens comes out of the prefill");
    assert_eq!(seen.clear_cache, 1);
    assert!(seen.warmups.is_empty(), "it was warm already");
    let request = &seen.prefills[0].requests[1];
    assert_eq!((request.id, request.truncate, request.input_ids.len()), (1, 150, 150));
    assert_eq!(request.inputs.split(' ').count(), 150);
    assert_eq!(seen.prefills[0].max_tokens, 310);

    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["is_complete"], true);
    assert_eq!(report["batches"][1]["runs"].as_array().unwrap().len(), 4);
    assert_eq!(report["batches"][1]["runs"][0]["decode_steps"], 4);
    assert_eq!(report["shards"]["dtype"], "torch.bfloat16");
    assert_eq!(report["shards"]["model_id"], "some/model");
}

#[test]
fn a_shard_without_router_is_warmed_up_first() {
    let (shard, folder) =
        (FakeShard::start(Behaviour { is_warm: false, ..Default::default() }), Folder::new());
    let output = folder.run(&shard, &["-b", "4", "-s", "100", "-r", "1", "--no-tui"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("warming up with a prefill of 400 tokens"), "{}", stderr(&output));
    assert_eq!(shard.seen.lock().unwrap().warmups[0].max_prefill_tokens, 400);
}

#[test]
fn tgis_shards_are_taken_as_they_are() {
    let (shard, folder) =
        (FakeShard::start(Behaviour { is_ours: false, ..Default::default() }), Folder::new());
    let output = folder.run(&shard, &["-b", "1", "-r", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(shard.seen.lock().unwrap().warmups.is_empty());
}

#[test]
fn one_token_needs_no_decode() {
    let (shard, folder) = (FakeShard::start(Behaviour::default()), Folder::new());
    let output = folder.run(&shard, &["-b", "1", "-d", "1", "-r", "2"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(!stdout(&output).contains("NaN"), "{}", stdout(&output));
    assert_eq!(shard.seen.lock().unwrap().decodes, 0);
}

#[test]
fn a_failing_call_ends_the_run_with_what_was_measured() {
    let behaviour = Behaviour { failing_decode: Some(10), ..Default::default() };
    let (shard, folder) = (FakeShard::start(behaviour), Folder::new());
    let json = folder.path().join("report.json");
    let arguments = ["-b", "1", "-b", "2", "-d", "3", "-r", "3", "--output-json", json.to_str().unwrap()];
    let output = folder.run(&shard, &arguments);
    assert_eq!(output.status.code(), Some(1));
    let error = "error: decode of batch size 2 failed: Server error: out of memory\n";
    assert!(stderr(&output).ends_with(error), "{}", stderr(&output));
    assert!(stdout(&output).contains("NaN"), "batch size 2 has no figures");
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["is_complete"], false);
    assert!(report["failure"].as_str().unwrap().contains("out of memory"));
    assert_eq!(shard.seen.lock().unwrap().clear_cache, 2, "the interrupted batch is not left in the cache");
}

#[test]
fn answers_that_are_too_short_are_no_speed() {
    let (shard, folder) =
        (FakeShard::start(Behaviour { missing_steps: 2, ..Default::default() }), Folder::new());
    let output = folder.run(&shard, &["-b", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("took 5 steps, expected 7: the shard stopped early"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn what_cannot_fit_is_said_before_anything_runs() {
    let (shard, folder) =
        (FakeShard::start(Behaviour { cache_tokens: 1600, ..Default::default() }), Folder::new());
    let output = folder.run(&shard, &["-b", "1", "-b", "64", "-s", "100"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("needs 6848 tokens of KV cache, the shard has 1600"),
        "{}",
        stderr(&output)
    );
    assert!(shard.seen.lock().unwrap().prefills.is_empty() && stdout(&output).is_empty());

    let behaviour = Behaviour { is_warm: false, ..Default::default() };
    let shard = FakeShard::start(behaviour);
    let output = folder.run(&shard, &["-b", "1", "-s", "2045"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("the shard allows 2047 prompt tokens and 2048 in all"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn wrong_paths_are_one_clear_line_each() {
    let folder = Folder::new();
    let output = folder.command(Path::new("/nonexistent/shard-0"), &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "error: could not connect to shard at /nonexistent/shard-0: No such file or directory (os error 2); \
         --master-shard-uds-path names the socket of rank 0 of a running shard\n"
    );
    let output = folder.command(Path::new("/x"), &["--output-json", "/nonexistent/r.json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot write /nonexistent/r.json"), "{}", stderr(&output));

    std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
    let output = folder.command(Path::new("/x"), &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot load the tokenizer of"), "{}", stderr(&output));
}

#[test]
fn mistakes_on_the_command_line_are_usage() {
    let folder = Folder::new();
    let output = folder.command(Path::new("/x"), &["-r", "0", "-s", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(stderr(&output).lines().count(), 2, "{}", stderr(&output));
    assert_eq!(folder.command(Path::new("/x"), &["--no-such-flag"]).output().unwrap().status.code(), Some(2));
}

#[test]
fn a_signal_ends_a_run_that_hangs() {
    let (shard, folder) = (FakeShard::start(Behaviour { hangs: true, ..Default::default() }), Folder::new());
    let mut child =
        folder.command(&shard.path, &["-b", "1"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    while shard.seen.lock().unwrap().prefills.is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let killed = Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}
