//! GGUF's tensor names in Hugging Face's spelling.

/// Tensors outside the layers.
const OUTSIDE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a llama layer.
const LLAMA_LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`; a name that is not known stays as it is, to be
/// listed as surplus.
pub(super) fn hugging_face_name(name: &str) -> String {
    translate(name).unwrap_or_else(|| name.to_owned())
}

fn translate(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.')?;
    if let Some((_, known)) = OUTSIDE.iter().find(|(gguf, _)| *gguf == stem) {
        return Some(format!("{known}.{kind}"));
    }
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let (_, known) = LLAMA_LAYER.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("model.layers.{layer}.{known}.{kind}"))
}

/// Whether llama's converter has reordered this tensor's rows so that a rotation pairs neighbours, and whether it is
/// one of queries.
pub(super) fn permuted(name: &str) -> Option<Projection> {
    let (stem, _) = name.rsplit_once('.')?;
    match stem.strip_prefix("blk.")?.split_once('.')?.1 {
        "attn_q" => Some(Projection::Query),
        "attn_k" => Some(Projection::Key),
        _ => None,
    }
}

/// Which heads a reordered tensor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Projection {
    /// Query heads.
    Query,
    /// KV heads.
    Key,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_translated_or_left() {
        assert_eq!(hugging_face_name("blk.11.ffn_down.weight"), "model.layers.11.mlp.down_proj.weight");
        assert_eq!(hugging_face_name("output.weight"), "lm_head.weight");
        assert_eq!(hugging_face_name("token_embd.weight"), "model.embed_tokens.weight");
        assert_eq!(hugging_face_name("blk.0.attn_rot_embd"), "blk.0.attn_rot_embd");
        assert_eq!(hugging_face_name("x"), "x");
        assert_eq!(permuted("blk.0.attn_q.bias"), Some(Projection::Query));
        assert_eq!(permuted("blk.0.attn_v.weight"), None);
    }
}
