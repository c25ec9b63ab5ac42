//! A cursor over bytes that never reads past their end.

use super::GgufError;

/// The bytes of a file and how far they are read.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// Length of the whole file in bytes.
    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position as u64
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    /// The next `count` bytes, which hold `what`.
    pub(super) fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], GgufError> {
        let end = self.position.checked_add(count).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(GgufError::new(format!(
                "{what} needs {count} bytes at {}, but only {} are left",
                self.position,
                self.remaining()
            )));
        };
        let taken = &self.bytes[self.position..end];
        self.position = end;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things of at least `min_bytes` each; more than fit into the rest of the file is an error.
    pub(super) fn count(&mut self, min_bytes: u64, what: &str) -> Result<usize, GgufError> {
        let count = self.u64(what)?;
        let most = self.remaining() as u64 / min_bytes;
        if count > most {
            return Err(GgufError::new(format!("{count} {what}, but only {most} fit into the file")));
        }
        // At most the length of a slice, so it fits.
        Ok(count as usize)
    }

    /// A text with its length before it.
    pub(super) fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let length = self.count(1, "bytes of text")?;
        let start = self.position;
        let bytes = self.take(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(GgufError::new(format!("{what} at {start} is not valid UTF-8: {error}"))),
        }
    }
}
