//! The files of one model, and what they say.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use crate::bounded::{self, MAX_TOKENIZER_BYTES};
use crate::config::{ModelConfig, one_line};
use crate::error::HubError;
use crate::generation_config::GenerationConfig;
use crate::gguf::Gguf;
use crate::panic_guard::catch_panic;
use crate::tokenizer::{Tokenizer, decoding_tokenizer_from_json, tokenizer_from_json};
use crate::tokenizer_files::TokenizerConfig;
use crate::{gguf_config, gguf_tokenizer};

/// Files with a model's weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightFiles {
    /// Sorted by name; at least one.
    Safetensors(Vec<PathBuf>),
    /// What `torch.save` writes, sorted by name; at least one.
    Pytorch(Vec<PathBuf>),
    /// One file that also holds configuration and tokenizer.
    Gguf(PathBuf),
}

impl WeightFiles {
    /// The paths, sorted by name.
    pub fn paths(&self) -> &[PathBuf] {
        match self {
            WeightFiles::Safetensors(paths) | WeightFiles::Pytorch(paths) => paths,
            WeightFiles::Gguf(path) => std::slice::from_ref(path),
        }
    }
}

/// A model that is complete on this disk.
///
/// Clones share what was read: the header of a GGUF file is parsed once.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    /// As it was asked for.
    pub model_id: String,
    /// Directory of `config.json` and the tokenizer's files.
    pub root: PathBuf,
    /// The weights.
    pub weights: WeightFiles,
    /// The commit on the Hub; `None` for local files.
    pub sha: Option<String>,
    gguf: Arc<OnceLock<Arc<GgufFile>>>,
}

/// A GGUF file in memory, with its header parsed.
#[derive(Debug)]
pub struct GgufFile {
    /// Its header.
    pub header: Gguf,
    map: memmap2::Mmap,
}

impl GgufFile {
    /// The whole file; the ranges of [`Gguf::tensors`] are into this.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Takes the pages of `range` out of this process's memory; they stay in the system's file cache, and come back when
    /// they are read again. For what has been read into another form.
    ///
    /// # Panics
    /// When the range is not within the file.
    pub fn release(&self, range: Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.map.len(),
            "bytes {range:?} of {}",
            self.map.len()
        );
        let dont_need = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is only read and nobody writes the file (see `open_gguf`): a page that is needed again comes back
        // from the file as it was. A refusal leaves everything as it is.
        let _ = unsafe { self.map.unchecked_advise_range(dont_need, range.start, range.len()) };
    }
}

impl ModelFiles {
    pub(crate) fn new(model_id: &str, root: &Path, weights: WeightFiles, sha: Option<String>) -> Self {
        Self { model_id: model_id.to_owned(), root: root.to_owned(), weights, sha, gguf: Arc::default() }
    }

