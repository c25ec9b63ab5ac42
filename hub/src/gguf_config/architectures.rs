//! Every GGUF architecture that is read, as the `config.json` of its Hugging Face family.

use serde_json::{Map, Value as Json, json};

use super::rope_scaling::rope_scaling;
use super::{MetadataReader, classic, mixtures};
use crate::error::HubError;
use crate::gguf::{GgmlType, Gguf, Value, quote};

/// An architecture of GGUF and the family it is.
struct Architecture {
    /// `general.architecture`.
    name: &'static str,
    /// `model_type` in config.json.
    model_type: &'static str,
    /// Its entry in `architectures`.
    class: &'static str,
    /// Adds what the common keys do not say.
    finish: fn(&mut Builder<'_>) -> Result<(), HubError>,
}

const ARCHITECTURES: &[Architecture] = &[
    Architecture { name: "baichuan", model_type: "llama", class: "LlamaForCausalLM", finish: baichuan },
    Architecture { name: "bloom", model_type: "bloom", class: "BloomForCausalLM", finish: classic::bloom },
    Architecture {
        name: "command-r",
        model_type: "cohere",
        class: "CohereForCausalLM",
        finish: classic::cohere,
    },
    Architecture { name: "dbrx", model_type: "dbrx", class: "DbrxForCausalLM", finish: mixtures::dbrx },
    Architecture {
        name: "deepseek2",
        model_type: "deepseek_v2",
        class: "DeepseekV2ForCausalLM",
        finish: mixtures::deepseek,
    },
    Architecture {
        name: "falcon",
        model_type: "falcon",
        class: "FalconForCausalLM",
        finish: classic::falcon,
    },
    Architecture { name: "gemma", model_type: "gemma", class: "GemmaForCausalLM", finish: gemma },
    Architecture { name: "gemma2", model_type: "gemma2", class: "Gemma2ForCausalLM", finish: gemma2 },
    Architecture { name: "gemma3", model_type: "gemma3_text", class: "Gemma3ForCausalLM", finish: gemma3 },
    Architecture { name: "glm4", model_type: "glm4", class: "Glm4ForCausalLM", finish: glm4 },
    Architecture { name: "gpt2", model_type: "gpt2", class: "GPT2LMHeadModel", finish: classic::gpt2 },
    Architecture {
        name: "gptneox",
        model_type: "gpt_neox",
        class: "GPTNeoXForCausalLM",
        finish: classic::gpt_neox,
    },
    Architecture { name: "granite", model_type: "granite", class: "GraniteForCausalLM", finish: granite },
    Architecture { name: "llama", model_type: "llama", class: "LlamaForCausalLM", finish: llama_or_mixtral },
    Architecture { name: "mpt", model_type: "mpt", class: "MptForCausalLM", finish: classic::mpt },
    Architecture { name: "olmo2", model_type: "olmo2", class: "Olmo2ForCausalLM", finish: olmo2 },
    Architecture { name: "phi2", model_type: "phi", class: "PhiForCausalLM", finish: classic::phi },
    Architecture { name: "phi3", model_type: "phi3", class: "Phi3ForCausalLM", finish: phi3 },
    Architecture { name: "qwen2", model_type: "qwen2", class: "Qwen2ForCausalLM", finish: qwen },
    Architecture {
        name: "qwen2moe",
        model_type: "qwen2_moe",
        class: "Qwen2MoeForCausalLM",
        finish: mixtures::qwen2,
    },
    Architecture { name: "qwen3", model_type: "qwen3", class: "Qwen3ForCausalLM", finish: qwen },
    Architecture {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        class: "Qwen3MoeForCausalLM",
        finish: mixtures::qwen3,
    },
    Architecture { name: "stablelm", model_type: "stablelm", class: "StableLmForCausalLM", finish: stablelm },
    Architecture {
        name: "starcoder2",
        model_type: "starcoder2",
        class: "Starcoder2ForCausalLM",
        finish: classic::starcoder2,
    },
];

/// The configuration of a file of this architecture; `bytes` is the whole file.
pub(super) fn config(
    reader: &MetadataReader<'_>,
    name: &str,
    bytes: &[u8],
) -> Result<Map<String, Json>, HubError> {
    let Some(architecture) = ARCHITECTURES.iter().find(|known| known.name == name) else {
        let names: Vec<_> = ARCHITECTURES.iter().map(|known| known.name).collect();
        let supported = format!("the architectures {}", names.join(", "));
        return Err(reader.unsupported(&format!("architecture {}", quote(name)), &supported));
    };
    let mut builder = Builder { reader, name, bytes, config: Map::new() };
    builder.common(architecture)?;
    (architecture.finish)(&mut builder)?;
    Ok(builder.config)
}

/// A configuration under construction.
pub(super) struct Builder<'a> {
    pub(super) reader: &'a MetadataReader<'a>,
    name: &'a str,
    bytes: &'a [u8],
    pub(super) config: Map<String, Json>,
}

