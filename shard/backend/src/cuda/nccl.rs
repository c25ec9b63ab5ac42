//! NVIDIA's library for collectives between GPUs, loaded when ranks need it.
//!
//! Only the symbols below are used. The ranks have met already, so its id travels over their shared memory and nothing listens on
//! the network for it; which ways between the GPUs it takes is the library's business and the user's (`NCCL_*`).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;
use libloading::Library;

use super::driver::{Context, DevicePtr, Stream};
use crate::{BackendError, DType};

/// The versioned name first: without development files there is no other.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// `ncclSum`.
const SUM: c_int = 0;
const SUCCESS: c_int = 0;

type RawComm = *mut c_void;

/// `ncclUniqueId`, which the ranks of a group know one another by.
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([u8; Self::BYTES]);

impl UniqueId {
    const BYTES: usize = 128;
}

type AllReduceFn =
    unsafe extern "C" fn(DevicePtr, DevicePtr, usize, c_int, c_int, RawComm, CUstream) -> c_int;
type BroadcastFn = AllReduceFn;
type InitFn = unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int) -> c_int;

/// The library's functions.
struct Api {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init_rank: InitFn,
    all_reduce: AllReduceFn,
    broadcast: BroadcastFn,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    abort: unsafe extern "C" fn(RawComm) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(RawComm) -> *const c_char,
    version: i32,
    // The functions are gone with it.
    _library: Library,
}

impl Api {
    fn load() -> Result<Self, BackendError> {
        // SAFETY: NCCL's initialisers do nothing but set up its own state.
        let library = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok()).ok_or_else(|| {
            refused(format!(
                "there is no {}; NVIDIA's package libnccl2 or the Python package nvidia-nccl-cu13 provides it, and \
                 LD_LIBRARY_PATH says where it is",
                NAMES[0]
            ))
        })?;
        let version: unsafe extern "C" fn(*mut c_int) -> c_int = symbol(&library, c"ncclGetVersion")?;
        let mut number = 0;
        // SAFETY: a place for a number.
        let code = unsafe { version(&raw mut number) };
        if code != SUCCESS {
            return Err(refused(format!("NCCL does not tell its version (error {code})")));
        }
        Ok(Self {
            get_unique_id: symbol(&library, c"ncclGetUniqueId")?,
            init_rank: symbol(&library, c"ncclCommInitRank")?,
            all_reduce: symbol(&library, c"ncclAllReduce")?,
            broadcast: symbol(&library, c"ncclBroadcast")?,
            group_start: symbol(&library, c"ncclGroupStart")?,
            group_end: symbol(&library, c"ncclGroupEnd")?,
            abort: symbol(&library, c"ncclCommAbort")?,
            error_string: symbol(&library, c"ncclGetErrorString")?,
            last_error: symbol(&library, c"ncclGetLastError")?,
            version: number,
            _library: library,
        })
    }

    /// `Ok` when the library said so, else its words for the error and for what led to it.
    fn check(&self, operation: &str, code: c_int) -> Result<(), BackendError> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: both give strings that live as long as the library; the second's communicator is not used.
        let (name, detail) =
            unsafe { (text((self.error_string)(code)), text((self.last_error)(ptr::null_mut()))) };
        let reason = format!("{name} (NCCL {}): {}", version_text(self.version), detail.trim());
        Err(BackendError::Device { operation: operation.to_owned(), reason: reason.replace('\n', "; ") })
    }
}

fn refused(reason: String) -> BackendError {
    BackendError::Device { operation: "starting NCCL".to_owned(), reason }
}

fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, BackendError> {
    // SAFETY: the type is that of the function in nccl.h, unchanged since version 2.13.
    match unsafe { library.get::<T>(name.to_bytes_with_nul()) } {
        Ok(function) => Ok(*function),
        Err(_) => Err(refused(format!(
            "the library has no {}, expected NCCL 2.13 or later: install a newer libnccl2",
            name.to_string_lossy()
        ))),
    }
}

