//! Where the GPUs of one model meet: which way sums and gathers take.
//!
//! Kernels of our own through memory that the ranks have mapped from one another ([`Peers`]), NCCL ([`Nccl`]), or, where there is
//! neither, the host's memory. Both ways on the device are put on the stream like any operation, so they can be recorded.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::CudaBuffer;
use super::driver::{Context, DeviceMemory, DevicePtr};
use super::launch::Queue;
use super::nccl::{Loaded, Nccl};
use super::peers::Peers;
use crate::collectives::Communicator;
use crate::{BackendError, DType};

/// How ranks exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RankPath {
    /// The fastest that there is.
    #[default]
    Auto,
    /// Our own kernels alone, or the host.
    Peers,
    /// NCCL alone, or the host.
    Nccl,
    /// The host's memory.
    Host,
}

impl RankPath {
    /// `auto`, `peers`, `nccl` or `host`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(Self::Auto),
            "peers" => Some(Self::Peers),
            "nccl" => Some(Self::Nccl),
            "host" => Some(Self::Host),
            _ => None,
        }
    }
}

/// With more ranks than two every part sent to every rank is more than has to travel; beyond this many bytes NCCL sends less.
/// Not measured yet.
const MANY_RANKS_BYTES: usize = 512 << 10;

/// The ways there are. With neither, ranks meet on the host.
#[derive(Default)]
pub(super) struct Ranks {
    rank: usize,
    world: usize,
    peers: Option<Peers>,
    nccl: Option<Joining>,
    /// Every result must be added up in the same order, whatever its size.
    is_deterministic: bool,
    /// Where NCCL puts the ranks' parts before they become columns.
    staging: Option<DeviceMemory>,
    context: Option<Arc<Context>>,
}

/// NCCL takes half a second to start, in which weights are loaded.
enum Joining {
    Begun(JoinHandle<Result<Nccl, BackendError>>),
    Done(Nccl),
}

impl Ranks {
    /// Finds the ways between the ranks' devices, the same on all of them.
    ///
    /// # Errors
    /// [`BackendError::PeerLost`].
    pub(super) fn meet(
        context: &Arc<Context>,
        communicator: &mut dyn Communicator,
        queue: &mut Queue,
        (path, is_deterministic): (RankPath, bool),
    ) -> Result<Self, BackendError> {
        let (rank, world) = (communicator.rank(), communicator.world_size());
        let mut ranks = Self { rank, world, is_deterministic, ..Self::default() };
        if world == 1 || path == RankPath::Host {
            return Ok(ranks);
        }
        ranks.context = Some(Arc::clone(context));
        if path != RankPath::Nccl {
            ranks.peers = Peers::meet(context, communicator, queue)?;
        }
        let is_wanted = match path {
            RankPath::Auto => ranks.peers.is_none() || (world > 2 && !is_deterministic),
            other => other == RankPath::Nccl,
        };
        if is_wanted {
            ranks.nccl = begin_nccl(context, communicator)?;
        }
        match (&ranks.peers, &ranks.nccl) {
            (None, None) => tracing::warn!(
                "ranks add up their parts through the host's memory, which is slow: their GPUs do not reach one another's memory, \
                 and NCCL is not used"
            ),
            (Some(_), None) => tracing::info!("ranks exchange through one another's memory"),
            (None, Some(_)) => tracing::info!("ranks exchange by NCCL"),
            (Some(_), Some(_)) => {
                tracing::info!("ranks exchange through one another's memory, long messages by NCCL");
            }
        }
        Ok(ranks)
    }

    /// Whether exchanges are operations on the stream.
    pub(super) fn is_on_device(&self) -> bool {
        self.world == 1 || self.peers.is_some() || self.nccl.is_some()
    }

    /// What was found: [`RankPath::Auto`] is both ways on the device.
    pub(super) fn path(&self) -> RankPath {
        match (&self.peers, &self.nccl) {
            (None, None) => RankPath::Host,
            (Some(_), None) => RankPath::Peers,
            (None, Some(_)) => RankPath::Nccl,
            (Some(_), Some(_)) => RankPath::Auto,
        }
    }

    /// Waits until the ranks have met in NCCL, where they use it. Before the first step.
    pub(super) fn finish_joining(&mut self) -> Result<(), BackendError> {
        self.nccl = match self.nccl.take() {
            Some(Joining::Begun(thread)) => {
                let joined = thread.join().map_err(|_| BackendError::Device {
                    operation: "joining the ranks by NCCL".to_owned(),
                    reason: "its thread panicked".to_owned(),
                })?;
                Some(Joining::Done(joined?))
            }
            other => other,
        };
        Ok(())
    }

