//! The signals that ask a process to stop.

use std::fmt;
use std::io;

use tokio::signal::unix::{self, SignalKind};

/// A signal that asks the process to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: Ctrl-C in a terminal.
    Interrupt,
    /// SIGTERM: what supervisors and Kubernetes send.
    Terminate,
    /// SIGHUP: the terminal went away.
    Hangup,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Signal::Interrupt => "SIGINT",
            Signal::Terminate => "SIGTERM",
            Signal::Hangup => "SIGHUP",
        })
    }
}

/// What the launcher sends the router when nothing will ever compute the running requests: each of them is ended with an
/// error at once. SIGUSR1, which nobody else sends.
#[derive(Debug)]
pub struct GiveUpSignal(unix::Signal);

impl GiveUpSignal {
    /// Its number.
    pub fn number() -> i32 {
        SignalKind::user_defined1().as_raw_value()
    }

    /// Starts to catch it; until then it ends the process.
    ///
    /// # Errors
    /// The operating system refuses the handler.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self(unix::signal(SignalKind::user_defined1())?))
    }

    /// Waits for it. Cancel-safe.
    pub async fn received(&mut self) {
        self.0.recv().await;
    }
}

/// The stop signals this process receives, one after another.
///
/// A drain listens on for a second signal, which means "now".
#[derive(Debug)]
pub struct SignalStream {
    interrupt: unix::Signal,
    terminate: unix::Signal,
    hangup: unix::Signal,
}

impl SignalStream {
    /// Starts to catch the signals; from here on none of them ends the process by itself.
    ///
    /// # Errors
    /// The operating system refuses the handler.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: unix::signal(SignalKind::interrupt())?,
            terminate: unix::signal(SignalKind::terminate())?,
            hangup: unix::signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next stop signal. Cancel-safe.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Terminate,
            _ = self.interrupt.recv() => Signal::Interrupt,
            _ = self.hangup.recv() => Signal::Hangup,
        }
    }
}

/// Waits for the first stop signal. The signals are caught from the first poll on.
///
/// When the handlers cannot be installed, an error is logged and the future never resolves: the signals then
/// end the process by their default action.
pub async fn shutdown_signal() -> Signal {
    match SignalStream::new() {
        Ok(mut stream) => stream.next().await,
        Err(error) => {
            tracing::error!("cannot catch stop signals, they will end this process at once: {error}");
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test for all, because signals reach the whole process.
    #[tokio::test]
    async fn stream_yields_first_and_second_signal() {
        let mut stream = SignalStream::new().unwrap();
        for (number, expected) in
            [("TERM", Signal::Terminate), ("INT", Signal::Interrupt), ("HUP", Signal::Hangup)]
        {
            let pid = std::process::id().to_string();
            let status = std::process::Command::new("kill").args(["-s", number, &pid]).status().unwrap();
            assert!(status.success());
            assert_eq!(stream.next().await, expected);
        }
        assert_eq!(Signal::Terminate.to_string(), "SIGTERM");
    }
}
