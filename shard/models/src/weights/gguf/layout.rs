//! Where the tensors of Hugging Face's names lie in a GGUF file: converters rename them, and for some architectures also
//! reorder rows, fold a constant in, or stack experts.

use std::ops::Range;

use hub::gguf::{Gguf, TensorInfo};

use super::names::{Names, layer_and_part};

/// What has to be known of a file to undo what its converter did.
pub(super) struct Layout {
    names: Names,
    num_heads: usize,
    num_kv_heads: usize,
    hidden_size: usize,
    /// How queries, keys and values lie in the tensor that holds them all.
    fused: Fused,
}

/// What the converters of an architecture make of a tensor of queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fused {
    /// All queries, then all keys, then all values, as Hugging Face has them.
    AsIs,
    /// The same, but Hugging Face has them side by side for each KV head.
    ByKvHead,
    /// The same, but Hugging Face has a tensor for each.
    Apart,
}

/// A tensor, or one of several in it.
pub(super) struct Place {
    /// Hugging Face's name.
    pub(super) name: String,
    /// As the file has it, outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// In the file.
    pub(super) bytes: Range<usize>,
    pub(super) order: RowOrder,
    /// It is so many matrices, one below the other; Hugging Face's tensor is their transposes.
    pub(super) transposed: Option<usize>,
    /// Added to every element.
    pub(super) shift: f32,
}

/// Where in the file the rows of a tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As Hugging Face has them.
    Plain,
    /// Within each head, row `2 i + j` of the file is row `j * head_dim / 2 + i`: the rotation pairs neighbours.
    Interleaved { head_dim: usize },
    /// Hugging Face has `sizes` rows of each of three parts for every group, one group after the other; the file has all of
    /// the first part, then all of the second, then all of the third.
    ByPart { sizes: [usize; 3], groups: usize },
}

impl RowOrder {
    /// The row of the file that is row `row` of Hugging Face's tensor.
    pub(super) fn row_in_file(self, row: usize) -> usize {
        match self {
            RowOrder::Plain => row,
            RowOrder::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (second, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + second
            }
            RowOrder::ByPart { sizes, groups } => {
                let stride: usize = sizes.iter().sum();
                let (group, mut within) = (row / stride, row % stride);
                let mut before = 0;
                for size in sizes {
                    if within < size {
                        return before + group * size + within;
                    }
                    within -= size;
                    before += size * groups;
                }
                unreachable!("the rest of a division is below the sum of the parts")
            }
        }
    }
}

impl Layout {
    /// Reads what the metadata says.
    ///
    /// # Errors
    /// A value is of the wrong kind.
    pub(super) fn of(header: &Gguf) -> Result<Self, String> {
        let read = |error: hub::gguf::GgufError| error.to_string();
        let architecture = header.str("general.architecture").map_err(read)?.unwrap_or_default();
        let number = |key: &str| {
            let value = header.u64(&format!("{architecture}.{key}")).map_err(read)?;
            Ok::<_, String>(value.unwrap_or(0) as usize)
        };
        let num_heads = number("attention.head_count")?;
        let num_kv_heads = match number("attention.head_count_kv")? {
            0 => num_heads,
            num_kv_heads => num_kv_heads,
        };
        let hidden_size = number("embedding_length")?;
        let fused = match architecture {
            "bloom" | "falcon" | "gptneox" => Fused::ByKvHead,
            "phi2" => Fused::Apart,
            _ => Fused::AsIs,
        };
        let has_two_norms = header.tensor("blk.0.attn_norm_2.weight").is_some();
        Ok(Self {
            names: Names::of(architecture, has_two_norms),
            num_heads,
            num_kv_heads,
            hidden_size,
            fused,
        })
    }

