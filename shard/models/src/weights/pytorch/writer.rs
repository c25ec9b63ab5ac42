//! What `torch.save` writes, put together by hand: for the tests here and for those of the program.

/// Instructions one after the other.
#[derive(Clone, Default)]
pub(crate) struct Code(pub(crate) Vec<u8>);

impl Code {
    pub(crate) fn new() -> Self {
        Self(b"\x80\x02".to_vec())
    }

    pub(crate) fn op(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn int(self, value: i64) -> Self {
        self.op(b"\x8a\x08").op(&value.to_le_bytes())
    }

    pub(crate) fn text(self, text: &str) -> Self {
        self.op(b"X").op(&(text.len() as u32).to_le_bytes()).op(text.as_bytes())
    }

    pub(crate) fn global(self, module: &str, name: &str) -> Self {
        self.op(format!("c{module}\n{name}\n").as_bytes())
    }

    pub(crate) fn ints(self, values: &[i64]) -> Self {
        values.iter().fold(self.op(b"("), |code, &value| code.int(value)).op(b"t")
    }

    pub(crate) fn storage(self, class: &str, key: &str, len: i64) -> Self {
        self.op(b"(").text("storage").global("torch", class).text(key).text("cpu").int(len).op(b"tQ")
    }

    /// A call of `_rebuild_tensor_v2`.
    pub(crate) fn tensor(self, view: &View<'_>) -> Self {
        self.global("torch._utils", "_rebuild_tensor_v2")
            .op(b"(")
            .storage(view.class, view.key, view.len)
            .int(view.offset)
            .ints(view.shape)
            .ints(view.strides)
            .op(b"\x89")
            .global("collections", "OrderedDict")
            .op(b")RtR")
    }
}

/// What a tensor is said to be.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) class: &'a str,
    pub(crate) key: &'a str,
    pub(crate) len: i64,
    pub(crate) offset: i64,
    pub(crate) shape: &'a [i64],
    pub(crate) strides: &'a [i64],
}

/// Six numbers as two rows.
pub(crate) const VIEW: View<'static> =
    View { class: "FloatStorage", key: "0", len: 6, offset: 0, shape: &[2, 3], strides: &[3, 1] };

/// A dictionary with one tensor.
pub(crate) fn one_tensor(name: &str, view: &View<'_>) -> Code {
    Code::new().op(b"}(").text(name).tensor(view).op(b"u.")
}

/// A zip archive as torch lays it out, with entries stored.
pub(crate) fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let (size, at) = ((data.len() as u32).to_le_bytes(), (out.len() as u32).to_le_bytes());
        let name_len = (name.len() as u16).to_le_bytes();
        out.extend(
            [b"PK\x03\x04".as_slice(), &[0; 14], &size, &size, &name_len, &[0; 2], name.as_bytes(), data]
                .concat(),
        );
        let fixed = [b"PK\x01\x02".as_slice(), &[0; 16], &size, &size, &name_len, &[0; 12], &at].concat();
        directory.extend([&fixed, name.as_bytes()].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let (size, at) = ((directory.len() as u32).to_le_bytes(), (out.len() as u32).to_le_bytes());
    [&out, &directory, b"PK\x05\x06\0\0\0\0".as_slice(), &count, &count, &size, &at, &[0; 2]].concat()
}
