//! DeepSeek's projection of latent vectors, of which converters since 2025 store keys and values in a tensor each, that of the
//! keys transposed: it is multiplied with queries instead.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use backend::{DType, HostMatrix};

use super::{GgufWeights, Tensor, no_window};
use crate::ModelError;
use crate::weights::{TensorMeta, WeightSource, is_within};

/// `kv_b_proj` in two parts.
pub(super) struct LatentUp {
    /// `[heads * latent, key]`.
    keys: Tensor,
    /// `[heads * value, latent]`.
    values: Tensor,
    heads: usize,
}

/// Takes the parts out of `tensors`, where both are there and fit one another.
pub(super) fn take(tensors: &mut HashMap<String, Tensor>) -> HashMap<String, LatentUp> {
    let layers: Vec<String> = tensors
        .keys()
        .filter_map(|name| name.strip_prefix("blk.")?.strip_suffix(".attn_k_b.weight").map(str::to_owned))
        .collect();
    let mut found = HashMap::new();
    for layer in layers {
        let [keys, values] = ["k", "v"].map(|part| format!("blk.{layer}.attn_{part}_b.weight"));
        let shapes = [&keys, &values].map(|name| tensors.get(name).map(|tensor| tensor.shape.clone()));
        let [Some(of_keys), Some(of_values)] = shapes else { continue };
        if let ([heads, latent, key], [same, value, width]) = (of_keys.as_slice(), of_values.as_slice())
            && (heads, latent) == (same, width)
            && let (Some(mut keys), Some(mut values)) = (tensors.remove(&keys), tensors.remove(&values))
        {
            (keys.shape, values.shape) = (vec![heads * latent, *key], vec![heads * value, *width]);
            let up = LatentUp { keys, values, heads: *heads };
            found.insert(format!("model.layers.{layer}.self_attn.kv_b_proj.weight"), up);
        }
    }
    found
}

impl LatentUp {
    /// Elements of a key, of a value and of a latent vector.
    fn sizes(&self) -> [usize; 3] {
        [self.keys.shape[1], self.values.shape[0] / self.heads.max(1), self.values.shape[1]]
    }

    /// As if it were one tensor.
    pub(super) fn meta(&self) -> TensorMeta {
        let [key, value, latent] = self.sizes();
        TensorMeta {
            shape: vec![self.heads * (key + value), latent],
            dtype: self.keys.dtype().and(self.values.dtype()).map(|_| DType::F32),
            stored: format!("{} and {}", self.keys.ggml_type, self.values.ggml_type),
            quantized: None,
        }
    }

    /// Each head's rows for keys, then its rows for values, as f32.
    pub(super) fn matrix(
        &self,
        weights: &GgufWeights,
        name: &str,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'static>, ModelError> {
        let [key, value, latent] = self.sizes();
        let stride = key + value;
        if !is_within(&rows, &cols, (self.heads * stride, latent)) {
            return Err(no_window(name, &rows, &cols));
        }
        let mut bytes = Vec::with_capacity(rows.len() * cols.len() * size_of::<f32>());
        let mut append = |part: HostMatrix<'_>| {
            let mut row = vec![0.0; part.cols];
            for index in 0..part.rows {
                part.read_row(index, &mut row);
                bytes.extend(row.iter().flat_map(|value| value.to_le_bytes()));
            }
            weights.recycle(part);
        };
        let heads = if rows.is_empty() { 0..0 } else { rows.start / stride..rows.end.div_ceil(stride) };
        for head in heads {
            let within = rows.start.max(head * stride) - head * stride
                ..rows.end.min((head + 1) * stride) - head * stride;
            if within.start < key {
                let of_keys = within.start..within.end.min(key);
                let latents = head * latent + cols.start..head * latent + cols.end;
                append(weights.stored(name, &self.keys, (latents, of_keys))?.transposed());
            }
            if within.end > key {
                let first = head * value;
                let of_values = first + within.start.max(key) - key..first + within.end - key;
                append(weights.stored(name, &self.values, (of_values, cols.clone()))?);
            }
        }
        Ok(HostMatrix {
            dtype: DType::F32,
            rows: rows.len(),
            cols: cols.len(),
            row_stride: cols.len(),
            bytes: Cow::Owned(bytes),
        })
    }
}
