//! Reference outputs, and how far ours may be from them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

/// How far an answer may be from the float64 reference: the one table.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Two best logits closer than this are a near-tie: either token is right, and texts part.
    pub near_tie: f64,
    /// Largest error of a log-probability.
    pub logprob: f64,
}

/// Weights in float32.
pub const FLOAT32: Tolerance = Tolerance { near_tie: 0.001, logprob: 0.002 };
/// Weights in bfloat16, or dequantized to it.
pub const BFLOAT16: Tolerance = Tolerance { near_tie: 0.02, logprob: 0.05 };

/// One prompt and what the reference answers, greedily.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// The text; none when the ids were made up.
    pub prompt: Option<String>,
    /// Its ids.
    pub input_ids: Vec<u32>,
    /// Log-probability of each prompt token; the first has none. Empty where the reference does not say.
    #[serde(default)]
    pub prefill: Vec<Option<f64>>,
    /// The continuation.
    pub generated_ids: Vec<u32>,
    /// Its log-probabilities.
    pub logprobs: Vec<f64>,
    /// Best minus second-best logit at each step.
    pub gaps: Vec<f64>,
}

impl Case {
    /// Steps to compare: those before the first near-tie.
    pub fn comparable(&self, tolerance: Tolerance) -> usize {
        self.gaps.iter().position(|&gap| gap < tolerance.near_tie).unwrap_or(self.gaps.len())
    }

    /// Compares generated tokens with the reference.
    ///
    /// # Errors
    /// At the first id that differs or log-probability that is too far off.
    pub fn check(&self, tokens: &[Token], tolerance: Tolerance) -> Result<()> {
        let steps = self.comparable(tolerance);
        ensure!(tokens.len() >= steps, "{} tokens, expected at least {steps}", tokens.len());
        for (step, token) in tokens.iter().take(steps).enumerate() {
            let (id, logprob) = (self.generated_ids[step], self.logprobs[step]);
            ensure!(token.id == id, "step {step} of {:?}: token {}, expected {id}", self.prompt, token.id);
            let error = (token.logprob - logprob).abs();
            ensure!(
                error <= tolerance.logprob,
                "step {step} of {:?}: log-probability off by {error}",
                self.prompt
            );
        }
        Ok(())
    }
}

/// A generated token as `/generate` reports it.
#[derive(Debug, Clone, Deserialize)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f64,
    /// Its text.
    pub text: String,
}

/// A file or folder among the committed fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Reads reference outputs: one JSON object a line, or a `.json` file with a list called `prompts`.
///
/// # Errors
/// When the file is missing or malformed.
pub fn cases(path: &Path) -> Result<Vec<Case>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let is_list = path.extension().is_some_and(|extension| extension == "json");
    if is_list {
        #[derive(Deserialize)]
        struct List {
            prompts: Vec<Case>,
        }
        let list: List = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        return Ok(list.prompts);
    }
    let cases: Vec<Case> = text
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{}: {line:.80}", path.display())))
        .collect::<Result<_>>()?;
    ensure!(!cases.is_empty(), "{} holds no case", path.display());
    Ok(cases)
}

/// The tokens of an answer's `details`.
///
/// # Errors
/// When they are not there.
pub fn tokens_of(answer: &Value) -> Result<Vec<Token>> {
    let tokens = answer.pointer("/details/tokens").with_context(|| format!("no tokens in {answer}"))?;
    Ok(serde_json::from_value(tokens.clone())?)
}
