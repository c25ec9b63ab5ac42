//! The parameters of a request: every rule that needs no tokenizer, in TGI's order.

use proto::v3::NextTokenChooserParameters;

use super::{ValidationError, ValidationLimits};
use crate::types::{GenerateParameters, GenerateRequest};

/// Parameters that broke no rule. Unset ones have the value that switches them off.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ValidParameters {
    pub(super) chooser: NextTokenChooserParameters,
    pub(super) max_new_tokens: Option<u32>,
    pub(super) stop: Vec<String>,
    pub(super) top_n_tokens: u32,
    pub(super) truncate: Option<usize>,
}

/// Checks all parameters. `random_seed` is used when the client gave none.
pub(super) fn check(
    request: &GenerateRequest,
    limits: &ValidationLimits,
    random_seed: u64,
) -> Result<ValidParameters, ValidationError> {
    let parameters = &request.parameters;
    let best_of = parameters.best_of.unwrap_or(1);
    if best_of > 1 && !is_sampled(parameters) {
        return Err(ValidationError::BestOfSampling);
    }
    let chooser = check_chooser(parameters)?;
    if parameters.max_new_tokens == Some(0) {
        return Err(ValidationError::NegativeMaxNewTokens);
    }
    if parameters.stop.len() > limits.max_stop_sequences {
        return Err(ValidationError::StopSequence {
            max: limits.max_stop_sequences,
            given: parameters.stop.len(),
        });
    }
    if best_of > 1 && parameters.seed.is_some() {
        return Err(ValidationError::BestOfSeed);
    }
    let top_n_tokens = parameters.top_n_tokens.unwrap_or(0);
    if top_n_tokens > limits.max_top_n_tokens {
        return Err(ValidationError::TopNTokens { max: limits.max_top_n_tokens, given: top_n_tokens });
    }
    if request.inputs.is_empty() {
        return Err(ValidationError::EmptyInput);
    }
    if let Some(given) = parameters.truncate
        && !(1..=limits.max_input_tokens).contains(&given)
    {
        return Err(ValidationError::Truncate { max: limits.max_input_tokens, given });
    }
    check_supported(parameters)?;
    Ok(ValidParameters {
        chooser: NextTokenChooserParameters { seed: parameters.seed.unwrap_or(random_seed), ..chooser },
        max_new_tokens: parameters.max_new_tokens,
        stop: parameters.stop.clone(),
        top_n_tokens,
        truncate: parameters.truncate,
    })
}

/// `best_of` against the limit; checked before everything else. Absent and 1 are fine always.
pub(super) fn check_best_of(
    best_of: Option<usize>,
    limits: &ValidationLimits,
) -> Result<usize, ValidationError> {
    let max = limits.max_best_of;
    match best_of.unwrap_or(1) {
        1 => Ok(1),
        _ if max == 1 => Err(ValidationError::BestOfDisabled),
        given if given == 0 || given > max => Err(ValidationError::BestOf { max, given }),
        given => Ok(given),
    }
}

fn is_sampled(parameters: &GenerateParameters) -> bool {
    parameters.do_sample
        || parameters.temperature.is_some()
        || parameters.top_k.is_some()
        || parameters.top_p.is_some()
        || parameters.typical_p.is_some()
}

fn check_chooser(parameters: &GenerateParameters) -> Result<NextTokenChooserParameters, ValidationError> {
    // Written so that NaN fails, too. Infinite is what a number becomes that is too large for 32 bits.
    let positive = |value: Option<f32>, error| match value.unwrap_or(1.0) {
        value if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err(error),
    };
    let temperature = positive(parameters.temperature, ValidationError::Temperature)?;
    let repetition_penalty = positive(parameters.repetition_penalty, ValidationError::RepetitionPenalty)?;
    let frequency_penalty = parameters.frequency_penalty.unwrap_or(0.0);
    if !(-2.0..=2.0).contains(&frequency_penalty) {
        return Err(ValidationError::FrequencyPenalty);
    }
    // 1.0 switches it off, but only by being unset: TGI refuses an explicit 1.0.
    let mass = |value: Option<f32>, error| match value {
        None => Ok(1.0),
        Some(value) if value > 0.0 && value < 1.0 => Ok(value),
        Some(_) => Err(error),
    };
    let top_p = mass(parameters.top_p, ValidationError::TopP)?;
    let typical_p = mass(parameters.typical_p, ValidationError::TypicalP)?;
    let top_k = match parameters.top_k.map(u32::try_from) {
        None => 0,
        Some(Ok(top_k)) if top_k > 0 => top_k,
        Some(_) => return Err(ValidationError::TopK),
    };
    Ok(NextTokenChooserParameters {
        temperature,
        top_k,
        top_p,
        typical_p,
        do_sample: parameters.do_sample,
        repetition_penalty,
        frequency_penalty,
        ..Default::default()
    })
}