    /// The GGUF file, opened at the first call; `None` for other formats.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub fn gguf(&self) -> Result<Option<Arc<GgufFile>>, HubError> {
        match &self.weights {
            WeightFiles::Safetensors(_) | WeightFiles::Pytorch(_) => Ok(None),
            WeightFiles::Gguf(path) => self.open_gguf(path).map(Some),
        }
    }

    fn open_gguf(&self, path: &Path) -> Result<Arc<GgufFile>, HubError> {
        if let Some(open) = self.gguf.get() {
            return Ok(Arc::clone(open));
        }
        let file = File::open(path).map_err(HubError::io("open", path))?;
        // SAFETY: the map is only read. Changing a model file in place while it is served is not supported by
        // anything that maps weights; files from the Hub are replaced by renaming, which leaves this map alone.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(HubError::io("map", path))?;
        let header = Gguf::parse(&map)
            .map_err(|error| HubError::Gguf { origin: path.display().to_string(), problem: error.0 })?;
        // When two threads come here at once, both parsed the same; the first one's result is shared.
        Ok(Arc::clone(self.gguf.get_or_init(|| Arc::new(GgufFile { header, map }))))
    }

    /// `config.json`, or the same built from GGUF metadata.
    ///
    /// # Errors
    /// The file is missing or damaged, or the GGUF file's architecture is not supported.
    pub fn config(&self) -> Result<ModelConfig, HubError> {
        match &self.weights {
            WeightFiles::Safetensors(_) | WeightFiles::Pytorch(_) => {
                ModelConfig::from_file(&self.root.join("config.json"))
            }
            WeightFiles::Gguf(path) => {
                let file = self.open_gguf(path)?;
                gguf_config::model_config(&file.header, file.bytes(), &origin(path))
            }
        }
    }

    /// `tokenizer.json`, or a tokenizer built from GGUF metadata.
    ///
    /// # Errors
    /// The file is missing or damaged, or the GGUF file's kind of tokenizer is not supported.
    pub fn tokenizer(&self) -> Result<Tokenizer, HubError> {
        self.read_tokenizer(tokenizer_from_json)
    }

    /// The same, good only to turn tokens into text where that is quicker to read: large vocabularies take a third of the
    /// time and memory.
    ///
    /// # Errors
    /// As [`ModelFiles::tokenizer`].
    pub fn decoding_tokenizer(&self) -> Result<Tokenizer, HubError> {
        self.read_tokenizer(decoding_tokenizer_from_json)
    }

    fn read_tokenizer(&self, read: ReadJson) -> Result<Tokenizer, HubError> {
        if let WeightFiles::Gguf(path) = &self.weights {
            return gguf_tokenizer::tokenizer(&self.open_gguf(path)?.header, &origin(path));
        }
        let path = self.root.join("tokenizer.json");
        if !path.is_file() {
            return Err(HubError::Missing {
                model_id: self.model_id.clone(),
                missing: "tokenizer.json".to_owned(),
                looked_in: self.root.clone(),
                remedy: "only fast tokenizers are read; convert the tokenizer with transformers first"
                    .to_owned(),
            });
        }
        read_tokenizer(&path, read)
    }

    /// Whether the model has a row of its embedding for every token of `tokenizer`. The other way round is usual: embeddings
    /// are padded to a round number.
    ///
    /// Added tokens beyond the embedding are tolerated, since published models have them (Gemma 3's text models know the
    /// token that stands for an image): a prompt that uses one is refused when it comes.
    ///
    /// # Errors
    /// The vocabulary is larger than the embedding, or the configuration cannot be read.
    pub fn check_vocabulary(&self, tokenizer: &Tokenizer) -> Result<(), HubError> {
        let Some(rows) = self.config()?.vocab_size()? else { return Ok(()) };
        let beyond = |id: &u32| usize::try_from(*id).is_ok_and(|id| id >= rows);
        if let Some(largest) = tokenizer.get_model().largest_id().filter(beyond) {
            return Err(HubError::format(
                format!("tokenizer of {}", self.model_id),
                format!(
                    "its largest token id is {largest}, expected ids below the model's vocab_size of {rows}; tokenizer \
                     and weights are not of the same model: take both from one revision"
                ),
            ));
        }
        let added = tokenizer.get_added_tokens_decoder();
        let added: Vec<_> =
            added.iter().filter(|(id, _)| beyond(id)).map(|(_, token)| &token.content).collect();
        if let Some(first) = added.first() {
            let count = added.len();
            tracing::warn!(
                "{count} added token(s) such as {first:?} are beyond the model's {rows} rows; prompts with them are refused"
            );
        }
        Ok(())
    }

    /// Special tokens, chat template and limits of the tokenizer.
    ///
    /// # Errors
    /// A file is damaged.
    pub fn tokenizer_config(&self) -> Result<TokenizerConfig, HubError> {
        match &self.weights {
            WeightFiles::Safetensors(_) | WeightFiles::Pytorch(_) => TokenizerConfig::from_root(&self.root),
            WeightFiles::Gguf(path) => {
                gguf_tokenizer::tokenizer_config(&self.open_gguf(path)?.header, &origin(path))
            }
        }
    }

    /// Which tokens end a text.
    ///
    /// # Errors
    /// A file is damaged.
    pub fn generation_config(&self) -> Result<GenerationConfig, HubError> {
        match &self.weights {
            WeightFiles::Safetensors(_) | WeightFiles::Pytorch(_) => {
                GenerationConfig::from_root(&self.root, &self.config()?)
            }
            WeightFiles::Gguf(path) => {
                gguf_config::generation_config(&self.open_gguf(path)?.header, &origin(path))
            }
        }
    }

    /// A cheap identity in 64 hexadecimal digits: names and sizes of the weight files and the configuration.
    /// Ranks of one model compare it before they load. The weights themselves are not read.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self) -> Result<String, HubError> {
        let mut hash = Sha256::new();
        for path in self.weights.paths() {
            let size = std::fs::metadata(path).map_err(HubError::io("read", path))?.len();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hash.update(format!("{name}\0{size}\0"));
        }
        hash.update(serde_json::Value::Object(self.config()?.raw).to_string());
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// The tokenizer of one `tokenizer.json`.
///
/// # Errors
/// The file cannot be read or is damaged.
pub fn tokenizer_from_file(path: &Path) -> Result<Tokenizer, HubError> {
    read_tokenizer(path, tokenizer_from_json)
}

