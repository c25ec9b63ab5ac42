//! A pipe to the launcher: when it ends, the launcher is gone and this process has nobody to serve.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{FromRawFd, RawFd};

use nix::fcntl::{FcntlArg, fcntl};

use crate::error::ShardError;

/// Watches the read end numbered `fd` from a thread of its own; calls `on_end` when the other end is closed.
///
/// # Errors
/// [`ShardError::Usage`] when the number is not an open file, [`ShardError::System`] without a thread.
pub fn watch(fd: RawFd, on_end: impl FnOnce() + Send + 'static) -> Result<(), ShardError> {
    // SAFETY: whoever started this process passed the number for this purpose only, so nobody else owns it; it is
    // used for a system call below before it is owned.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    if fcntl(borrowed, FcntlArg::F_GETFD).is_err() {
        return Err(ShardError::Usage(vec![format!(
            "--lifeline-fd (QUARTET_LIFELINE_FD) is {fd}, which is not open; expected the read end of a pipe"
        )]));
    }
    // SAFETY: as above; from here on the thread owns it.
    let mut pipe = unsafe { File::from_raw_fd(fd) };
    let wait = move || {
        let mut byte = [0];
        loop {
            match pipe.read(&mut byte) {
                // Nothing is ever sent; whatever comes is no end.
                Ok(count) if count > 0 => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => break,
            }
        }
        on_end();
    };
    std::thread::Builder::new()
        .name("lifeline".to_string())
        .spawn(wait)
        .map(drop)
        .map_err(|source| ShardError::System { action: "cannot start the lifeline's thread", source })
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_end_of_the_pipe_is_noticed_and_nothing_before() {
        let (read, mut write) = std::io::pipe().unwrap();
        let (sender, receiver) = channel();
        watch(read.into_raw_fd(), move || sender.send(()).unwrap()).unwrap();
        std::io::Write::write_all(&mut write, b"x").unwrap();
        assert_eq!(receiver.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
        drop(write);
        receiver.recv_timeout(Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn a_closed_number_is_a_mistake() {
        let error = watch(99_999, || ()).unwrap_err().to_string();
        assert!(error.contains("is 99999, which is not open"), "{error}");
    }
}
