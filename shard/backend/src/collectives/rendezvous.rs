//! How ranks find one another: rank 0 listens on a Unix socket, compares who comes, and hands out shared memory.
//!
//! A rank introduces itself with [`Hello`]; when all are there, rank 0 answers each with a [`Verdict`]. The connections
//! stay open: the end of one tells that its process is gone.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    bind, listen, recvmsg, sendmsg, socket,
};
use nix::sys::stat::{Mode, fchmod};

use crate::BackendError;

/// First bytes of a connection; the last two are the version of what follows.
const MAGIC: [u8; 8] = *b"QRTRDV01";
/// A hash and some words fit many times.
const MAX_FINGERPRINT_BYTES: usize = 4096;
/// More processes than this never share one machine's memory for one model.
pub(super) const MAX_RANKS: usize = 256;
/// How often a rank looks whether rank 0 listens already.
const CONNECT_INTERVAL: Duration = Duration::from_millis(2);
/// A rank introduces itself right after it has connected; whoever is silent for longer is somebody else.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);

/// Where and as whom a rank meets the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// Path of the Unix socket that rank 0 listens on until all are there.
    pub socket: PathBuf,
    /// This process's rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Version of the program, fingerprint of the model and settings: whatever must agree. At most 4096 bytes.
    pub fingerprint: String,
    /// How long to wait for the others, here and in every collective.
    pub timeout: Duration,
}

/// An open connection to a rank.
pub(super) struct Peer {
    pub(super) rank: usize,
    pub(super) stream: UnixStream,
}

/// What a rank says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hello {
    rank: usize,
    world_size: usize,
    fingerprint: String,
}

/// Rank 0's answer.
enum Verdict {
    /// All fit; the shared memory comes along.
    Welcome,
    /// They do not belong together.
    Mismatch { rank: usize, found: String, expected: String },
    /// A rank did not come.
    Lost { rank: usize },
}

impl Rendezvous {
    /// Rank 0: waits for the others and hands them `memory`.
    pub(super) fn host(&self, memory: &OwnedFd) -> Result<Vec<Peer>, BackendError> {
        let listener = listen_on(&self.socket).map_err(|error| self.socket_error("listen on", error))?;
        let result = self.gather(&listener, memory);
        // Nobody is to come any more.
        let _ = std::fs::remove_file(&self.socket);
        result
    }

    fn gather(&self, listener: &UnixListener, memory: &OwnedFd) -> Result<Vec<Peer>, BackendError> {
        let deadline = Instant::now() + self.timeout;
        let mut guests: Vec<(Hello, UnixStream)> = Vec::new();
        while guests.len() + 1 < self.world_size
            && let Some(stream) =
                accept(listener, deadline).map_err(|error| self.socket_error("accept on", error))?
        {
            // Whoever does not speak our language is not a rank.
            if let Ok(hello) = Hello::read(&stream) {
                guests.push((hello, stream));
            }
        }
        let verdict = self.judge(guests.iter().map(|(hello, _)| hello));
        let mut peers = Vec::new();
        for (hello, stream) in guests {
            verdict
                .send(&stream, memory)
                .map_err(|error| self.lost(hello.rank, format!("cannot answer it: {error}")))?;
            peers.push(Peer { rank: hello.rank, stream });
        }
        self.accept_verdict(verdict)?;
        Ok(peers)
    }

