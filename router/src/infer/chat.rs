//! From a conversation to a prompt with parameters.

use serde_json::Value;

use super::{Infer, InferError};
use crate::types::{ChatRequest, GenerateParameters, GenerateRequest};
use crate::validation::ValidationError;

impl Infer {
    /// Renders the chat template and translates OpenAI's parameters.
    ///
    /// # Errors
    /// The template refused the messages, or a parameter cannot be honoured.
    pub fn prepare_chat(&self, request: &ChatRequest) -> Result<GenerateRequest, InferError> {
        let parameters = chat_parameters(request).map_err(|error| self.count(error))?;
        let inputs = self.apply_chat_template(&request.messages)?;
        Ok(GenerateRequest { inputs, parameters })
    }
}

/// OpenAI's parameters as ours.
///
/// # Errors
/// A parameter cannot be honoured.
pub fn chat_parameters(request: &ChatRequest) -> Result<GenerateParameters, InferError> {
    check_supported(request)?;
    Ok(translate(request))
}

/// What cannot be honoured is refused, never ignored.
fn check_supported(request: &ChatRequest) -> Result<(), InferError> {
    let has_tools = request.tools.is_some();
    let has_format = request.response_format.is_some();
    if has_tools && has_format {
        return Err(InferError::Tool("Grammar and tools are mutually exclusive".to_string()));
    }
    if has_format {
        return Err(ValidationError::Grammar.into());
    }
    let ignores_tools = request.tool_choice.as_ref().and_then(Value::as_str) == Some("none");
    if request.tools.as_ref().is_some_and(|tools| !tools.is_empty()) && !ignores_tools {
        let text = "tools are not supported by this server; leave `tools` unset or `tool_choice` \"none\"";
        return Err(InferError::Tool(text.to_string()));
    }
    if request.n.is_some_and(|n| n != 1) {
        let reason = "one answer a request; send the request again for another";
        return Err(ValidationError::Unsupported { parameter: "n", reason }.into());
    }
    if request.logit_bias.as_ref().is_some_and(|bias| !is_empty(bias)) {
        let reason = "leave it unset";
        return Err(ValidationError::Unsupported { parameter: "logit_bias", reason }.into());
    }
    Ok(())
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn translate(request: &ChatRequest) -> GenerateParameters {
    let (do_sample, temperature) = openai_sampling(request.temperature);
    GenerateParameters {
        do_sample,
        temperature,
        // TGI's translation: OpenAI's neutral 0 becomes a strong 2.0 only when it is sent explicitly.
        repetition_penalty: request.presence_penalty.map(|penalty| penalty + 2.0),
        frequency_penalty: request.frequency_penalty,
        top_p: request.top_p,
        max_new_tokens: request.max_tokens,
        stop: request.stop.clone().map(Vec::from).unwrap_or_default(),
        details: true,
        seed: request.seed,
        top_n_tokens: request.top_logprobs,
        ..Default::default()
    }
}

/// OpenAI's temperature: 0 means greedy, everything else (absent too) sampling.
pub(super) fn openai_sampling(temperature: Option<f32>) -> (bool, Option<f32>) {
    if temperature == Some(0.0) { (false, None) } else { (true, temperature) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(extra: &str) -> ChatRequest {
        let json = format!(r#"{{"messages":[{{"role":"user","content":"a"}}]{extra}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn parameters_are_translated() {
        let request = chat(
            r#","temperature":0,"presence_penalty":-0.5,"max_tokens":7,"stop":"x","top_logprobs":3,"model":"any""#,
        );
        let parameters = translate(&request);
        assert_eq!((parameters.do_sample, parameters.temperature), (false, None));
        assert_eq!(parameters.repetition_penalty, Some(1.5));
        assert_eq!((parameters.max_new_tokens, parameters.top_n_tokens), (Some(7), Some(3)));
        assert_eq!(parameters.stop, ["x"]);
        assert!(translate(&chat("")).do_sample);
        assert!(check_supported(&request).is_ok());
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        let error = |extra: &str| check_supported(&chat(extra)).map_err(|error| error.to_string());
        assert!(error(r#","tools":[{"type":"function"}]"#).unwrap_err().starts_with("Tool error: tools are"));
        assert_eq!(
            error(r#","tools":[],"response_format":{"type":"json","value":{}}"#).unwrap_err(),
            "Tool error: Grammar and tools are mutually exclusive"
        );
        assert_eq!(
            error(r#","response_format":{"type":"json","value":{}}"#).unwrap_err(),
            "Input validation error: grammar is not supported"
        );
        assert!(error(r#","n":2"#).unwrap_err().contains("`n` is not supported"));
        assert!(error(r#","logit_bias":{"5":1}"#).unwrap_err().contains("`logit_bias`"));
        assert_eq!(error(r#","tools":[{}],"tool_choice":"none","n":1,"logit_bias":[]"#), Ok(()));
        assert_eq!(error(r#","tools":null,"tool_choice":null,"response_format":null"#), Ok(()));
    }
}
