//! The files of one model, and what they say.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::config::ModelConfig;
use crate::error::HubError;
use crate::generation_config::GenerationConfig;
use crate::gguf::Gguf;
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
        Tokenizer::from_file(&path)
            .map_err(|error| HubError::Tokenizer { origin: origin(&path), problem: error.to_string() })
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

fn origin(path: &Path) -> String {
    path.display().to_string()
}
