//! Scalings that options ask for in place of the configuration's.

use hub::{ModelConfig, RopeKind, RopeOverride};

use super::decoder_spec;
use crate::ModelError;
use crate::spec::DecoderSpec;

/// The architecture that `config` describes, with `rope` in place of its own scaling.
///
/// # Errors
/// As [`decoder_spec`], and where the model has nothing that could be scaled.
pub(crate) fn spec_with(
    config: &ModelConfig,
    rope: Option<&RopeOverride>,
) -> Result<DecoderSpec, ModelError> {
    let Some(rope) = rope else { return decoder_spec(config) };
    let spec = decoder_spec(&config.with_rope_scaling(rope))?;
    if !takes_scaling(decoder_spec, config) {
        return Err(ModelError::Unusable(vec![format!(
            "--rope-scaling (ROPE_SCALING) {} and --rope-factor (ROPE_FACTOR) {}: this model's positions are not of a kind \
             that can be scaled; leave both out",
            rope.kind.name(),
            rope.factor
        )]));
    }
    Ok(spec)
}

/// Whether a scaling changes anything in what `build` makes of `config`: two that differ must give different layers. So no
/// list of architectures has to be kept.
pub(super) fn takes_scaling(
    build: fn(&ModelConfig) -> Result<DecoderSpec, ModelError>,
    config: &ModelConfig,
) -> bool {
    let layers = |factor| {
        let rope = RopeOverride { kind: RopeKind::Linear, factor };
        build(&config.with_rope_scaling(&rope)).ok().map(|spec| spec.layers)
    };
    match (layers(2.0), layers(3.0)) {
        (Some(two), Some(three)) => two != three,
        _ => false,
    }
}