    /// Compares the guests with this rank, and sees whether all are there.
    fn judge<'a>(&self, guests: impl Iterator<Item = &'a Hello>) -> Verdict {
        let mut is_there = vec![false; self.world_size];
        is_there[0] = true;
        for hello in guests {
            let expected = Hello {
                rank: hello.rank,
                world_size: self.world_size,
                fingerprint: self.fingerprint.clone(),
            };
            if *hello != expected {
                let (found, expected) = (hello.describe(), expected.describe());
                return Verdict::Mismatch { rank: hello.rank, found, expected };
            }
            match is_there.get_mut(hello.rank) {
                Some(place) if !*place => *place = true,
                _ => {
                    return Verdict::Mismatch {
                        rank: hello.rank,
                        found: format!("a rank that is taken or not below {}", self.world_size),
                        expected: "each rank once".to_owned(),
                    };
                }
            }
        }
        match is_there.iter().position(|is_there| !is_there) {
            Some(rank) => Verdict::Lost { rank },
            None => Verdict::Welcome,
        }
    }

    /// A rank other than 0: introduces itself and takes the shared memory.
    pub(super) fn attend(&self) -> Result<(Peer, OwnedFd), BackendError> {
        let deadline = Instant::now() + self.timeout;
        let stream = self.connect(deadline)?;
        let broken = |error: io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                self.lost(0, format!("it did not answer within {:?}", self.timeout))
            }
            _ => self.lost(0, format!("the connection ended: {error}")),
        };
        let hello =
            Hello { rank: self.rank, world_size: self.world_size, fingerprint: self.fingerprint.clone() };
        (&stream).write_all(&hello.encode()).map_err(broken)?;
        // Rank 0 may have begun to wait later than this rank, and it is the one that says who is missing.
        stream.set_read_timeout(Some(self.timeout + HELLO_TIMEOUT)).map_err(broken)?;
        let (verdict, memory) = Verdict::receive(&stream).map_err(broken)?;
        self.accept_verdict(verdict)?;
        match memory {
            Some(memory) => Ok((Peer { rank: 0, stream }, memory)),
            None => Err(self.lost(0, "it sent no shared memory".to_owned())),
        }
    }

    fn connect(&self, deadline: Instant) -> Result<UnixStream, BackendError> {
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => return Ok(stream),
                // Not there yet, left behind by a process that is gone, or busy.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::WouldBlock
                    ) =>
                {
                    if Instant::now() >= deadline {
                        return Err(self.lost(0, format!("it did not listen within {:?}", self.timeout)));
                    }
                    std::thread::sleep(CONNECT_INTERVAL);
                }
                Err(error) => return Err(self.socket_error("connect to", error)),
            }
        }
    }

    fn accept_verdict(&self, verdict: Verdict) -> Result<(), BackendError> {
        match verdict {
            Verdict::Welcome => Ok(()),
            Verdict::Mismatch { rank, found, expected } => {
                Err(BackendError::RankMismatch { rank, found, expected })
            }
            Verdict::Lost { rank } => {
                Err(self.lost(rank, format!("it did not come within {:?}", self.timeout)))
            }
        }
    }

    fn lost(&self, rank: usize, reason: String) -> BackendError {
        BackendError::PeerLost { rank, operation: "rendezvous", sequence: 0, reason }
    }

    fn socket_error(&self, action: &str, error: io::Error) -> BackendError {
        BackendError::Device {
            operation: format!("{action} {}", self.socket.display()),
            reason: error.to_string(),
        }
    }

    /// Whether the numbers make sense.
    pub(super) fn check(&self) -> Result<(), BackendError> {
        let problem = if self.world_size > MAX_RANKS || self.rank >= self.world_size {
            format!("rank {} of {}, expected less than {MAX_RANKS} ranks", self.rank, self.world_size)
        } else if self.fingerprint.len() > MAX_FINGERPRINT_BYTES {
            format!(
                "a fingerprint of {} bytes, expected at most {MAX_FINGERPRINT_BYTES}",
                self.fingerprint.len()
            )
        } else {
            return Ok(());
        };
        Err(BackendError::Device { operation: "rendezvous".to_owned(), reason: problem })
    }
}

impl Hello {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        put_number(&mut bytes, self.rank);
        put_number(&mut bytes, self.world_size);
        put_text(&mut bytes, &self.fingerprint);
        bytes
    }

    fn read(mut stream: &UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        let mut magic = [0; MAGIC.len()];
        stream.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(Self {
            rank: get_number(stream)?,
            world_size: get_number(stream)?,
            fingerprint: get_text(stream)?,
        })
    }

    fn describe(&self) -> String {
        format!("{} ranks and fingerprint {:?}", self.world_size, self.fingerprint)
    }
}

