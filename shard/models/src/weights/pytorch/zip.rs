//! The container `torch.save` writes: a zip archive whose entries are stored as they are.
//!
//! Only the central directory is read, and entries are ranges of the mapped file: what a general zip library adds
//! (decompression, copies through a reader, dates and permissions) is of no use here.

use std::collections::HashMap;
use std::ops::Range;

use crate::weights::pickle::quote;

/// What a zip archive begins with, unless it is empty.
pub(super) const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const LOCAL_HEADER_BYTES: usize = 30;
const DIRECTORY_ENTRY: &[u8] = b"PK\x01\x02";
const DIRECTORY_ENTRY_BYTES: usize = 46;
const END: &[u8] = b"PK\x05\x06";
const END_BYTES: usize = 22;
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const LOCATOR_64_BYTES: usize = 20;
const END_64: &[u8] = b"PK\x06\x06";
const END_64_BYTES: usize = 56;
/// The end record is followed by a comment of at most so many bytes.
const MAX_COMMENT_BYTES: usize = u16::MAX as usize;
/// Storages in a file: one a tensor, and a few more entries.
const MAX_ENTRIES: u64 = 1 << 17;
/// The tag of the extra field with sizes that take 64 bits.
const EXTRA_64: u16 = 1;

/// Where each entry's data is in the file.
pub(super) fn entries(bytes: &[u8]) -> Result<HashMap<&str, Range<usize>>, String> {
    let (count, start) = directory(bytes)?;
    if count > MAX_ENTRIES {
        return Err(format!("its directory has {count} entries, expected at most {MAX_ENTRIES}"));
    }
    let mut entries = HashMap::new();
    let mut at = usize::try_from(start).map_err(|_| incomplete(bytes))?;
    for _ in 0..count {
        let entry = Entry::read(bytes, at)?;
        at = entry.next;
        let range = entry.data(bytes)?;
        if entries.insert(entry.name, range).is_some() {
            return Err(format!("entry {} is there twice", quote(entry.name)));
        }
    }
    check_apart(&entries)?;
    Ok(entries)
}

/// Entries that share bytes: nothing writes them, and they make a small file look like a large one.
fn check_apart(entries: &HashMap<&str, Range<usize>>) -> Result<(), String> {
    let mut sorted: Vec<_> = entries.iter().filter(|(_, range)| !range.is_empty()).collect();
    sorted.sort_by_key(|(name, range)| (range.start, range.end, **name));
    match sorted.windows(2).find(|pair| pair[1].1.start < pair[0].1.end) {
        Some(pair) => Err(format!("entries {} and {} overlap", quote(pair[0].0), quote(pair[1].0))),
        None => Ok(()),
    }
}

/// Number of entries and start of the central directory.
fn directory(bytes: &[u8]) -> Result<(u64, u64), String> {
    let last = bytes.len().checked_sub(END_BYTES).ok_or_else(|| incomplete(bytes))?;
    let first = last.saturating_sub(MAX_COMMENT_BYTES);
    let end =
        (first..=last).rev().find(|&at| bytes[at..].starts_with(END)).ok_or_else(|| incomplete(bytes))?;
    let record = Fields::new(bytes, end, END_BYTES)?;
    let locator = end.checked_sub(LOCATOR_64_BYTES).filter(|&at| bytes[at..].starts_with(LOCATOR_64));
    let Some(locator) = locator else {
        return Ok((u64::from(record.u16(10)), u64::from(record.u32(16))));
    };
    let at = usize::try_from(Fields::new(bytes, locator, LOCATOR_64_BYTES)?.u64(8));
    let at = at.map_err(|_| incomplete(bytes))?;
    let record = Fields::new(bytes, at, END_64_BYTES)?;
    if !record.0.starts_with(END_64) {
        return Err("its end record for large files is damaged".to_owned());
    }
    Ok((record.u64(32), record.u64(48)))
}

/// An entry of the central directory.
struct Entry<'a> {
    name: &'a str,
    size: u64,
    local_header: u64,
    /// Where the next one begins.
    next: usize,
}

