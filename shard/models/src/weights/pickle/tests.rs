//! Pickles put together by hand: sound ones in small variations, and hostile ones.

use super::opcodes as op;
use super::*;
use crate::testing::Noise;
use crate::weights::pytorch::writer::{Code, VIEW, View, one_tensor};

impl Code {
    fn parse(&self) -> Result<Pickle<'_>, PickleError> {
        Pickle::parse(&self.0)
    }

    fn error(&self) -> String {
        let error = self.parse().map(|pickle| pickle.tensors().map(|_| ())).and_then(|tensors| tensors);
        error.unwrap_err().to_string()
    }
}

#[test]
fn a_dictionary_of_tensors() {
    let code = one_tensor("a", &View { offset: 1, shape: &[3], strides: &[2], ..VIEW });
    let pickle = code.parse().unwrap();
    assert_eq!(pickle.num_bytes, code.0.len());
    let tensors = pickle.tensors().unwrap();
    let (name, tensor) = tensors[0];
    assert_eq!((tensors.len(), name, tensor.offset), (1, "a", 1));
    assert_eq!((tensor.shape.as_slice(), tensor.strides.as_slice()), ([3].as_slice(), [2].as_slice()));
    assert_eq!((tensor.storage.key, tensor.storage.len, tensor.storage.element.name), ("0", 6, "F32"));
}

#[test]
fn newer_protocols_and_attached_versions() {
    // Protocol 4: a frame, names from the stack, a memo without numbers.
    let dict = |code: Code| {
        code.op(&[op::SHORT_BINUNICODE, 11])
            .op(b"collections")
            .op(&[op::SHORT_BINUNICODE, 11])
            .op(b"OrderedDict")
    };
    let code = dict(Code(vec![op::PROTO, 4]).op(&[op::FRAME]).op(&[0; 8]))
        .op(&[op::STACK_GLOBAL, op::MEMOIZE])
        .op(b")R}")
        .text("_metadata")
        .op(&[op::BINGET, 0])
        .op(b")Rsb.");
    assert_eq!(code.parse().unwrap().tensors().unwrap(), []);
}

#[test]
fn what_is_no_tensor_is_refused_by_name() {
    let call = |module: &str, name: &str| Code::new().global(module, name).op(b"(").text("id").op(b"tR.");
    for (code, words) in [
        (call("os", "system"), "it refers to \"os.system\", expected only tensors"),
        (call("builtins", "eval"), "\"builtins.eval\""),
        (call("torch", "load"), "\"torch.load\""),
        (call("torch.storage", "_load_from_bytes"), "\"torch.storage._load_from_bytes\""),
        (call("torch._utils", "_rebuild_tensor_v3"), "\"torch._utils._rebuild_tensor_v3\""),
        (call("collections", "OrderedDict"), "makes no tensor"),
        (call("torch", "FloatStorage"), "makes no tensor"),
        (Code::new().text("os").text("system").op(&[op::STACK_GLOBAL]), "\"os.system\""),
        (Code::new().op(b"(ios\nsystem\n."), "instruction INST is not allowed"),
        (Code::new().op(b"(o."), "instruction OBJ"),
        (Code::new().op(b"\x81."), "instruction NEWOBJ "),
        (Code::new().op(b"\x82\x01."), "instruction EXT1"),
        (Code::new().op(b"2."), "instruction DUP"),
        (Code::new().op(&[0xff]), "instruction 0xff"),
        (Code::new().global("torch._utils", "_rebuild_tensor_v2").op(b")b."), "attributes on a name"),
        (Code::new().op(b"}").text("x").op(b"Ns."), "entry \"x\" is None, expected a tensor"),
        (Code::new().op(b"}").text("state_dict").op(b"}s."), "is a dictionary, expected a tensor"),
        (Code::new().op(b"}NNs."), "a name is None, expected a text"),
        (Code::new().op(b"]."), "it holds a list, expected a dictionary of tensors"),
        (Code::new().op(b"]NNs."), "entries for a list, expected a dictionary"),
        (Code::new().op(b"}Na."), "entries for a dictionary, expected a list"),
        (Code::new().op(b"NQ."), "no storage"),
    ] {
        let error = code.error();
        assert!(error.contains(words), "{error}");
        assert!(!error.contains('\n') && error.len() < 250, "{error}");
    }
    let long = call("a\u{1b}[31m", &"x".repeat(10_000)).error();
    assert!(long.len() < 250 && long.contains("\\u{1b}"), "{long}");
}

