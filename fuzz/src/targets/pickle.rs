//! The pickle inside a PyTorch file: the input is wrapped in a zip archive with storages that it may refer to.

use super::pytorch;

/// Storages in the archive, named by their number.
const NUM_STORAGES: usize = 10;
/// Of each: enough for the largest tensor of the tiny model in float32.
const STORAGE_BYTES: usize = 2048;

/// Loads the archive.
pub fn run(input: &[u8]) {
    pytorch::run(&archive(input));
}

/// What `torch.save` would write with this pickle.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let storage = [0x3c; STORAGE_BYTES];
    let storages = (0..NUM_STORAGES).map(|number| (format!("m/data/{number}"), storage.as_slice()));
    let entries: Vec<_> = std::iter::once(("m/data.pkl".to_owned(), pickle)).chain(storages).collect();
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in &entries {
        let offset = bytes.len() as u32;
        let sizes = [0, data.len() as u32, data.len() as u32].map(u32::to_le_bytes).concat();
        let name_len = (name.len() as u16).to_le_bytes();
        bytes.extend_from_slice(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0");
        bytes.extend([sizes.as_slice(), &name_len, &[0, 0], name.as_bytes(), data].concat());
        directory.extend_from_slice(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0");
        directory
            .extend([sizes.as_slice(), &name_len, &[0; 12], &offset.to_le_bytes(), name.as_bytes()].concat());
    }
    let (start, size) = (bytes.len() as u32, directory.len() as u32);
    let count = (entries.len() as u16).to_le_bytes();
    bytes.extend(directory);
    bytes.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    bytes.extend([count.as_slice(), &count, &size.to_le_bytes(), &start.to_le_bytes(), &[0, 0]].concat());
    bytes
}
