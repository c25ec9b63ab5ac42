//! Processes that lost their parent and fell to the launcher: as process 1 of a container, and as a sub-reaper for whatever
//! its children start. Nobody else waits for them.

use std::collections::HashSet;

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

/// From now on, descendants that lose their parent become children of this process.
pub fn adopt() {
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        tracing::warn!("orphans of child processes will not be reaped by the launcher: {error}");
    }
}

/// Reaps every adopted process that has ended. Those of `own` are waited for elsewhere.
///
/// One of `own` that has ended and was not waited for yet hides what comes after it; its end is another occasion.
pub fn reap(own: &HashSet<u32>) {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, flags) {
        let (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) = status else { return };
        if u32::try_from(pid.as_raw()).is_ok_and(|pid| own.contains(&pid)) {
            return;
        }
        reap_one(pid);
    }
}

fn reap_one(pid: Pid) {
    if let Ok(status) = waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        tracing::debug!("an orphan was reaped: {status:?}");
    }
}
