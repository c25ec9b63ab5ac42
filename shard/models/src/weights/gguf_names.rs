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

/// Where Gemma 2 and 3 have other norms: there are four in a layer.
const GEMMA2_LAYER: &[(&str, &str)] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];

/// The names of one architecture.
pub(super) struct Names {
    /// Before llama's.
    own: &'static [(&'static str, &'static str)],
    /// The converter has reordered the rows of queries and keys so that a rotation pairs neighbours.
    is_permuted: bool,
    /// The converter has added 1 to the weights of norms.
    pub(super) has_shifted_norms: bool,
}

impl Names {
    /// Those of `general.architecture`.
    pub(super) fn of(architecture: &str) -> Self {
        let is_gemma = matches!(architecture, "gemma" | "gemma2" | "gemma3");
        Self {
            own: if matches!(architecture, "gemma2" | "gemma3") { GEMMA2_LAYER } else { &[] },
            is_permuted: matches!(architecture, "llama" | "granite"),
            has_shifted_norms: is_gemma,
        }
    }

    /// `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; a name that is not known stays as it is.
    pub(super) fn hugging_face(&self, name: &str) -> String {
        self.translate(name).unwrap_or_else(|| name.to_owned())
    }

    /// The tensor's part of a layer, where its rows may have been reordered.
    pub(super) fn permuted_part<'a>(&self, name: &'a str) -> Option<&'a str> {
        let (stem, _) = name.rsplit_once('.').filter(|_| self.is_permuted)?;
        Some(stem.strip_prefix("blk.")?.split_once('.')?.1)
    }

    fn translate(&self, name: &str) -> Option<String> {
        let (stem, kind) = name.rsplit_once('.')?;
        if let Some((_, known)) = OUTSIDE.iter().find(|(gguf, _)| *gguf == stem) {
            return Some(format!("{known}.{kind}"));
        }
        let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
        let (_, known) = self.own.iter().chain(&LAYER).find(|(gguf, _)| *gguf == part)?;
        Some(format!("model.layers.{layer}.{known}.{kind}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_or_left() {
        let llama = Names::of("llama");
        assert_eq!(llama.hugging_face("blk.11.ffn_down.weight"), "model.layers.11.mlp.down_proj.weight");
        assert_eq!(llama.hugging_face("output.weight"), "lm_head.weight");
        assert_eq!(llama.hugging_face("token_embd.weight"), "model.embed_tokens.weight");
        assert_eq!(llama.hugging_face("blk.0.attn_rot_embd"), "blk.0.attn_rot_embd");
        assert_eq!(llama.hugging_face("x"), "x");
        assert_eq!(llama.permuted_part("blk.0.attn_q.bias"), Some("attn_q"));
        assert_eq!(Names::of("qwen2").permuted_part("blk.0.attn_q.bias"), None);
    }

    #[test]
    fn gemma_has_norms_of_its_own() {
        let name = "blk.1.ffn_norm.weight";
        let expected = "model.layers.1.pre_feedforward_layernorm.weight";
        assert_eq!(Names::of("gemma3").hugging_face(name), expected);
        let expected = "model.layers.1.post_attention_layernorm.weight";
        assert_eq!(Names::of("gemma").hugging_face(name), expected);
    }
}
