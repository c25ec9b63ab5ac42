//! The Dockerfile and SageMaker's entry point.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use launcher::programs::{ROUTER_NAMES, SHARD_NAMES};

use super::{read, root};

/// The instructions of the Dockerfile, continued lines joined.
fn instructions() -> Vec<(String, String)> {
    let text = read("Dockerfile").replace("\\\n", " ");
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, rest)| (name.to_owned(), rest.trim().to_owned()))
        .collect()
}

fn all(name: &str) -> Vec<String> {
    instructions()
        .into_iter()
        .filter(|instruction| instruction.0 == name)
        .map(|instruction| instruction.1)
        .collect()
}

#[test]
fn every_file_that_is_copied_exists() {
    let mut copied = 0;
    for copy in all("COPY").iter().filter(|copy| !copy.contains("--from=")) {
        let words: Vec<&str> = copy.split_whitespace().filter(|word| !word.starts_with("--")).collect();
        let (_, sources) = words.split_last().unwrap();
        for source in sources {
            assert!(root().join(source).exists(), "{source} does not exist");
            copied += 1;
        }
    }
    assert!(copied >= 5);
}

#[test]
fn our_programs_have_upstreams_names() {
    let runs = all("RUN").join("\n");
    let ours = ["launcher", "shard", "router", "benchmark"];
    for program in ours {
        assert!(runs.contains(&format!("target/release/{program} ")), "{program} is not installed");
        assert!(read(&format!("{program}/Cargo.toml")).contains(&format!("name = \"{program}\"")));
    }
    let [shard, router] = [SHARD_NAMES, ROUTER_NAMES];
    for (program, link) in [
        (ours[0], "text-generation-launcher"),
        (shard[0], shard[1]),
        (router[0], router[1]),
        (ours[3], "text-generation-benchmark"),
    ] {
        assert!(runs.contains(&format!("ln -s {program} {link}")), "{link} is missing");
    }
    let entries = all("ENTRYPOINT");
    assert_eq!(
        entries,
        [r#"["sagemaker-entrypoint.sh"]"#, r#"["text-generation-launcher"]"#],
        "the last is the default"
    );
}

#[test]
fn the_environment_is_upstreams_and_the_user_is_not_root() {
    let env = all("ENV").join(" ");
    for pair in ["HF_HOME=/data", "HF_HUB_ENABLE_HF_TRANSFER=1", "PORT=80"] {
        assert!(env.split_whitespace().any(|word| word == pair), "{pair} is missing");
    }
    for user in all("USER") {
        assert!(user.split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id > 0)), "{user}");
    }
    assert_eq!(all("USER").len(), 1);
}

#[test]
fn versions_are_those_of_the_build() {
    let from = all("FROM").join("\n");
    let manifest = read("Cargo.toml");
    let rust = manifest
        .lines()
        .find_map(|line| line.strip_prefix("rust-version = "))
        .unwrap()
        .trim_matches('"')
        .to_owned();
    assert!(from.contains(&format!("rust:{rust}-")), "{from}");
    let script = read("scripts/install_nvcc.sh");
    let nvcc = script.lines().find_map(|line| line.strip_prefix("version=")).unwrap();
    let minor = nvcc.rsplit_once('.').unwrap().0;
    assert!(from.contains(&format!("nvidia/cuda:{minor}.")), "libraries of another CUDA than {nvcc}: {from}");
}

#[test]
fn sagemakers_variables_become_the_launchers() {
    let dir = tempfile::tempdir().unwrap();
    let fake = dir.path().join("text-generation-launcher");
    std::fs::write(&fake, "#!/bin/sh\necho \"$@\"; env\n").unwrap();
    std::fs::set_permissions(&fake, std::fs::Permissions::from_mode(0o755)).unwrap();
    let run = |variables: &[(&str, &str)]| {
        let output = Command::new(root().join("deploy/sagemaker-entrypoint.sh"))
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", dir.path().display()))
            .envs(variables.iter().copied())
            .arg("--json-output")
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, text) = run(&[]);
    assert_eq!(code, Some(1));
    assert!(text.contains("HF_MODEL_ID must be set"), "{text}");
    let (code, text) = run(&[("HF_MODEL_ID", "org/model"), ("SM_NUM_GPUS", "0")]);
    assert_eq!(code, Some(0), "{text}");
    assert!(
        text.starts_with("--port 8080 --json-output\n") && text.contains("\nMODEL_ID=org/model\n"),
        "{text}"
    );
    assert!(!text.contains("NUM_SHARD"), "{text}");
    let (_, text) = run(&[
        ("HF_MODEL_ID", "org/model"),
        ("HF_MODEL_REVISION", "main"),
        ("SM_NUM_GPUS", "4"),
        ("HF_MODEL_QUANTIZE", "awq"),
        ("HF_MODEL_TRUST_REMOTE_CODE", "True"),
    ]);
    for pair in ["REVISION=main", "NUM_SHARD=4", "QUANTIZE=awq", "TRUST_REMOTE_CODE=true"] {
        assert!(text.lines().any(|line| line == pair), "no {pair}: {text}");
    }
}
