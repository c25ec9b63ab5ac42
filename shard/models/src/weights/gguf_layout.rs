//! Where the tensors of Hugging Face's names lie in a GGUF file: converters rename them, and for some architectures also
//! reorder rows, fold a constant in, or stack experts.

use std::ops::Range;

use hub::gguf::{Gguf, TensorInfo};

use super::gguf_names::Names;

/// What has to be known of a file to undo what its converter did.
pub(super) struct Layout {
    names: Names,
    num_heads: usize,
    num_kv_heads: usize,
}

/// A tensor, or one of several in it.
pub(super) struct Place {
    /// Hugging Face's name.
    pub(super) name: String,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// In the file.
    pub(super) bytes: Range<usize>,
    pub(super) order: RowOrder,
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
        Ok(Self { names: Names::of(architecture), num_heads, num_kv_heads })
    }

    /// What a tensor of the file is. A name that is not known stays as it is, to be listed as surplus.
    ///
    /// # Errors
    /// Its rows do not fit the heads.
    pub(super) fn places(&self, info: &TensorInfo) -> Result<Vec<Place>, String> {
        let heads = match self.names.permuted_part(&info.name) {
            Some("attn_q") => Some(self.num_heads),
            Some("attn_k") => Some(self.num_kv_heads),
            _ => None,
        };
        let order = heads.map_or(Ok(RowOrder::Plain), |heads| interleaved(info, heads))?;
        let shift =
            if self.names.has_shifted_norms && info.name.ends_with("norm.weight") { -1.0 } else { 0.0 };
        Ok(vec![Place {
            name: self.names.hugging_face(&info.name),
            shape: info.shape.clone(),
            bytes: info.range.clone(),
            order,
            shift,
        }])
    }
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
