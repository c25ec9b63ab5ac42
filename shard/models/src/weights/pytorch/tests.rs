//! Both containers as torch writes them, and files that nobody should trust.

use super::*;
use crate::testing::Noise;
use crate::weights::pytorch::writer::{Code, VIEW, View, archive, one_tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration-tests/fixtures/pytorch").join(name)
}

fn file_of(code: &Code, storage: &[u8]) -> Vec<u8> {
    archive(&[("m/data.pkl", &code.0), ("m/data/0", storage)])
}

fn open(bytes: &[u8]) -> Result<Pytorch, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pytorch_model.bin");
    std::fs::write(&path, bytes).unwrap();
    Pytorch::open(&[path]).map_err(|error| error.to_string())
}

fn error_of(bytes: &[u8]) -> String {
    let error = open(bytes).err().unwrap();
    assert!(error.contains("pytorch_model.bin: not a usable PyTorch file: "), "{error}");
    assert!(!error.contains('\n') && error.len() < 500, "{error}");
    error
}

fn rows(weights: &Pytorch, name: &str) -> Vec<Vec<f32>> {
    let (num_rows, num_cols) = rows_and_cols(&weights.meta(name).unwrap().shape).unwrap();
    let matrix = weights.matrix(name, 0..num_rows, 0..num_cols).unwrap();
    let row = |row| {
        let mut values = vec![0.0; num_cols];
        matrix.read_row(row, &mut values);
        values
    };
    (0..num_rows).map(row).collect()
}

#[test]
fn both_containers_hold_what_was_saved() {
    for name in ["zip.bin", "legacy.bin"] {
        let weights = Pytorch::open(&[fixture(name)]).unwrap();
        assert_eq!(weights.names().len(), 14);
        let plain: Vec<Vec<f32>> =
            (0..4).map(|row| (0..6).map(|col| (row * 6 + col) as f32).collect()).collect();
        assert_eq!(rows(&weights, "plain"), plain);
        assert_eq!(rows(&weights, "tied"), plain);
        let transposed: Vec<Vec<f32>> =
            (0..6).map(|row| (0..4).map(|col| (col * 6 + row) as f32).collect()).collect();
        assert_eq!(rows(&weights, "transposed"), transposed);
        assert_eq!(rows(&weights, "columns")[3], [20.0, 21.0, 22.0]);
        assert_eq!(rows(&weights, "one_row"), [[6.0, 7.0, 8.0, 9.0, 10.0, 11.0]]);
        assert_eq!(weights.vector("vector", 1..3).unwrap(), [6.0, 7.0]);
        assert_eq!(weights.vector("half", 21..24).unwrap(), [5.25, 5.5, 5.75]);
        assert_eq!(rows(&weights, "brain")[1][..2], [-12.0, -13.0]);
        assert_eq!(rows(&weights, "empty"), Vec::<Vec<f32>>::new());
        let window = weights.matrix("transposed", 4..6, 1..3).unwrap();
        let mut row = [0.0; 2];
        window.read_row(1, &mut row);
        assert_eq!(row, [11.0, 17.0]);
        for (name, stored) in [
            ("expanded", "F32 with strides [0, 0]"),
            ("double", "F64"),
            ("position_ids", "I64"),
            ("attn.bias", "U8"),
        ] {
            let meta = weights.meta(name).unwrap();
            assert_eq!((meta.dtype, meta.stored.as_str()), (None, stored));
            assert!(weights.matrix(name, 0..1, 0..1).is_err());
        }
        assert_eq!(weights.meta("attn.bias").unwrap().shape, [1, 1, 4, 6]);
        assert!(weights.matrix("plain", 0..5, 0..1).is_err());
    }
}

#[test]
fn a_tensor_in_two_files_is_named_with_both() {
    let error = Pytorch::open(&[fixture("zip.bin"), fixture("legacy.bin")]).err().unwrap().to_string();
    assert!(error.contains("zip.bin and in ") && error.contains("legacy.bin, expected it once"), "{error}");
}