impl<'a> Builder<'a> {
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.name)
    }

    pub(super) fn set(&mut self, key: &str, value: impl Into<Json>) {
        self.config.insert(key.to_owned(), value.into());
    }

    pub(super) fn extend(&mut self, object: Json) {
        if let Json::Object(object) = object {
            self.config.extend(object);
        }
    }

    fn gguf(&self) -> &'a Gguf {
        self.reader.gguf
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, HubError> {
        self.reader.f64(&self.key(name))
    }

    /// Copies a number, where there is one.
    pub(super) fn copy(&mut self, name: &str, to: &str) -> Result<(), HubError> {
        if let Some(value) = self.number(name)? {
            self.set(to, value);
        }
        Ok(())
    }

    pub(super) fn integer(&self, name: &str) -> Result<Option<u64>, HubError> {
        self.reader.u64(&self.key(name))
    }

    pub(super) fn bool(&self, name: &str) -> Result<Option<bool>, HubError> {
        self.reader.bool(&self.key(name))
    }

    /// Of a tensor, outermost dimension first.
    pub(super) fn shape(&self, tensor: &str) -> Option<&'a [usize]> {
        self.gguf().tensor(tensor).map(|tensor| tensor.shape.as_slice())
    }

    pub(super) fn has(&self, tensor: &str) -> bool {
        self.gguf().tensor(tensor).is_some()
    }

    /// An integer that [`Builder::common`] has set.
    pub(super) fn known(&self, key: &str) -> u64 {
        self.config.get(key).and_then(Json::as_u64).unwrap_or(1)
    }

    /// What all architectures say in the same way.
    fn common(&mut self, architecture: &Architecture) -> Result<(), HubError> {
        let reader = self.reader;
        let hidden_size = reader.size(&self.key("embedding_length"))?;
        let num_heads = reader.size(&self.key("attention.head_count"))?;
        let num_kv_heads = reader
            .uniform_size(&self.key("attention.head_count_kv"))?
            .filter(|&n| n > 0)
            .unwrap_or(num_heads);
        if num_heads % num_kv_heads != 0 {
            return Err(reader.wrong(format!(
                "{num_heads} attention heads cannot share {num_kv_heads} key and value heads"
            )));
        }
        let head_dim = match reader.u64(&self.key("attention.key_length"))? {
            Some(head_dim) if head_dim > 0 => head_dim,
            _ if hidden_size % num_heads == 0 => hidden_size / num_heads,
            _ => return Err(reader.wrong(format!("{num_heads} attention heads do not divide {hidden_size}"))),
        };
        let vocab_size = match reader.gguf.tensor("token_embd.weight") {
            Some(tensor) => tensor.shape[0] as u64,
            None => match reader.u64(&self.key("vocab_size"))? {
                Some(vocab_size) => vocab_size,
                None => reader.tokens()?.len() as u64,
            },
        };
        let intermediate_size = reader
            .uniform_size(&self.key("feed_forward_length"))?
            .ok_or_else(|| reader.lacks(&self.key("feed_forward_length")))?;
        self.extend(json!({
            "architectures": [architecture.class],
            "model_type": architecture.model_type,
            "bos_token_id": reader.token_id("bos")?,
            "eos_token_id": reader.token_id("eos")?,
            "head_dim": head_dim,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": reader.size(&self.key("context_length"))?,
            "num_attention_heads": num_heads,
            "num_hidden_layers": reader.size(&self.key("block_count"))?,
            "num_key_value_heads": num_kv_heads,
            "pad_token_id": reader.token_id("padding")?,
            "tie_word_embeddings": !self.has("output.weight"),
            "torch_dtype": activation_dtype(reader.gguf),
            "use_cache": true,
            "vocab_size": vocab_size,
        }));
        Ok(())
    }

    /// The norms' epsilon, which must be there.
    pub(super) fn eps(&mut self, gguf: &str, key: &str) -> Result<(), HubError> {
        let gguf = self.key(gguf);
        let eps = self.reader.f64(&gguf)?.ok_or_else(|| self.reader.lacks(&gguf))?;
        self.set(key, eps);
        Ok(())
    }

    pub(super) fn rms_eps(&mut self) -> Result<(), HubError> {
        self.eps("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    }

    /// A rotation of whole heads.
    pub(super) fn rope(&mut self) -> Result<(), HubError> {
        let head_dim = self.known("head_dim");
        let rotary_dim = self.rotary_dim()?;
        if rotary_dim != head_dim {
            let found = format!("a rotation of {rotary_dim} of a head's {head_dim} numbers");
            return Err(self.reader.unsupported(&found, "a rotation of all"));
        }
        self.scaled_rope(rotary_dim)
    }

    /// A rotation of the first elements of a head.
    pub(super) fn partial_rope(&mut self) -> Result<(), HubError> {
        let (head_dim, rotary_dim) = (self.known("head_dim"), self.rotary_dim()?);
        if rotary_dim == 0 || rotary_dim > head_dim {
            let problem =
                format!("{} is {rotary_dim}, expected 1 to {head_dim}", self.key("rope.dimension_count"));
            return Err(self.reader.wrong(problem));
        }
        self.set("partial_rotary_factor", rotary_dim as f64 / head_dim as f64);
        self.scaled_rope(rotary_dim)
    }

    pub(super) fn rotary_dim(&self) -> Result<u64, HubError> {
        Ok(self.reader.u64(&self.key("rope.dimension_count"))?.unwrap_or_else(|| self.known("head_dim")))
    }

    pub(super) fn scaled_rope(&mut self, rotary_dim: u64) -> Result<(), HubError> {
        let rope_theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        self.set("rope_theta", rope_theta);
        let scaling = rope_scaling(self.reader, self.name, self.bytes, (rotary_dim, rope_theta))?;
        self.set("rope_scaling", scaling);
        Ok(())
    }

    pub(super) fn window(&mut self) -> Result<(), HubError> {
        if let Some(window) = self.reader.u64(&self.key("attention.sliding_window"))?.filter(|&n| n > 0) {
            self.set("sliding_window", window);
        }
        Ok(())
    }
}

/// The dtype to compute in: that of plain weights, and bfloat16 for quantized ones, as their originals had.
fn activation_dtype(gguf: &Gguf) -> &'static str {
    let tensor = gguf.tensor("blk.0.attn_q.weight").or_else(|| gguf.tensor("blk.0.attn_qkv.weight"));
    match tensor.map(|tensor| tensor.ggml_type) {
        Some(GgmlType::F32) => "float32",
        Some(GgmlType::F16) => "float16",
        _ => "bfloat16",
    }
}

