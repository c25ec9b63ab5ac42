//! A file on its way: the bytes that have come, and a table of which those are, in one file.
//!
//! Behind the place of the content there is a trailer: a mark, the content's size, the segment size, and for each segment
//! how many of its bytes are here, all integers of 64 bits, little endian. Bytes are written before they are counted, so a
//! process that is killed at any moment leaves a file that can be gone on with. The trailer is cut off when all is here; a
//! file without one, of the right size, lacks only the check of its content.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MARK: &[u8; 16] = b"quartet part 1\r\n";
/// Mark, size, segment size.
const HEADER_BYTES: u64 = 32;

/// See the module's text.
#[derive(Debug)]
pub(super) struct PartFile {
    file: File,
    path: PathBuf,
    size: u64,
    segment_bytes: u64,
    /// Bytes that are here, from each segment's start.
    done: Vec<AtomicU64>,
}

impl PartFile {
    /// Opens the file at `path` for a content of `size` bytes, and goes on where an earlier process stopped; what is there
    /// but is no such file is begun anew. `segment_bytes` is the size of new segments, at least 1.
    pub(super) fn open(path: &Path, size: u64, segment_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let (segment_bytes, done, is_new) = match read_table(&file, size)? {
            Some((segment_bytes, done)) => (segment_bytes, done, false),
            None => {
                let segment_bytes = segment_bytes.max(1);
                (segment_bytes, vec![0; num_segments(size, segment_bytes)], true)
            }
        };
        let done = done.into_iter().map(AtomicU64::new).collect();
        let part = Self { file, path: path.to_owned(), size, segment_bytes, done };
        if is_new {
            part.begin()?;
        }
        Ok(part)
    }

    /// Forgets what is here.
    pub(super) fn begin(&self) -> io::Result<()> {
        self.done.iter().for_each(|done| done.store(0, Ordering::Relaxed));
        self.file.set_len(0)?;
        let mut trailer = MARK.to_vec();
        trailer.extend(self.size.to_le_bytes());
        trailer.extend(self.segment_bytes.to_le_bytes());
        trailer.resize(trailer.len() + 8 * self.done.len(), 0);
        self.file.write_all_at(&trailer, self.size)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Number of segments; 0 for an empty content.
    pub(super) fn num_segments(&self) -> usize {
        self.done.len()
    }

    /// The bytes of segment `index`.
    pub(super) fn segment(&self, index: usize) -> Range<u64> {
        let start = index as u64 * self.segment_bytes;
        start..(start + self.segment_bytes).min(self.size)
    }

    /// Where the bytes of segment `index` that are not here begin; its end when all are.
    pub(super) fn next_missing(&self, index: usize) -> u64 {
        index as u64 * self.segment_bytes + self.done[index].load(Ordering::Relaxed)
    }

    /// Where the first byte that is not here is; the content's size when all are.
    pub(super) fn first_missing(&self) -> u64 {
        (0..self.num_segments())
            .map(|index| (self.next_missing(index), self.segment(index).end))
            .find(|(next, end)| next < end)
            .map_or(self.size, |(next, _)| next)
    }

    /// How many bytes are here.
    pub(super) fn num_done(&self) -> u64 {
        self.done.iter().map(|done| done.load(Ordering::Relaxed)).sum()
    }

    /// Takes the bytes at `offset`, however many segments they are of, and leaves out those that are here already. A stream
    /// of them must not begin behind the first byte that its segment lacks.
    pub(super) fn write(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() && offset < self.size {
            let index = (offset / self.segment_bytes) as usize;
            let segment = self.segment(index);
            // Segments are of at most this buffer's length or longer than it, so this fits.
            let count = (bytes.len() as u64).min(segment.end - offset) as usize;
            let (mine, rest) = bytes.split_at(count);
            let skip = self.next_missing(index).saturating_sub(offset).min(count as u64) as usize;
            if skip < count {
                self.write_segment(index, offset + skip as u64, &mine[skip..])?;
            }
            (offset, bytes) = (offset + count as u64, rest);
        }
        Ok(())
    }

    fn write_segment(&self, index: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        let done = offset + bytes.len() as u64 - self.segment(index).start;
        // Two streams may bring the same bytes; the count never goes back.
        let before = self.done[index].fetch_max(done, Ordering::Relaxed);
        let place = self.size + HEADER_BYTES + 8 * index as u64;
        self.file.write_all_at(&before.max(done).to_le_bytes(), place)
    }

    /// Cuts the trailer off and has the content written to the disk. All bytes must be here.
    pub(super) fn complete(&self) -> io::Result<()> {
        self.file.set_len(self.size)?;
        self.file.sync_all()
    }
}

fn num_segments(size: u64, segment_bytes: u64) -> usize {
    size.div_ceil(segment_bytes) as usize
}

/// Segment size and counts of an existing file; `None` when it is not one of ours, or of another content.
fn read_table(file: &File, size: u64) -> io::Result<Option<(u64, Vec<u64>)>> {
    let length = file.metadata()?.len();
    if length == size && size > 0 {
        return Ok(Some((size, vec![size])));
    }
    if length < size + HEADER_BYTES {
        return Ok(None);
    }
    let mut header = [0; HEADER_BYTES as usize];
    file.read_exact_at(&mut header, size)?;
    let segment_bytes = read_u64(&header[24..]);
    if header[..16] != MARK[..] || read_u64(&header[16..]) != size || segment_bytes == 0 {
        return Ok(None);
    }
    let count = size.div_ceil(segment_bytes);
    // Compared before anything is allocated.
    if count.checked_mul(8).and_then(|bytes| bytes.checked_add(size + HEADER_BYTES)) != Some(length) {
        return Ok(None);
    }
    let mut table = vec![0; 8 * count as usize];
    file.read_exact_at(&mut table, size + HEADER_BYTES)?;
    let done: Vec<u64> = table.chunks_exact(8).map(read_u64).collect();
    let is_possible = |(index, &done): (usize, &u64)| {
        let start = index as u64 * segment_bytes;
        done <= segment_bytes.min(size - start)
    };
    Ok(done.iter().enumerate().all(is_possible).then_some((segment_bytes, done)))
}

fn read_u64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(size: usize) -> Vec<u8> {
        (0..size).map(|index| (index * 7 % 251) as u8).collect()
    }

