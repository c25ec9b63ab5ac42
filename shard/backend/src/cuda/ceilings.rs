//! What the hardware allows, measured: speed is judged as time over these.

use std::ptr;

use cudarc::driver::sys;

use super::cublaslt::{Operands, Product};
use super::driver::{DeviceMemory, check};
use super::launch::{Launch, args};
use super::module::Module;
use super::{CudaBackend, CudaBuffer};
use crate::{BackendError, DType};

/// Limits of the device, as a loop that only reads and a large matrix product reach them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Reading device memory.
    pub read_bytes_per_second: f64,
    /// A bf16 product of three 8192 x 8192 matrices through cuBLASLt.
    pub bf16: MatrixRate,
    /// The same of E4M3 matrices with a scale a row into bf16; none: the device or the library does not multiply them.
    pub fp8: Option<MatrixRate>,
}

/// FLOPs a second of matrix products, 2 for each multiplication and addition.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatrixRate {
    /// Of ten products in a row, 15 ms: over before the device has slowed down to keep to its power.
    pub burst: f64,
    /// Of products back to back for 0.3 s, after as many that were not counted: what a step of 0.1 s or more can have.
    pub sustained: f64,
}

/// Bytes that are read: forty times the L2 cache.
const READ_BYTES: usize = 2 << 30;
/// Width of the matrices.
const SIZE: usize = 8192;
/// Products between two looks at the clock.
const PRODUCTS: usize = 10;
/// Seconds of products, counted and before that.
const SUSTAINED: f64 = 0.3;

/// Time between two places in a stream.
struct Timer {
    begin: sys::CUevent,
    end: sys::CUevent,
}

impl Timer {
    fn new() -> Result<Self, BackendError> {
        let (mut begin, mut end) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: places for two handles.
        unsafe {
            check("making an event", sys::cuEventCreate(&raw mut begin, 0))?;
            check("making an event", sys::cuEventCreate(&raw mut end, 0))?;
        }
        Ok(Self { begin, end })
    }

    /// Median seconds of five times `work`, after one to warm up.
    fn median(
        &self,
        stream: sys::CUstream,
        mut work: impl FnMut() -> Result<(), BackendError>,
    ) -> Result<f64, BackendError> {
        work()?;
        let mut seconds = Vec::new();
        for _ in 0..5 {
            seconds.push(self.once(stream, &mut work)?);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }

    /// Seconds that `work` takes.
    fn once(
        &self,
        stream: sys::CUstream,
        work: &mut impl FnMut() -> Result<(), BackendError>,
    ) -> Result<f64, BackendError> {
        let mut milliseconds = 0.0;
        // SAFETY: events and stream are alive.
        unsafe {
            check("recording an event", sys::cuEventRecord(self.begin, stream))?;
            work()?;
            check("recording an event", sys::cuEventRecord(self.end, stream))?;
            check("waiting for an event", sys::cuEventSynchronize(self.end))?;
            check(
                "reading an event",
                sys::cuEventElapsedTime_v2(&raw mut milliseconds, self.begin, self.end),
            )?;
        }
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// The rate of `product`, one of squares.
    fn rate(
        &self,
        stream: sys::CUstream,
        mut product: impl FnMut() -> Result<(), BackendError>,
    ) -> Result<MatrixRate, BackendError> {
        let flops = PRODUCTS as f64 * 2.0 * (SIZE as f64).powi(3);
        let burst = self.median(stream, || (0..PRODUCTS).try_for_each(|_| product()))?;
        let times = (SUSTAINED / burst).ceil() as usize;
        // All of them are on the stream before the first has ended: there is no pause in which the device would cool down.
        let mut products = || (0..times * PRODUCTS).try_for_each(|_| product());
        products()?;
        let sustained = self.once(stream, &mut products)? / times as f64;
        Ok(MatrixRate { burst: flops / burst, sustained: flops / sustained })
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.begin);
            let _ = sys::cuEventDestroy_v2(self.end);
        }
    }
}

impl CudaBackend {
    /// Measures all; takes some GiB of memory for a moment.
    ///
    /// # Errors
    /// The device's.
    pub fn measure_ceilings(&mut self) -> Result<Ceilings, BackendError> {
        self.context.make_current()?;
        let module = Module::load(&self.context, "ceiling")?;
        Ok(Ceilings {
            read_bytes_per_second: self.measure_reading(&module)?,
            bf16: self.measure_multiplying(&module)?,
            fp8: self.measure_multiplying_fp8(&module)?,
        })
    }

