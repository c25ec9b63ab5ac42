//! What the model takes of each rank and how it is split: asked of the program `shard`, which knows every architecture, by
//! the very command that would serve. It reads headers only.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::command::Invocation;

/// The answer of `shard footprint`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footprint {
    /// Type of the weights.
    pub dtype: String,
    /// Type of the KV cache.
    pub kv_dtype: String,
    /// Whether most weights stay in quantized blocks.
    pub is_quantized: bool,
    /// Layers.
    pub num_layers: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Longest sequence that positions and tokenizer allow.
    pub max_context: usize,
    /// One for each rank.
    pub ranks: Vec<RankFootprint>,
}

/// One rank's part. Ranges are `[first, end)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankFootprint {
    /// Packed weights.
    pub weight_bytes: u64,
    /// Buffers of a step.
    pub workspace_bytes: u64,
    /// Buffers of the logits.
    pub logits_bytes: u64,
    /// One KV block.
    pub block_bytes: u64,
    /// Query heads.
    pub query_heads: [usize; 2],
    /// KV heads that they read; ranks may have the same ones.
    pub kv_heads: [usize; 2],
    /// Columns of the feed-forward, or of each expert.
    pub feed_forward: [usize; 2],
    /// Rows of the vocabulary.
    pub vocabulary: [usize; 2],
    /// The KV cache there is room for; none where the free memory is not known.
    pub cache: Option<CacheForecast>,
}

impl RankFootprint {
    /// All that does not grow with the number of tokens.
    pub fn fixed_bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.workspace_bytes).saturating_add(self.logits_bytes)
    }
}

/// What the warm-up will find.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum CacheForecast {
    /// A cache fits.
    Fits {
        /// Blocks, the reserved one included.
        num_blocks: u64,
        /// Tokens of all requests together.
        total_tokens: u64,
        /// Prompt and answer of one request.
        max_total_tokens: u64,
        /// Prompt of one request.
        max_input_tokens: u64,
    },
    /// It does not; the line says by how much and what changes it.
    TooLittle(String),
}

/// Asks `program`, with the arguments and environment of `serve`, a shard's invocation. `free_bytes`: of each rank's device, or
/// one number for all.
///
/// # Errors
/// One line: the program's, or that it cannot be run.
pub fn ask(
    program: &Path,
    serve: &Invocation,
    free_bytes: &[u64],
    max_prefill_tokens: u32,
) -> Result<Footprint, String> {
    let mut command = Command::new(program);
    command.arg("footprint").args(serve.args.iter().skip(1));
    if !free_bytes.is_empty() {
        let list: Vec<String> = free_bytes.iter().map(u64::to_string).collect();
        command.args(["--free-bytes", &list.join(",")]);
    }
    command.args(["--max-prefill-tokens", &max_prefill_tokens.to_string()]);
    // There is no pipe in this child.
    let env = serve.env.iter().filter(|(name, _)| *name != "QUARTET_LIFELINE_FD");
    command.envs(env.map(|(name, value)| (name, value)));
    for name in &serve.env_removed {
        command.env_remove(name);
    }
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} cannot be run: {error}", program.display()))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = words.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        return Err(if lines.is_empty() { output.status.to_string() } else { lines.join("; ") });
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("{} answered what is not understood: {error}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another process writes it: what this one holds open for writing, a child that another test starts just then would hold
    /// too, and a file that anyone may write to is not run.
    fn shard(script: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
        let status = Command::new("/bin/sh").args(["-c", write]).arg(&path).arg(script).status().unwrap();
        assert!(status.success());
        (dir, path)
    }

    #[test]
    fn the_command_is_that_of_serving() {
        let answer = r#"{"dtype": "bfloat16", "kv_dtype": "float16", "is_quantized": false, "num_layers": 1, "block_size": 16,
            "max_context": 9, "ranks": [{"weight_bytes": 1, "workspace_bytes": 2, "logits_bytes": 3, "block_bytes": 4,
            "query_heads": [0, 1], "kv_heads": [0, 1], "feed_forward": [0, 64], "vocabulary": [0, 7],
            "cache": "not enough"}]}"#;
        let check = r#"[ "$*" = "footprint org/model --sharded --free-bytes 5,6 --max-prefill-tokens 7" ] || exit 3
            [ "$WORLD_SIZE" = 2 ] && [ -z "$QUARTET_LIFELINE_FD" ] || exit 4"#;
        let (_dir, path) = shard(&format!("{check}\ncat <<'END'\n{answer}\nEND"));
        let words = ["serve", "org/model", "--sharded"];
        let serve = Invocation {
            args: words.map(str::to_owned).to_vec(),
            env: vec![("WORLD_SIZE", "2".into()), ("QUARTET_LIFELINE_FD", "9".into())],
            env_removed: Vec::new(),
        };
        let footprint = ask(&path, &serve, &[5, 6], 7).unwrap();
        assert_eq!(footprint.ranks[0].fixed_bytes(), 6);
        assert_eq!(footprint.ranks[0].cache, Some(CacheForecast::TooLittle("not enough".to_owned())));
    }

    #[test]
    fn the_programs_last_words_are_the_error() {
        let (_dir, path) = shard("echo 'a is missing' >&2; echo 'b is wrong' >&2; exit 10");
        let error = ask(&path, &Invocation::default(), &[], 1).unwrap_err();
        assert_eq!(error, "a is missing; b is wrong");
        let (_dir, path) = shard("echo hello");
        assert!(ask(&path, &Invocation::default(), &[], 1).unwrap_err().contains("not understood"));
        assert!(
            ask(Path::new("/no/shard"), &Invocation::default(), &[], 1).unwrap_err().contains("/no/shard")
        );
    }
}
