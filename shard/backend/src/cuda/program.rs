//! What the layers of a step launched, as data: whether one launch of `merged.cu` computes the same.
//!
//! While a step is prepared for recording, the operations that a merged step knows note what they launched. If these are
//! whole layers of the usual kind, one after the other and nothing else, they are a [`Program`].

use super::driver::DevicePtr;
use crate::DType;

/// Rows of weights of a tile, and of a gated product's gates in it.
const TILE: usize = 16;
const GATES: usize = 8;
/// Columns that a product takes at once.
const STEP: usize = 64;
/// Most query heads of a KV head.
const MOST_GROUP: usize = 8;
/// Operations of a layer.
const LAYER: usize = 8;

/// A product with a plain weight of 16 bits, without a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Product {
    pub(super) x: DevicePtr,
    /// Row-major without gaps.
    pub(super) weight: DevicePtr,
    pub(super) out: DevicePtr,
    pub(super) dtype: DType,
    pub(super) inputs: usize,
    /// Rows of the weight.
    pub(super) outputs: usize,
}

/// How heads lie in a row and in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heads {
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) block_size: usize,
}

/// A layer's part of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CachePlanes {
    pub(super) keys: DevicePtr,
    pub(super) values: DevicePtr,
}

/// A rotary embedding of whole heads by halves whose frequencies never change.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PlainRope {
    pub(super) inv_freq: DevicePtr,
    pub(super) pairs: usize,
    pub(super) scale: f32,
}

/// An operation as it was launched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Operation {
    /// `out = rms_norm(residual)`, of `residual += delta` where there is one; the residual is float32.
    Norm { residual: DevicePtr, delta: Option<DevicePtr>, weight: DevicePtr, eps: f32, out: DevicePtr },
    /// A product.
    Product(Product),
    /// Queries and keys turned in place, keys and values stored.
    Rope { qkv: DevicePtr, rope: PlainRope, cache: CachePlanes },
    /// Attention without a window, a cap or biases over a cache of the activations' type.
    Attention { qkv: DevicePtr, heads: Heads, scale: f32, cache: CachePlanes, out: DevicePtr },
    /// `activation(gate) * up`, the activation by its number in the kernels.
    Gated { product: Product, activation: i32 },
}

/// What was launched, in order.
#[derive(Debug, Default)]
pub(super) struct Notes {
    operations: Vec<Operation>,
    /// Launches before the first of these operations.
    prefix: usize,
    /// Launches up to the end of the last one.
    end: usize,
    /// Something else was launched among them.
    has_others: bool,
}

impl Notes {
    /// An operation that began after `begin` launches and ended after `end`; none: it is not what a merged step knows.
    pub(super) fn add(&mut self, (begin, end): (usize, usize), operation: Option<Operation>) {
        if self.operations.is_empty() {
            self.prefix = begin;
        } else if begin != self.end {
            self.has_others = true;
        }
        self.end = end;
        match operation {
            Some(operation) => self.operations.push(operation),
            None => self.has_others = true,
        }
    }

    /// The program that computes the same, if all of it were layers of the usual kind. `launched`: how many launches there were.
    pub(super) fn program(&self, launched: usize) -> Option<Program> {
        if self.has_others || self.end != launched {
            return None;
        }
        let (layers, rest) = self.operations.as_chunks::<LAYER>();
        if layers.is_empty() || !rest.is_empty() {
            return None;
        }
        let mut program: Option<Program> = None;
        for operations in layers {
            let next = Program::of_layer(operations, self.prefix)?;
            match &mut program {
                None if next.first_delta.is_none() => program = Some(next),
                Some(all) if all.is_continued_by(&next) => all.layers.extend(next.layers),
                _ => return None,
            }
        }
        program.filter(Program::fits)
    }
}

/// Where a layer's weights are, and its part of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LayerPlaces {
    /// Of queries, keys and values; out; gate and up; down.
    pub(super) weights: [DevicePtr; 4],
    /// Both norms' weights, keys and values.
    pub(super) rest: [DevicePtr; 4],
}