    fn nccl(&self) -> Option<&Nccl> {
        match &self.nccl {
            Some(Joining::Done(nccl)) => Some(nccl),
            _ => None,
        }
    }

    /// The way of a message of so many bytes.
    fn peers_for(&self, bytes: usize) -> Option<&Peers> {
        let is_short = self.world == 2 || self.is_deterministic || bytes <= MANY_RANKS_BYTES;
        self.peers.as_ref().filter(|_| is_short || self.nccl.is_none())
    }

    /// `x = sum of x over the ranks`; false: the ranks have to meet on the host.
    pub(super) fn all_reduce(&self, queue: &Queue, x: &CudaBuffer) -> Result<bool, BackendError> {
        if let Some(peers) = self.peers_for(x.used_bytes()) {
            peers.all_reduce(queue, x)?;
            return Ok(true);
        }
        let Some(nccl) = self.nccl() else { return Ok(self.world == 1) };
        if !queue.is_dry() {
            nccl.all_reduce(queue.stream(), x.ptr(), (x.rows() * x.width(), x.dtype()))?;
        }
        Ok(true)
    }

    /// The ranks' columns side by side; false: the ranks have to meet on the host.
    pub(super) fn all_gather(
        &mut self,
        queue: &Queue,
        local: &CudaBuffer,
        widths: &[usize],
        out: &CudaBuffer,
    ) -> Result<bool, BackendError> {
        if local.dtype() != DType::F32 || out.dtype() != DType::F32 {
            return Ok(false);
        }
        if let Some(peers) = self.peers_for(out.used_bytes()) {
            peers.all_gather(queue, local, widths, out)?;
            return Ok(true);
        }
        if self.nccl().is_none() {
            return Ok(false);
        }
        if queue.is_dry() {
            return Ok(true);
        }
        // The first steps are the largest there are.
        let bytes = out.memory().bytes();
        if self.staging.as_ref().is_none_or(|staging| staging.bytes() < bytes)
            && let Some(context) = &self.context
        {
            self.staging = None;
            self.staging = Some(DeviceMemory::new(context, bytes, "logits of all ranks")?);
        }
        let (Some(staging), Some(nccl)) = (&self.staging, self.nccl()) else { return Ok(false) };
        let mut at = staging.ptr();
        let mut parts = Vec::new();
        for width in widths {
            parts.push((at, local.rows() * width));
            at += (local.rows() * width * size_of::<f32>()) as DevicePtr;
        }
        nccl.all_gather(queue.stream(), local.ptr(), self.rank, &parts)?;
        let mut column = 0;
        for (&width, &(from, _)) in widths.iter().zip(&parts) {
            let (to, row_bytes) = (out.ptr() + column, width * size_of::<f32>());
            queue.stream().copy_columns(
                (to, out.width() * size_of::<f32>()),
                (from, row_bytes),
                (row_bytes, local.rows()),
            )?;
            column += row_bytes as DevicePtr;
        }
        Ok(true)
    }
}

/// Starts NCCL on all ranks, or on none: where one has no library, or two share a device, which it refuses.
fn begin_nccl(
    context: &Arc<Context>,
    communicator: &mut dyn Communicator,
) -> Result<Option<Joining>, BackendError> {
    let library = Loaded::new();
    let version = library.as_ref().map_or_else(|_| String::new(), Loaded::version);
    let mut own = context.uuid()?.to_vec();
    own.extend(version.as_bytes());
    own.resize(32, 0);
    let all = communicator.exchange(&own)?;
    let library = match library {
        Ok(library) => library,
        Err(error) => {
            tracing::info!("{error}");
            return Ok(None);
        }
    };
    let shares_device = all.iter().enumerate().any(|(rank, one)| {
        all[..rank].iter().any(|other| other.iter().zip(one).take(16).all(|(a, b)| a == b))
    });
    if shares_device {
        tracing::info!("NCCL is not used: it refuses ranks that share a device");
        return Ok(None);
    }
    if let Some(rank) = all.iter().position(|one| one.get(16..) != own.get(16..)) {
        tracing::info!("NCCL is not used: rank {rank} has not the version {version} that this one has");
        return Ok(None);
    }
    let (rank, world) = (communicator.rank(), communicator.world_size());
    let id = if rank == 0 { library.unique_id() } else { Ok(vec![0; 128]) };
    // A rank 0 without an id says so by one that is all zero.
    let ids = communicator.exchange(id.as_deref().unwrap_or(&[0; 128]))?;
    id?;
    let id = ids.into_iter().next().unwrap_or_default();
    if id.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    tracing::info!("NCCL {version}");
    let context = Arc::clone(context);
    Ok(Some(Joining::Begun(std::thread::spawn(move || library.join(&context, &id, (rank, world))))))
}
