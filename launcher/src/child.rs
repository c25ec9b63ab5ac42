//! One child process: started so that it cannot outlive us, watched, ended with a deadline, reaped.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpid, getppid};
use process::{ExitCode, GiveUpSignal};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::command::Invocation;
use crate::log_relay::{self, LastWords};
use crate::supervisor::{ChildId, Death};

/// After its exit a child's pipes end at once, unless a grandchild holds them open.
const PIPES_END_WITHIN: Duration = Duration::from_millis(300);

/// What a router needs to end every stream with an error event once nothing will be computed for them any more.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// What a running child can be told.
#[derive(Debug)]
enum Order {
    Terminate(Duration),
    GiveUp,
    Kill,
}

/// A running child. The task that watches it also sends its signals, so none can reach a process that took over its id.
#[derive(Debug)]
pub struct Handle {
    /// The process id, while it was not waited for.
    pub pid: Option<u32>,
    /// When it was started.
    pub started: Instant,
    orders: mpsc::UnboundedSender<Order>,
    /// A child that is held back waits for the end of its input.
    held: Option<ChildStdin>,
}

impl Handle {
    /// Lets a child go that [`spawn_held`] has started, with `input` for it to read.
    pub fn release(&mut self, input: String) {
        if let Some(mut held) = self.held.take() {
            tokio::spawn(async move {
                // A child that has died meanwhile reads nothing.
                let _ = held.write_all(input.as_bytes()).await;
            });
        }
    }

    /// SIGTERM now, SIGKILL after `grace`. A router is told to give its requests up first, and has half a second for that.
    pub fn terminate(&self, grace: Duration) {
        // A child that has ended already takes no orders.
        let _ = self.orders.send(Order::Terminate(grace));
    }

    /// Tells a router that nothing will ever compute its requests.
    pub fn give_up(&self) {
        let _ = self.orders.send(Order::GiveUp);
    }

    /// SIGKILL now.
    pub fn kill(&self) {
        let _ = self.orders.send(Order::Kill);
    }
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Which child.
    pub child: ChildId,
    /// Exit code or signal, and what that means; one line.
    pub reason: String,
    /// Whether it ended by itself, and what that means for the next one.
    pub death: Death,
    /// It was told to end, and did so with code 0 or by the signal it was sent.
    pub is_orderly: bool,
    /// Its last lines, oldest first.
    pub last_words: Vec<String>,
}

impl Exit {
    /// The reason and the last line the child wrote.
    pub fn in_one_line(&self) -> String {
        match self.last_words.last() {
            Some(last) => format!("{}; its last words: {last}", self.reason),
            None => self.reason.clone(),
        }
    }

    /// The reason and all its last words, one below the other.
    pub fn report(&self) -> String {
        if self.last_words.is_empty() {
            return format!("{}; it wrote nothing", self.reason);
        }
        format!("{}; its last words:\n    {}", self.reason, self.last_words.join("\n    "))
    }
}

/// Starts `program` and watches it; its `Exit` goes to `exits`.
///
/// `lifeline` is a file descriptor that the child inherits under its number.
///
/// Must be called on the main thread: the kernel kills the child when the *thread* that started it ends.
///
/// # Errors
/// The operating system cannot start the program.
pub fn spawn(
    child: ChildId,
    program: &Path,
    invocation: &Invocation,
    lifeline: Option<RawFd>,
    exits: mpsc::UnboundedSender<Exit>,
) -> io::Result<Handle> {
    start(child, program, (invocation, false), lifeline, exits)
}

/// The same, of a child whose input stays open until [`Handle::release`].
///
/// # Errors
/// As [`spawn`].
pub fn spawn_held(
    child: ChildId,
    program: &Path,
    invocation: &Invocation,
    exits: mpsc::UnboundedSender<Exit>,
) -> io::Result<Handle> {
    start(child, program, (invocation, true), None, exits)
}

