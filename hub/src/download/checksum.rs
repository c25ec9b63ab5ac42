//! What a file's content must be, and whether it is.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What the Hub says a file hashes to. It is the file's name among the cache's blobs too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    /// Of large files: SHA-256 of the content, 64 hexadecimal digits.
    Sha256(String),
    /// Of files that are kept in Git: SHA-1 of `blob SIZE\0` and the content, 40 hexadecimal digits.
    GitBlob(String),
    /// A tag that says nothing of the content, as some mirrors give. Only the size can be checked.
    Opaque(String),
}

impl Checksum {
    /// Reads an entity tag; `None` when it cannot be a file's name.
    pub(super) fn from_tag(tag: &str) -> Option<Self> {
        let is_hexadecimal = tag.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
        let is_name = tag.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        match tag.len() {
            64 if is_hexadecimal => Some(Self::Sha256(tag.to_owned())),
            40 if is_hexadecimal => Some(Self::GitBlob(tag.to_owned())),
            1..=100 if is_name && !tag.starts_with('.') => Some(Self::Opaque(tag.to_owned())),
            _ => None,
        }
    }

    /// The same for the file of this name: a tag that says nothing of the content may be two files' tag.
    pub(super) fn for_file(self, name: &str) -> Self {
        match self {
            Self::Opaque(tag) => Self::Opaque(format!("{tag}-{name}")),
            hash => hash,
        }
    }

    /// The file's name among the cache's blobs.
    pub(super) fn blob_name(&self) -> &str {
        let (Self::Sha256(name) | Self::GitBlob(name) | Self::Opaque(name)) = self;
        name
    }

    /// What is compared, in words.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "SHA-256",
            Self::GitBlob(_) => "Git hash",
            Self::Opaque(_) => "tag",
        }
    }

    /// Whether the file at `path`, of `size` bytes, has this content.
    pub(super) fn matches(&self, path: &Path, size: u64) -> io::Result<bool> {
        match self {
            Self::Sha256(expected) => Ok(hash_file(path, Sha256::new())? == *expected),
            Self::GitBlob(expected) => {
                Ok(hash_file(path, Sha1::new_with_prefix(format!("blob {size}\0")))? == *expected)
            }
            Self::Opaque(_) => Ok(true),
        }
    }
}

/// Hexadecimal digits of what `hash` gives after the file.
fn hash_file(path: &Path, mut hash: impl Digest) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_told_apart_and_never_lead_elsewhere() {
        assert!(matches!(Checksum::from_tag(&"a1".repeat(32)), Some(Checksum::Sha256(_))));
        assert!(matches!(Checksum::from_tag(&"a1".repeat(20)), Some(Checksum::GitBlob(_))));
        assert!(matches!(Checksum::from_tag("65f0-1a2b"), Some(Checksum::Opaque(_))));
        for bad in ["", "..", ".hidden", "a/b", "../x", "a b", "ä", &"x".repeat(101)] {
            assert_eq!(Checksum::from_tag(bad), None, "{bad:?}");
        }
        let of = |tag: &str| Checksum::from_tag(tag).unwrap().for_file("a.json").blob_name().to_owned();
        assert_eq!((of("65f0-2"), of(&"a1".repeat(20))), ("65f0-2-a.json".to_owned(), "a1".repeat(20)));
    }

    #[test]
    fn content_is_compared_as_git_and_sha256_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "hello\n").unwrap();
        // `printf 'hello\n' | git hash-object --stdin` and `| sha256sum`.
        let git = Checksum::from_tag("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let sha256 = Checksum::from_tag(sha256).unwrap();
        assert!(git.matches(&path, 6).unwrap() && sha256.matches(&path, 6).unwrap());
        std::fs::write(&path, "hellO\n").unwrap();
        assert!(!git.matches(&path, 6).unwrap() && !sha256.matches(&path, 6).unwrap());
    }
}
