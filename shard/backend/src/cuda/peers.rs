//! Sums and gathers over GPUs that have mapped one another's memory, by kernels of our own (`ranks.cu`): no library, no host.
//!
//! Every rank has a region that all write to. What reaches it is announced by numbers that count this rank's calls in device
//! memory, so a recorded graph can be replayed. Waits are bounded: a rank that does not come raises an alarm that the host sees
//! when it waits for the step.

use std::sync::Arc;
use std::time::Duration;

use super::CudaBuffer;
use super::driver::{Context, DeviceMemory, DevicePtr, IpcMemory};
use super::launch::{Alarm, Argument, Launch, Queue, args};
use super::module::{ByType, Function, Module};
use crate::collectives::Communicator;
use crate::{BackendError, DType};

// The layout of `ranks.cu`.
const BLOCKS: usize = 256;
const SMALL_THREADS: usize = 256;
const UNIT_BYTES: usize = 8;
const SLOT_BYTES: usize = 16;
const PIECE_THREADS: usize = 512;
const PIECE_BYTES: usize = 32768;
/// More GPUs than a machine has.
pub(super) const MAX_RANKS: usize = 16;

/// Messages of at most as many bytes carry a number beside every four bytes, which doubles what travels and saves a round trip.
/// As many as the small kernel has room for: where the other one overtakes it between two GPUs is not measured yet (the example
/// `ranks` does).
const SMALL_BYTES: usize = BLOCKS * SMALL_THREADS * UNIT_BYTES;

/// How long a rank waits on the device for another. Ranks get each call within milliseconds of one another; the host's own patience
/// is longer, so that the error names who is missing.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for the first exchange, which all begin together.
const FIRST_PATIENCE: Duration = Duration::from_secs(5);

/// Kernels' parameter: who takes part. The layout is `Group` in `ranks.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Group {
    bases: DevicePtr,
    alarm: DevicePtr,
    patience: i64,
    rank: i32,
    world: i32,
}
impl Argument for Group {}

/// Columns of each rank.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Widths([i32; MAX_RANKS]);
impl Argument for Widths {}

/// The other ranks' memory, and the kernels that go through it.
pub(super) struct Peers {
    group: Group,
    small: ByType,
    pieces: ByType,
    gather: Function,
    _bases: DeviceMemory,
    // Others' before our own: nobody writes any more when a collective is over.
    _mapped: Vec<IpcMemory>,
    _region: DeviceMemory,
}

/// Bytes of a rank's region.
const fn region_bytes(world_size: usize) -> usize {
    let numbers = (2 + MAX_RANKS) * BLOCKS * size_of::<u32>();
    let slots = 2 * world_size * BLOCKS * (SMALL_THREADS * SLOT_BYTES + PIECE_BYTES);
    numbers + slots
}

/// One byte from each rank: whether all could do what `outcome` says of this one. A rank that could not says why.
fn all_agree<T>(
    communicator: &mut dyn Communicator,
    outcome: Result<T, BackendError>,
) -> Result<Option<T>, BackendError> {
    let answers = communicator.exchange(&[u8::from(outcome.is_ok())])?;
    match outcome {
        Ok(value) if answers.iter().all(|answer| answer == &[1]) => Ok(Some(value)),
        Ok(_) => Ok(None),
        Err(error) => {
            tracing::info!("no memory shared with the other ranks' GPUs: {error}");
            Ok(None)
        }
    }
}

impl Peers {
    /// Maps the other ranks' memory, and sees that sums through it are right. None, on all ranks alike: it cannot be mapped.
    ///
    /// # Errors
    /// [`BackendError::PeerLost`].
    pub(super) fn meet(
        context: &Arc<Context>,
        communicator: &mut dyn Communicator,
        queue: &mut Queue,
    ) -> Result<Option<Self>, BackendError> {
        let (rank, world) = (communicator.rank(), communicator.world_size());
        if world > MAX_RANKS {
            return Ok(None);
        }
        let own = DeviceMemory::zeroed(context, region_bytes(world), "what ranks exchange")
            .and_then(|region| Ok((IpcMemory::export(&region)?, region)));
        let Some((handle, region)) = all_agree(communicator, own)? else { return Ok(None) };
        let mut mapped = Vec::new();
        let mut bases = Vec::new();
        let mut map = |other: usize, bytes: &[u8]| -> Result<(), BackendError> {
            if other == rank {
                bases.extend(region.ptr().to_le_bytes());
            } else {
                let memory = IpcMemory::open(context, bytes)?;
                bases.extend(memory.ptr().to_le_bytes());
                mapped.push(memory);
            }
            Ok(())
        };
        let handles = communicator.exchange(&handle)?;
        let outcome = handles.iter().enumerate().try_for_each(|(other, bytes)| map(other, bytes));
        if all_agree(communicator, outcome)?.is_none() {
            return Ok(None);
        }
        let peers = Self::with(context, queue, (region, mapped, &bases), (rank, world));
        let Some(mut peers) = all_agree(communicator, peers)? else { return Ok(None) };
        let patience = std::mem::replace(&mut peers.group.patience, FIRST_PATIENCE.as_nanos() as i64);
        let checked = peers.check(context, queue);
        peers.group.patience = patience;
        let agreed = all_agree(communicator, checked)?.map(|()| peers);
        if agreed.is_none() {
            queue.set_alarm(None);
        }
        Ok(agreed)
    }