/// A string of the library's.
///
/// # Safety
/// `words` is null or a string that lives.
unsafe fn text(words: *const c_char) -> String {
    if words.is_null() {
        return String::new();
    }
    // SAFETY: by contract.
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

/// 22809 is 2.28.9.
fn version_text(version: i32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// The library's numbers for element types.
fn type_number(dtype: DType) -> c_int {
    match dtype {
        DType::F16 => 6,
        DType::F32 => 7,
        DType::BF16 => 9,
    }
}

/// One rank's part of a group of GPUs.
pub(super) struct Nccl {
    api: Api,
    comm: RawComm,
}

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Nccl {}

/// The library, before the ranks have met in it.
pub(super) struct Loaded(Api);

impl Loaded {
    /// Loads the library; none of the ranks has to be there.
    ///
    /// # Errors
    /// One line that says what is missing and what provides it.
    pub(super) fn new() -> Result<Self, BackendError> {
        Ok(Self(Api::load()?))
    }

    /// What rank 0 gives to all.
    pub(super) fn unique_id(&self) -> Result<Vec<u8>, BackendError> {
        let mut id = UniqueId([0; UniqueId::BYTES]);
        // SAFETY: a place for an id.
        let code = unsafe { (self.0.get_unique_id)(&raw mut id) };
        self.0.check("making an id for the ranks", code)?;
        Ok(id.0.to_vec())
    }

    /// Version, for the log and to be compared.
    pub(super) fn version(&self) -> String {
        version_text(self.0.version)
    }

    /// Meets the other ranks, each on a device of its own; blocks until all are there.
    pub(super) fn join(
        self,
        context: &Arc<Context>,
        id: &[u8],
        (rank, world): (usize, usize),
    ) -> Result<Nccl, BackendError> {
        context.make_current()?;
        let mut unique = UniqueId([0; UniqueId::BYTES]);
        for (to, &byte) in unique.0.iter_mut().zip(id) {
            *to = byte;
        }
        let mut comm = ptr::null_mut();
        // SAFETY: a place for a handle; the id is rank 0's.
        let code = unsafe { (self.0.init_rank)(&raw mut comm, world as c_int, unique, rank as c_int) };
        self.0.check("joining the ranks by NCCL", code)?;
        Ok(Nccl { api: self.0, comm })
    }
}

impl Nccl {
    /// `x = sum of x over the ranks`, in place, in stream order.
    pub(super) fn all_reduce(
        &self,
        stream: &Stream,
        x: DevicePtr,
        (count, dtype): (usize, DType),
    ) -> Result<(), BackendError> {
        // SAFETY: the caller gives an address range of as many elements.
        let code =
            unsafe { (self.api.all_reduce)(x, x, count, type_number(dtype), SUM, self.comm, stream.raw()) };
        self.api.check("adding up over ranks", code)
    }

    /// Rank `r`'s part `r` of `parts` (address and elements of float32) to the same part of every rank; this one's is at `own`.
    pub(super) fn all_gather(
        &self,
        stream: &Stream,
        own: DevicePtr,
        rank: usize,
        parts: &[(DevicePtr, usize)],
    ) -> Result<(), BackendError> {
        // SAFETY: begins a group that ends below.
        self.api.check("gathering from ranks", unsafe { (self.api.group_start)() })?;
        let mut result = Ok(());
        for (root, &(at, count)) in parts.iter().enumerate().filter(|(_, (_, count))| *count > 0) {
            let from = if root == rank { own } else { at };
            // SAFETY: the caller gives address ranges of as many elements.
            let code = unsafe {
                let number = type_number(DType::F32);
                (self.api.broadcast)(from, at, count, number, root as c_int, self.comm, stream.raw())
            };
            result = result.and(self.api.check("gathering from ranks", code));
        }
        // SAFETY: begun above.
        result.and(self.api.check("gathering from ranks", unsafe { (self.api.group_end)() }))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // Not `ncclCommDestroy`, which waits for the other ranks: one of them may be why this one ends.
        // SAFETY: made by `join`, and nothing uses it any more.
        let _ = unsafe { (self.api.abort)(self.comm) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_they_are_written() {
        assert_eq!(version_text(22_809), "2.28.9");
        assert_eq!(version_text(21_304), "2.13.4");
    }

    #[test]
    fn a_missing_library_is_said_in_one_line_with_what_provides_it() {
        match Loaded::new() {
            Ok(library) => assert!(library.version().starts_with('2'), "{}", library.version()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("libnccl2") && !text.contains('\n'), "{text}");
            }
        }
    }
}
