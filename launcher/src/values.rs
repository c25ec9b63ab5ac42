//! The values that options take beyond numbers and text.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;

/// A secret: parsed and passed on, never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Redacted(String);

impl Redacted {
    /// The secret itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl FromStr for Redacted {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

/// Ways to store weights in fewer bits.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// 4 bits, activation-aware.
    Awq,
    /// The compressed-tensors family of formats.
    CompressedTensors,
    /// 8 bits, in flight.
    Eetq,
    /// Mixed 2 to 8 bits.
    Exl2,
    /// 4 bits with reordering.
    Gptq,
    /// 4 bits in Marlin's layout.
    Marlin,
    /// 8 bits, in flight.
    Bitsandbytes,
    /// 4-bit normal floats, in flight.
    BitsandbytesNf4,
    /// 4-bit floats, in flight.
    BitsandbytesFp4,
    /// 8-bit floats.
    Fp8,
}

/// Precision of weights and arithmetic.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE half precision.
    #[value(name = "float16")]
    Float16,
    /// bfloat16.
    #[value(name = "bfloat16")]
    BFloat16,
    /// IEEE single precision.
    #[value(name = "float32")]
    Float32,
}

/// Precision of the KV cache.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCacheDtype {
    /// 4 bits of exponent, 3 of mantissa.
    #[value(name = "fp8_e4m3fn")]
    Fp8E4m3fn,
    /// 5 bits of exponent, 2 of mantissa.
    #[value(name = "fp8_e5m2")]
    Fp8E5m2,
}

/// How rotary positions are stretched.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeScaling {
    /// All positions divided by the factor.
    Linear,
    /// The base grows with the sequence.
    Dynamic,
}

/// What is told to upstream's authors: here always nothing.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageStats {
    /// As `off`.
    On,
    /// Nothing is sent.
    Off,
    /// As `off`.
    NoStack,
}

/// What the shards run on.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// CUDA when possible, else the CPU.
    Auto,
    /// NVIDIA GPUs.
    Cuda,
    /// This machine's processor.
    Cpu,
}

/// The spelling of an option's value on the command line.
pub fn spelled<T: ValueEnum>(value: T) -> String {
    value.to_possible_value().map(|possible| possible.get_name().to_owned()).unwrap_or_default()
}
