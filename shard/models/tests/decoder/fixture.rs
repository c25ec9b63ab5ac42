//! A random llama of awkward sizes, or one of the kinds in `mixtures`, written as its files would be.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use backend::Fp8Format;
use half::bf16;
use hub::{HubOptions, ModelFiles, ModelRef};
use serde_json::{Value, json};

use crate::testing::{Noise, gguf_bytes};
use crate::{mixtures, relatives};

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    Bf16,
    /// Projections in E4M3, attention's with a scale a row and the others with one a block of [`BLOCK`]; the rest in F32.
    Fp8,
}

/// Rows and columns that share a scale.
const BLOCK: [usize; 2] = [16, 24];

impl Stored {
    const fn name(self) -> &'static str {
        match self {
            Stored::Bf16 => "BF16",
            Stored::F32 | Stored::Fp8 => "F32",
        }
    }
}

/// How a tensor of eight bits is stored: numbers, then the name, shape and values of its scales.
struct Eight {
    numbers: Vec<u8>,
    scales: (String, [usize; 2], Vec<f32>),
}

impl Tensor {
    /// The projection rounded to eight bits; its values become what those stand for.
    fn round_to_eight_bits(&mut self) -> Eight {
        let [rows, cols] = [self.shape[0], self.shape[1]];
        let is_in_blocks = self.name.contains("mlp");
        let [block_rows, block_cols] = if is_in_blocks { BLOCK } else { [1, cols] };
        let grid = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
        let scale_of = |row: usize, col: usize| row / block_rows * grid[1] + col / block_cols;
        let mut scales = vec![0.0_f32; grid[0] * grid[1]];
        for (at, value) in self.values.iter().enumerate() {
            let scale = &mut scales[scale_of(at / cols, at % cols)];
            *scale = scale.max(value.abs() / Fp8Format::E4M3.max());
        }
        let mut numbers = Vec::new();
        for (at, value) in self.values.iter_mut().enumerate() {
            let scale = scales[scale_of(at / cols, at % cols)];
            let number = Fp8Format::E4M3.encode(*value / scale);
            *value = Fp8Format::E4M3.decode(number) * scale;
            numbers.push(number);
        }
        let suffix = if is_in_blocks { "_scale_inv" } else { "_scale" };
        Eight { numbers, scales: (format!("{}{suffix}", self.name), grid, scales) }
    }
}

/// Which architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Llama,
    /// Experts beside a weighed shared one: Qwen2-MoE.
    Experts,
    /// Attention over latent vectors, experts in groups: DeepSeek-V3.
    Latent,
    /// Norms of the sums, a narrow embedding: OPT 350M.
    NormedSums,
    /// Norms of each head, attention and feed-forward side by side: StableLM 2 12B.
    HeadNorms,
    /// Linear biases: Baichuan 13B.
    LinearBiases,
    /// Rows of the logits' matrix of length 1: Baichuan 2.
    NormedHead,
}

/// A weight, as the numbers that the file holds.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}

