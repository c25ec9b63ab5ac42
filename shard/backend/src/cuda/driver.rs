//! The driver's objects with owners: the device, its memory, streams and events.
//!
//! Built on the raw bindings, which load the driver's library when it is first used. Whoever calls them first has asked
//! [`require`] whether the library is there: the bindings panic where it is not.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use crate::BackendError;

/// The driver API that kernels of CUDA 13.0 need.
const DRIVER_VERSION: i32 = 13_000;

/// A device address.
pub(crate) type DevicePtr = u64;

/// An error of `operation` with the driver's own words. What leaves the device useless for this process is
/// [`BackendError::DeviceLost`].
pub(super) fn failed(operation: &str, code: sys::CUresult) -> BackendError {
    let mut text = ptr::null();
    // SAFETY: `text` is a place for a pointer to a constant string; it stays null where the code is unknown.
    let found = unsafe { sys::cuGetErrorString(code, &raw mut text) } == sys::CUresult::CUDA_SUCCESS;
    let words = if found && !text.is_null() {
        // SAFETY: the driver gives a string that lives as long as the process.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        "unknown error".to_owned()
    };
    let reason = format!("{words} ({code:?})");
    if is_lasting(code) {
        return BackendError::DeviceLost {
            device: "the GPU".to_owned(),
            operation: operation.to_owned(),
            reason,
        };
    }
    BackendError::Device { operation: operation.to_owned(), reason }
}

/// Whether every later call would answer the same: a kernel went wrong, or the hardware did. It may be an earlier launch's.
fn is_lasting(code: sys::CUresult) -> bool {
    use sys::CUresult::*;
    matches!(
        code,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_UNKNOWN
    )
}

/// `Ok` when the driver said so.
pub(super) fn check(operation: &str, code: sys::CUresult) -> Result<(), BackendError> {
    if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failed(operation, code)) }
}

fn refused(reason: impl Into<String>) -> BackendError {
    BackendError::Device { operation: "starting CUDA".to_owned(), reason: reason.into() }
}

