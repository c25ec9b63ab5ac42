//! What families with mixtures of experts share.

use backend::{Activation, RouterScores, Routing, WeightNormalization};
use serde_json::Value;

use super::config_reader::ConfigReader;
use crate::spec::{DecoderSpec, ExpertsSpec, GatedSpec, LinearSpec, MlpSpec};

/// The most experts a layer may have; the largest in use have some 400.
const MAX_EXPERTS: usize = 1 << 14;
/// The most experts of all layers together, each of which takes a kilobyte before any file is opened; the largest models
/// have 24 thousand.
const MAX_EXPERTS_IN_ALL: usize = 1 << 17;
/// Names of the projections of Mixtral's experts.
const MIXTRAL_NAMES: [&str; 3] = ["w1", "w3", "w2"];
/// Names of the projections of most others' experts.
pub(super) const NAMES: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// A number of experts.
pub(super) fn count(reader: &mut ConfigReader<'_>, key: &str, default: Option<usize>) -> usize {
    let count = match default {
        Some(default) => reader.size_or(key, default),
        None => reader.size(key),
    };
    if count > MAX_EXPERTS {
        reader.wrong(format!("{key}: found {count}, expected at most {MAX_EXPERTS}"));
        return 1;
    }
    // An impossible number of layers is reported where it is read.
    let layers = ["num_hidden_layers", "n_layers"].map(|key| reader.config().usize(key).ok().flatten());
    let layers = layers.into_iter().flatten().next().unwrap_or(1);
    if count.saturating_mul(layers) > MAX_EXPERTS_IN_ALL {
        reader.wrong(format!(
            "{key}: found {count} in each of {layers} layers, expected at most {MAX_EXPERTS_IN_ALL} in all"
        ));
        return 1;
    }
    count
}

/// Softmax over all experts, of which `num_chosen` are taken.
pub(super) fn softmax(num_chosen: usize, is_normalized: bool) -> Routing {
    Routing {
        num_chosen,
        scores: RouterScores::Softmax,
        groups: None,
        normalization: if is_normalized { WeightNormalization::Sum } else { WeightNormalization::None },
        scale: 1.0,
    }
}

/// Refuses a rule that cannot choose among `num_experts`.
pub(super) fn check(reader: &mut ConfigReader<'_>, routing: &Routing, num_experts: usize) {
    // What follows from a mistake is no second one.
    if let Some(problem) = routing.problem(num_experts).filter(|_| !reader.has_mistakes()) {
        reader.wrong(format!("the choice of experts: {problem}"));
    }
}

/// The experts `PREFIX.0` and so on.
pub(super) fn numbered(prefix: &str, num_experts: usize, names: [&str; 3]) -> Vec<GatedSpec> {
    (0..num_experts).map(|index| GatedSpec::new(&format!("{prefix}.{index}"), names)).collect()
}

/// Gives every layer `num_experts` experts with Mixtral's tensor names.
pub(super) fn set_mixtral(spec: &mut DecoderSpec, num_experts: usize, shared: &ExpertsOfAllLayers) {
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        let prefix = format!("model.layers.{index}.block_sparse_moe");
        layer.mlp = MlpSpec::Experts(Box::new(ExpertsSpec {
            intermediate_size: shared.intermediate_size,
            activation: shared.activation,
            routing: shared.routing,
            router: LinearSpec::new(&format!("{prefix}.gate"), false),
            correction: None,
            experts: numbered(&format!("{prefix}.experts"), num_experts, MIXTRAL_NAMES),
            shared: None,
        }));
    }
}

/// What the experts of all layers have in common.
pub(super) struct ExpertsOfAllLayers {
    /// Width between an expert's projections.
    pub(super) intermediate_size: usize,
    /// On the gate.
    pub(super) activation: Activation,
    /// How a token's experts are chosen.
    pub(super) routing: Routing,
}

/// Which layers have experts after Qwen's rule: every `decoder_sparse_step`-th that `mlp_only_layers` does not name.
pub(super) fn qwen_layers(reader: &mut ConfigReader<'_>, num_layers: usize) -> Vec<bool> {
    let step = reader.size_or("decoder_sparse_step", 1);
    let mut layers: Vec<bool> = (1..=num_layers).map(|number| number.is_multiple_of(step)).collect();
    match reader.config().raw.get("mlp_only_layers") {
        None | Some(Value::Null) => {}
        Some(Value::Array(dense)) if dense.iter().all(Value::is_u64) => {
            for index in dense.iter().filter_map(Value::as_u64) {
                if let Some(layer) = layers.get_mut(index as usize) {
                    *layer = false;
                }
            }
        }
        Some(other) => reader.wrong(format!("mlp_only_layers: found {other}, expected a list of layers")),
    }
    layers
}

/// Qwen's experts of a layer, by the layer's prefix: `num_experts` of `moe_intermediate_size`, `num_experts_per_tok` for a token.
pub(super) fn qwen(
    reader: &mut ConfigReader<'_>,
    activation: Activation,
    num_chosen: usize,
) -> impl Fn(&str) -> ExpertsSpec + use<> {
    let num_experts = count(reader, "num_experts", None);
    let intermediate_size = reader.size("moe_intermediate_size");
    let num_chosen = reader.size_or("num_experts_per_tok", num_chosen);
    let routing = softmax(num_chosen, reader.flag_or("norm_topk_prob", false));
    check(reader, &routing, num_experts);
    move |prefix| ExpertsSpec {
        intermediate_size,
        activation,
        routing,
        router: LinearSpec::new(&format!("{prefix}.mlp.gate"), false),
        correction: None,
        experts: numbered(&format!("{prefix}.mlp.experts"), num_experts, NAMES),
        shared: None,
    }
}