fn start(
    child: ChildId,
    program: &Path,
    (invocation, is_held): (&Invocation, bool),
    lifeline: Option<RawFd>,
    exits: mpsc::UnboundedSender<Exit>,
) -> io::Result<Handle> {
    let mut command = Command::new(program);
    command
        .args(&invocation.args)
        .envs(invocation.env.iter().map(|(name, value)| (name, value)))
        .stdin(if is_held { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if is_held {
        command.env("QUARTET_HOLD_UNTIL_INPUT_ENDS", "true");
    }
    for name in &invocation.env_removed {
        command.env_remove(name);
    }
    let launcher = getpid();
    // SAFETY: between fork and exec only async-signal-safe system calls are made: prctl, getppid and fcntl. No
    // allocation, no lock.
    unsafe {
        command.pre_exec(move || tie_to_parent(launcher, lifeline));
    }
    let mut process = command.spawn()?;
    let (pid, started) = (process.id(), Instant::now());
    let held = process.stdin.take();
    let words = LastWords::default();
    let pipes = relay(child, &mut process, &words);
    let (orders, received) = mpsc::unbounded_channel();
    tokio::spawn(watch(Watched { child, process, pipes, words }, received, exits));
    Ok(Handle { pid, started, orders, held })
}

/// Runs in the child before it becomes the program.
fn tie_to_parent(launcher: Pid, lifeline: Option<RawFd>) -> io::Result<()> {
    // SIGKILL rather than SIGTERM: without a launcher nobody would end a child that drains for long.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != launcher {
        // The launcher died before the line above took effect.
        return Err(io::Error::from_raw_os_error(nix::libc::ESRCH));
    }
    if let Some(lifeline) = lifeline {
        // SAFETY: the descriptor is open: the launcher holds it while it starts children, and fork copied it.
        let lifeline = unsafe { std::os::fd::BorrowedFd::borrow_raw(lifeline) };
        nix::fcntl::fcntl(lifeline, nix::fcntl::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    }
    Ok(())
}

/// Starts the tasks that read the child's output.
fn relay(child: ChildId, process: &mut Child, words: &LastWords) -> Vec<JoinHandle<()>> {
    let (stdout, stderr) = (process.stdout.take(), process.stderr.take());
    let mut tasks = Vec::new();
    match child {
        ChildId::Shard(rank) => {
            let span = tracing::info_span!("shard-manager", rank);
            tasks.extend(
                stdout.map(|out| tokio::spawn(log_relay::relay_shard_stdout(out, span, words.clone()))),
            );
            tasks.extend(stderr.map(|err| tokio::spawn(log_relay::collect_stderr(err, words.clone()))));
        }
        ChildId::Router => {
            tasks.extend(stdout.map(|out| tokio::spawn(log_relay::copy_stdout(out, words.clone()))));
            tasks.extend(stderr.map(|err| tokio::spawn(log_relay::copy_stderr(err, words.clone()))));
        }
    }
    tasks
}

struct Watched {
    child: ChildId,
    process: Child,
    pipes: Vec<JoinHandle<()>>,
    words: LastWords,
}

/// Lives as long as the child: obeys orders, keeps the deadline, reports the end.
async fn watch(
    mut watched: Watched,
    mut orders: mpsc::UnboundedReceiver<Order>,
    exits: mpsc::UnboundedSender<Exit>,
) {
    let mut deadline: Option<Instant> = None;
    let (mut was_told, mut has_given_up) = (false, false);
    let group = watched.process.id().and_then(|pid| i32::try_from(pid).ok());
    let status = loop {
        let out_of_time = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            status = watched.process.wait() => break status,
            order = orders.recv() => {
                match order {
                    Some(Order::GiveUp) => {
                        has_given_up = true;
                        give_up(&watched);
                    }
                    Some(Order::Terminate(grace)) => {
                        was_told = true;
                        signal(&watched, Signal::SIGTERM);
                        let new = Instant::now() + grace;
                        deadline = Some(deadline.map_or(new, |old| old.min(new)));
                    }
                    // Nobody is left to give orders: the supervisor has gone.
                    Some(Order::Kill) | None => {
                        was_told = true;
                        signal(&watched, Signal::SIGKILL);
                        deadline = None;
                    }
                }
            }
            () = out_of_time => {
                if watched.child == ChildId::Router && !has_given_up {
                    tracing::warn!("router did not end in time after SIGTERM: its requests end with an error");
                    give_up(&watched);
                    has_given_up = true;
                    deadline = Some(Instant::now() + LAST_ANSWERS);
                    continue;
                }
                tracing::warn!("{} did not end in time after SIGTERM and is killed", watched.child);
                signal(&watched, Signal::SIGKILL);
                deadline = None;
            }
        }
    };
    if let Some(group) = group {
        // What it had started in its group, if anything, goes with it. A group's number is no process's while it has
        // members; without any the call fails.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let reading = async {
        for pipe in watched.pipes {
            // A relay that panicked has nothing more to say.
            let _ = pipe.await;
        }
    };
    let _ = tokio::time::timeout(PIPES_END_WITHIN, reading).await;
    // The supervisor may have gone too.
    let _ = exits.send(describe(watched.child, status, was_told, watched.words.lines()));
}

/// Signals the child's whole process group, so that a wrapper script does not shield the program it runs.
fn signal(watched: &Watched, signal: Signal) {
    if let Some(pid) = watched.process.id().and_then(|pid| i32::try_from(pid).ok()) {
        tracing::debug!("sending {signal} to {}", watched.child);
        // The only error is that the group has just ended.
        let _ = killpg(Pid::from_raw(pid), signal);
    }
}

fn give_up(watched: &Watched) {
    if let Ok(number) = Signal::try_from(GiveUpSignal::number()) {
        signal(watched, number);
    }
}

fn describe(child: ChildId, status: io::Result<ExitStatus>, was_told: bool, last_words: Vec<String>) -> Exit {
    let (how, code, signal) = match &status {
        Ok(status) => (explain(*status, was_told), status.code(), status.signal()),
        Err(error) => (format!("is lost: {error}"), None, None),
    };
    let is_orderly = was_told && (code == Some(0) || signal.is_some());
    let death = death(code, signal, is_orderly);
    Exit { child, reason: format!("{child} {how}"), death, is_orderly, last_words }
}

/// A code of ours says whether the next one would end alike; a signal, a panic or an end that nobody asked for may be
/// chance.
fn death(code: Option<i32>, signal: Option<i32>, is_orderly: bool) -> Death {
    let known = code.and_then(ExitCode::from_code);
    if is_orderly || known == Some(ExitCode::PeerLost) {
        return Death::Consequence;
    }
    let from_outside =
        [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].map(|signal| Some(signal as i32));
    if from_outside.contains(&signal) {
        return Death::Killed;
    }
    Death::Cause { restart_helps: known.is_none_or(|code| code == ExitCode::Ok || code.is_restartable()) }
}

/// The exit status as a clause.
fn explain(status: ExitStatus, was_told: bool) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) if !was_told => "exited with code 0 although nobody asked it to end".to_owned(),
        (Some(101), _) => "exited with code 101 (it panicked)".to_owned(),
        (Some(code), _) => match ExitCode::from_code(code) {
            Some(known) => format!("exited with code {code} ({})", known.meaning()),
            None => format!("exited with code {code}"),
        },
        (None, Some(number)) => {
            let name = Signal::try_from(number)
                .map_or_else(|_| format!("signal {number}"), |known| known.to_string());
            let hint = if number == Signal::SIGKILL as i32 && !was_told {
                " (the kernel does that when memory runs out: see `dmesg`)"
            } else {
                ""
            };
            format!("was ended by {name}{hint}")
        }
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(wait_status: i32, was_told: bool) -> Exit {
        let words = vec!["loading".to_owned(), "no such file".to_owned()];
        describe(ChildId::Shard(1), Ok(ExitStatus::from_raw(wait_status)), was_told, words)
    }

    #[test]
    fn reasons_name_child_cause_and_last_words() {
        assert_eq!(
            exit(10 << 8, false).in_one_line(),
            "shard rank 1 exited with code 10 (the model is missing, damaged or not supported); its last words: no such \
             file"
        );
        assert!(
            exit(0, false)
                .report()
                .ends_with("nobody asked it to end; its last words:\n    loading\n    no such file")
        );
        assert!(exit(9, false).reason.contains("SIGKILL (the kernel"));
        assert!(!exit(9, true).reason.contains("kernel"));
        assert!(exit(101 << 8, false).reason.contains("panicked"));
        assert!(exit(77 << 8, false).reason.contains("code 77"));
    }

    #[test]
    fn order_and_consequence_are_told_apart_from_causes() {
        assert_eq!(exit(14 << 8, false).death, Death::Consequence);
        assert!(exit(0, true).is_orderly && !exit(0, false).is_orderly);
        assert!(exit(15, true).is_orderly && exit(15, true).death == Death::Consequence);
        assert!(!exit(13 << 8, true).is_orderly);
    }

    #[test]
    fn causes_tell_whether_a_restart_helps() {
        assert_eq!(exit(9, false).death, Death::Killed);
        for (wait_status, helps) in [
            (6, true),
            (11, true),
            (0, true),
            (1 << 8, true),
            (13 << 8, true),
            (101 << 8, true),
            (77 << 8, true),
            (2 << 8, false),
            (10 << 8, false),
            (11 << 8, false),
            (12 << 8, false),
        ] {
            let expected = Death::Cause { restart_helps: helps };
            assert_eq!(exit(wait_status, false).death, expected, "{wait_status}");
        }
    }
}