/// Llama and Mistral, and Mixtral where there are experts.
fn llama_or_mixtral(builder: &mut Builder<'_>) -> Result<(), HubError> {
    let has_experts = builder.integer("expert_count")?.is_some_and(|count| count > 0);
    if has_experts { mixtures::mixtral(builder) } else { llama(builder) }
}

pub(super) fn llama(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.rms_eps()?;
    builder.rope()?;
    builder.extend(json!({
        "attention_bias": builder.has("blk.0.attn_q.bias"),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": builder.has("blk.0.ffn_gate.bias"),
        "pretraining_tp": 1,
    }));
    Ok(())
}

fn granite(builder: &mut Builder<'_>) -> Result<(), HubError> {
    llama(builder)?;
    builder.copy("embedding_scale", "embedding_multiplier")?;
    builder.copy("residual_scale", "residual_multiplier")?;
    builder.copy("logit_scale", "logits_scaling")?;
    match builder.number("attention.scale")? {
        Some(scale) => builder.set("attention_multiplier", scale),
        None => builder.set("attention_multiplier", (builder.known("head_dim") as f64).sqrt().recip()),
    }
    Ok(())
}

/// Baichuan of 7B parameters is Llama once its projections are apart. The larger ones have linear biases instead of a rotation,
/// which no key says, and the second generation normalises the rows of its logits' matrix.
fn baichuan(builder: &mut Builder<'_>) -> Result<(), HubError> {
    let (layers, vocabulary) = (builder.known("num_hidden_layers"), builder.known("vocab_size"));
    if layers >= 40 || vocabulary == 125_696 {
        let found = format!("baichuan with {layers} layers and {vocabulary} tokens");
        return Err(builder.reader.unsupported(&found, "the first generation's 7B models"));
    }
    llama(builder)
}

