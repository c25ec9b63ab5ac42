//! GGUF's tensor names in Hugging Face's spelling.

/// Tensors outside the layers, for architectures that follow llama's names.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a layer, for architectures that follow llama's names.
const LAYER: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

type Table = &'static [(&'static str, &'static str)];

/// The names of one architecture.
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    /// What layers are under.
    layers: &'static str,
    /// Outside the layers, before llama's.
    outside: Table,
    /// Of a layer, before llama's.
    own: Table,
    /// What experts are under in a layer, and their projections: gate, up, down.
    experts: (&'static str, [&'static str; 3]),
    /// The projections of all experts are in one tensor.
    has_stacked_experts: bool,
    /// The converter has reordered the rows of queries and keys so that a rotation pairs neighbours.
    pub(super) is_permuted: bool,
    /// The converter has added 1 to the weights of norms.
    pub(super) has_shifted_norms: bool,
    /// Hugging Face's matrices are the transposes of the file's.
    pub(super) is_transposed: bool,
}

const LLAMA: Names = Names {
    layers: "model.layers",
    outside: &[],
    own: &[],
    experts: ("mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
    has_stacked_experts: false,
    is_permuted: false,
    has_shifted_norms: false,
    is_transposed: false,
};

/// Where Gemma 2 and 3 have other norms: there are four in a layer.
const GEMMA2: Table = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// BLOOM's, which Falcon took over.
const BLOOM: Table = &[
    ("attn_qkv", "self_attention.query_key_value"),
    ("attn_output", "self_attention.dense"),
    ("ffn_up", "mlp.dense_h_to_4h"),
    ("ffn_down", "mlp.dense_4h_to_h"),
];
const FALCON_TWO_NORMS: Table = &[
    ("attn_norm", "ln_mlp"),
    ("attn_norm_2", "ln_attn"),
    ("attn_qkv", "self_attention.query_key_value"),
    ("attn_output", "self_attention.dense"),
    ("ffn_up", "mlp.dense_h_to_4h"),
    ("ffn_down", "mlp.dense_4h_to_h"),
];
const GLM4: Table = &[
    ("post_attention_norm", "post_self_attn_layernorm"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("post_ffw_norm", "post_mlp_layernorm"),
];
const GPT2: Table = &[
    ("attn_norm", "ln_1"),
    ("attn_qkv", "attn.c_attn"),
    ("attn_output", "attn.c_proj"),
    ("ffn_norm", "ln_2"),
    ("ffn_up", "mlp.c_fc"),
    ("ffn_down", "mlp.c_proj"),
];
const GPT_NEOX: Table = &[
    ("attn_qkv", "attention.query_key_value"),
    ("attn_output", "attention.dense"),
    ("ffn_up", "mlp.dense_h_to_4h"),
    ("ffn_down", "mlp.dense_4h_to_h"),
];
const MPT: Table = &[
    ("attn_norm", "norm_1"),
    ("attn_qkv", "attn.Wqkv"),
    ("attn_output", "attn.out_proj"),
    ("ffn_norm", "norm_2"),
    ("ffn_up", "ffn.up_proj"),
    ("ffn_down", "ffn.down_proj"),
];
const OLMO2: Table =
    &[("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")];
const PHI2: Table = &[("attn_output", "self_attn.dense"), ("ffn_up", "mlp.fc1"), ("ffn_down", "mlp.fc2")];
const PHI3: Table = &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")];
const QWEN_MOE: Table = &[
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];
const DEEPSEEK2: Table = &[
    ("attn_q_a", "self_attn.q_a_proj"),
    ("attn_q_a_norm", "self_attn.q_a_layernorm"),
    ("attn_q_b", "self_attn.q_b_proj"),
    ("attn_kv_a_mqa", "self_attn.kv_a_proj_with_mqa"),
    ("attn_kv_a_norm", "self_attn.kv_a_layernorm"),
    ("attn_kv_b", "self_attn.kv_b_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    // With the suffix the file adds.
    ("exp_probs_b", "mlp.gate.e_score_correction"),
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
];

const DBRX: Table = &[
    ("attn_norm", "norm_attn_norm.norm_1"),
    ("attn_output_norm", "norm_attn_norm.norm_2"),
    ("attn_qkv", "norm_attn_norm.attn.Wqkv"),
    ("attn_output", "norm_attn_norm.attn.out_proj"),
    ("ffn_gate_inp", "ffn.router.layer"),
];

impl Names {
    /// Those of `general.architecture`; `has_two_norms`: a layer has `attn_norm_2`.
    pub(super) fn of(architecture: &str, has_two_norms: bool) -> Self {
        let transformer = |layers, outside, own| Self { layers, outside, own, ..LLAMA };
        let own = |own| Self { own, ..LLAMA };
        match architecture {
            "llama" => Self {
                own: &[("ffn_gate_inp", "block_sparse_moe.gate")],
                experts: ("block_sparse_moe.experts", ["w1", "w3", "w2"]),
                is_permuted: true,
                ..LLAMA
            },
            "baichuan" | "granite" => Self { is_permuted: true, ..LLAMA },
            "gemma" => Self { has_shifted_norms: true, ..LLAMA },
            "gemma2" | "gemma3" => Self { has_shifted_norms: true, ..own(GEMMA2) },
            "bloom" | "falcon" => transformer(
                "transformer.h",
                &[
                    ("token_embd", "transformer.word_embeddings"),
                    ("token_embd_norm", "transformer.word_embeddings_layernorm"),
                    ("output_norm", "transformer.ln_f"),
                ],
                if has_two_norms { FALCON_TWO_NORMS } else { BLOOM },
            ),
            "glm4" => own(GLM4),
            "gpt2" => Self {
                is_transposed: true,
                ..transformer(
                    "transformer.h",
                    &[
                        ("token_embd", "transformer.wte"),
                        ("position_embd", "transformer.wpe"),
                        ("output_norm", "transformer.ln_f"),
                    ],
                    GPT2,
                )
            },
            "gptneox" => transformer(
                "gpt_neox.layers",
                &[
                    ("token_embd", "gpt_neox.embed_in"),
                    ("output_norm", "gpt_neox.final_layer_norm"),
                    ("output", "embed_out"),
                ],
                GPT_NEOX,
            ),
            "mpt" => transformer(
                "transformer.blocks",
                &[
                    ("token_embd", "transformer.wte"),
                    ("position_embd", "transformer.wpe"),
                    ("output_norm", "transformer.norm_f"),
                ],
                MPT,
            ),
            "olmo2" => own(OLMO2),
            "phi2" => Self { outside: &[("output_norm", "model.final_layernorm")], ..own(PHI2) },
            "phi3" => own(PHI3),
            "qwen2moe" | "qwen3moe" => own(QWEN_MOE),
            "dbrx" => Self {
                experts: ("ffn.experts.mlp", ["w1", "v1", "w2"]),
                has_stacked_experts: true,
                ..transformer(
                    "transformer.blocks",
                    &[("token_embd", "transformer.wte"), ("output_norm", "transformer.norm_f")],
                    DBRX,
                )
            },
            "deepseek2" => own(DEEPSEEK2),
            "starcoder2" => own(&[("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")]),
            _ => LLAMA,
        }
    }

    /// `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; a name that is not known stays as it is.
    pub(super) fn hugging_face(&self, name: &str) -> String {
        self.translate(name).unwrap_or_else(|| name.to_owned())
    }

    /// The name of an expert's matrix, where the tensor holds those of all experts.
    pub(super) fn of_expert(&self, name: &str, expert: usize) -> Option<String> {
        let (experts, projection) = self.experts(name).filter(|_| !self.has_stacked_experts)?;
        Some(format!("{experts}.{expert}.{projection}.weight"))
    }

    /// The name of the tensor of all experts, where Hugging Face has one too.
    pub(super) fn of_all_experts(&self, name: &str) -> Option<String> {
        let (experts, projection) = self.experts(name).filter(|_| self.has_stacked_experts)?;
        Some(format!("{experts}.{projection}"))
    }

    /// What the experts are under, and the projection.
    fn experts(&self, name: &str) -> Option<(String, &'static str)> {
        let (layer, part) = layer_and_part(name)?;
        let place =
            ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"].iter().position(|known| *known == part)?;
        let (experts, projections) = self.experts;
        Some((format!("{}.{layer}.{experts}", self.layers), projections[place]))
    }

    fn translate(&self, name: &str) -> Option<String> {
        let (stem, kind) = name.rsplit_once('.')?;
        if let Some((_, known)) = self.outside.iter().chain(&OUTSIDE).find(|(gguf, _)| *gguf == stem) {
            return Some(format!("{known}.{kind}"));
        }
        let (layer, part) = layer_and_part(name)?;
        let (_, known) = self.own.iter().chain(&LAYER).find(|(gguf, _)| *gguf == part)?;
        let separator = if part == "exp_probs_b" { '_' } else { '.' };
        Some(format!("{}.{layer}.{known}{separator}{kind}", self.layers))
    }
}

/// `3` and `attn_q` of `blk.3.attn_q.weight`.
pub(super) fn layer_and_part(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.')?.0.strip_prefix("blk.")?.split_once('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_or_left() {
        let llama = Names::of("llama", false);
        assert_eq!(llama.hugging_face("blk.11.ffn_down.weight"), "model.layers.11.mlp.down_proj.weight");
        assert_eq!(llama.hugging_face("output.weight"), "lm_head.weight");
        assert_eq!(llama.hugging_face("token_embd.weight"), "model.embed_tokens.weight");
        assert_eq!(llama.hugging_face("blk.0.attn_rot_embd"), "blk.0.attn_rot_embd");
        assert_eq!(llama.hugging_face("x"), "x");
        assert_eq!(layer_and_part("blk.0.attn_q.bias"), Some(("0", "attn_q")));
        assert_eq!(layer_and_part("token_embd.weight"), None);
    }

    #[test]
    fn gemma_has_norms_of_its_own() {
        let name = "blk.1.ffn_norm.weight";
        let expected = "model.layers.1.pre_feedforward_layernorm.weight";
        assert_eq!(Names::of("gemma3", false).hugging_face(name), expected);
        let expected = "model.layers.1.post_attention_layernorm.weight";
        assert_eq!(Names::of("gemma", false).hugging_face(name), expected);
        assert_eq!(Names::of("glm4", false).hugging_face(name), expected);
        let after = Names::of("glm4", false).hugging_face("blk.1.post_attention_norm.weight");
        assert_eq!(after, "model.layers.1.post_self_attn_layernorm.weight");
    }

    #[test]
    fn experts_have_names_of_their_own() {
        let name = "blk.2.ffn_down_exps.weight";
        let of = |architecture| Names::of(architecture, false).of_expert(name, 7).unwrap();
        assert_eq!(of("llama"), "model.layers.2.block_sparse_moe.experts.7.w2.weight");
        assert_eq!(of("qwen3moe"), "model.layers.2.mlp.experts.7.down_proj.weight");
        let deepseek = Names::of("deepseek2", false);
        let expected = "model.layers.3.mlp.gate.e_score_correction_bias";
        assert_eq!(deepseek.hugging_face("blk.3.exp_probs_b.bias"), expected);
        assert_eq!(deepseek.of_expert("blk.2.ffn_down.weight", 0), None);
    }

    #[test]
    fn falcons_norms_depend_on_their_number() {
        let name = |has_two| Names::of("falcon", has_two).hugging_face("blk.0.attn_norm.weight");
        assert_eq!(name(false), "transformer.h.0.input_layernorm.weight");
        assert_eq!(name(true), "transformer.h.0.ln_mlp.weight");
    }
}
