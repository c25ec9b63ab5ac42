//! OPT (arXiv:2205.01068): learned positions whose table begins with two unused rows, LayerNorm before each part, ReLU.

use backend::Activation;
use hub::ModelConfig;

use super::classic::{SizeKeys, Sizes, expect_flag, lm_head};
use super::config_reader::ConfigReader;
use super::dense::activation;
use crate::ModelError;
use crate::spec::{
    DecoderSpec, EmbeddingProjectionSpec, EmbeddingSpec, LayerSpec, LinearSpec, MixerSpec, NormSpec,
    PositionTableSpec, ResidualSpec,
};

const KEYS: SizeKeys = SizeKeys {
    hidden_size: "hidden_size",
    num_heads: "num_attention_heads",
    num_layers: "num_hidden_layers",
    intermediate_size: "ffn_dim",
    // Not a key of the family, so always 1e-5.
    eps: "layer_norm_eps",
};

/// Rows of the position table before that of the first position.
const POSITION_OFFSET: usize = 2;

/// The classic decoder; the 350M model alone normalises after the parts, and has a narrower embedding.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    expect_flag(&mut reader, "layer_norm_elementwise_affine", true);
    expect_flag(&mut reader, "_remove_final_layer_norm", false);
    let norms_before = reader.flag_or("do_layer_norm_before", true);
    let sizes = Sizes::read(&mut reader, &KEYS);
    let width = reader.size_or("word_embed_proj_dim", sizes.hidden_size);
    let projection = (width != sizes.hidden_size).then(|| EmbeddingProjectionSpec {
        width,
        proj_in: LinearSpec::new("model.decoder.project_in", false),
        proj_out: LinearSpec::new("model.decoder.project_out", false),
    });
    let activation = activation(&mut reader, "activation_function", Activation::Relu);
    let has_bias = reader.flag_or("enable_bias", true);
    let norm = |prefix: &str| NormSpec::layer(prefix, true, sizes.eps);
    let layers = (0..sizes.num_layers).map(|index| {
        let prefix = format!("model.decoder.layers.{index}");
        let linear = |name: &str| LinearSpec::new(&format!("{prefix}.{name}"), has_bias);
        let qkv = ["q_proj", "k_proj", "v_proj"].map(|name| linear(&format!("self_attn.{name}")));
        LayerSpec {
            residual: {
                let mixer = norm(&format!("{prefix}.self_attn_layer_norm"));
                let mlp = norm(&format!("{prefix}.final_layer_norm"));
                let is_last = index + 1 == sizes.num_layers;
                if norms_before {
                    ResidualSpec::pre_norm(mixer, mlp)
                } else {
                    ResidualSpec::PostNorm { mixer, mlp: (!is_last).then_some(mlp) }
                }
            },
            mixer: MixerSpec::Attention(sizes.attention(qkv, linear("self_attn.out_proj"))),
            mlp: sizes.mlp(activation, linear("fc1"), linear("fc2")),
        }
    });
    let layers = layers.collect();
    let last = if norms_before {
        "model.decoder.final_layer_norm".to_owned()
    } else {
        format!("model.decoder.layers.{}.final_layer_norm", sizes.num_layers - 1)
    };
    let longest = reader.size_or("max_position_embeddings", 2048);
    let embedding = EmbeddingSpec {
        positions: Some(PositionTableSpec {
            weight: "model.decoder.embed_positions.weight".to_owned(),
            rows: longest + POSITION_OFFSET,
            offset: POSITION_OFFSET,
        }),
        projection,
        ..EmbeddingSpec::tokens("model.decoder.embed_tokens.weight")
    };
    let mut spec = sizes.decoder(embedding, layers, norm(&last), longest);
    spec.lm_head = lm_head(&mut reader, "lm_head", true);
    reader.finish(spec)
}