/// OLMo 2; the third generation goes by the same name and has windows.
fn olmo2(builder: &mut Builder<'_>) -> Result<(), HubError> {
    if builder.integer("attention.sliding_window")?.is_some_and(|window| window > 0) {
        return Err(builder.reader.unsupported("olmo2 with a sliding window", "olmo2 without"));
    }
    builder.rms_eps()?;
    builder.rope()?;
    builder.extend(json!({"attention_bias": false, "hidden_act": "silu"}));
    Ok(())
}

/// Qwen 2 and 3: windows are not kept in GGUF, and the released models do not use theirs.
pub(super) fn qwen(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.rms_eps()?;
    builder.rope()?;
    builder.extend(json!({"attention_bias": false, "hidden_act": "silu", "use_sliding_window": false}));
    Ok(())
}

fn phi3(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.rms_eps()?;
    builder.partial_rope()?;
    builder.window()?;
    builder.set("hidden_act", "silu");
    let key = builder.key("rope.scaling.original_context_length");
    if let Some(original) = builder.reader.u64(&key)? {
        builder.set("original_max_position_embeddings", original);
    }
    Ok(())
}

/// GLM-4 0414, whose rotation already pairs neighbours.
fn glm4(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.rms_eps()?;
    builder.partial_rope()?;
    builder.set("attention_bias", builder.has("blk.0.attn_q.bias"));
    builder.set("hidden_act", "silu");
    Ok(())
}

fn stablelm(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.eps("attention.layer_norm_epsilon", "layer_norm_eps")?;
    builder.partial_rope()?;
    let is_parallel = builder.bool("use_parallel_residual")?;
    builder.extend(json!({
        "hidden_act": "silu",
        "qk_layernorm": builder.has("blk.0.attn_q_norm.weight"),
        "use_parallel_residual": is_parallel.unwrap_or(false),
        "use_qkv_bias": builder.has("blk.0.attn_q.bias"),
    }));
    Ok(())
}

fn gemma(builder: &mut Builder<'_>) -> Result<(), HubError> {
    builder.rms_eps()?;
    builder.rope()?;
    builder.extend(json!({"attention_bias": false, "hidden_activation": "gelu_pytorch_tanh"}));
    Ok(())
}

/// Gemma 2 keeps the scores' factor nowhere: it is that of the head's size but for the largest model, of 46 layers.
fn gemma2(builder: &mut Builder<'_>) -> Result<(), HubError> {
    gemma(builder)?;
    builder.window()?;
    builder.copy("attn_logit_softcapping", "attn_logit_softcapping")?;
    builder.copy("final_logit_softcapping", "final_logit_softcapping")?;
    query_scalar(builder, 46);
    Ok(())
}

/// Gemma 3: as Gemma 2, with 62 layers.
fn gemma3(builder: &mut Builder<'_>) -> Result<(), HubError> {
    gemma(builder)?;
    builder.window()?;
    query_scalar(builder, 62);
    builder.set("rope_local_base_freq", builder.number("rope.freq_base_swa")?.unwrap_or(10_000.0));
    builder.copy("final_logit_softcapping", "final_logit_softcapping")?;
    match builder.gguf().metadata.get(&builder.key("attention.sliding_window_pattern")) {
        Some(Value::Array(crate::gguf::Array::Bools(slides))) => {
            let kind = |&slides: &bool| if slides { "sliding_attention" } else { "full_attention" };
            builder.set("layer_types", slides.iter().map(kind).collect::<Vec<_>>());
        }
        Some(value) if value.as_u64().is_some() => builder.set("sliding_window_pattern", value.as_u64()),
        _ => builder.set("sliding_window_pattern", 6),
    }
    Ok(())
}

fn query_scalar(builder: &mut Builder<'_>, layers_of_largest: u64) {
    let scalar = if builder.known("num_hidden_layers") == layers_of_largest {
        builder.known("hidden_size") / builder.known("num_attention_heads")
    } else {
        builder.known("head_dim")
    };
    builder.set("query_pre_attn_scalar", scalar);
}
