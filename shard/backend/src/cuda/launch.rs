//! Launches in stream order, and their recording into graphs.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_void};
use std::mem;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::driver::{Context, DevicePtr, PinnedMemory, Stream, check};
use super::module::Function;
use super::step_clock::StepClock;
use crate::BackendError;

/// A kernel with its grid.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// The kernel.
    pub(crate) function: Function,
    /// Blocks in x, y, z.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub(crate) shared_bytes: u32,
}

/// A kernel's parameter by value; addresses are [`DevicePtr`].
pub(crate) trait Argument: Copy {}
impl Argument for DevicePtr {}
impl Argument for i64 {}
impl Argument for i32 {}
impl Argument for u32 {}
impl Argument for f32 {}
impl Argument for sys::CUtensorMap {}

/// The address of a parameter, for `args!`.
pub(crate) fn address<T: Argument>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

/// The parameters of a launch: `args![x, rows, eps]`, each a local variable or field of a type a kernel takes.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &mut [$(crate::cuda::launch::address(&$value)),*] };
}
pub(crate) use args;

/// What happens to launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// They run, or are recorded where the stream captures.
    Launch,
    /// Nothing: a recorded graph is about to run them.
    Dry,
    /// As many as this, from [`Queue::count_anew`] on, and of the others nothing.
    First(usize),
}

/// A step of the largest legal shape takes seconds at most; after this the device counts as lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where kernels that wait for other ranks say that one did not come: one more than its number.
pub(super) struct Alarm(PinnedMemory);

impl Alarm {
    /// One that is silent.
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, BackendError> {
        Ok(Self(PinnedMemory::new(context, size_of::<u32>(), "the ranks' alarm")?))
    }

    /// Where kernels find it.
    pub(super) fn ptr(&self) -> DevicePtr {
        self.0.ptr()
    }

    /// The rank that did not come.
    fn missing_rank(&self) -> Option<u32> {
        let word = self.0.as_slice().as_ptr().cast::<u32>();
        // SAFETY: page-aligned memory of four bytes. The device may write at any time, so it is read as it is.
        unsafe { word.read_volatile() }.checked_sub(1)
    }
}

/// Where operations go.
pub(crate) struct Queue {
    stream: Stream,
    pub(super) mode: Mode,
    /// Names the device in errors.
    device: String,
    /// Percent of a multiprocessor's memory that kernels ask for as shared memory, see [`super::shared_split`].
    shared_percent: Cell<Option<u32>>,
    /// Whoever wants to know when steps begin and end on the device.
    pub(super) clock: RefCell<Option<StepClock>>,
    /// Launches since [`Queue::count_anew`], those that were left out too.
    launched: Cell<usize>,
    /// Name of what was launched last, for errors.
    last: Cell<*const c_char>,
    /// Of kernels that wait for other ranks.
    alarm: Option<Alarm>,
}

// SAFETY: the handle is only read, and used from one thread at a time.
unsafe impl Send for Queue {}

impl Queue {
    /// Work on `stream` of the device of that name.
    pub(super) fn new(stream: Stream, device: &str) -> Self {
        let shared_percent = Cell::new(None);
        Self {
            stream,
            mode: Mode::Launch,
            device: device.to_owned(),
            shared_percent,
            clock: RefCell::new(None),
            launched: Cell::new(0),
            last: Cell::new(ptr::null()),
            alarm: None,
        }
    }

    /// Whether ranks have come is looked up there from now on, whenever the device has been waited for.
    pub(super) fn set_alarm(&mut self, alarm: Option<Alarm>) {
        self.alarm = alarm;
    }

    /// From now on kernels ask for this split of a multiprocessor's memory.
    pub(super) fn set_shared_percent(&self, percent: Option<u32>) {
        self.shared_percent.set(percent);
    }

    fn wait_for_rest(&self) -> Result<(), BackendError> {
        self.stream.synchronize(PATIENCE).map_err(|error| self.lost("waiting for a step", error))?;
        match self.alarm.as_ref().and_then(Alarm::missing_rank) {
            None => Ok(()),
            Some(rank) => Err(BackendError::DeviceLost {
                device: self.device.clone(),
                operation: "exchanging with the other ranks".to_owned(),
                reason: format!("rank {rank} did not come: its process is gone, stopped or far behind"),
            }),
        }
    }

    /// A step begins with what is put on the stream next. What a step that failed or was not sampled left there is over.
    ///
    /// # Errors
    /// As [`Queue::wait`].
    pub(super) fn begin_step(&self) -> Result<(), BackendError> {
        self.wait_for_rest()?;
        self.clock.borrow_mut().as_mut().map_or(Ok(()), |clock| clock.begin(&self.stream))
    }

