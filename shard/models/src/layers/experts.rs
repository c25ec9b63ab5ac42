//! Mixtures of experts: every rank has all of them, cut by tiles of their inner width as other feed-forwards are.

use backend::{Activation, Backend, RouterScores, Routing, WeightNormalization};

use super::linear::{ColumnPart, Linear};
use super::mlp::Mlp;
use super::{Loader, Output, Role, Scratch};
use crate::ModelError;
use crate::spec::{ExpertsSpec, GatedSpec, LinearSpec, MlpSpec, SharedExpertSpec};
use crate::tensor_parallel::split_tiles;

/// How one expert is weighed by the logistic function of its router's logit.
const WEIGHED: Routing = Routing {
    num_chosen: 1,
    scores: RouterScores::Sigmoid,
    groups: None,
    normalization: WeightNormalization::None,
    scale: 1.0,
};

/// This rank's part of the experts of one layer.
pub(crate) struct Experts<B: Backend> {
    routed: Routed<B>,
    shared: Option<Shared<B>>,
}

/// Experts and the router that chooses among them.
struct Routed<B: Backend> {
    router: Linear<B>,
    correction: Option<B::Vector>,
    routing: Routing,
    experts: B::Experts,
    /// Scratch buffer.
    router_logits: usize,
}

/// The expert of all tokens.
struct Shared<B: Backend> {
    expert: SharedExpert<B>,
    /// Scratch buffer of what the routed experts give, which is added to what this one gives.
    routed_out: usize,
}

enum SharedExpert<B: Backend> {
    /// As it is.
    Plain(Box<Mlp<B>>),
    /// Weighed by a projection of its own.
    Weighed(Routed<B>),
}

impl<B: Backend> Experts<B> {
    /// Loads the router and this rank's tiles of every expert.
    pub(super) fn load(
        loader: &mut Loader<'_, B>,
        spec: &ExpertsSpec,
        hidden_size: usize,
    ) -> Result<Self, ModelError> {
        let ExpertsSpec { intermediate_size, activation, routing, router, correction, experts, shared } =
            spec;
        if let Some(problem) = routing.problem(experts.len()) {
            return Err(ModelError::Unusable(vec![problem]));
        }
        let sizes = [*intermediate_size, hidden_size];
        let mut routed = Routed::load(loader, (router, *routing), experts, *activation, sizes)?;
        if let Some(name) = correction {
            let correction = loader.source.vector(name, 0..experts.len())?;
            loader.weight_bytes += size_of_val(correction.as_slice());
            routed.correction = Some(loader.backend.vector(correction)?);
        }
        let shared = match shared {
            None => None,
            Some(shared) => Some(Shared::load(loader, shared, *activation, hidden_size)?),
        };
        Ok(Self { routed, shared })
    }

    /// `out = experts(x)`, this rank's part of the sum.
    pub(super) fn forward(
        &self,
        backend: &mut B,
        (x, out): (&B::Buffer, &mut B::Buffer),
        scratch: &mut Scratch<B>,
    ) -> Result<(), ModelError> {
        let Some(Shared { expert, routed_out }) = &self.shared else {
            return self.routed.forward(backend, (x, out), scratch.one(self.routed.router_logits));
        };
        match expert {
            SharedExpert::Plain(mlp) => mlp.forward(backend, (x, Output::to(out)), scratch)?,
            SharedExpert::Weighed(expert) => {
                expert.forward(backend, (x, out), scratch.one(expert.router_logits))?;
            }
        }
        let (router_logits, routed_out) = scratch.pair(self.routed.router_logits, *routed_out);
        self.routed.forward(backend, (x, routed_out), router_logits)?;
        Ok(backend.add(out, routed_out)?)
    }
}

impl<B: Backend> Routed<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        (router, routing): (&LinearSpec, Routing),
        experts: &[GatedSpec],
        activation: Activation,
        [intermediate_size, hidden_size]: [usize; 2],
    ) -> Result<Self, ModelError> {
        let inner = split_tiles(intermediate_size, "columns of an expert", loader.rank, loader.world_size)?;
        let mut projections = Vec::with_capacity(experts.len());
        // The kernels of experts multiply plain weights: rounding these would cost accuracy and save nothing.
        let quantizes = std::mem::take(&mut loader.fp8.quantizes);
        for GatedSpec { gate_proj, up_proj, down_proj } in experts {
            let parts = [
                ColumnPart { linear: gate_proj, rows: inner.clone() },
                ColumnPart { linear: up_proj, rows: inner.clone() },
            ];
            let gate_up = Linear::merged_column_parallel(loader, &parts, hidden_size)?;
            let down = Linear::row_parallel(loader, down_proj, hidden_size, inner.clone())?;
            projections.push((gate_up.into_weight(), down.into_weight()));
        }
        loader.fp8.quantizes = quantizes;
        Ok(Self {
            router: Linear::precise(loader, router, [experts.len(), hidden_size])?,
            correction: None,
            routing,
            experts: loader.backend.experts(projections, activation)?,
            router_logits: loader.reserve(Role::RouterLogits, experts.len())?,
        })
    }

    /// `out = experts(x)`, this rank's part of the sum.
    fn forward(
        &self,
        backend: &mut B,
        (x, out): (&B::Buffer, &mut B::Buffer),
        router_logits: &mut B::Buffer,
    ) -> Result<(), ModelError> {
        self.router.forward(backend, x, router_logits)?;
        let routing = (&self.routing, self.correction.as_ref());
        Ok(backend.mixture_of_experts(x, router_logits, routing, &self.experts, out)?)
    }
}

impl<B: Backend> Shared<B> {
    fn load(
        loader: &mut Loader<'_, B>,
        spec: &SharedExpertSpec,
        activation: Activation,
        hidden_size: usize,
    ) -> Result<Self, ModelError> {
        let SharedExpertSpec { intermediate_size, projections, gate } = spec;
        let expert = match gate {
            None => {
                let GatedSpec { gate_proj, up_proj, down_proj } = projections.clone();
                let intermediate_size = *intermediate_size;
                let mlp = MlpSpec::Gated { intermediate_size, activation, gate_proj, up_proj, down_proj };
                SharedExpert::Plain(Box::new(Mlp::load(loader, &mlp, hidden_size)?))
            }
            Some(gate) => {
                let sizes = [*intermediate_size, hidden_size];
                let projections = std::slice::from_ref(projections);
                SharedExpert::Weighed(Routed::load(loader, (gate, WEIGHED), projections, activation, sizes)?)
            }
        };
        Ok(Self { expert, routed_out: loader.reserve(Role::RoutedOut, hidden_size)? })
    }
}
