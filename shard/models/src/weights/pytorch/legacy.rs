//! The container before torch 1.6: a row of pickles, then the storages one after the other.

use std::collections::HashMap;
use std::ops::Range;

use crate::weights::pickle::{Pickle, quote};

/// The first pickle: a number that nothing else begins with.
pub(super) const MAGIC: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
/// The second pickle: the format's version, 1001, the only one there was.
const VERSION: &[u8] = b"\x80\x02M\xe9\x03.";
/// Before each storage: its number of elements.
const LEN_BYTES: usize = 8;

/// The pickle of tensors, and where each of its storages is in the file.
pub(super) fn read(bytes: &[u8]) -> Result<(Pickle<'_>, HashMap<&str, Range<usize>>), String> {
    let start = MAGIC.len() + VERSION.len();
    if bytes.get(MAGIC.len()..start) != Some(VERSION) {
        return Err("its version is not 1001".to_owned());
    }
    let mut at = start;
    let mut next = || {
        let pickle = Pickle::parse(&bytes[at..]).map_err(|error| error.to_string())?;
        at += pickle.num_bytes;
        Ok::<_, String>(pickle)
    };
    // What the machine that wrote it was like: files of big-endian ones are not to be told apart here, nor do any exist.
    next()?;
    let tensors = next()?;
    let keys = next()?;
    let element_bytes: HashMap<_, _> = tensors
        .tensors()
        .map_err(|error| error.to_string())?
        .into_iter()
        .map(|(_, tensor)| (tensor.storage.key, tensor.storage.element.num_bytes))
        .collect();
    let mut storages = HashMap::new();
    for key in keys.texts().map_err(|error| error.to_string())? {
        let incomplete = || format!("storage {} leaves the file; the download may be incomplete", quote(key));
        let Some(element_bytes) = element_bytes.get(key) else {
            return Err(format!("storage {} belongs to no tensor", quote(key)));
        };
        let len = bytes[at..].first_chunk::<LEN_BYTES>().ok_or_else(incomplete)?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| incomplete())?;
        let start = at + LEN_BYTES;
        let end = len.checked_mul(*element_bytes).and_then(|size| start.checked_add(size));
        let end = end.filter(|&end| end <= bytes.len()).ok_or_else(incomplete)?;
        if storages.insert(key, start..end).is_some() {
            return Err(format!("storage {} is there twice", quote(key)));
        }
        at = end;
    }
    Ok((tensors, storages))
}