    /// Waits until everything is done. The only place where the host waits for the device in a step.
    ///
    /// # Errors
    /// [`BackendError::DeviceLost`]: whatever was launched went wrong, here or in the hardware.
    pub(crate) fn wait(&self) -> Result<(), BackendError> {
        if let Some(clock) = &*self.clock.borrow() {
            clock.end(&self.stream)?;
        }
        self.wait_for_rest()
    }

    /// The error of a device that is of no use any more.
    fn lost(&self, operation: &str, error: BackendError) -> BackendError {
        let reason = match error {
            BackendError::Device { reason, .. } | BackendError::DeviceLost { reason, .. } => reason,
            other => other.to_string(),
        };
        BackendError::DeviceLost {
            device: self.device.clone(),
            operation: format!("{operation} (last launched: {})", self.last_kernel()),
            reason,
        }
    }

    /// Name of the kernel that was launched last, recorded ones aside.
    fn last_kernel(&self) -> String {
        let name = self.last.get();
        if name.is_null() {
            return "a recorded graph".to_owned();
        }
        // SAFETY: the driver's string; its module lives as long as the backend.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    /// The stream, for what is not a launch. Nothing may be put on it in dry mode: ask [`Queue::is_dry`].
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Whether launches are left out.
    pub(super) fn is_dry(&self) -> bool {
        match self.mode {
            Mode::Launch => false,
            Mode::Dry => true,
            Mode::First(count) => self.launched.get() >= count,
        }
    }

    /// Launches are counted from here on.
    pub(super) fn count_anew(&self) {
        self.launched.set(0);
    }

    /// Launches since [`Queue::count_anew`]. Those of cuBLASLt are none.
    pub(super) fn launched(&self) -> usize {
        self.launched.get()
    }

    /// Launches a kernel. It may start while the one before it ends (programmatic dependent launch), so every kernel waits
    /// by itself before it touches anything but weights.
    pub(crate) fn launch(&self, launch: &Launch, args: &mut [*mut c_void]) -> Result<(), BackendError> {
        self.launch_clusters(launch, 1, args)
    }

    /// Launches a kernel whose blocks wait for one another: the driver runs all of them at the same time or refuses.
    pub(super) fn launch_cooperative(
        &self,
        launch: &Launch,
        args: &mut [*mut c_void],
    ) -> Result<(), BackendError> {
        // SAFETY: an attribute is plain data; its kind says which part of the union is read.
        let mut attribute: sys::CUlaunchAttribute = unsafe { mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
        attribute.value.cooperative = 1;
        self.launch_with(launch, &mut [attribute], args)
    }

    /// The same in clusters of `blocks` blocks, of which the grid is a multiple. More than one: Hopper and later.
    pub(crate) fn launch_clusters(
        &self,
        launch: &Launch,
        blocks: u32,
        args: &mut [*mut c_void],
    ) -> Result<(), BackendError> {
        // SAFETY: an attribute is plain data; its kind says which part of the union is read.
        let mut attributes: [sys::CUlaunchAttribute; 3] = unsafe { mem::zeroed() };
        attributes[0].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[0].value.programmaticStreamSerializationAllowed = 1;
        let mut count = 1;
        if let Some(percent) = self.shared_percent.get() {
            attributes[count].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            attributes[count].value.sharedMemCarveout = percent;
            count += 1;
        }
        if blocks > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 };
            count += 1;
        }
        self.launch_with(launch, &mut attributes[..count], args)
    }

    fn launch_with(
        &self,
        launch: &Launch,
        attributes: &mut [sys::CUlaunchAttribute],
        args: &mut [*mut c_void],
    ) -> Result<(), BackendError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let is_dry = self.is_dry();
        self.launched.set(self.launched.get() + 1);
        if is_dry {
            return Ok(());
        }
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream.raw(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the arguments are as many and of the types the kernel has; each operation is tested against its reference.
        let code = unsafe {
            sys::cuLaunchKernelEx(&raw const config, launch.function.raw, args.as_mut_ptr(), ptr::null_mut())
        };
        let launched = check("launching a kernel", code).map_err(|error| match error {
            // An earlier one went wrong.
            BackendError::DeviceLost { .. } => self.lost("launching a kernel", error),
            other => other,
        });
        self.last.set(launch.function.name);
        launched
    }

    /// Copies within the device, unless dry.
    pub(super) fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<(), BackendError> {
        if self.is_dry() { Ok(()) } else { self.stream.copy(to, from, bytes) }
    }
}
