//! From a `config.json` to a [`DecoderSpec`]: one file per family, and the table that finds it.

mod baichuan;
mod bloom;
mod classic;
mod cohere;
mod config_reader;
mod dbrx;
mod deepseek;
mod dense;
mod experts;
mod falcon;
mod gemma;
mod gpt2;
mod gpt_neox;
mod gptj;
mod granite;
mod llama;
mod mistral;
mod mixtral;
mod mpt;
mod olmo2;
mod opt;
mod phi;
mod phi3;
mod phimoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod respelled;
mod rope;
mod rope_override;
mod rope_scaling;
mod stablelm;
mod starcoder2;
mod unsupported;
mod window;

use hub::{ModelConfig, stretched};

pub(crate) use rope_override::spec_with;

use crate::ModelError;
use crate::quantization::stored_as;
use crate::spec::DecoderSpec;

/// A family of models that share tensor names and arithmetic.
struct Family {
    /// `model_type` in config.json.
    model_type: &'static str,
    /// Its entry in `architectures`.
    architecture: &'static str,
    /// Builds the spec, or lists every mistake in the configuration.
    build: fn(&ModelConfig) -> Result<DecoderSpec, ModelError>,
}

/// Every family there is. A relative that would run but compute something else is not an alias: it has its own line or none.
const FAMILIES: &[Family] = &[
    Family { model_type: "baichuan", architecture: "BaiChuanForCausalLM", build: baichuan::spec },
    Family { model_type: "baichuan", architecture: "BaichuanForCausalLM", build: baichuan::spec },
    Family { model_type: "bloom", architecture: "BloomForCausalLM", build: bloom::spec },
    Family { model_type: "codegen", architecture: "CodeGenForCausalLM", build: gptj::codegen },
    Family { model_type: "cohere", architecture: "CohereForCausalLM", build: cohere::spec },
    Family { model_type: "dbrx", architecture: "DbrxForCausalLM", build: dbrx::spec },
    Family { model_type: "deepseek_v2", architecture: "DeepseekV2ForCausalLM", build: deepseek::v2 },
    Family { model_type: "deepseek_v3", architecture: "DeepseekV3ForCausalLM", build: deepseek::v3 },
    Family { model_type: "falcon", architecture: "FalconForCausalLM", build: falcon::falcon },
    Family { model_type: "falcon", architecture: "RWForCausalLM", build: falcon::falcon },
    Family { model_type: "gemma", architecture: "GemmaForCausalLM", build: gemma::gemma },
    Family { model_type: "gemma2", architecture: "Gemma2ForCausalLM", build: gemma::gemma2 },
    Family { model_type: "gemma3_text", architecture: "Gemma3ForCausalLM", build: gemma::gemma3_text },
    Family { model_type: "gpt2", architecture: "GPT2LMHeadModel", build: gpt2::gpt2 },
    Family { model_type: "gpt_bigcode", architecture: "GPTBigCodeForCausalLM", build: gpt2::gpt_bigcode },
    Family { model_type: "gpt_neox", architecture: "GPTNeoXForCausalLM", build: gpt_neox::spec },
    Family { model_type: "gptj", architecture: "GPTJForCausalLM", build: gptj::gptj },
    Family { model_type: "granite", architecture: "GraniteForCausalLM", build: granite::spec },
    Family { model_type: "llama", architecture: "LlamaForCausalLM", build: llama::spec },
    Family { model_type: "mistral", architecture: "MistralForCausalLM", build: mistral::spec },
    Family { model_type: "mixtral", architecture: "MixtralForCausalLM", build: mixtral::spec },
    Family { model_type: "mpt", architecture: "MPTForCausalLM", build: mpt::spec },
    Family { model_type: "mpt", architecture: "MptForCausalLM", build: mpt::spec },
    Family { model_type: "olmo2", architecture: "Olmo2ForCausalLM", build: olmo2::spec },
    Family { model_type: "opt", architecture: "OPTForCausalLM", build: opt::spec },
    Family { model_type: "phi", architecture: "PhiForCausalLM", build: phi::spec },
    Family { model_type: "phi3", architecture: "Phi3ForCausalLM", build: phi3::spec },
    Family { model_type: "phimoe", architecture: "PhimoeForCausalLM", build: phimoe::spec },
    Family { model_type: "phimoe", architecture: "PhiMoEForCausalLM", build: phimoe::spec },
    Family { model_type: "qwen2", architecture: "Qwen2ForCausalLM", build: qwen2::spec },
    Family { model_type: "qwen2_moe", architecture: "Qwen2MoeForCausalLM", build: qwen2_moe::spec },
    Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", build: qwen3::spec },
    Family { model_type: "qwen3_moe", architecture: "Qwen3MoeForCausalLM", build: qwen3_moe::spec },
    Family { model_type: "RefinedWeb", architecture: "RWForCausalLM", build: falcon::refined_web },
    Family { model_type: "RefinedWebModel", architecture: "RWForCausalLM", build: falcon::refined_web_model },
    Family { model_type: "stablelm", architecture: "StableLmForCausalLM", build: stablelm::spec },
    Family { model_type: "starcoder2", architecture: "Starcoder2ForCausalLM", build: starcoder2::spec },
];

/// The architecture that `config` describes.
///
/// # Errors
/// The architecture or its quantization is not supported, or values are missing or impossible: one line each.
pub fn decoder_spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let family = find(config)?;
    stored_as(config, None)?;
    let mut spec = (family.build)(config)?;
    let stretch = config.context_stretch();
    // Positions that are looked up in a table end with it, whatever the configuration says of scaling.
    if stretch > 1.0 && rope_override::takes_scaling(family.build, config) {
        spec.max_position_embeddings = stretched(spec.max_position_embeddings, stretch);
    }
    Ok(spec)
}

fn find(config: &ModelConfig) -> Result<&'static Family, ModelError> {
    let architectures = config.architectures();
    let fits = |family: &&Family| {
        config.model_type().is_none_or(|model_type| model_type == family.model_type)
            && (architectures.is_empty() || architectures.contains(&family.architecture))
            && !(architectures.is_empty() && config.model_type().is_none())
    };
    FAMILIES.iter().find(fits).ok_or_else(|| unsupported::refusal(config))
}

#[cfg(test)]
mod experts_tests;
#[cfg(test)]
mod gpt_tests;
#[cfg(test)]
mod relatives_tests;
#[cfg(test)]
mod rope_tests;
#[cfg(test)]
mod tests;
