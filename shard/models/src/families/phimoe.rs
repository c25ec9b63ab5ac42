//! Phi-3.5-MoE (arXiv:2404.14219): Llama with LayerNorms, biases, and experts chosen by SparseMixer.

use backend::{RouterScores, Routing};
use hub::ModelConfig;

use super::config_reader::ConfigReader;
use super::dense::{Dense, attentions, norms};
use super::experts::ExpertsOfAllLayers;
use super::{experts, rope, window};
use crate::ModelError;
use crate::spec::{DecoderSpec, LinearSpec, LmHeadSpec, NormKind};

/// Llama whose norms subtract the mean; two experts for a token.
pub(super) fn spec(config: &ModelConfig) -> Result<DecoderSpec, ModelError> {
    let mut reader = ConfigReader::new(config);
    let dense = Dense {
        mlp_bias: false,
        eps: ("rms_norm_eps", 1e-5),
        rope: |reader, head_dim| rope::frequencies_or(reader, head_dim, 1e6),
        max_position_embeddings: 131_072,
        ..Dense::llama(&mut reader)
    };
    let mut spec = dense.spec(&mut reader);
    let window = window::size(&mut reader, None);
    attentions(&mut spec).for_each(|attention| attention.window = window);
    for norm in norms(&mut spec) {
        norm.kind = NormKind::Layer;
        norm.bias = Some(norm.weight.replace(".weight", ".bias"));
    }
    if let LmHeadSpec::Own(lm_head) = &mut spec.lm_head {
        *lm_head = LinearSpec::new("lm_head", reader.flag_or("lm_head_bias", false));
    }
    let num_experts = experts::count(&mut reader, "num_local_experts", Some(16));
    let num_chosen = reader.size_or("num_experts_per_tok", 2);
    if num_chosen != 2 {
        reader.wrong(format!(
            "num_experts_per_tok: found {num_chosen}, expected 2, which SparseMixer is made for"
        ));
    }
    // Zero is allowed: only equal logits are near then.
    let jitter = reader.read(config.f64("router_jitter_noise")).unwrap_or(0.01);
    if !(0.0..=1.0).contains(&jitter) {
        reader.wrong(format!("router_jitter_noise: found {jitter}, expected 0 to 1"));
    }
    let scores = RouterScores::SparseMixer { jitter: jitter as f32 };
    let routing = Routing { scores, ..experts::softmax(num_chosen, false) };
    experts::check(&mut reader, &routing, num_experts);
    let intermediate_size = reader.size("intermediate_size");
    let shared = ExpertsOfAllLayers { intermediate_size, activation: dense.activation, routing };
    experts::set_mixtral(&mut spec, num_experts, &shared);
    reader.finish(spec)
}