#[test]
fn tensors_that_leave_their_storage_are_refused() {
    open(&file_of(&one_tensor("a", &VIEW), &[0; 24])).unwrap();
    let error = |view: View<'_>| error_of(&file_of(&one_tensor("a", &view), &[0; 24]));
    let huge = i64::MAX;
    assert!(error(View { offset: 1, ..VIEW }).ends_with(
        "tensor \"a\" of shape [2, 3] with strides [3, 1] from 1 on leaves its storage of 6 elements"
    ));
    for view in [
        View { shape: &[3, 3], ..VIEW },
        View { strides: &[4, 1], ..VIEW },
        View { strides: &[huge, huge], ..VIEW },
        View { offset: huge, ..VIEW },
        View { offset: 7, shape: &[0], strides: &[1], ..VIEW },
        View { offset: 6, shape: &[], strides: &[], ..VIEW },
    ] {
        let error = error(view);
        assert!(error.contains("leaves its storage"), "{error}");
    }
    for shape in [&[huge, huge], &[huge, 1], &[1 << 62, 1 << 62]] {
        let error = error(View { shape, strides: &[0, 0], ..VIEW });
        assert!(error.contains("no such tensor can exist"), "{error}");
    }
    for view in [
        View { len: 5, ..VIEW },
        View { len: 7, ..VIEW },
        View { len: huge, ..VIEW },
        View { class: "HalfStorage", ..VIEW },
        View { class: "DoubleStorage", ..VIEW },
    ] {
        let error = error(view);
        assert!(error.contains("but 24 bytes"), "{error}");
    }
    assert!(error(View { key: "1", ..VIEW }).contains("in storage \"1\", which is not there"));
    assert!(error(View { key: "../../data.pkl", ..VIEW }).contains("which is not there"));
}

#[test]
fn code_is_named_and_never_run() {
    let code = Code::new().global("posix", "system").op(b"(").text("touch /tmp/pwned").op(b"tR.");
    let error = error_of(&file_of(&code, &[]));
    assert!(error.contains("it refers to \"posix.system\""), "{error}");
    let legacy = [legacy::MAGIC, b"\x80\x02M\xe9\x03.", &code.0].concat();
    assert!(error_of(&legacy).contains("\"posix.system\""));
}

#[test]
fn damaged_archives_are_refused() {
    let pickle = one_tensor("a", &VIEW).0;
    let storage = [0; 24];
    let sound = file_of(&Code(pickle.clone()), &storage);
    for end in (0..sound.len()).step_by(7) {
        open(&sound[..end]).err().unwrap();
    }
    let replaced = |from: &[u8], to: &[u8], nth: usize| {
        let at =
            sound.windows(from.len()).enumerate().filter(|(_, window)| *window == from).nth(nth).unwrap().0;
        let mut bytes = sound.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        error_of(&bytes)
    };
    // In the directory: method 8, an encrypted entry, a size past the end, a header past the end.
    let entry = |change: &[u8], at: usize| {
        let fixed = b"PK\x01\x02";
        let start = sound.windows(4).position(|window| window == fixed).unwrap();
        let mut bytes = sound.clone();
        bytes[start + at..start + at + change.len()].copy_from_slice(change);
        error_of(&bytes)
    };
    assert!(entry(&[8, 0], 10).contains("is compressed or encrypted"));
    assert!(entry(&[1, 0], 8).contains("is compressed or encrypted"));
    assert!(entry(&[0xfe; 8], 20).contains("leaves the file; the download may be incomplete"));
    assert!(entry(&[0xff; 8], 20).contains("lacks its 64-bit size"));
    assert!(entry(&[1, 0, 0, 0], 20).contains("takes 1 bytes"));
    assert!(entry(&[0xfe; 4], 42).contains("leaves the file"));
    assert!(entry(&[1, 0, 0, 0], 42).contains("a damaged header"));
    assert!(replaced(b"PK\x05\x06", b"XX", 0).contains("the download may be incomplete"));
    assert!(replaced(b"m/data.pkl", b"m/date", 1).contains("no data.pkl, or several"));
    for entries in [
        archive(&[("m/data.pkl", &pickle), ("n/data.pkl", &pickle)]),
        archive(&[("data.pkl", &pickle)]),
        archive(&[]),
    ] {
        open(&entries).err().unwrap();
    }
    let twice = archive(&[("m/data.pkl", &pickle), ("m/data/0", &storage), ("m/data/0", &storage)]);
    assert!(error_of(&twice).contains("entry \"m/data/0\" is there twice"));
    // The second storage's header becomes that of the first.
    let mut shared = archive(&[("m/data.pkl", &pickle), ("m/data/0", &storage), ("m/data/1", &storage)]);
    let at = shared.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    let first = shared.windows(8).position(|window| window == b"m/data/0").unwrap() - 30;
    shared[at + 42..at + 46].copy_from_slice(&(first as u32).to_le_bytes());
    assert!(error_of(&shared).contains("entries \"m/data/0\" and \"m/data/1\" overlap"));
    let big = archive(&[("m/data.pkl", &pickle), ("m/data/0", &storage), ("m/byteorder", b"big")]);
    assert!(error_of(&big).contains("big-endian"));
    for other in [b"".as_slice(), b"GGUF", b"version https://git-lfs", b"\x80\x02}."] {
        assert!(error_of(other).contains("expected what torch.save writes"));
    }
}