    #[test]
    fn goes_on_where_it_stopped_whatever_the_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        let bytes = content(1000);
        let part = PartFile::open(&path, 1000, 300).unwrap();
        assert_eq!((part.num_segments(), part.segment(3), part.first_missing()), (4, 900..1000, 0));
        part.write(600, &bytes[600..750]).unwrap();
        part.write(0, &bytes[..10]).unwrap();
        drop(part);

        // Another segment size does not matter any more.
        let part = PartFile::open(&path, 1000, 64).unwrap();
        assert_eq!((part.num_segments(), part.num_done(), part.first_missing()), (4, 160, 10));
        assert_eq!(part.next_missing(2), 750);
        // A stream from the start over everything leaves out what is here.
        part.write(0, &[&[0; 10], &bytes[10..]].concat()).unwrap();
        assert_eq!((part.num_done(), part.first_missing()), (1000, 1000));
        part.complete().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);

        // Complete but not renamed: nothing is missing.
        assert_eq!(PartFile::open(&path, 1000, 64).unwrap().first_missing(), 1000);
    }

    #[test]
    fn what_is_no_part_of_this_content_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        let damage: [&dyn Fn(); 5] = [
            &|| std::fs::write(&path, "short").unwrap(),
            &|| std::fs::write(&path, vec![9; 5000]).unwrap(),
            &|| drop(PartFile::open(&path, 500, 100).unwrap()),
            &|| {
                // A count beyond its segment.
                let part = PartFile::open(&path, 1000, 300).unwrap();
                part.file.write_all_at(&301_u64.to_le_bytes(), 1000 + HEADER_BYTES).unwrap();
            },
            &|| {
                // A segment size of one byte would need a long table.
                let part = PartFile::open(&path, 1000, 300).unwrap();
                part.file.write_all_at(&1_u64.to_le_bytes(), 1024).unwrap();
            },
        ];
        for damage in damage {
            damage();
            let part = PartFile::open(&path, 1000, 300).unwrap();
            assert_eq!((part.num_done(), part.num_segments()), (0, 4));
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 1000 + HEADER_BYTES + 32);
        }
    }

    #[test]
    fn an_empty_content_is_complete_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        let part = PartFile::open(&path, 0, 300).unwrap();
        assert_eq!((part.num_segments(), part.first_missing()), (0, 0));
        part.complete().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    }
}
