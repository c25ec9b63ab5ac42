//! Sound files, and files that nobody should trust.

use std::path::PathBuf;

use super::*;
use crate::testing::Noise;

fn file(folder: &Path, name: &str, header: &str, data: &[u8]) -> PathBuf {
    let path = folder.join(name);
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    std::fs::write(&path, bytes).unwrap();
    path
}

fn error_of(header: &str, data: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "model.safetensors", header, data);
    Safetensors::open(&[path]).err().unwrap().to_string()
}

#[test]
fn windows_of_several_files() {
    let folder = tempfile::tempdir().unwrap();
    let numbers: Vec<u8> = (0..12).flat_map(|n| (n as f32).to_le_bytes()).collect();
    let first = file(
        folder.path(),
        "model-00001-of-00002.safetensors",
        r#"{"__metadata__":{"format":"pt"},"m":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]}}"#,
        &numbers,
    );
    let second = file(
        folder.path(),
        "model-00002-of-00002.safetensors",
        r#"{"v":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"i":{"dtype":"I64","shape":[1],"data_offsets":[4,12]}}"#,
        &[0x80, 0x3f, 0x00, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    let weights = Safetensors::open(&[first.clone(), second]).unwrap();
    let window = weights.matrix("m", 1..3, 1..3).unwrap();
    let mut row = [0.0; 2];
    window.read_row(1, &mut row);
    assert_eq!((window.row_stride, row), (4, [9.0, 10.0]));
    assert_eq!(weights.vector("v", 0..2).unwrap(), [1.0, -2.0]);
    assert_eq!(weights.meta("i").unwrap().dtype, None);
    assert!(weights.matrix("i", 0..1, 0..1).is_err());
    assert!(weights.matrix("m", 0..4, 0..4).is_err());
    assert_eq!(weights.matrix("m", 3..3, 0..4).unwrap().rows, 0);

    let error = Safetensors::open(&[first.clone(), first]).err().unwrap().to_string();
    assert!(error.starts_with("tensor \"m\" is in ") && error.contains("expected it once"), "{error}");
}

#[test]
fn hostile_headers_are_refused_in_one_line() {
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let cases = [
        // Past the end, reversed, with a gap before, of a size that is not the shape's, and overflowing ones.
        tensor("[4]", "[0,16]"),
        tensor("[1]", "[4,0]"),
        tensor("[1]", "[4,8]"),
        tensor("[3]", "[0,8]"),
        tensor("[18446744073709551615,18446744073709551615]", "[0,8]"),
        tensor("[4611686018427387905]", "[0,4]"),
        tensor("[-1]", "[0,8]"),
        // Overlap.
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#
            .to_owned(),
        r#"{"a":{"dtype":"F7","shape":[2],"data_offsets":[0,8]}}"#.to_owned(),
        "[1, 2]".to_owned(),
        "{".to_owned(),
        String::new(),
        "[".repeat(100_000),
    ];
    for header in cases {
        let error = error_of(&header, &[0; 8]);
        assert!(error.contains("model.safetensors: not a usable safetensors file: "), "{error}");
        assert!(!error.contains('\n') && error.len() < 500, "{error}");
    }
}

#[test]
fn lengths_are_checked_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let error = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Safetensors::open(std::slice::from_ref(&path)).err().unwrap().to_string()
    };
    assert!(error(b"").ends_with("it has 0 bytes, expected a header"));
    assert!(error(b"1234567").ends_with("it has 7 bytes, expected a header"));
    assert!(error(&u64::MAX.to_le_bytes()).ends_with("expected at most 16777216"));
    assert!(error(&100_u64.to_le_bytes()).ends_with("ends at 8; the download may be incomplete"));
    let header = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    let truncated = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 15]].concat();
    assert!(error(&truncated).ends_with("the download may be incomplete"));
}

#[test]
fn random_damage_is_an_error_or_harmless() {
    let header = r#"{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]}}"#;
    let sound = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 12]].concat();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let mut noise = Noise::new(3);
    for _ in 0..2000 {
        let mut bytes = sound.clone();
        for _ in 0..=noise.below(3) {
            let at = noise.below(bytes.len());
            bytes[at] = noise.next() as u8;
        }
        bytes.truncate(bytes.len() - noise.below(2) * noise.below(bytes.len()));
        // Some file systems wait for the disk when a file is overwritten.
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, &bytes).unwrap();
        let Ok(weights) = Safetensors::open(std::slice::from_ref(&path)) else { continue };
        for name in weights.names() {
            let Some((rows, cols)) = rows_and_cols(&weights.meta(name).unwrap().shape) else { continue };
            if let Ok(matrix) = weights.matrix(name, 0..rows, 0..cols) {
                (0..rows).for_each(|row| matrix.read_row(row, &mut vec![0.0; cols]));
            }
        }
    }
}

/// Resident memory of the mapping of `path`, in KiB.
fn resident_kib(path: &Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let own = maps.split_once(path.to_str().unwrap()).unwrap().1;
    let line = own.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn what_is_packed_leaves_this_processs_memory() {
    let folder = tempfile::tempdir().unwrap();
    let data = vec![1; 4 << 20];
    let path = file(
        folder.path(),
        "model.safetensors",
        r#"{"m":{"dtype":"BF16","shape":[2048,1024],"data_offsets":[0,4194304]}}"#,
        &data,
    );
    let weights = Safetensors::open(std::slice::from_ref(&path)).unwrap();
    let read_all = || {
        let matrix = weights.matrix("m", 0..2048, 0..1024).unwrap();
        assert_eq!(matrix.bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>(), 4 << 20);
        matrix
    };
    let matrix = read_all();
    assert!(resident_kib(&path) >= 4096);
    weights.recycle(matrix);
    assert!(resident_kib(&path) < 1024, "{} KiB are left", resident_kib(&path));
    read_all();
}
