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

/// An error of `operation` with the driver's own words.
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
    BackendError::Device { operation: operation.to_owned(), reason: format!("{words} ({code:?})") }
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
    match code {
        sys::CUresult::CUDA_SUCCESS => {}
        sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            return Err(refused(
                "the driver finds no GPU; CUDA_VISIBLE_DEVICES or the container hides them, or use --device cpu",
            ));
        }
        other => return Err(failed("starting the CUDA driver", other)),
    }
    let mut version = 0;
    // SAFETY: a place for a number.
    check("asking the driver's version", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    if version < DRIVER_VERSION {
        return Err(refused(format!(
            "the driver supports CUDA {}.{}, expected 13.0 or later: install a driver of branch 580 or later",
            version / 1000,
            version % 1000 / 10
        )));
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
                code @ (sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
                | sys::CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE) => {
                    let error = failed("opening a context", code);
                    return Err(refused(format!(
                        "{error}; another process holds device {ordinal} (nvidia-smi names it) or its compute mode is exclusive"
                    )));
                }
                code => return Err(failed("opening a context", code)),
            }
            let context = Self { device, raw };
            context.make_current()?;
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