/// Finds out whether this machine can run CUDA at all: library, driver version, a device.
///
/// # Errors
/// One line that names what is missing and what provides it.
pub(super) fn require(ordinal: usize) -> Result<(), BackendError> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(refused(
            "there is no NVIDIA driver (libcuda.so.1) here; install it, start the container with the NVIDIA runtime \
             (--gpus all), or use --device cpu",
        ));
    }
    // SAFETY: the library is there.
    let code = unsafe { sys::cuInit(0) };
    if let Some(problem) = problem_with_start(code) {
        return Err(refused(problem));
    }
    let mut version = 0;
    // SAFETY: a place for a number.
    check("asking the driver's version", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    if let Some(problem) = problem_with_version(version) {
        return Err(refused(problem));
    }
    let mut count = 0;
    // SAFETY: a place for a number.
    check("counting devices", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    if ordinal >= usize::try_from(count).unwrap_or(0) {
        return Err(refused(format!(
            "there is no device {ordinal}: the driver shows {count}; CUDA_VISIBLE_DEVICES decides which are visible"
        )));
    }
    Ok(())
}

/// What `cuInit` found, in words; none: nothing is wrong.
fn problem_with_start(code: sys::CUresult) -> Option<String> {
    match code {
        sys::CUresult::CUDA_SUCCESS => None,
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Some(
            "the driver finds no GPU; CUDA_VISIBLE_DEVICES or the container hides them, or use --device cpu"
                .to_owned(),
        ),
        sys::CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | sys::CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => Some(format!(
            "libcuda.so.1 does not fit the kernel's NVIDIA driver ({code:?}); after an update of the driver reboot, and do not \
             put CUDA's compat folder on LD_LIBRARY_PATH"
        )),
        other => Some(format!(
            "the CUDA driver does not start ({other:?}); nvidia-smi says whether it works at all"
        )),
    }
}

/// Of a driver that supports CUDA `version` at most (13000 is 13.0).
fn problem_with_version(version: i32) -> Option<String> {
    (version < DRIVER_VERSION).then(|| {
        format!(
            "the driver supports CUDA {}.{}, expected 13.0 or later: install a driver of branch 580 or later",
            version / 1000,
            version % 1000 / 10
        )
    })
}

/// Of a device of this compute capability: bfloat16 begins with 8.0.
fn problem_with_capability((major, minor): (i32, i32)) -> Option<String> {
    (major < 8).then(|| {
        format!(
            "the GPU has compute capability {major}.{minor}, expected 8.0 (Ampere) or later: choose another with \
             CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    })
}

/// Why device `ordinal` gives no context; none: the driver's own words have to do.
fn problem_with_context(code: sys::CUresult, ordinal: usize) -> Option<String> {
    match code {
        sys::CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => Some(format!(
            "device {ordinal} is in use by another process and its compute mode is exclusive, or prohibited (nvidia-smi -q -d \
             COMPUTE says which); choose another device, or end that process"
        )),
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Some(format!(
            "device {ordinal} has no memory left for a context: another process holds it (nvidia-smi names it)"
        )),
        _ => None,
    }
}

/// The device's primary context, current on the thread that made it.
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: a context may be used from any thread that makes it current.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks for itself.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of device `ordinal`.
    ///
    /// # Errors
    /// What [`require`] finds, or why the device cannot be used.
    pub(super) fn new(ordinal: usize) -> Result<Arc<Self>, BackendError> {
        require(ordinal)?;
        let mut device = 0;
        let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        // SAFETY: places for what the driver makes.
        unsafe {
            check("opening the device", sys::cuDeviceGet(&raw mut device, number))?;
            let mut raw = ptr::null_mut();
            match sys::cuDevicePrimaryCtxRetain(&raw mut raw, device) {
                sys::CUresult::CUDA_SUCCESS => {}
                code => {
                    let problem = problem_with_context(code, ordinal);
                    return Err(problem.map_or_else(|| failed("opening a context", code), refused));
                }
            }
            let context = Self { device, raw };
            context.make_current()?;
            if let Some(problem) = problem_with_capability(context.compute_capability()?) {
                return Err(refused(problem));
            }
            Ok(Arc::new(context))
        }
    }

    /// Makes it the calling thread's.
    pub(super) fn make_current(&self) -> Result<(), BackendError> {
        // SAFETY: the context is alive.
        check("making the context current", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// One of the device's numbers.
    pub(super) fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32, BackendError> {
        let mut value = 0;
        // SAFETY: a place for a number.
        let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, self.device) };
        check("asking for a property of the device", code)?;
        Ok(value)
    }

    /// Compute capability, e.g. `(9, 0)`.
    pub(super) fn compute_capability(&self) -> Result<(i32, i32), BackendError> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok((self.attribute(MAJOR)?, self.attribute(MINOR)?))
    }

    /// What the driver calls the device.
    pub(super) fn name(&self) -> Result<String, BackendError> {
        let mut text = [0u8; 256];
        // SAFETY: the driver writes at most 256 bytes, the last of them zero.
        let code = unsafe { sys::cuDeviceGetName(text.as_mut_ptr().cast(), 256, self.device) };
        check("asking the device's name", code)?;
        Ok(CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy().into_owned())
    }

    /// What tells the device from all others.
    pub(super) fn uuid(&self) -> Result<[u8; 16], BackendError> {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: a place for 16 bytes.
        let code = unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, self.device) };
        check("asking the device's identity", code)?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// Free and total bytes of the device.
    pub(super) fn memory(&self) -> Result<(usize, usize), BackendError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: places for two numbers.
        check("asking for free memory", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `new`. At the end of a process the driver may be gone already: nobody could act on that.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Memory of the device.
pub(super) struct DeviceMemory {
    ptr: DevicePtr,
    bytes: usize,
    // The context outlives its memory.
    context: Arc<Context>,
}

impl DeviceMemory {
    /// `bytes` of undefined contents; `what` they are for goes into the error.
    pub(super) fn new(context: &Arc<Context>, bytes: usize, what: &str) -> Result<Self, BackendError> {
        let mut ptr = 0;
        // SAFETY: a place for an address; the context is current on every thread that allocates.
        match unsafe { sys::cuMemAlloc_v2(&raw mut ptr, bytes.max(1)) } {
            sys::CUresult::CUDA_SUCCESS => Ok(Self { ptr, bytes, context: Arc::clone(context) }),
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(BackendError::OutOfMemory {
                what: format!("{what} on the GPU"),
                needed_bytes: bytes,
                available_bytes: context.memory()?.0,
            }),
            code => Err(failed(&format!("allocating {what}"), code)),
        }
    }

    /// The same, all zero.
    pub(super) fn zeroed(context: &Arc<Context>, bytes: usize, what: &str) -> Result<Self, BackendError> {
        let memory = Self::new(context, bytes, what)?;
        // SAFETY: the range was just allocated.
        check("clearing memory", unsafe { sys::cuMemsetD8_v2(memory.ptr, 0, bytes.max(1)) })?;
        // A memset of the default stream is not ordered before other streams.
        // SAFETY: the context is current.
        check("clearing memory", unsafe { sys::cuCtxSynchronize() })?;
        Ok(memory)
    }

    /// Its address.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`, and nothing uses it: whoever launched work on it has waited or owns the stream's end.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context.raw);
            let _ = sys::cuMemFree_v2(self.ptr);
        }
    }
}

/// Another process's memory of a device, perhaps another device, mapped here.
pub(super) struct IpcMemory {
    ptr: DevicePtr,
    context: Arc<Context>,
}

impl IpcMemory {
    /// What other processes open `memory` by.
    pub(super) fn export(memory: &DeviceMemory) -> Result<Vec<u8>, BackendError> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: a place for a handle; the address begins an allocation.
        let code = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, memory.ptr()) };
        check("sharing memory with other ranks", code)?;
        Ok(handle.reserved.iter().map(|&byte| byte as u8).collect())
    }

    /// Maps what another process has exported, whether or not its device is visible here.
    pub(super) fn open(context: &Arc<Context>, exported: &[u8]) -> Result<Self, BackendError> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        for (to, &byte) in handle.reserved.iter_mut().zip(exported) {
            *to = byte.cast_signed();
        }
        let mut ptr = 0;
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: a place for an address; the driver refuses bytes that are no handle.
        let code = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut ptr, handle, flags) };
        check("mapping another rank's memory", code)?;
        Ok(Self { ptr, context: Arc::clone(context) })
    }

    /// Its address here.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.ptr
    }
}

