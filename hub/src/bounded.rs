//! Reading small files that nobody vouches for: ordinary files only, and of bounded size.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::HubError;

/// Of a configuration. A parsed file takes a multiple of its size.
pub(crate) const MAX_JSON_BYTES: u64 = 16 << 20;
/// Of an index: those of models with hundreds of experts a layer have 13 MiB.
pub(crate) const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Of a tokenizer: the largest published ones have 35 MiB.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// The bytes of a file that has `max` at most.
///
/// # Errors
/// It cannot be read, is larger, or is no file but a pipe or a device, which might never end.
pub(crate) fn read(path: &Path, max: u64) -> Result<Vec<u8>, HubError> {
    let wrong = |found: String| {
        HubError::format(
            path.display().to_string(),
            format!("found {found}, expected a file of at most {max} bytes"),
        )
    };
    let metadata = std::fs::metadata(path).map_err(HubError::io("read", path))?;
    if !metadata.is_file() {
        return Err(wrong("no ordinary file".to_owned()));
    }
    // All at once, where the file says its size: growing would copy, and leave room for as much again.
    let mut bytes = Vec::with_capacity(metadata.len().min(max) as usize + 1);
    let file = File::open(path).map_err(HubError::io("read", path))?;
    // One more than allowed, so that a file that grows meanwhile is noticed.
    file.take(max + 1).read_to_end(&mut bytes).map_err(HubError::io("read", path))?;
    if bytes.len() as u64 > max {
        return Err(wrong(format!("{} bytes", metadata.len())));
    }
    Ok(bytes)
}

/// [`read`], as text.
pub(crate) fn read_text(path: &Path, max: u64) -> Result<String, HubError> {
    String::from_utf8(read(path, max)?).map_err(|_| {
        HubError::format(path.display().to_string(), "found bytes that are no text, expected UTF-8")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_bounded_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_text(&path, 5).unwrap(), "12345");
        let error = read(&path, 4).unwrap_err().to_string();
        assert!(error.ends_with("found 5 bytes, expected a file of at most 4 bytes"), "{error}");
        for other in [dir.path(), Path::new("/dev/zero")] {
            let error = read(other, 4).unwrap_err().to_string();
            assert!(error.contains("found no ordinary file"), "{error}");
        }
        // A file that says it is empty and is not.
        assert!(read(Path::new("/proc/cpuinfo"), 4).is_err());
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read_text(&path, 5).unwrap_err().to_string().contains("expected UTF-8"));
        assert!(read(&dir.path().join("gone"), 5).unwrap_err().to_string().starts_with("cannot read "));
    }
}