/// What cannot be honoured is refused, never ignored.
fn check_supported(parameters: &GenerateParameters) -> Result<(), ValidationError> {
    if parameters.watermark {
        let reason = "this server does not watermark; leave it unset or false";
        return Err(ValidationError::Unsupported { parameter: "watermark", reason });
    }
    if parameters.adapter_id.is_some() {
        let reason = "this server has no adapters loaded; leave it unset";
        return Err(ValidationError::Unsupported { parameter: "adapter_id", reason });
    }
    if parameters.grammar.is_some() {
        return Err(ValidationError::Grammar);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ValidationLimits = ValidationLimits {
        max_best_of: 2,
        max_stop_sequences: 2,
        max_top_n_tokens: 5,
        max_input_tokens: 10,
        max_total_tokens: 20,
    };

    fn error_of(parameters: &str) -> String {
        let json = format!(r#"{{"inputs":"a","parameters":{parameters}}}"#);
        let request: GenerateRequest = serde_json::from_str(&json).unwrap();
        match check(&request, &LIMITS, 9) {
            Ok(_) => "accepted".to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn every_rule_has_its_text() {
        for (parameters, text) in [
            (r#"{"best_of":2}"#, "you must use sampling when `best_of` is > 1"),
            (r#"{"best_of":2,"do_sample":true,"seed":1}"#, "`seed` must not be set when `best_of` > 1"),
            (r#"{"temperature":0}"#, "`temperature` must be strictly positive"),
            (r#"{"repetition_penalty":-1}"#, "`repetition_penalty` must be strictly positive"),
            (r#"{"repetition_penalty":1e300}"#, "`repetition_penalty` must be strictly positive"),
            (r#"{"temperature":1e39}"#, "`temperature` must be strictly positive"),
            (r#"{"temperature":1e-50}"#, "`temperature` must be strictly positive"),
            (r#"{"frequency_penalty":2.5}"#, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
            (r#"{"top_p":1.0}"#, "`top_p` must be > 0.0 and < 1.0"),
            (r#"{"typical_p":0.0}"#, "`typical_p` must be > 0.0 and < 1.0"),
            (r#"{"top_k":-3}"#, "`top_k` must be strictly positive"),
            (r#"{"top_k":0}"#, "`top_k` must be strictly positive"),
            (r#"{"max_new_tokens":0}"#, "`max_new_tokens` must be strictly positive"),
            (r#"{"stop":["a","b","c"]}"#, "`stop` supports up to 2 stop sequences. Given: 3"),
            (r#"{"top_n_tokens":6}"#, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
            (r#"{"truncate":0}"#, "`truncate` must be strictly positive and less than 10. Given: 0"),
            (r#"{"truncate":11}"#, "`truncate` must be strictly positive and less than 10. Given: 11"),
            (r#"{"grammar":{"type":"regex","value":"a"}}"#, "grammar is not supported"),
            (
                r#"{"watermark":true}"#,
                "`watermark` is not supported: this server does not watermark; leave it unset or false",
            ),
            (
                r#"{"adapter_id":"x"}"#,
                "`adapter_id` is not supported: this server has no adapters loaded; leave it unset",
            ),
            (r#"{"truncate":10,"top_n_tokens":5,"top_p":0.99,"top_k":1}"#, "accepted"),
        ] {
            assert_eq!(error_of(parameters), text, "{parameters}");
        }
    }

    #[test]
    fn rules_are_checked_in_order() {
        assert_eq!(
            error_of(r#"{"top_k":0,"top_p":2,"temperature":-1,"stop":["a","b","c"]}"#),
            "`temperature` must be strictly positive"
        );
        let empty: GenerateRequest =
            serde_json::from_str(r#"{"inputs":"","parameters":{"truncate":0}}"#).unwrap();
        assert_eq!(check(&empty, &LIMITS, 9), Err(ValidationError::EmptyInput));
    }

    #[test]
    fn best_of_is_compared_with_its_limit() {
        assert_eq!(check_best_of(None, &LIMITS), Ok(1));
        assert_eq!(check_best_of(Some(2), &LIMITS), Ok(2));
        assert_eq!(
            check_best_of(Some(0), &LIMITS).unwrap_err().to_string(),
            "`best_of` must be > 0 and <= 2. Given: 0"
        );
        let single = ValidationLimits { max_best_of: 1, ..LIMITS };
        assert_eq!(check_best_of(Some(2), &single), Err(ValidationError::BestOfDisabled));
    }

    #[test]
    fn unset_means_off_and_the_seed_is_random() {
        let request: GenerateRequest = serde_json::from_str(r#"{"inputs":"a","parameters":{}}"#).unwrap();
        let valid = check(&request, &LIMITS, 9).unwrap();
        let NextTokenChooserParameters { temperature, top_k, top_p, typical_p, seed, do_sample, .. } =
            valid.chooser;
        assert_eq!((temperature, top_k, top_p, typical_p, seed, do_sample), (1.0, 0, 1.0, 1.0, 9, false));
    }
}
