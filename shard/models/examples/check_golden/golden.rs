//! Reference outputs.

use std::path::Path;

use serde_json::Value;

use crate::Failure;

/// One prompt of the reference.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) input_ids: Vec<u32>,
    pub(crate) generated_ids: Vec<u32>,
    pub(crate) logprobs: Vec<f64>,
    pub(crate) gaps: Vec<f64>,
    pub(crate) last_logprobs: Vec<f64>,
    /// Of the second prompt token and those after it.
    pub(crate) prefill: Vec<f64>,
}

/// Reads a file of them.
pub(crate) fn read_cases(path: &Path) -> Result<Vec<Case>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let prompts = match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(mut object)) if object.contains_key("prompts") => match object.remove("prompts") {
            Some(Value::Array(prompts)) => prompts,
            _ => return Err("prompts is not a list".into()),
        },
        _ => text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?,
    };
    let case = |(index, prompt): (usize, &Value)| Case {
        name: prompt["name"].as_str().map_or_else(|| index.to_string(), str::to_owned),
        input_ids: ids(&prompt["input_ids"]),
        generated_ids: ids(&prompt["generated_ids"]),
        logprobs: numbers(&prompt["logprobs"]),
        gaps: numbers(&prompt["gaps"]),
        last_logprobs: numbers(&prompt["last_logprobs"]),
        prefill: numbers(&prompt["prefill"]),
    };
    Ok(prompts.iter().enumerate().map(case).collect())
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|number| number as u32).collect()
}

/// The numbers of a list, without nulls.
fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect()
}