#[test]
fn impossible_views_are_refused() {
    let error = |view: View<'_>| one_tensor("a", &view).error();
    assert!(error(View { offset: -1, ..VIEW }).contains("a size of -1, expected a non-negative number"));
    assert!(error(View { shape: &[2, -3], ..VIEW }).contains("a size of -3"));
    assert!(error(View { len: i64::MIN, ..VIEW }).contains("a size of -9223372036854775808"));
    assert!(error(View { shape: &[6], ..VIEW }).contains("a tensor of 1 dimensions has 2 strides"));
    assert!(error(View { shape: &[1; 9], strides: &[1; 9], ..VIEW }).contains("a tensor of 9 dimensions"));
    assert!(error(View { class: "QUInt8Storage", ..VIEW }).contains("\"torch.QUInt8Storage\""));
    let twice = Code::new().op(b"}(").text("a").tensor(&VIEW).text("a").tensor(&VIEW).op(b"u.");
    assert_eq!(twice.error(), "tensor \"a\" is there twice");
    let part_of_another = Code::new()
        .op(b"(")
        .text("storage")
        .global("torch", "FloatStorage")
        .text("0")
        .text("cpu")
        .int(6)
        .ints(&[1]);
    assert!(part_of_another.op(b"tQ.").error().contains("part of another"));
}

#[test]
fn broken_programs_are_refused() {
    for code in [
        Code(vec![]),
        Code(vec![op::PROTO]),
        Code(vec![op::PROTO, 1]),
        Code(vec![op::PROTO, 9]),
        Code::new().op(b"."),
        Code::new().op(b"0."),
        Code::new().op(b"t."),
        Code::new().op(b"(."),
        Code::new().op(b"}(Nu."),
        Code::new().op(b"}N(a."),
        Code::new().op(b"N(\x85."),
        Code::new().op(b"N\x87."),
        Code::new().op(b"Nq."),
        Code::new().op(b"q\x01."),
        Code::new().op(b"h\x01."),
        Code::new().op(b"R."),
        Code::new().op(b"NNR."),
        Code::new().op(b"s."),
        Code::new().op(b"b."),
        Code::new().op(b"X\xff\xff\xff\xffabc"),
        Code::new().op(b"X\x01\0\0\0\xff."),
        Code::new().op(b"\x8a\x09123456789."),
        Code::new().op(b"ctorch"),
        Code::new().op(b"c\xff\n\xff\n."),
    ] {
        let error = code.error();
        assert!(error.contains("(byte "), "{error}");
    }
}

#[test]
fn size_and_depth_are_bounded() {
    let values = Code::new().op(&vec![op::NONE; MAX_VALUES + 1]).op(b".");
    assert!(values.error().starts_with(&format!("it has more than {MAX_VALUES} values")));
    let references = Code::new().op(b"Nq\0").op(&b"h\0".repeat(MAX_VALUES)).op(b".");
    assert!(references.error().starts_with("it has more than"));
    assert!(Code::new().op(&vec![op::MARK; MAX_VALUES + 1]).error().starts_with("it has more than"));
    // A memo that refers to itself, and tuples a million deep, are values like others.
    let cycle = Code::new().op(b"}q\0").text("me").op(b"h\0s.");
    assert_eq!(
        cycle.error(),
        "entry \"me\" is a dictionary, expected a tensor; save the model's state dictionary alone"
    );
    let deep = Code::new().op(b"N").op(&vec![op::TUPLE1; MAX_VALUES - 1]).op(b".");
    assert_eq!(deep.error(), "it holds a tuple, expected a dictionary of tensors");
    let endless = Code::new().op(&b"(t".repeat(MAX_PICKLE_BYTES / 2)).error();
    assert!(endless.starts_with("it has more than"), "{endless}");
    let long = Code::new().op(&b"\x80\x02".repeat(MAX_PICKLE_BYTES / 2)).error();
    assert!(long.starts_with("it is longer than 16777216 bytes"), "{long}");
    let tensors =
        Code::new().global("torch._utils", "_rebuild_parameter").op(b"q\0").tensor(&VIEW).op(b"\x85q\x01");
    let tensors = tensors.op(&b"h\0h\x01R".repeat(MAX_TENSORS)).op(b".");
    assert!(tensors.error().starts_with("it has more than 65536 tensors"));
}

#[test]
fn random_damage_is_an_error_or_harmless() {
    let sound = Code::new().op(b"}(").text("a").tensor(&VIEW).text("b").tensor(&VIEW).op(b"u.").0;
    let mut noise = Noise::new(11);
    for _ in 0..20_000 {
        let mut bytes = sound.clone();
        for _ in 0..=noise.below(3) {
            let at = noise.below(bytes.len());
            bytes[at] = noise.next() as u8;
        }
        if let Ok(pickle) = Pickle::parse(&bytes) {
            let _ = pickle.tensors();
        }
    }
}