/// Reads the text of a `tokenizer.json`.
type ReadJson = fn(&[u8]) -> tokenizers::Result<Tokenizer>;

/// Reads a `tokenizer.json`.
fn read_tokenizer(path: &Path, read: ReadJson) -> Result<Tokenizer, HubError> {
    let bytes = bounded::read(path, MAX_TOKENIZER_BYTES)?;
    let wrong = |problem: String| HubError::Tokenizer { origin: origin(path), problem: one_line(&problem) };
    // The library checks much, but not all that a file may hold.
    match catch_panic(|| read(&bytes)) {
        Ok(tokenizer) => tokenizer.map(as_it_is).map_err(|error| wrong(error.to_string())),
        Err(panic) => Err(wrong(format!("its parts contradict one another: {panic}"))),
    }
}

/// Without the padding and cutting that some files ask for, left over from training: they would change prompts behind the
/// caller's back, and a hostile file could pad each to any length.
fn as_it_is(mut tokenizer: Tokenizer) -> Tokenizer {
    tokenizer.with_padding(None);
    // Only cutting lengths can be refused, and none is given.
    let _ = tokenizer.with_truncation(None);
    tokenizer
}

fn origin(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A model with `tokens` in its vocabulary, one more that is added, and `rows` in its embedding.
    fn check(tokens: &[(&str, u32)], added: u32, rows: usize) -> Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let vocab: serde_json::Map<_, _> =
            tokens.iter().map(|&(token, id)| (token.to_owned(), json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null,
            "added_tokens": [{"id": added, "content": "<image>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
        });
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(dir.path().join("config.json"), json!({"vocab_size": rows}).to_string()).unwrap();
        let weights = WeightFiles::Safetensors(vec![dir.path().join("model.safetensors")]);
        let files = ModelFiles::new("org/name", dir.path(), weights, None);
        let tokenizer = files.tokenizer().unwrap();
        files.check_vocabulary(&tokenizer).map_err(|error| error.to_string())
    }

    #[test]
    fn a_vocabulary_larger_than_the_embedding_is_refused() {
        let error = check(&[("a", 0), ("b", 7)], 8, 7).unwrap_err();
        assert_eq!(
            error,
            "tokenizer of org/name: its largest token id is 7, expected ids below the model's vocab_size of 7; tokenizer \
             and weights are not of the same model: take both from one revision"
        );
        check(&[("a", 0), ("b", 7)], 8, 64).unwrap();
        // As Gemma 3 has it.
        check(&[("a", 0), ("b", 1)], 2, 2).unwrap();
    }

    #[test]
    fn padding_and_cutting_are_not_for_prompts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": null, "decoder": null,
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": 1_u64 << 40,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
        });
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let tokenizer = tokenizer_from_file(&path).unwrap();
        assert_eq!(tokenizer.encode("b a b", true).unwrap().get_ids(), [1, 0, 1]);
    }

    #[test]
    fn damaged_tokenizers_are_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        for text in
            ["", "{}", "[\n]", &"[".repeat(10_000), r#"{"version": "1.0", "model": {"type": "a\nb"}}"#]
        {
            std::fs::write(&path, text).unwrap();
            let error = read_tokenizer(&path, tokenizer_from_json).unwrap_err().to_string();
            assert!(error.contains("tokenizer.json: cannot build the tokenizer: "), "{error}");
            assert!(!error.contains('\n') && error.len() < 400, "{error}");
        }
    }
}