    fn with(
        context: &Arc<Context>,
        queue: &mut Queue,
        (region, mapped, bases): (DeviceMemory, Vec<IpcMemory>, &[u8]),
        (rank, world): (usize, usize),
    ) -> Result<Self, BackendError> {
        let module = Module::load(context, "ranks")?;
        let table = DeviceMemory::zeroed(context, bases.len(), "addresses of the ranks' memory")?;
        queue.stream().upload(table.ptr(), bases)?;
        let alarm = Alarm::new(context)?;
        let group = Group {
            bases: table.ptr(),
            alarm: alarm.ptr(),
            patience: PATIENCE.as_nanos() as i64,
            rank: rank as i32,
            world: world as i32,
        };
        queue.set_alarm(Some(alarm));
        Ok(Self {
            group,
            small: module.by_type("reduce_small")?,
            pieces: module.by_type("reduce_pieces")?,
            gather: module.function("gather_columns")?,
            _bases: table,
            _mapped: mapped,
            _region: region,
        })
    }

    /// Adds up known numbers: there are machines that map what they then do not reach.
    fn check(&self, context: &Arc<Context>, queue: &Queue) -> Result<(), BackendError> {
        const COUNT: usize = 4 * PIECE_BYTES / size_of::<f32>();
        let buffer = DeviceMemory::new(context, COUNT * size_of::<f32>(), "a first sum over ranks")?;
        let value = |rank: i32, index: usize| (index % 8191) as f32 + rank as f32;
        let own: Vec<u8> = (0..COUNT).flat_map(|index| value(self.group.rank, index).to_le_bytes()).collect();
        for is_small in [true, false, true, false, true, false] {
            queue.stream().upload(buffer.ptr(), &own)?;
            self.reduce_at(queue, buffer.ptr(), (COUNT, DType::F32), is_small)?;
            let mut bytes = vec![0; own.len()];
            queue.stream().download(&mut bytes, buffer.ptr())?;
            queue.wait()?;
            let is_right = bytes.chunks_exact(4).enumerate().all(|(index, sum)| {
                let expected: f32 = (0..self.group.world).map(|rank| value(rank, index)).sum();
                sum == expected.to_le_bytes()
            });
            if !is_right {
                return Err(BackendError::Device {
                    operation: "a first sum over ranks".to_owned(),
                    reason:
                        "what the GPUs write to one another does not arrive (an IOMMU or ACS in between?)"
                            .to_owned(),
                });
            }
        }
        Ok(())
    }

    /// `x = sum of x over the ranks`.
    pub(super) fn all_reduce(&self, queue: &Queue, x: &CudaBuffer) -> Result<(), BackendError> {
        let is_small = x.used_bytes() <= SMALL_BYTES;
        self.reduce_at(queue, x.ptr(), (x.rows() * x.width(), x.dtype()), is_small)
    }

    fn reduce_at(
        &self,
        queue: &Queue,
        x: DevicePtr,
        (count, dtype): (usize, DType),
        is_small: bool,
    ) -> Result<(), BackendError> {
        let bytes = count * dtype.size_bytes();
        let (kernels, threads, blocks) = if is_small {
            (&self.small, SMALL_THREADS, bytes.div_ceil(SMALL_THREADS * UNIT_BYTES))
        } else {
            (&self.pieces, PIECE_THREADS, bytes.div_ceil(PIECE_BYTES).min(BLOCKS))
        };
        let launch = Launch {
            function: kernels.of(dtype),
            grid: [blocks as u32, 1, 1],
            block: threads as u32,
            shared_bytes: 0,
        };
        queue.launch(&launch, args![x, count as i64, self.group])
    }

    /// Columns side by side, of float32.
    pub(super) fn all_gather(
        &self,
        queue: &Queue,
        local: &CudaBuffer,
        widths: &[usize],
        out: &CudaBuffer,
    ) -> Result<(), BackendError> {
        let mut columns = Widths([0; MAX_RANKS]);
        for (to, &width) in columns.0.iter_mut().zip(widths) {
            *to = width as i32;
        }
        let rows = local.rows() as i32;
        let longest = local.rows() * widths.iter().copied().max().unwrap_or(0) * size_of::<f32>();
        let launch = Launch {
            function: self.gather,
            grid: [longest.div_ceil(PIECE_BYTES).min(BLOCKS) as u32, 1, 1],
            block: PIECE_THREADS as u32,
            shared_bytes: 0,
        };
        queue.launch(&launch, args![local.ptr(), out.ptr(), rows, columns, self.group])
    }
}
