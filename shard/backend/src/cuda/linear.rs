//! Weights on the device.

use std::sync::Arc;

use half::{bf16, f16};

use super::driver::{Context, DeviceMemory, DevicePtr};
use super::upload::Uploader;
use crate::{BackendError, DType, HostMatrix};

/// Rows begin at multiples of this many bytes, so that they can be read 16 bytes at a time.
const ROW_ALIGNMENT: usize = 16;

/// A linear layer's weight `[out_features, in_features]`, row-major.
pub struct CudaLinear {
    memory: DeviceMemory,
    /// Of weights of eight bits, `[out_features]` f32: what each row is to be multiplied with.
    scales: Option<DeviceMemory>,
    /// Its elements', or of the activations that weights of eight bits are multiplied with.
    pub(super) dtype: DType,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
    /// Elements from one row to the next.
    pub(super) row_stride: usize,
}

impl CudaLinear {
    /// Stacks `parts` along their rows. On the device once the uploader has finished.
    pub(super) fn new(
        context: &Arc<Context>,
        uploader: &Uploader,
        parts: &[HostMatrix<'_>],
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let in_features = HostMatrix::common_columns(parts)?;
        let out_features = parts.iter().map(|part| part.rows).sum::<usize>();
        let row_bytes = (in_features * dtype.size_bytes()).next_multiple_of(ROW_ALIGNMENT);
        let memory = DeviceMemory::new(context, out_features * row_bytes, "a weight")?;
        let mut to = memory.ptr();
        for part in parts {
            uploader.matrix(part, dtype, (to, row_bytes))?;
            to += (part.rows * row_bytes) as DevicePtr;
        }
        let row_stride = row_bytes / dtype.size_bytes();
        Ok(Self { memory, scales: None, dtype, out_features, in_features, row_stride })
    }

    /// Room for weights of eight bits with a scale a row.
    pub(super) fn of_eight_bits(
        context: &Arc<Context>,
        [out_features, in_features]: [usize; 2],
        dtype: DType,
    ) -> Result<Self, BackendError> {
        let row_stride = in_features.next_multiple_of(ROW_ALIGNMENT);
        let memory = DeviceMemory::new(context, out_features * row_stride, "a weight")?;
        let scales = DeviceMemory::new(context, out_features * size_of::<f32>(), "scales of a weight")?;
        Ok(Self { memory, scales: Some(scales), dtype, out_features, in_features, row_stride })
    }

    /// Room for a plain weight of the same shape.
    pub(super) fn plain_like(context: &Arc<Context>, weight: &Self) -> Result<Self, BackendError> {
        let (dtype, in_features) = (weight.dtype, weight.in_features);
        let row_bytes = (in_features * dtype.size_bytes()).next_multiple_of(ROW_ALIGNMENT);
        let memory = DeviceMemory::new(context, weight.out_features * row_bytes, "a weight")?;
        let row_stride = row_bytes / dtype.size_bytes();
        Ok(Self { memory, scales: None, dtype, out_features: weight.out_features, in_features, row_stride })
    }

    /// Address of the rows' scales; none: the weights are plain.
    pub(super) fn scales(&self) -> Option<DevicePtr> {
        self.scales.as_ref().map(DeviceMemory::ptr)
    }

    /// Address of the first row.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.memory.ptr()
    }

    /// Bytes it takes.
    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes() + self.scales.as_ref().map_or(0, DeviceMemory::bytes)
    }
}

/// A weight that the result of the next operation is multiplied with, and nothing else.
#[derive(Debug, Clone, Copy)]
pub(super) struct NextWeight {
    pub(super) is_fp8: bool,
    pub(super) dtype: DType,
    pub(super) out_features: usize,
    pub(super) in_features: usize,
}

impl From<&CudaLinear> for NextWeight {
    fn from(weight: &CudaLinear) -> Self {
        Self {
            is_fp8: weight.scales.is_some(),
            dtype: weight.dtype,
            out_features: weight.out_features,
            in_features: weight.in_features,
        }
    }
}

/// A small parameter `[width]` of f32.
pub struct CudaVector {
    memory: DeviceMemory,
    /// The same in bfloat16 and in float16, where these hold every value.
    narrow: [Option<DeviceMemory>; 2],
    pub(super) width: usize,
}

impl CudaVector {
    /// Copies `values`. On the device once the uploader has finished.
    pub(super) fn new(
        context: &Arc<Context>,
        uploader: &Uploader,
        values: &[f32],
    ) -> Result<Self, BackendError> {
        let memory = DeviceMemory::new(context, size_of_val(values), "a parameter")?;
        uploader.bytes(bytemuck::cast_slice(values), memory.ptr())?;
        let narrow = |words: Option<Vec<u16>>| -> Result<Option<DeviceMemory>, BackendError> {
            let Some(words) = words else { return Ok(None) };
            let memory = DeviceMemory::new(context, size_of_val(&*words), "a parameter")?;
            uploader.bytes(bytemuck::cast_slice(&words), memory.ptr())?;
            Ok(Some(memory))
        };
        let [bf16, f16] = narrowed(values);
        Ok(Self { memory, narrow: [narrow(bf16)?, narrow(f16)?], width: values.len() })
    }

    /// Address of the elements in another type, if it holds them as they are.
    pub(super) fn exactly_as(&self, dtype: DType) -> Option<DevicePtr> {
        match dtype {
            DType::F32 => Some(self.ptr()),
            DType::BF16 => self.narrow[0].as_ref().map(DeviceMemory::ptr),
            DType::F16 => self.narrow[1].as_ref().map(DeviceMemory::ptr),
        }
    }

    /// Address of the first element.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.memory.ptr()
    }
}

/// The bits of `values` in bfloat16 and in float16, where these hold every one of them.
fn narrowed(values: &[f32]) -> [Option<Vec<u16>>; 2] {
    let bf16 = values.iter().map(|&value| {
        let narrow = bf16::from_f32(value);
        (narrow.to_f32().to_bits() == value.to_bits()).then_some(narrow.to_bits())
    });
    let f16 = values.iter().map(|&value| {
        let narrow = f16::from_f32(value);
        (narrow.to_f32().to_bits() == value.to_bits()).then_some(narrow.to_bits())
    });
    [bf16.collect(), f16.collect()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_narrow_where_their_type_holds_them() {
        let [of_both, of_f16] = narrowed(&[0.5, -1.25, 0.0]);
        assert_eq!(of_both, Some(vec![0x3f00, 0xbfa0, 0]));
        assert_eq!(of_f16, Some(vec![0x3800, 0xbd00, 0]));
        // Too large for float16, and of more bits than bfloat16 has.
        assert!(matches!(narrowed(&[1e6, 65_536.0]), [None, None]));
        assert!(matches!(narrowed(&[65_536.0]), [Some(_), None]));
        assert!(matches!(narrowed(&[1.001_953_1]), [None, _]));
    }
}