impl Drop for IpcMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`; the kernels that use it are bounded, and the driver waits for them.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context.raw);
            let _ = sys::cuIpcCloseMemHandle(self.ptr);
        }
    }
}

/// Page-locked memory of the host, which the device's copy engines reach.
pub(super) struct PinnedMemory {
    ptr: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// `bytes` of zeros.
    pub(super) fn new(context: &Arc<Context>, bytes: usize, what: &str) -> Result<Self, BackendError> {
        let mut ptr: *mut c_void = ptr::null_mut();
        // SAFETY: a place for an address.
        let code = unsafe { sys::cuMemAllocHost_v2(&raw mut ptr, bytes.max(1)) };
        check(
            &format!("allocating {bytes} bytes of page-locked memory for {what} (ulimit -l limits it)"),
            code,
        )?;
        // SAFETY: the range was just allocated.
        unsafe { ptr::write_bytes(ptr.cast::<u8>(), 0, bytes) };
        Ok(Self { ptr: ptr.cast(), bytes, context: Arc::clone(context) })
    }

    /// Where kernels find it: the device sees page-locked memory at the host's address.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.ptr as DevicePtr
    }

    /// Its bytes.
    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated and initialised by `new`.
        unsafe { std::slice::from_raw_parts(self.ptr, self.bytes) }
    }

    /// Its bytes. The caller has waited for copies from and to them.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; copies that use it have been waited for.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context.raw);
            let _ = sys::cuMemFreeHost(self.ptr.cast());
        }
    }
}

/// A queue of work on the device.
pub(super) struct Stream {
    raw: sys::CUstream,
    context: Arc<Context>,
}

// SAFETY: a stream may be used from any thread, one at a time.
unsafe impl Send for Stream {}
// SAFETY: the driver locks for itself.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not wait for the default one.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, BackendError> {
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a place for a handle.
        check("making a stream", unsafe { sys::cuStreamCreate(&raw mut raw, flags) })?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// The driver's handle.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Its device's context.
    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Waits, polling, until everything launched so far is done: sleeping would cost 50 us a step.
    ///
    /// # Errors
    /// Something launched went wrong, or nothing ends within `patience`.
    pub(super) fn synchronize(&self, patience: Duration) -> Result<(), BackendError> {
        let begin = Instant::now();
        loop {
            // Asking for the time costs less than asking the driver.
            for _ in 0..64 {
                // SAFETY: the stream is alive.
                match unsafe { sys::cuStreamQuery(self.raw) } {
                    sys::CUresult::CUDA_ERROR_NOT_READY => std::hint::spin_loop(),
                    code => return check("waiting for the device", code),
                }
            }
            if begin.elapsed() > patience {
                return Err(BackendError::Device {
                    operation: "waiting for the device".to_owned(),
                    reason: format!("not done after {} s", patience.as_secs()),
                });
            }
        }
    }

    /// Copies `bytes` to the device in stream order. `source` must be left alone until the copy is done; it is at once where
    /// it is no page-locked memory.
    pub(super) fn upload(&self, to: DevicePtr, source: &[u8]) -> Result<(), BackendError> {
        // SAFETY: the caller gives an address range of the device that is as long.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, source.as_ptr().cast(), source.len(), self.raw) };
        check("copying to the device", code)
    }

    /// Copies from the device in stream order; `to` holds the result once the stream has been waited for.
    pub(super) fn download(&self, to: &mut [u8], from: DevicePtr) -> Result<(), BackendError> {
        // SAFETY: the caller gives an address range of the device that is as long.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.raw) };
        check("copying from the device", code)
    }

    /// Copies within the device in stream order.
    pub(super) fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<(), BackendError> {
        // SAFETY: the caller gives two address ranges of the device that are as long.
        check("copying on the device", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.raw) })
    }

    /// Copies `rows` rows of `row_bytes` bytes within the device, each place an address and the bytes from one row to the next.
    pub(super) fn copy_columns(
        &self,
        (to, to_stride): (DevicePtr, usize),
        (from, from_stride): (DevicePtr, usize),
        (row_bytes, rows): (usize, usize),
    ) -> Result<(), BackendError> {
        if row_bytes * rows == 0 {
            return Ok(());
        }
        // SAFETY: plain data, of which zero means nothing.
        let mut copy: sys::CUDA_MEMCPY2D = unsafe { std::mem::zeroed() };
        copy.srcMemoryType = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        copy.srcDevice = from;
        copy.srcPitch = from_stride;
        copy.dstMemoryType = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        copy.dstDevice = to;
        copy.dstPitch = to_stride;
        copy.WidthInBytes = row_bytes;
        copy.Height = rows;
        // SAFETY: the caller gives two places of the device with as many rows.
        check("copying on the device", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`; waiting first keeps memory that is in use alive long enough.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context.raw);
            let _ = sys::cuStreamSynchronize(self.raw);
            let _ = sys::cuStreamDestroy_v2(self.raw);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sys::CUresult;
    use super::*;

    #[test]
    fn what_is_missing_is_said_in_one_line() {
        let context = |code| problem_with_context(code, 3);
        for (problem, word) in [
            (problem_with_start(CUresult::CUDA_ERROR_NO_DEVICE), "CUDA_VISIBLE_DEVICES"),
            (problem_with_start(CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH), "reboot"),
            (problem_with_start(CUresult::CUDA_ERROR_SYSTEM_NOT_READY), "SYSTEM_NOT_READY"),
            (problem_with_version(12_080), "supports CUDA 12.8, expected 13.0 or later"),
            (problem_with_capability((7, 5)), "compute capability 7.5, expected 8.0"),
            (context(CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE), "device 3 is in use"),
            (context(CUresult::CUDA_ERROR_OUT_OF_MEMORY), "device 3 has no memory left"),
        ] {
            let problem = problem.unwrap();
            assert!(problem.contains(word) && !problem.contains('\n'), "{problem}");
        }
        assert_eq!(problem_with_start(CUresult::CUDA_SUCCESS), None);
        assert_eq!(problem_with_version(13_000), None);
        assert_eq!(problem_with_capability((8, 0)), None);
        assert_eq!(context(CUresult::CUDA_ERROR_INVALID_DEVICE), None);
    }

    #[test]
    fn faults_that_last_are_told_from_refusals() {
        for code in [
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
        ] {
            assert!(is_lasting(code), "{code:?}");
        }
        for code in [CUresult::CUDA_ERROR_OUT_OF_MEMORY, CUresult::CUDA_ERROR_INVALID_VALUE] {
            assert!(!is_lasting(code), "{code:?}");
        }
    }
}