impl Verdict {
    /// One byte, with the memory's descriptor or followed by the details.
    fn send(&self, mut stream: &UnixStream, memory: &OwnedFd) -> io::Result<()> {
        let mut details = Vec::new();
        let (code, descriptors) = match self {
            Verdict::Welcome => (0, vec![memory.as_raw_fd()]),
            Verdict::Mismatch { rank, found, expected } => {
                put_number(&mut details, *rank);
                put_text(&mut details, found);
                put_text(&mut details, expected);
                (1, Vec::new())
            }
            Verdict::Lost { rank } => {
                put_number(&mut details, *rank);
                (2, Vec::new())
            }
        };
        let control: &[ControlMessage<'_>] =
            if descriptors.is_empty() { &[] } else { &[ControlMessage::ScmRights(&descriptors)] };
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&[code])], control, MsgFlags::MSG_NOSIGNAL, None)?;
        stream.write_all(&details)
    }

    fn receive(stream: &UnixStream) -> io::Result<(Self, Option<OwnedFd>)> {
        let mut code = [0_u8];
        let mut descriptor = None;
        {
            let mut space = nix::cmsg_space!([RawFd; 1]);
            let mut buffers = [IoSliceMut::new(&mut code)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
            if message.bytes == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(received) = control {
                    for fd in received {
                        // SAFETY: the kernel has just made it for this process; nobody else owns it.
                        descriptor = Some(unsafe { OwnedFd::from_raw_fd(fd) });
                    }
                }
            }
        }
        let verdict = match code[0] {
            0 => Verdict::Welcome,
            1 => Verdict::Mismatch {
                rank: get_number(stream)?,
                found: get_text(stream)?,
                expected: get_text(stream)?,
            },
            2 => Verdict::Lost { rank: get_number(stream)? },
            _ => return Err(ErrorKind::InvalidData.into()),
        };
        Ok((verdict, descriptor))
    }
}

fn put_number(bytes: &mut Vec<u8>, number: usize) {
    // Ranks and lengths are far below 2^32; a number that is not would be refused as a mismatch.
    bytes.extend(u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
}

/// A text of at most twice the fingerprint's limit: a description quotes and names it.
fn put_text(bytes: &mut Vec<u8>, text: &str) {
    let end = text.floor_char_boundary(2 * MAX_FINGERPRINT_BYTES);
    put_number(bytes, end);
    bytes.extend(&text.as_bytes()[..end]);
}

fn get_number(mut stream: &UnixStream) -> io::Result<usize> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes) as usize)
}

fn get_text(mut stream: &UnixStream) -> io::Result<String> {
    let length = get_number(stream)?;
    if length > 2 * MAX_FINGERPRINT_BYTES {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    String::from_utf8(bytes).map_err(|_| ErrorKind::InvalidData.into())
}

/// The next connection; none when the deadline has passed.
fn accept(listener: &UnixListener, deadline: Instant) -> io::Result<Option<UnixStream>> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(Some(stream));
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(CONNECT_INTERVAL);
    }
}

/// Listens on `path` for this user only. A file that nobody answers on is a dead process's and is replaced.
fn listen_on(path: &Path) -> io::Result<UnixListener> {
    match try_listen_on(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            try_listen_on(path)
        }
        other => other,
    }
}

fn try_listen_on(path: &Path) -> io::Result<UnixListener> {
    let address = UnixAddr::new(path)?;
    let descriptor = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Before it has a name, so that there is no moment in which others could connect.
    fchmod(&descriptor, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(descriptor.as_raw_fd(), &address)?;
    listen(&descriptor, Backlog::MAXCONN)?;
    let listener = UnixListener::from(descriptor);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Size of the memory behind `memory`.
pub(super) fn memory_size(memory: &OwnedFd) -> io::Result<u64> {
    Ok(File::from(memory.try_clone()?).metadata()?.len())
}