    /// What a tensor of the file is. A name that is not known stays as it is, to be listed as surplus.
    ///
    /// # Errors
    /// Its rows do not fit the heads.
    pub(super) fn places(&self, info: &TensorInfo) -> Result<Vec<Place>, String> {
        let part = layer_and_part(&info.name).map_or("", |(_, part)| part);
        if let ([experts, rows, cols], Some(_)) = (info.shape.as_slice(), self.names.of_expert(&info.name, 0))
        {
            return Ok(self.experts(info, [*experts, *rows, *cols]));
        }
        if let (&[experts, rows, cols], Some(name)) =
            (info.shape.as_slice(), self.names.of_all_experts(&info.name))
        {
            return Ok(vec![Place {
                name,
                shape: vec![experts * rows, cols],
                bytes: info.range.clone(),
                order: RowOrder::Plain,
                transposed: (part == "ffn_down_exps").then_some(experts),
                shift: 0.0,
            }]);
        }
        let mut place = Place {
            name: self.names.hugging_face(&info.name),
            shape: info.shape.clone(),
            bytes: info.range.clone(),
            order: RowOrder::Plain,
            transposed: (self.names.is_transposed && !part.is_empty() && info.shape.len() == 2).then_some(1),
            shift: if self.names.has_shifted_norms && info.name.ends_with("norm.weight") {
                -1.0
            } else {
                0.0
            },
        };
        match part {
            "attn_q" if self.names.is_permuted => place.order = interleaved(info, self.num_heads)?,
            "attn_k" if self.names.is_permuted => place.order = interleaved(info, self.num_kv_heads)?,
            "attn_qkv" if self.fused == Fused::ByKvHead => place.order = self.by_kv_head(info)?,
            "attn_qkv" if self.fused == Fused::Apart => return apart(info),
            // Converters leave out dimensions of one element.
            "ffn_gate_inp_shexp" if place.shape.len() == 1 => place.shape.insert(0, 1),
            _ => {}
        }
        Ok(vec![place])
    }

    /// One matrix of each expert.
    fn experts(&self, info: &TensorInfo, [count, rows, cols]: [usize; 3]) -> Vec<Place> {
        let bytes = info.range.len() / count.max(1);
        let place = |expert: usize| {
            let start = info.range.start + expert * bytes;
            Some(Place {
                name: self.names.of_expert(&info.name, expert)?,
                shape: vec![rows, cols],
                bytes: start..start + bytes,
                order: RowOrder::Plain,
                transposed: None,
                shift: 0.0,
            })
        };
        (0..count).filter_map(place).collect()
    }

    /// As many KV heads as the rows allow for: some files name the query heads instead.
    fn by_kv_head(&self, info: &TensorInfo) -> Result<RowOrder, String> {
        let (rows, heads, hidden_size) = (info.shape[0], self.num_heads, self.hidden_size);
        let head_dim = hidden_size.checked_div(heads).unwrap_or(0);
        let kv_heads = rows.checked_div(head_dim).unwrap_or(0).saturating_sub(heads) / 2;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || rows != (heads + 2 * kv_heads) * head_dim {
            return Err(format!(
                "tensor {} has {rows} rows, which {heads} heads of a width of {hidden_size} and their keys and values \
                 cannot share",
                info.name
            ));
        }
        Ok(RowOrder::ByPart { sizes: [heads / kv_heads * head_dim, head_dim, head_dim], groups: kv_heads })
    }
}

/// Queries, keys and values as three tensors.
fn apart(info: &TensorInfo) -> Result<Vec<Place>, String> {
    let rows = info.shape[0];
    let Some((layer, _)) = layer_and_part(&info.name).filter(|_| rows.is_multiple_of(3)) else {
        return Err(format!("tensor {} has {rows} rows, expected three parts of equal size", info.name));
    };
    let kind = info.name.rsplit_once('.').map_or("weight", |(_, kind)| kind);
    let bytes = info.range.len() / 3;
    let place = |(index, projection): (usize, &str)| {
        let start = info.range.start + index * bytes;
        let mut shape = info.shape.clone();
        shape[0] = rows / 3;
        Place {
            name: format!("model.layers.{layer}.self_attn.{projection}.{kind}"),
            shape,
            bytes: start..start + bytes,
            order: RowOrder::Plain,
            transposed: None,
            shift: 0.0,
        }
    };
    Ok(["q_proj", "k_proj", "v_proj"].into_iter().enumerate().map(place).collect())
}

fn interleaved(info: &TensorInfo, num_heads: usize) -> Result<RowOrder, String> {
    let rows = info.shape[0];
    if num_heads == 0 || !rows.is_multiple_of(2 * num_heads) {
        return Err(format!(
            "tensor {} has {rows} rows, which {num_heads} heads cannot share in pairs",
            info.name
        ));
    }
    Ok(RowOrder::Interleaved { head_dim: rows / num_heads })
}