/// A model on disk, deleted when dropped.
pub(crate) struct Fixture {
    pub(crate) kind: Kind,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) num_layers: usize,
    pub(crate) vocab_size: usize,
    pub(crate) is_tied: bool,
    pub(crate) has_biases: bool,
    pub(crate) tensors: Vec<Tensor>,
    /// Those of eight bits, by name.
    eight: HashMap<String, Eight>,
    pub(crate) stored: Stored,
    noise: Noise,
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Fixture {
    /// Own logits' matrix, no biases.
    pub(crate) fn plain(stored: Stored) -> Self {
        Self::new(stored, Kind::Llama, false, false)
    }

    /// The embedding gives the logits; every linear layer has a bias.
    pub(crate) fn tied_with_biases(stored: Stored) -> Self {
        Self::new(stored, Kind::Llama, true, true)
    }

    /// Of another kind, with biases where it may have them.
    pub(crate) fn of(kind: Kind, stored: Stored, has_biases: bool) -> Self {
        Self::new(stored, kind, false, has_biases)
    }

    fn new(stored: Stored, kind: Kind, is_tied: bool, has_biases: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut fixture = Self {
            kind,
            hidden_size: 40,
            intermediate_size: 72,
            num_heads: 6,
            num_kv_heads: 3,
            head_dim: 12,
            num_layers: 2,
            vocab_size: 131,
            is_tied,
            has_biases,
            tensors: Vec::new(),
            eight: HashMap::new(),
            stored,
            noise: Noise::new(11),
            model: folder.path().to_owned(),
            folder,
        };
        relatives::resize(&mut fixture);
        fixture.fill();
        if stored == Stored::Fp8 {
            let projections =
                fixture.tensors.iter_mut().filter(|tensor| tensor.name.ends_with("_proj.weight"));
            fixture.eight =
                projections.map(|tensor| (tensor.name.clone(), tensor.round_to_eight_bits())).collect();
        }
        fixture.write();
        fixture
    }

    fn fill(&mut self) {
        if relatives::is_relative(self.kind) {
            return relatives::fill(self);
        }
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        self.add("model.embed_tokens.weight", &[self.vocab_size, hidden]);
        for layer in 0..self.num_layers {
            let prefix = format!("model.layers.{layer}");
            self.add(&format!("{prefix}.input_layernorm.weight"), &[hidden]);
            self.add(&format!("{prefix}.post_attention_layernorm.weight"), &[hidden]);
            if self.kind != Kind::Llama {
                mixtures::add_layer(self, layer);
                continue;
            }
            for (name, shape) in [
                ("self_attn.q_proj", [queries, hidden]),
                ("self_attn.k_proj", [keys, hidden]),
                ("self_attn.v_proj", [keys, hidden]),
                ("self_attn.o_proj", [hidden, queries]),
                ("mlp.gate_proj", [inner, hidden]),
                ("mlp.up_proj", [inner, hidden]),
                ("mlp.down_proj", [hidden, inner]),
            ] {
                self.add_linear(&format!("{prefix}.{name}"), shape, self.has_biases);
            }
        }
        self.add("model.norm.weight", &[hidden]);
        if !self.is_tied {
            self.add("lm_head.weight", &[self.vocab_size, hidden]);
        }
    }

    /// Adds a projection.
    pub(crate) fn add_linear(&mut self, prefix: &str, shape: [usize; 2], has_bias: bool) {
        self.add(&format!("{prefix}.weight"), &shape);
        if has_bias {
            self.add(&format!("{prefix}.bias"), &shape[..1]);
        }
    }

    /// Adds a random tensor; [`Fixture::write`] brings it to the disk.
    pub(crate) fn add(&mut self, name: &str, shape: &[usize]) {
        let scale = if shape.len() == 2 { 1.5 / (shape[1] as f32).sqrt() } else { 0.5 };
        let offset = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let value = || {
            // Evenly from -1 to 1.
            let unit = self.noise.next() as u32 as f32 / (1_u32 << 31) as f32 - 1.0;
            let value = offset + scale * unit;
            if self.stored == Stored::Bf16 { bf16::from_f32(value).to_f32() } else { value }
        };
        let values = std::iter::repeat_with(value).take(shape.iter().product()).collect();
        self.tensors.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), values });
    }

    /// The values of a tensor.
    pub(crate) fn values(&self, name: &str) -> Option<&[f32]> {
        self.tensors.iter().find(|tensor| tensor.name == name).map(|tensor| tensor.values.as_slice())
    }

    /// Random token ids.
    pub(crate) fn tokens(&self, len: usize, seed: u64) -> Vec<u32> {
        let mut noise = Noise::new(seed);
        (0..len).map(|_| noise.below(self.vocab_size) as u32).collect()
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn files(&self) -> ModelFiles {
        let model = ModelRef { model_id: self.model.display().to_string(), revision: None };
        hub::locate(&model, &HubOptions::default()).unwrap()
    }

    fn bytes(&self, values: &[f32]) -> Vec<u8> {
        match self.stored {
            Stored::F32 | Stored::Fp8 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Stored::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        }
    }

    /// Writes config.json and two safetensors files.
    pub(crate) fn write(&self) {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size, "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads, "head_dim": self.head_dim,
            "num_hidden_layers": self.num_layers, "vocab_size": self.vocab_size, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128, "tie_word_embeddings": self.is_tied, "attention_bias": self.has_biases,
            "mlp_bias": self.has_biases, "rope_theta": 100.0, "hidden_act": "silu",
        });
        mixtures::change(&mut config, self);
        if self.stored == Stored::Fp8 {
            config["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": BLOCK});
        }
        relatives::change(&mut config, self);
        std::fs::write(self.folder().join("config.json"), config.to_string()).unwrap();
        let (first, second) = self.tensors.split_at(self.tensors.len() / 2);
        for (name, tensors) in [("model-00001-of-00002", first), ("model-00002-of-00002", second)] {
            let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
            let mut put = |name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>| {
                let offsets = [data.len(), data.len() + bytes.len()];
                let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
                header.insert(name.to_owned(), entry);
                data.extend(bytes);
            };
            for tensor in tensors {
                match self.eight.get(&tensor.name) {
                    None => put(&tensor.name, self.stored.name(), &tensor.shape, self.bytes(&tensor.values)),
                    Some(Eight { numbers, scales: (scale_name, grid, scales) }) => {
                        put(&tensor.name, "F8_E4M3", &tensor.shape, numbers.clone());
                        put(scale_name, "F32", grid, self.bytes(scales));
                    }
                }
            }
            let header = Value::Object(header).to_string();
            let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
            std::fs::write(self.folder().join(format!("{name}.safetensors")), bytes).unwrap();
        }
    }

    /// The same model as a GGUF file: other names, and the rows of queries and keys so that a rotation pairs neighbours.
    pub(crate) fn as_gguf(&self) -> Self {
        let mut fixture = Self::new(self.stored, self.kind, self.is_tied, self.has_biases);
        let code = if self.stored == Stored::F32 { 0 } else { 30 };
        let tensors: Vec<_> = self
            .tensors
            .iter()
            .map(|tensor| {
                let values = match &tensor.name {
                    name if name.contains("q_proj") || name.contains("k_proj") => self.interleave(tensor),
                    _ => tensor.values.clone(),
                };
                (gguf_name(&tensor.name), tensor.shape.clone(), code, self.bytes(&values))
            })
            .collect();
        let numbers = [
            ("llama.embedding_length", self.hidden_size),
            ("llama.feed_forward_length", self.intermediate_size),
            ("llama.attention.head_count", self.num_heads),
            ("llama.attention.head_count_kv", self.num_kv_heads),
            ("llama.attention.key_length", self.head_dim),
            ("llama.rope.dimension_count", self.head_dim),
            ("llama.block_count", self.num_layers),
            ("llama.vocab_size", self.vocab_size),
            ("llama.context_length", 128),
            ("llama.rope.freq_base", 100),
        ]
        .map(|(key, number)| (key, number as u64));
        let floats = [("llama.attention.layer_norm_rms_epsilon", 1e-5)];
        fixture.model = fixture.folder().join("model.gguf");
        std::fs::write(&fixture.model, gguf_bytes("llama", &numbers, &floats, &tensors)).unwrap();
        fixture
    }

    /// Component `i` of the first half of a head and of the second one after the other.
    fn interleave(&self, tensor: &Tensor) -> Vec<f32> {
        let width = tensor.shape.get(1).copied().unwrap_or(1);
        let half = self.head_dim / 2;
        let mut values = Vec::new();
        for head in tensor.values.chunks_exact(self.head_dim * width) {
            let (first, second) = head.split_at(half * width);
            for (first, second) in first.chunks_exact(width).zip(second.chunks_exact(width)) {
                values.extend_from_slice(first);
                values.extend_from_slice(second);
            }
        }
        values
    }
}

fn gguf_name(name: &str) -> String {
    [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    .into_iter()
    .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}
