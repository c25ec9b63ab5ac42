//! The prompt: as many tokens of a fixed text as were asked for.

use std::path::Path;

use hub::Tokenizer;

use crate::error::BenchmarkError;
use crate::settings::Settings;

/// Meaningless on purpose: no model has an opinion on it, and everybody measures the same.
const FILLER: &str = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut \
    labore et dolore magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut aliquip \
    ex ea commodo consequat. Duis aute irure dolor in reprehenderit in voluptate velit esse cillum dolore eu fugiat \
    nulla pariatur. Excepteur sint occaecat cupidatat non proident, sunt in culpa qui officia deserunt mollit anim id \
    est laborum. ";

/// A prompt of an exact length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// For shards that tokenize by themselves, as TGI's do.
    pub text: String,
    /// The tokens themselves: tokenizing `text` again need not give the same number.
    pub input_ids: Vec<u32>,
}

impl Prompt {
    /// Loads the tokenizer that `settings` names and makes the prompt.
    ///
    /// # Errors
    /// [`BenchmarkError::Tokenizer`] when there is no tokenizer, or one that gives no tokens.
    pub fn load(settings: &Settings) -> Result<Self, BenchmarkError> {
        load_tokenizer(settings)
            .and_then(|tokenizer| Self::new(tokenizer, settings.sequence_length as usize))
            .map_err(|reason| BenchmarkError::Tokenizer { name: settings.model.clone(), reason })
    }

    /// The last `length` tokens of the filler, repeated as often as needed.
    fn new(mut tokenizer: Tokenizer, length: usize) -> Result<Self, String> {
        // Some tokenizer files cut or pad by themselves.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        let mut repeats = 1;
        loop {
            let encoding =
                tokenizer.encode(FILLER.repeat(repeats), true).map_err(|error| error.to_string())?;
            let ids = encoding.get_ids();
            if ids.len() < length {
                // Most of the tokens are the text's, but special ones come only once: the estimate may be short.
                let wanted = (length * repeats).div_ceil(ids.len().max(1)).max(repeats + 1);
                if ids.len() < repeats {
                    return Err(format!("{} tokens for {repeats} paragraphs of text", ids.len()));
                }
                repeats = wanted;
                continue;
            }
            let input_ids = ids[ids.len() - length..].to_vec();
            let text = tokenizer.decode(&input_ids, false).map_err(|error| error.to_string())?;
            return Ok(Self { text, input_ids });
        }
    }
}

/// A directory needs only tokenizer.json; anything else is found as every other program finds it.
fn load_tokenizer(settings: &Settings) -> Result<Tokenizer, String> {
    let file = Path::new(&settings.model).join("tokenizer.json");
    if file.is_file() {
        return hub::tokenizer_from_file(&file).map_err(|error| error.to_string());
    }
    let model = hub::ModelRef { model_id: settings.model.clone(), revision: Some(settings.revision.clone()) };
    let files = hub::fetch(&model, &settings.hub).map_err(|error| error.to_string())?;
    files.tokenizer().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token a word, and a special one in front.
    fn tokenizer() -> Tokenizer {
        let json = r#"{
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"<s>": 0, "<unk>": 1, "laborum.": 2, "est": 3}, "unk_token": "<unk>"}
        }"#;
        hub::tokenizer_from_json(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_prompt_has_exactly_the_length_asked_for() {
        for length in [1, 2, 69, 70, 71, 200, 1000] {
            let prompt = Prompt::new(tokenizer(), length).unwrap();
            assert_eq!(prompt.input_ids.len(), length);
            assert_eq!(prompt.input_ids.last(), Some(&2), "the end of the text is kept");
        }
        assert_eq!(Prompt::new(tokenizer(), 2).unwrap().text, "est laborum.");
    }

    #[test]
    fn a_tokenizer_without_tokens_is_refused() {
        let mute = r#"{"version": "1.0", "added_tokens": [],
            "model": {"type": "BPE", "vocab": {}, "merges": []}}"#;
        assert!(Prompt::new(hub::tokenizer_from_json(mute.as_bytes()).unwrap(), 10).is_err());
    }
}
