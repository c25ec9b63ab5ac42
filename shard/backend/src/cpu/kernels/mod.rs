//! The arithmetic, written once over sixteen lanes and compiled for each instruction set.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod compact;
mod elementwise;
#[cfg(target_arch = "x86_64")]
mod fixed_point;
mod matmul;
mod portable;
mod quantized;
mod simd;

pub(super) use attention::{
    AttentionArgs, AttentionConfig, KeysValues, QueryRow, Target, merge, partial_len, scratch_len,
};
pub(super) use compact::{
    CompactKernels, CompactPanels, EncodedPanel, Exception, GROUP, QUAD_BYTES, QUAD_INPUTS, bases_len,
    decode, is_worth_it, max_exceptions,
};
pub(super) use matmul::{MatmulArgs, PackArgs, padded_tile};
pub(super) use quantized::{GroupLayout, STEP, STEP_BYTES, padded_tokens};
pub(super) use simd::LANES;

use super::isa::Isa;
use crate::{Activation, DType};

/// The kernels that depend on an element type.
///
/// Calling one is unsafe because it uses the instruction set; [`Kernels::of`] hands out those that the processor has.
pub(super) struct TypedKernels {
    /// Inputs a step of a packed weight takes, and 32-bit elements of its packed activations.
    pub(super) step_inputs: usize,
    /// Bytes of a step of a packed weight.
    pub(super) step_bytes: usize,
    /// Packs a tile of activations.
    pub(super) pack: unsafe fn(PackArgs<'_>),
    /// Multiplies panels.
    pub(super) matmul: unsafe fn(&MatmulArgs<'_>),
    /// Attention over a cache of this type.
    pub(super) attention: unsafe fn(AttentionArgs<'_>),
}

/// The kernels of quantized weights.
pub(super) struct QuantizedKernels {
    /// Largest tile of tokens.
    pub(super) max_tokens: usize,
    /// Packs a tile of activations.
    pub(super) pack: unsafe fn(PackArgs<'_>, &GroupLayout),
    /// Multiplies panels.
    pub(super) matmul: unsafe fn(&MatmulArgs<'_>, &GroupLayout),
}

/// The kernels of products of many rows with bf16 weights in 16-bit fixed point.
pub(super) struct FixedKernels {
    /// Tokens of a tile, of how many there are.
    pub(super) tile_tokens: fn(usize) -> usize,
    /// The number of tokens that a tile of so many is padded to.
    pub(super) padded: fn(usize) -> usize,
    /// 32-bit elements of a row's packed activations, of its inputs.
    pub(super) row_elements: fn(usize) -> usize,
    /// 32-bit elements of memory for converted panels, of their inputs: as many panels as a cache takes, at least one.
    pub(super) scratch_elements: fn(usize) -> usize,
    /// Bytes of the exponents that belong to a panel, of its steps.
    pub(super) exponents_len: fn(usize) -> usize,
    /// Computes the exponents of a panel.
    pub(super) exponents: unsafe fn(&[u8], &mut [u8]),
    /// Packs a tile of activations.
    pub(super) pack: unsafe fn(PackArgs<'_>),
    /// Multiplies panels, with the exponents of all panels and memory of `scratch_elements` for converted ones.
    pub(super) matmul: unsafe fn(&MatmulArgs<'_>, &[u8], &mut [u32]),
    /// The same of compact panels.
    pub(super) compact_matmul: unsafe fn(&MatmulArgs<'_>, &CompactPanels<'_>, &[u8], &mut [u32]),
}

/// Of a row, its weight and bias, the epsilon, and the result.
type LayerNorm = unsafe fn(&[f32], (&[f32], &[f32]), f32, &mut [f32]);
/// Of a row, its weight and bias, and the epsilon.
type LayerNormInPlace = unsafe fn(&mut [f32], (&[f32], &[f32]), f32);

/// All kernels of one instruction set.
pub(super) struct Kernels {
    /// Largest tile of tokens or query rows.
    pub(super) max_tile: usize,
    f32: TypedKernels,
    f16: TypedKernels,
    bf16: TypedKernels,
    /// Products with quantized weights.
    pub(super) quantized: QuantizedKernels,
    /// Products of many rows with bf16 weights, where the processor has a faster way for them.
    pub(super) fixed: Option<&'static FixedKernels>,
    /// Products with bf16 weights in 12 bits, where decoding them in registers is quicker than reading 16 bits.
    pub(super) compact: Option<&'static CompactKernels>,
    /// `out = rms_norm(x) * weight`.
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    /// `out = layer_norm(x) * weight + bias`.
    pub(super) layer_norm: LayerNorm,
    /// `x = rms_norm(x) * weight`.
    pub(super) rms_norm_in_place: unsafe fn(&mut [f32], &[f32], f32),
    pub(super) layer_norm_in_place: LayerNormInPlace,
    /// `x *= factor`.
    pub(super) scale: unsafe fn(&mut [f32], f32),
    /// `x = cap * tanh(x / cap)`.
    pub(super) soft_cap: unsafe fn(&mut [f32], f32),
    /// `x += y`.
    pub(super) add: unsafe fn(&mut [f32], &[f32]),
    /// `out = activation(gate) * up`.
    pub(super) gated: unsafe fn(&[f32], Activation, &mut [f32]),
    /// `x = activation(x)`.
    pub(super) activate: unsafe fn(&mut [f32], Activation),
    /// Largest element.
    pub(super) maximum: unsafe fn(&[f32]) -> f32,
    /// Sum of `exp(x - shift)`.
    pub(super) sum_exp: unsafe fn(&[f32], f32) -> f64,
}

impl Kernels {
    /// The kernels of `isa`, which the processor has: `Isa` values come from its detection.
    pub(super) fn of(isa: Isa) -> &'static Kernels {
        match isa {
            Isa::Portable => &portable_kernels::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2_kernels::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &avx512_kernels::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &avx512_vnni_kernels::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => &avx512_bf16_kernels::KERNELS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => &portable_kernels::KERNELS,
        }
    }

    /// Those for `dtype`.
    pub(super) fn typed(&self, dtype: DType) -> &TypedKernels {
        match dtype {
            DType::F32 => &self.f32,
            DType::F16 => &self.f16,
            DType::BF16 => &self.bf16,
        }
    }
}

/// Instantiates every kernel for one instruction set: `module, Simd type, bf16 weight type, integer type, fixed-point kernels,
/// compact kernels, features`.
macro_rules! kernels {
    ($module:ident, $simd:ty, $bf16:ty, $integer:ty, $fixed:expr, $compact:expr $(, $feature:literal)?) => {
        mod $module {
            use super::matmul::{Bf16, F16, F32, Widened};
            use super::*;

            type S = $simd;

            kernels!(@typed typed_f32, S, Widened<F32>, Widened<F32> $(, $feature)?);
            kernels!(@typed typed_f16, S, Widened<F16>, Widened<F16> $(, $feature)?);
            kernels!(@typed typed_bf16, S, $bf16, Widened<Bf16> $(, $feature)?);

            kernels!(@fn fn quantized_pack(args: PackArgs<'_>, layout: &GroupLayout) {
                quantized::pack::<$integer>(args, layout)
            } $(, $feature)?);
            kernels!(@fn fn quantized_matmul(args: &MatmulArgs<'_>, layout: &GroupLayout) {
                quantized::panels::<$integer>(args, layout)
            } $(, $feature)?);

            kernels!(@fn fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
                elementwise::rms_norm::<S>(x, weight, eps, out)
            } $(, $feature)?);
            kernels!(@fn fn layer_norm(x: &[f32], affine: (&[f32], &[f32]), eps: f32, out: &mut [f32]) {
                elementwise::layer_norm::<S>(x, affine, eps, out)
            } $(, $feature)?);
            kernels!(@fn fn layer_norm_in_place(x: &mut [f32], affine: (&[f32], &[f32]), eps: f32) {
                elementwise::layer_norm_in_place::<S>(x, affine, eps)
            } $(, $feature)?);
            kernels!(@fn fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
                elementwise::rms_norm_in_place::<S>(x, weight, eps)
            } $(, $feature)?);
            kernels!(@fn fn scale(x: &mut [f32], factor: f32) { elementwise::scale::<S>(x, factor) } $(, $feature)?);
            kernels!(@fn fn soft_cap(x: &mut [f32], cap: f32) { elementwise::soft_cap::<S>(x, cap) } $(, $feature)?);
            kernels!(@fn fn add(x: &mut [f32], y: &[f32]) { elementwise::add::<S>(x, y) } $(, $feature)?);
            kernels!(@fn fn gated(gate_up: &[f32], activation: Activation, out: &mut [f32]) {
                // A match on the outside leaves no branch in the loops.
                match activation {
                    Activation::Silu => elementwise::gated::<S>(gate_up, Activation::Silu, out),
                    Activation::GeluTanh => elementwise::gated::<S>(gate_up, Activation::GeluTanh, out),
                    Activation::Gelu => elementwise::gated::<S>(gate_up, Activation::Gelu, out),
                    Activation::Relu => elementwise::gated::<S>(gate_up, Activation::Relu, out),
                }
            } $(, $feature)?);
            kernels!(@fn fn activate(x: &mut [f32], activation: Activation) {
                match activation {
                    Activation::Silu => elementwise::activate::<S>(x, Activation::Silu),
                    Activation::GeluTanh => elementwise::activate::<S>(x, Activation::GeluTanh),
                    Activation::Gelu => elementwise::activate::<S>(x, Activation::Gelu),
                    Activation::Relu => elementwise::activate::<S>(x, Activation::Relu),
                }
            } $(, $feature)?);
            kernels!(@fn fn maximum(x: &[f32]) -> f32 { elementwise::maximum::<S>(x) } $(, $feature)?);
            kernels!(@fn fn sum_exp(x: &[f32], shift: f32) -> f64 { elementwise::sum_exp::<S>(x, shift) } $(, $feature)?);

            pub(super) static KERNELS: Kernels = Kernels {
                max_tile: <S as simd::Simd>::MAX_TILE,
                f32: typed_f32::KERNELS,
                f16: typed_f16::KERNELS,
                bf16: typed_bf16::KERNELS,
                quantized: QuantizedKernels {
                    max_tokens: <$integer as quantized::IntegerDot>::MAX_TOKENS,
                    pack: quantized_pack,
                    matmul: quantized_matmul,
                },
                fixed: $fixed,
                compact: $compact,
                rms_norm,
                layer_norm,
                rms_norm_in_place,
                layer_norm_in_place,
                scale,
                soft_cap,
                add,
                gated,
                activate,
                maximum,
                sum_exp,
            };
        }
    };
    (@typed $module:ident, $simd:ty, $weight:ty, $cached:ty $(, $feature:literal)?) => {
        mod $module {
            use super::*;

            kernels!(@fn fn pack(args: PackArgs<'_>) { matmul::pack::<$simd, $weight>(args) } $(, $feature)?);
            kernels!(@fn fn matmul(args: &MatmulArgs<'_>) { matmul::panels::<$simd, $weight>(args) } $(, $feature)?);
            kernels!(@fn fn attention(args: AttentionArgs<'_>) {
                attention::attention::<$simd, $cached>(args)
            } $(, $feature)?);

            pub(super) const KERNELS: TypedKernels = TypedKernels {
                step_inputs: <$weight as matmul::Weight<$simd>>::STEP_INPUTS,
                step_bytes: <$weight as matmul::Weight<$simd>>::STEP_BYTES,
                pack,
                matmul,
                attention,
            };
        }
    };
    (@fn fn $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block $(, $feature:literal)?) => {
        $(#[target_feature(enable = $feature)])?
        unsafe fn $name($($arg: $ty),*) $(-> $out)? {
            // SAFETY: the function enables the instruction set; the rest is the caller's contract.
            unsafe { $body }
        }
    };
}

kernels!(portable_kernels, portable::Portable, matmul::Bf16Pairs, portable::Portable, None, None);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx2_kernels,
    avx2::Avx2,
    matmul::Bf16Pairs,
    avx2::Avx2,
    None,
    Some(&compact::AVX2),
    "avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(avx512_kernels, avx512::Avx512, matmul::Bf16Pairs, avx2::Avx2, None, None, "avx512f,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512_vnni_kernels,
    avx512::Avx512,
    matmul::Bf16Pairs,
    avx512::Avx512,
    Some(&fixed_point::KERNELS),
    None,
    "avx512f,avx512vnni,avx512bw,avx512vl,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512_bf16_kernels,
    avx512::Avx512,
    avx512::Bf16Dot,
    avx512::Avx512,
    Some(&fixed_point::KERNELS),
    Some(&compact::AVX512_BF16),
    "avx512f,avx512bf16,avx512vnni,avx512bw,avx512vl,avx2,fma,f16c"
);