#[test]
fn sizes_of_64_bits_are_read() {
    // As torch writes entries beyond 4 GiB: placeholders, and the sizes in the extra field.
    let pickle = one_tensor("a", &VIEW).0;
    let data: Vec<u8> = (0..6).flat_map(|n| (n as f32).to_le_bytes()).collect();
    let mut bytes = archive(&[("m/data.pkl", &pickle), ("m/data/0", &data)]);
    let at = bytes.windows(4).rposition(|window| window == b"PK\x01\x02").unwrap();
    let header = u64::from(u32::from_le_bytes(bytes[at + 42..at + 46].try_into().unwrap()));
    let directory =
        u64::from(u32::from_le_bytes(bytes[bytes.len() - 6..bytes.len() - 2].try_into().unwrap()));
    bytes.truncate(bytes.len() - END_BYTES);
    bytes[at + 20..at + 28].fill(0xff);
    bytes[at + 42..at + 46].fill(0xff);
    bytes[at + 30..at + 32].copy_from_slice(&28_u16.to_le_bytes());
    bytes.extend([1, 0, 24, 0]);
    bytes.extend([24_u64, 24, header].iter().flat_map(|size| size.to_le_bytes()));
    let end = bytes.len() as u64;
    bytes.extend(
        [b"PK\x06\x06".as_slice(), &[0; 28], &2_u64.to_le_bytes(), &[0; 8], &directory.to_le_bytes()]
            .concat(),
    );
    bytes.extend([b"PK\x06\x07\0\0\0\0".as_slice(), &end.to_le_bytes(), &[0; 4]].concat());
    bytes.extend([b"PK\x05\x06".as_slice(), &[0; 4], &[0xff; 12], &[0; 2]].concat());
    assert_eq!(rows(&open(&bytes).unwrap(), "a"), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);

    let mut many = bytes.clone();
    many[end as usize + 32..end as usize + 40].fill(0xff);
    assert!(error_of(&many).contains("expected at most 131072"));
    bytes[end as usize + 48..end as usize + 56].fill(0xff);
    assert!(error_of(&bytes).contains("the download may be incomplete"));
}

/// Of an archive's end record without a comment.
const END_BYTES: usize = 22;

#[test]
fn damaged_legacy_files_are_refused() {
    let sound = std::fs::read(fixture("legacy.bin")).unwrap();
    for end in (0..sound.len()).step_by(11) {
        open(&sound[..end]).err().unwrap();
    }
    assert!(error_of(&sound[..sound.len() - 1]).contains("leaves the file; the download may be incomplete"));
    let legacy =
        |parts: &[&[u8]]| [&[legacy::MAGIC, b"\x80\x02M\xe9\x03.\x80\x02}."], parts].concat().concat();
    let tensors = one_tensor("a", &VIEW).0;
    let len = 6_u64.to_le_bytes();
    let keys =
        |keys: &[&str]| keys.iter().fold(Code::new().op(b"]("), |code, key| code.text(key)).op(b"e.").0;
    open(&legacy(&[&tensors, &keys(&["0"]), &len, &[0; 24]])).unwrap();
    for (file, words) in [
        (legacy(&[&tensors, &keys(&[])]), "in storage \"0\", which is not there"),
        (
            legacy(&[&tensors, &keys(&["0", "0"]), &len, &[0; 24], &len, &[0; 24]]),
            "storage \"0\" is there twice",
        ),
        (legacy(&[&tensors, &keys(&["1"]), &len, &[0; 24]]), "storage \"1\" belongs to no tensor"),
        (legacy(&[&tensors, &keys(&["0"]), &[0xff; 8], &[0; 24]]), "storage \"0\" leaves the file"),
        (legacy(&[&tensors, &tensors]), "expected a list of texts"),
        ([legacy::MAGIC, b"\x80\x02M\xe8\x03."].concat(), "its version is not 1001"),
    ] {
        let error = error_of(&file);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn random_damage_is_an_error_or_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.bin");
    let mut noise = Noise::new(5);
    for name in ["zip.bin", "legacy.bin"] {
        let sound = std::fs::read(fixture(name)).unwrap();
        for _ in 0..1500 {
            let mut bytes = sound.clone();
            for _ in 0..=noise.below(3) {
                let at = noise.below(bytes.len());
                bytes[at] = noise.next() as u8;
            }
            // Some file systems wait for the disk when a file is overwritten.
            let _ = std::fs::remove_file(&path);
            std::fs::write(&path, &bytes).unwrap();
            let Ok(weights) = Pytorch::open(std::slice::from_ref(&path)) else { continue };
            for name in weights.names() {
                let Some((rows, cols)) = rows_and_cols(&weights.meta(name).unwrap().shape) else { continue };
                if let Ok(matrix) = weights.matrix(name, 0..rows, 0..cols) {
                    (0..rows).for_each(|row| matrix.read_row(row, &mut vec![0.0; cols]));
                }
            }
        }
    }
}