    /// Launches a kernel that goes wrong and waits for it, for tests of what is said then. This process has no use of the
    /// device afterwards.
    ///
    /// # Errors
    /// [`BackendError::DeviceLost`].
    pub fn provoke_fault(&mut self) -> Result<(), BackendError> {
        self.context.make_current()?;
        let function = Module::load(&self.context, "ceiling")?.function("fault")?;
        self.queue.launch(&Launch { function, grid: [1; 3], block: 32, shared_bytes: 0 }, args![])?;
        self.queue.wait()
    }

    fn measure_reading(&self, module: &Module) -> Result<f64, BackendError> {
        let data = DeviceMemory::new(&self.context, READ_BYTES, "measuring")?;
        self.fill(module, &data)?;
        let (data_ptr, count, out) = (data.ptr(), (READ_BYTES / 16) as i64, self.workspace.ptr());
        let launch = Launch {
            function: module.function("read_all")?,
            grid: [self.facts.num_sms as u32 * 4, 1, 1],
            block: 512,
            shared_bytes: 0,
        };
        let seconds = Timer::new()?
            .median(self.queue.stream().raw(), || self.queue.launch(&launch, args![data_ptr, count, out]))?;
        Ok(READ_BYTES as f64 / seconds)
    }

    fn measure_multiplying(&mut self, module: &Module) -> Result<MatrixRate, BackendError> {
        let (x, weight, out) = (self.square()?, self.square()?, self.square()?);
        self.fill(module, x.memory())?;
        self.fill(module, weight.memory())?;
        let operands = Operands { x: x.ptr(), weight: weight.ptr(), bias: 0, out: out.ptr(), scales: [0; 2] };
        self.rate_of_squares(operands, false)
    }

    fn measure_multiplying_fp8(&mut self, module: &Module) -> Result<Option<MatrixRate>, BackendError> {
        if !self.matmuls.fp8.has_library() {
            return Ok(None);
        }
        let (mut x, out) = (self.square()?, self.square()?);
        self.fill(module, x.memory())?;
        x.resize(SIZE);
        let [(weight, weight_scales), (rounded, scales)] = [self.eight_bits(&x)?, self.eight_bits(&x)?];
        let operands = Operands {
            x: rounded.ptr(),
            weight: weight.ptr(),
            bias: 0,
            out: out.ptr(),
            scales: [weight_scales.ptr(), scales.ptr()],
        };
        self.rate_of_squares(operands, true).map(Some)
    }

    /// By the library, whatever the products of models are taken by.
    fn rate_of_squares(&mut self, operands: Operands, is_fp8: bool) -> Result<MatrixRate, BackendError> {
        let product = Product {
            rows: SIZE,
            outputs: SIZE,
            inputs: SIZE,
            weight_stride: SIZE,
            dtype: DType::BF16,
            out_dtype: DType::BF16,
            out_stride: SIZE,
            is_fp8,
            has_bias: false,
        };
        let (stream, workspace, library) =
            (self.queue.stream(), self.workspace.ptr(), self.matmuls.library.blaslt());
        Timer::new()?.rate(stream.raw(), || library.multiply(stream, workspace, product, operands))
    }

    /// A square rounded to eight bits, and its rows' scales.
    fn eight_bits(&self, x: &CudaBuffer) -> Result<(DeviceMemory, DeviceMemory), BackendError> {
        let bytes = DeviceMemory::new(&self.context, SIZE * SIZE, "measuring")?;
        let scales = DeviceMemory::new(&self.context, SIZE * 4, "measuring")?;
        let to = (bytes.ptr(), scales.ptr());
        self.matmuls.fp8.rounding.quantize(&self.queue, (x.ptr(), DType::BF16), [SIZE, SIZE], to)?;
        Ok((bytes, scales))
    }

    fn square(&self) -> Result<CudaBuffer, BackendError> {
        CudaBuffer::new(&self.context, SIZE, SIZE, DType::BF16)
    }

    /// Zeros would be multiplied faster than numbers are.
    fn fill(&self, module: &Module, memory: &DeviceMemory) -> Result<(), BackendError> {
        let launch = Launch {
            function: module.function("fill_random_bf16")?,
            grid: [self.facts.num_sms as u32 * 4, 1, 1],
            block: 512,
            shared_bytes: 0,
        };
        let (data, count, seed) = (memory.ptr(), (memory.bytes() / 2) as i64, 1_u32);
        self.queue.launch(&launch, args![data, count, seed])
    }
}
