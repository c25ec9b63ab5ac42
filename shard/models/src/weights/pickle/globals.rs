//! The names a pickle of tensors refers to: all there are.

use backend::DType;

/// What the elements of a storage are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::weights) struct ElementType {
    /// In the spelling of safetensors.
    pub(in crate::weights) name: &'static str,
    /// Bytes of one.
    pub(in crate::weights) num_bytes: usize,
    /// None: not read, such as the integers of masks.
    pub(in crate::weights) dtype: Option<DType>,
}

impl ElementType {
    const fn new(name: &'static str, num_bytes: usize, dtype: Option<DType>) -> Self {
        Self { name, num_bytes, dtype }
    }
}

/// What an allowed name means to the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Global {
    /// An empty dictionary when called.
    OrderedDict,
    /// Storage, offset, shape, strides and more that does not matter make a tensor.
    RebuildTensor,
    /// A tensor, and what training needs of it.
    RebuildParameter,
    /// One of the two before, the tensor's class, the arguments, and what is attached to it.
    RebuildFromType,
    /// A class of tensors.
    TensorClass,
    /// A class of storages.
    Storage(ElementType),
}

/// Class name and elements of torch's storages.
const STORAGES: [(&str, ElementType); 10] = [
    ("FloatStorage", ElementType::new("F32", 4, Some(DType::F32))),
    ("HalfStorage", ElementType::new("F16", 2, Some(DType::F16))),
    ("BFloat16Storage", ElementType::new("BF16", 2, Some(DType::BF16))),
    ("DoubleStorage", ElementType::new("F64", 8, None)),
    ("LongStorage", ElementType::new("I64", 8, None)),
    ("IntStorage", ElementType::new("I32", 4, None)),
    ("ShortStorage", ElementType::new("I16", 2, None)),
    ("CharStorage", ElementType::new("I8", 1, None)),
    ("ByteStorage", ElementType::new("U8", 1, None)),
    ("BoolStorage", ElementType::new("BOOL", 1, None)),
];

impl Global {
    /// The meaning of `module.name`; none: it is not allowed.
    pub(super) fn find(module: &str, name: &str) -> Option<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch._tensor", "_rebuild_from_type_v2") => Some(Self::RebuildFromType),
            ("torch", "Tensor") | ("torch.nn.parameter", "Parameter") => Some(Self::TensorClass),
            ("torch", name) => {
                let known = STORAGES.iter().find(|(known, _)| *known == name);
                known.map(|&(_, element)| Self::Storage(element))
            }
            _ => None,
        }
    }
}
