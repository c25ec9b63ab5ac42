//! Which tensors a spec is made of.

use std::collections::HashSet;

use super::{
    AttentionSpec, BranchSpec, DecoderSpec, EmbeddingProjectionSpec, ExpertsSpec, GatedSpec,
    LatentAttentionSpec, LatentProjectionSpec, LinearSpec, LmHeadSpec, MixerSpec, MlpSpec, NormSpec,
    QkNormScope, ResidualSpec,
};

/// A tensor that the spec needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its name.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
}

impl DecoderSpec {
    /// Every tensor the model is made of, in the order of the layers; one that several layers are parts of is there once.
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        let hidden = self.hidden_size;
        let mut list = TensorList::default();
        let mut table_width = hidden;
        if let Some(EmbeddingProjectionSpec { width, proj_in, proj_out }) = &self.embedding.projection {
            list.linear(proj_in, hidden, *width);
            list.linear(proj_out, *width, hidden);
            table_width = *width;
        }
        list.add(&self.embedding.tokens, &[self.vocab_size, table_width]);
        if let Some(positions) = &self.embedding.positions {
            list.add(&positions.weight, &[positions.rows, hidden]);
        }
        list.norms(&self.embedding.norm, hidden);
        for layer in &self.layers {
            match &layer.residual {
                ResidualSpec::Sequential { mixer, mlp } => {
                    for BranchSpec { norm, post_norm, .. } in [mixer, mlp] {
                        list.norms(norm, hidden);
                        list.norms(post_norm, hidden);
                    }
                }
                ResidualSpec::PostNorm { mixer, mlp } => {
                    list.norm(mixer, &[hidden]);
                    list.norms(mlp, hidden);
                }
                ResidualSpec::Parallel { norm, mlp_norm } => {
                    list.norm(norm, &[hidden]);
                    list.norms(mlp_norm, hidden);
                }
            }
            match &layer.mixer {
                MixerSpec::Attention(attention) => list.attention(attention, hidden),
                MixerSpec::LatentAttention(attention) => list.latent_attention(attention, hidden),
            }
            list.mlp(&layer.mlp, hidden);
        }
        list.norm(&self.norm, &[hidden]);
        if let LmHeadSpec::Own(lm_head) | LmHeadSpec::Normalised(lm_head) = &self.lm_head {
            list.linear(lm_head, self.vocab_size, table_width);
        }
        list.tensors
    }
}

#[derive(Default)]
struct TensorList {
    tensors: Vec<ExpectedTensor>,
    names: HashSet<String>,
}

impl TensorList {
    fn add(&mut self, name: &str, shape: &[usize]) {
        if self.names.insert(name.to_owned()) {
            self.tensors.push(ExpectedTensor { name: name.to_owned(), shape: shape.to_vec() });
        }
    }

    fn norm(&mut self, norm: &NormSpec, shape: &[usize]) {
        self.add(&norm.weight, shape);
        if let Some(bias) = &norm.bias {
            self.add(bias, shape);
        }
    }

    fn norms(&mut self, norm: &Option<NormSpec>, width: usize) {
        if let Some(norm) = norm {
            self.norm(norm, &[width]);
        }
    }

    fn linear(&mut self, linear: &LinearSpec, out_features: usize, in_features: usize) {
        self.add(&linear.weight, &linear.tensor_shape(out_features, in_features));
        if let Some(bias) = &linear.bias {
            self.add(bias, &[linear.rows.map_or(out_features, |rows| rows.total)]);
        }
    }

    fn attention(&mut self, attention: &AttentionSpec, hidden: usize) {
        let AttentionSpec { num_heads, num_kv_heads, head_dim, .. } = *attention;
        let (queries, keys) = (num_heads * head_dim, num_kv_heads * head_dim);
        self.linear(&attention.q_proj, queries, hidden);
        self.linear(&attention.k_proj, keys, hidden);
        self.linear(&attention.v_proj, keys, hidden);
        self.linear(&attention.o_proj, hidden, queries);
        if let Some(norm) = &attention.qk_norm {
            for (norm_spec, heads) in [(&norm.q, num_heads), (&norm.k, num_kv_heads)] {
                match norm.scope {
                    QkNormScope::Head => self.norm(norm_spec, &[head_dim]),
                    QkNormScope::HeadWithOwnWeight => self.norm(norm_spec, &[heads, head_dim]),
                    QkNormScope::HeadWithOwnTensor => {
                        (0..heads).for_each(|head| self.add(&norm_spec.weight_of_head(head), &[head_dim]));
                    }
                    QkNormScope::AllHeads => self.norm(norm_spec, &[heads * head_dim]),
                }
            }
        }
    }

    fn latent_attention(&mut self, attention: &LatentAttentionSpec, hidden: usize) {
        let &LatentAttentionSpec { num_heads, plain_dim, rotary_dim, value_dim, latent_dim, .. } = attention;
        let mut query_inputs = hidden;
        if let Some(LatentProjectionSpec { width, proj, norm }) = &attention.q_down {
            self.linear(proj, *width, hidden);
            self.norm(norm, &[*width]);
            query_inputs = *width;
        }
        self.linear(&attention.q_proj, num_heads * (plain_dim + rotary_dim), query_inputs);
        self.linear(&attention.kv_down.proj, latent_dim + rotary_dim, hidden);
        self.norm(&attention.kv_down.norm, &[latent_dim]);
        self.linear(&attention.kv_up, num_heads * (plain_dim + value_dim), latent_dim);
        self.linear(&attention.o_proj, hidden, num_heads * value_dim);
    }

    fn mlp(&mut self, mlp: &MlpSpec, hidden: usize) {
        match mlp {
            MlpSpec::Gated { intermediate_size, gate_proj, up_proj, down_proj, .. } => {
                self.linear(gate_proj, *intermediate_size, hidden);
                self.linear(up_proj, *intermediate_size, hidden);
                self.linear(down_proj, hidden, *intermediate_size);
            }
            MlpSpec::Plain { intermediate_size, up_proj, down_proj, .. } => {
                self.linear(up_proj, *intermediate_size, hidden);
                self.linear(down_proj, hidden, *intermediate_size);
            }
            MlpSpec::Experts(experts) => self.experts(experts, hidden),
        }
    }

    fn experts(&mut self, spec: &ExpertsSpec, hidden: usize) {
        self.linear(&spec.router, spec.experts.len(), hidden);
        if let Some(correction) = &spec.correction {
            self.add(correction, &[spec.experts.len()]);
        }
        for expert in &spec.experts {
            self.gated(expert, spec.intermediate_size, hidden);
        }
        if let Some(shared) = &spec.shared {
            self.gated(&shared.projections, shared.intermediate_size, hidden);
            shared.gate.iter().for_each(|gate| self.linear(gate, 1, hidden));
        }
    }

    fn gated(&mut self, expert: &GatedSpec, inner: usize, hidden: usize) {
        self.linear(&expert.gate_proj, inner, hidden);
        self.linear(&expert.up_proj, inner, hidden);
        self.linear(&expert.down_proj, hidden, inner);
    }
}
