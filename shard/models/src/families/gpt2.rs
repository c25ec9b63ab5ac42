//! GPT-2 (Radford et al. 2019) and GPT-BigCode (SantaCoder and StarCoder, arXiv:2305.06161): learned positions, LayerNorm before
//! each part, logits from the embedding. GPT-2 stores its matrices the other way round; GPT-BigCode's query heads share one
//! KV head.

use backend::Activation;
use hub::ModelConfig;

use super::classic::{GPT2_KEYS, Sizes, expect_flag, lm_head};
use super::config_reader::ConfigReader;
use super::dense::activation;
use super::respelled::respelled;
use crate::ModelError;
use crate::spec::{
    DecoderSpec, EmbeddingSpec, LayerSpec, LinearSpec, MixerSpec, NormSpec, PositionTableSpec, ResidualSpec,
};

/// GPT-2.
pub(super) fn gpt2(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    build(config, Activation::GeluTanh, |sizes, prefix, _| {
        let qkv = LinearSpec::fused(&format!("{prefix}.attn.c_attn"), true, [sizes.hidden_size; 3]);
        qkv.map(LinearSpec::transposed)
    })
}

/// GPT-BigCode.
pub(super) fn gpt_bigcode(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    build(config, Activation::GeluTanh, |sizes, prefix, reader| {
        let prefix = format!("{prefix}.attn.c_attn");
        if reader.flag_or("multi_query", true) {
            sizes.num_kv_heads = 1;
            LinearSpec::fused(&prefix, true, [sizes.hidden_size, sizes.head_dim, sizes.head_dim])
        } else {
            sizes.qkv_by_head(&prefix, true)
        }
    })
}

fn build(
    config: &ModelConfig,
    default_activation: Activation,
    qkv: impl Fn(&mut Sizes, &str, &mut ConfigReader<'_>) -> [LinearSpec; 3],
) -> Result<DecoderSpec, ModelError> {
    let config = respelled(
        config,
        &[("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")],
    );
    let mut reader = ConfigReader::new(&config);
    expect_flag(&mut reader, "add_cross_attention", false);
    let mut sizes = Sizes::read(&mut reader, &GPT2_KEYS);
    let activation = activation(&mut reader, "activation_function", default_activation);
    let positions = reader.size_or("n_positions", 1024);
    let is_scaled = reader.flag_or("scale_attn_weights", true);
    let is_scaled_by_layer = reader.flag_or("scale_attn_by_inverse_layer_idx", false);
    let mut layers = Vec::new();
    for index in 0..sizes.num_layers {
        let prefix = format!("transformer.h.{index}");
        let qkv = qkv(&mut sizes, &prefix, &mut reader);
        // What stores queries the other way round stores everything so.
        let is_transposed = qkv[0].is_transposed;
        let linear = |name: &str| {
            let linear = LinearSpec::new(&format!("{prefix}.{name}"), true);
            if is_transposed { linear.transposed() } else { linear }
        };
        let norm = |name: &str| NormSpec::layer(&format!("{prefix}.{name}"), true, sizes.eps);
        let mut attention = sizes.attention(qkv, linear("attn.c_proj"));
        if !is_scaled {
            attention.scale = 1.0;
        }
        if is_scaled_by_layer {
            attention.scale /= (index + 1) as f32;
        }
        layers.push(LayerSpec {
            residual: ResidualSpec::pre_norm(norm("ln_1"), norm("ln_2")),
            mixer: MixerSpec::Attention(attention),
            mlp: sizes.mlp(activation, linear("mlp.c_fc"), linear("mlp.c_proj")),
        });
    }
    let embedding = EmbeddingSpec {
        positions: Some(PositionTableSpec {
            weight: "transformer.wpe.weight".to_owned(),
            rows: positions,
            offset: 0,
        }),
        ..EmbeddingSpec::tokens("transformer.wte.weight")
    };
    let norm = NormSpec::layer("transformer.ln_f", true, sizes.eps);
    let mut spec = sizes.decoder(embedding, layers, norm, positions);
    spec.lm_head = lm_head(&mut reader, "lm_head", true);
    reader.finish(spec)
}