/// Layers for `merged.cu`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Program {
    /// Launches that come before it.
    pub(super) prefix: usize,
    pub(super) layers: Vec<LayerPlaces>,
    pub(super) dtype: DType,
    pub(super) heads: Heads,
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) residual: DevicePtr,
    pub(super) delta: DevicePtr,
    pub(super) qkv: DevicePtr,
    pub(super) mixed: DevicePtr,
    pub(super) activated: DevicePtr,
    pub(super) rope: PlainRope,
    pub(super) attention_scale: f32,
    pub(super) eps: f32,
    pub(super) activation: i32,
    /// What the first norm adds.
    first_delta: Option<DevicePtr>,
}

impl Program {
    /// One layer, if its operations read what the one before wrote.
    fn of_layer(operations: &[Operation; LAYER], prefix: usize) -> Option<Self> {
        use Operation::{Attention, Gated, Norm, Product, Rope};
        let &[
            Norm { residual, delta: first_delta, weight: norm, eps, out: normed },
            Product(qkv),
            Rope { qkv: turned, rope, cache: stored },
            Attention { qkv: attended, heads, scale, cache, out: mixed },
            Product(out),
            Norm { residual: again, delta: Some(added), weight: mlp_norm, eps: mlp_eps, out: mlp_normed },
            Gated { product: gate_up, activation },
            Product(down),
        ] = operations
        else {
            return None;
        };
        let hidden = qkv.inputs;
        let is_chain = normed == qkv.x
            && [turned, attended] == [qkv.out; 2]
            && mixed == out.x
            && added == out.out
            && mlp_normed == gate_up.x
            && gate_up.out == down.x
            && down.out == out.out
            && again == residual
            && stored == cache
            && eps.to_bits() == mlp_eps.to_bits();
        let has_widths = qkv.outputs == (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
            && out.inputs == heads.num_heads * heads.head_dim
            && [out.outputs, gate_up.inputs, down.outputs] == [hidden; 3]
            && gate_up.outputs == 2 * down.inputs;
        let has_one_type = [out, gate_up, down].iter().all(|product| product.dtype == qkv.dtype);
        (is_chain && has_widths && has_one_type).then(|| Self {
            prefix,
            layers: vec![LayerPlaces {
                weights: [qkv.weight, out.weight, gate_up.weight, down.weight],
                rest: [norm, mlp_norm, cache.keys, cache.values],
            }],
            dtype: qkv.dtype,
            heads,
            hidden,
            inner: down.inputs,
            residual,
            delta: down.out,
            qkv: qkv.out,
            mixed,
            activated: gate_up.out,
            rope,
            attention_scale: scale,
            eps,
            activation,
            first_delta,
        })
    }

    /// Rows and columns of a layer's weights, in the order of [`LayerPlaces::weights`].
    pub(super) fn weight_sizes(&self) -> [[usize; 2]; 4] {
        let Heads { num_heads, num_kv_heads, head_dim, .. } = self.heads;
        [
            [(num_heads + 2 * num_kv_heads) * head_dim, self.hidden],
            [self.hidden, num_heads * head_dim],
            [2 * self.inner, self.hidden],
            [self.hidden, self.inner],
        ]
    }

    /// Whether a layer has the same shape and goes on where this ends.
    fn is_continued_by(&self, next: &Self) -> bool {
        let like = Self { layers: self.layers.clone(), first_delta: self.first_delta, ..next.clone() };
        next.first_delta == Some(self.delta) && like == *self
    }

    /// Whether the kernel takes these sizes.
    fn fits(&self) -> bool {
        let Heads { num_heads, num_kv_heads, head_dim, .. } = self.heads;
        self.dtype != DType::F32
            && matches!(head_dim, 64 | 128)
            && self.rope.pairs * 2 == head_dim
            && num_heads.is_multiple_of(num_kv_heads)
            && num_heads / num_kv_heads <= MOST_GROUP
            && self.hidden.is_multiple_of(STEP.max(TILE))
            && self.inner.is_multiple_of(STEP.max(GATES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADS: Heads = Heads { num_heads: 8, num_kv_heads: 2, head_dim: 64, block_size: 16 };

    fn product(x: DevicePtr, weight: DevicePtr, out: DevicePtr, [inputs, outputs]: [usize; 2]) -> Product {
        Product { x, weight, out, dtype: DType::BF16, inputs, outputs }
    }

    /// A layer whose weights are numbered from `at` on; buffers have numbers below 10.
    fn layer(at: DevicePtr, delta: Option<DevicePtr>) -> Vec<Operation> {
        let cache = CachePlanes { keys: at + 6, values: at + 7 };
        let rope = PlainRope { inv_freq: 9, pairs: 32, scale: 1.0 };
        let norm = |delta, weight| Operation::Norm { residual: 1, delta, weight, eps: 1e-5, out: 2 };
        vec![
            norm(delta, at + 4),
            Operation::Product(product(2, at, 3, [512, 768])),
            Operation::Rope { qkv: 3, rope, cache },
            Operation::Attention { qkv: 3, heads: HEADS, scale: 0.125, cache, out: 4 },
            Operation::Product(product(4, at + 1, 5, [512, 512])),
            norm(Some(5), at + 5),
            Operation::Gated { product: product(2, at + 2, 6, [512, 2048]), activation: 0 },
            Operation::Product(product(6, at + 3, 5, [1024, 512])),
        ]
    }

    fn noted(operations: &[Operation]) -> Notes {
        let mut notes = Notes::default();
        for (index, &operation) in operations.iter().enumerate() {
            notes.add((index + 1, index + 2), Some(operation));
        }
        notes
    }

    fn two_layers() -> Vec<Operation> {
        [layer(100, None), layer(200, Some(5))].concat()
    }

    #[test]
    fn layers_in_order_are_a_program() {
        let program = noted(&two_layers()).program(17).unwrap();
        let places = |at: DevicePtr| LayerPlaces {
            weights: [at, at + 1, at + 2, at + 3],
            rest: [at + 4, at + 5, at + 6, at + 7],
        };
        assert_eq!(program.layers, [places(100), places(200)]);
        assert_eq!(program.weight_sizes(), [[768, 512], [512, 512], [2048, 512], [512, 1024]]);
        assert_eq!((program.prefix, program.hidden, program.inner), (1, 512, 1024));
        assert_eq!((program.residual, program.delta, program.activated), (1, 5, 6));
    }

    #[test]
    fn whatever_else_is_launched_is_no_program() {
        assert_eq!(noted(&two_layers()).program(18), None, "a launch after the last");
        let mut notes = noted(&two_layers()[..15]);
        notes.add((17, 18), Some(two_layers()[15]));
        assert_eq!(notes.program(18), None, "a launch between two");
        let mut notes = noted(&two_layers()[..15]);
        notes.add((16, 17), None);
        assert_eq!(notes.program(17), None, "an operation that is not known");
        assert_eq!(noted(&two_layers()[..15]).program(16), None, "half a layer");
        assert_eq!(noted(&[]).program(0), None);
    }

    #[test]
    fn what_does_not_go_on_where_the_last_ended_is_no_program() {
        let is_program = |change: fn(&mut Vec<Operation>)| {
            let mut operations = two_layers();
            change(&mut operations);
            noted(&operations).program(17).is_some()
        };
        assert!(is_program(|_| ()));
        assert!(!is_program(|all| all[8] = layer(200, None)[0]));
        assert!(!is_program(|all| all[0] = layer(100, Some(5))[0]));
        assert!(!is_program(|all| all[15] = Operation::Product(product(7, 203, 5, [1024, 512]))));
        assert!(!is_program(|all| all[15] = Operation::Product(product(6, 203, 8, [1024, 512]))));
        assert!(!is_program(|all| all[9] = Operation::Product(product(2, 200, 3, [512, 640]))));
        assert!(!is_program(|all| {
            let Operation::Gated { product, .. } = all[6] else { return };
            all[6] = Operation::Gated { product, activation: 1 };
        }));
    }

    #[test]
    fn sizes_that_the_kernel_does_not_take_are_no_program() {
        let mut program = noted(&two_layers()).program(17).unwrap();
        assert!(program.fits());
        program.hidden = 544;
        assert!(!program.fits());
        program.hidden = 512;
        program.heads.num_kv_heads = 3;
        assert!(!program.fits());
        program.heads = Heads { num_heads: 9, num_kv_heads: 1, ..HEADS };
        assert!(!program.fits());
        program.heads = HEADS;
        program.dtype = DType::F32;
        assert!(!program.fits());
    }
}
