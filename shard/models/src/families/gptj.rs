//! GPT-J (Wang and Komatsuzaki 2021) and CodeGen (arXiv:2203.13474): attention and feed-forward side by side after one LayerNorm,
//! neighbours of the first part of a head turned together, logits with a bias.

use backend::{Activation, RopeStyle};
use hub::ModelConfig;

use super::classic::{GPT2_KEYS, Sizes};
use super::config_reader::ConfigReader;
use super::dense::activation;
use super::rope;
use crate::ModelError;
use crate::spec::{
    DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, LmHeadSpec, MixerSpec, NormSpec, ResidualSpec,
};

/// CodeGen's tensor was laid out for so many devices: each one's share of the queries, of the values, of the keys.
const CODEGEN_GROUPS: usize = 4;
/// The embedding.
const TABLE: &str = "transformer.wte.weight";

/// GPT-J.
pub(super) fn gptj(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    build(config, |_, _, prefix| {
        ["q_proj", "k_proj", "v_proj"].map(|name| LinearSpec::new(&format!("{prefix}.attn.{name}"), false))
    })
}

/// CodeGen.
pub(super) fn codegen(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    build(config, |reader, sizes, prefix| {
        if !sizes.num_heads.is_multiple_of(CODEGEN_GROUPS) && !reader.has_mistakes() {
            reader.wrong(format!(
                "n_head: found {}, expected a multiple of {CODEGEN_GROUPS}, after which the tensors are laid out",
                sizes.num_heads
            ));
        }
        let share = (sizes.hidden_size / CODEGEN_GROUPS).max(1);
        let prefix = format!("{prefix}.attn.qkv_proj");
        let [q_proj, v_proj, k_proj] = LinearSpec::interleaved(&prefix, false, [share; 3], CODEGEN_GROUPS);
        [q_proj, k_proj, v_proj]
    })
}

fn build(
    config: &ModelConfig,
    qkv: impl Fn(&mut ConfigReader<'_>, &Sizes, &str) -> [LinearSpec; 3],
) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let sizes = Sizes::read(&mut reader, &GPT2_KEYS);
    let activation = activation(&mut reader, "activation_function", Activation::GeluTanh);
    if config.raw.get("rotary_dim").is_some_and(serde_json::Value::is_null) {
        reader.wrong("rotary_dim: found null, expected an even number of a head's elements");
    }
    let rotary_dim = reader.size_or("rotary_dim", 64);
    if (rotary_dim > sizes.head_dim || rotary_dim % 2 == 1) && !reader.has_mistakes() {
        reader.wrong(format!(
            "rotary_dim: found {rotary_dim}, expected an even number of a head's {} elements",
            sizes.head_dim
        ));
    }
    let mut rope = rope::unscaled(10_000.0, rotary_dim.min(sizes.head_dim));
    rope.style = RopeStyle::Interleaved;
    let mut layers = Vec::new();
    for index in 0..sizes.num_layers {
        let prefix = format!("transformer.h.{index}");
        let linear = |name: &str, has_bias| LinearSpec::new(&format!("{prefix}.{name}"), has_bias);
        let mut attention =
            sizes.attention(qkv(&mut reader, &sizes, &prefix), linear("attn.out_proj", false));
        attention.rope = Some(rope.clone());
        layers.push(LayerSpec {
            residual: ResidualSpec::Parallel {
                norm: NormSpec::layer(&format!("{prefix}.ln_1"), true, sizes.eps),
                mlp_norm: None,
            },
            mixer: MixerSpec::Attention(attention),
            mlp: sizes.mlp(activation, linear("mlp.fc_in", true), linear("mlp.fc_out", true)),
        });
    }
    let embedding = EmbeddingSpec::tokens(TABLE);
    let norm = NormSpec::layer("transformer.ln_f", true, sizes.eps);
    let longest = reader.size_or("n_positions", 2048);
    let mut spec = sizes.decoder(embedding, layers, norm, longest);
    let mut lm_head = LinearSpec::new("lm_head", true);
    if reader.flag_or("tie_word_embeddings", false) {
        // The bias stays the logits' own.
        lm_head.weight = TABLE.to_owned();
    }
    spec.lm_head = LmHeadSpec::Own(lm_head);
    reader.finish(spec)
}