impl<'a> Entry<'a> {
    fn read(bytes: &'a [u8], at: usize) -> Result<Self, String> {
        let fixed = Fields::new(bytes, at, DIRECTORY_ENTRY_BYTES)?;
        if !fixed.0.starts_with(DIRECTORY_ENTRY) {
            return Err("its directory is damaged".to_owned());
        }
        let [name_bytes, extra_bytes, comment_bytes] = [28, 30, 32].map(|at| usize::from(fixed.u16(at)));
        // None of these sums can overflow: `at` is within the file and the rest has 16 bits.
        let name_at = at + DIRECTORY_ENTRY_BYTES;
        let extra_at = name_at + name_bytes;
        let next = extra_at + extra_bytes + comment_bytes;
        let name = bytes.get(name_at..extra_at).ok_or_else(|| incomplete(bytes))?;
        let extra = bytes.get(extra_at..extra_at + extra_bytes).ok_or_else(|| incomplete(bytes))?;
        let name = std::str::from_utf8(name).map_err(|_| "an entry's name is not UTF-8".to_owned())?;
        let (method, flags) = (fixed.u16(10), fixed.u16(8));
        if method != 0 || flags & 1 != 0 {
            return Err(format!("entry {} is compressed or encrypted, expected it stored", quote(name)));
        }
        let mut large = LargeFields(extra_64(extra));
        let [stored, size, local_header] = [20, 24, 42].map(|at| fixed.u32(at));
        // In the extra field, in this order, are those that do not fit.
        let size = large.take(size, name)?;
        let stored = large.take(stored, name)?;
        let local_header = large.take(local_header, name)?;
        if stored != size {
            return Err(format!("entry {} takes {stored} bytes, expected {size}", quote(name)));
        }
        Ok(Self { name, size, local_header, next })
    }

    /// The data follows a header of its own, whose name and extra field may have other lengths than here.
    fn data(&self, bytes: &[u8]) -> Result<Range<usize>, String> {
        let outside =
            || format!("entry {} leaves the file; the download may be incomplete", quote(self.name));
        let at = usize::try_from(self.local_header).map_err(|_| outside())?;
        let header = Fields::new(bytes, at, LOCAL_HEADER_BYTES).map_err(|_| outside())?;
        if !header.0.starts_with(LOCAL_HEADER) {
            return Err(format!("entry {} has a damaged header", quote(self.name)));
        }
        let start = at + LOCAL_HEADER_BYTES + usize::from(header.u16(26)) + usize::from(header.u16(28));
        let end = usize::try_from(self.size).ok().and_then(|size| start.checked_add(size));
        end.filter(|&end| end <= bytes.len()).map(|end| start..end).ok_or_else(outside)
    }
}

/// The extra field with tag [`EXTRA_64`]; empty when there is none.
fn extra_64(mut extra: &[u8]) -> &[u8] {
    while let Some((&[a, b, c, d], rest)) = extra.split_first_chunk::<4>() {
        let (tag, len) = (u16::from_le_bytes([a, b]), usize::from(u16::from_le_bytes([c, d])));
        let Some((field, rest)) = rest.split_at_checked(len) else { break };
        if tag == EXTRA_64 {
            return field;
        }
        extra = rest;
    }
    &[]
}

/// What is left of the extra field with 64-bit sizes.
struct LargeFields<'a>(&'a [u8]);

impl LargeFields<'_> {
    /// `value`, or the next of the large ones when it stands for that.
    fn take(&mut self, value: u32, name: &str) -> Result<u64, String> {
        if value != u32::MAX {
            return Ok(u64::from(value));
        }
        let missing = || format!("entry {} lacks its 64-bit size", quote(name));
        let (&first, rest) = self.0.split_first_chunk::<8>().ok_or_else(missing)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(first))
    }
}

/// A record of known size; fields are read at offsets within it.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8], at: usize, len: usize) -> Result<Self, String> {
        let end = at.checked_add(len).ok_or_else(|| incomplete(bytes))?;
        bytes.get(at..end).map(Self).ok_or_else(|| incomplete(bytes))
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        // Offsets are constants within the record.
        self.0.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}

fn incomplete(bytes: &[u8]) -> String {
    format!("its directory is not within its {} bytes; the download may be incomplete", bytes.len())
}
