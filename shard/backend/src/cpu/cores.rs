//! Which core each thread is to stay on.
//!
//! A step is a few hundred short operations after each of which all threads meet, so a thread that is moved, or shares a core
//! with another, makes all wait. Threads are pinned where the cores are this model's own: where the threads of all its ranks
//! fill the set that the process may use. With fewer threads than cores the rest of the machine belongs to processes that are not
//! known here, and the scheduler, who sees them, chooses better.

use std::fs;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Where the system describes its processors.
const SYSTEM_CPUS: &str = "/sys/devices/system/cpu";

/// Processors of one core: the first hardware thread, and its siblings.
type Core = Vec<usize>;

/// The processor for each thread of this rank; none where they are better left to the scheduler.
pub(super) fn choose(threads: usize, rank: usize, world_size: usize) -> Option<Vec<usize>> {
    let allowed = allowed()?;
    // A limit on processor time (of a container) makes this smaller than the set: its cores are then shared with others.
    let share = std::thread::available_parallelism().ok()?.get();
    if share < allowed.len() {
        return None;
    }
    let siblings = |cpu: usize| {
        let path = Path::new(SYSTEM_CPUS).join(format!("cpu{cpu}/topology/thread_siblings_list"));
        fs::read_to_string(path).ok().and_then(|list| parse_list(&list)).unwrap_or_else(|| vec![cpu])
    };
    plan(&cores(&allowed, siblings), threads, rank, world_size)
}

/// Processors that this process may run on, in order.
fn allowed() -> Option<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).ok()?;
    Some((0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect())
}

/// Lets the calling thread run on `cpu` only. Where the system refuses, the thread stays where it may be: only speed depends
/// on it.
pub(super) fn pin_thread(cpu: usize) {
    let mut set = CpuSet::new();
    if let Err(error) = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
        tracing::debug!("a thread cannot be pinned to processor {cpu}: {error}");
    }
}

/// The processors of a list such as `0-3,8`.
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last >= CpuSet::count() {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// The cores that `allowed` processors are of, each with those that are allowed.
fn cores(allowed: &[usize], siblings: impl Fn(usize) -> Vec<usize>) -> Vec<Core> {
    let mut cores: Vec<Core> = Vec::new();
    for &cpu in allowed {
        if !cores.iter().any(|core| core.contains(&cpu)) {
            let mut core = siblings(cpu);
            core.retain(|cpu| allowed.contains(cpu));
            cores.push(if core.contains(&cpu) { core } else { vec![cpu] });
        }
    }
    cores
}

/// The processors of rank `rank`, of whose group every rank has `threads` threads. Ranks have cores of their own, and within
/// each, no second thread before every core has one.
fn plan(cores: &[Core], threads: usize, rank: usize, world_size: usize) -> Option<Vec<usize>> {
    let of_rank = |rank: usize| {
        let own = &cores[cores.len() * rank / world_size..cores.len() * (rank + 1) / world_size];
        let most = own.iter().map(Vec::len).max().unwrap_or(0);
        let in_turn = (0..most).flat_map(|turn| own.iter().filter_map(move |core| core.get(turn).copied()));
        in_turn.collect::<Vec<_>>()
    };
    // Either all ranks are pinned or none: one that is not would run on the others' cores.
    let fits = (0..world_size).all(|rank| of_rank(rank).len() >= threads);
    let is_filled = threads.checked_mul(world_size)? >= cores.len();
    (fits && is_filled).then(|| of_rank(rank).into_iter().take(threads).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `count` cores of two hardware threads, numbered as Linux does.
    fn hyper_threaded(count: usize) -> Vec<Core> {
        (0..count).map(|core| vec![core, core + count]).collect()
    }

    #[test]
    fn every_core_has_a_thread_before_any_has_two() {
        let four = hyper_threaded(4);
        assert_eq!(plan(&four, 4, 0, 1), Some(vec![0, 1, 2, 3]));
        assert_eq!(plan(&four, 6, 0, 1), Some(vec![0, 1, 2, 3, 4, 5]));
        assert_eq!(plan(&four, 8, 0, 1), Some(vec![0, 1, 2, 3, 4, 5, 6, 7]));
    }

    #[test]
    fn ranks_have_cores_of_their_own() {
        let four = hyper_threaded(4);
        assert_eq!(plan(&four, 3, 0, 2), Some(vec![0, 1, 4]));
        assert_eq!(plan(&four, 3, 1, 2), Some(vec![2, 3, 6]));
        let three: Vec<Core> = [2, 5, 7].map(|cpu| vec![cpu]).to_vec();
        let of_ranks = [0, 1, 2].map(|rank| plan(&three, 1, rank, 3));
        assert_eq!(of_ranks, [Some(vec![2]), Some(vec![5]), Some(vec![7])]);
    }

    #[test]
    fn nobody_is_pinned_where_the_cores_do_not_suffice_or_are_not_all_taken() {
        let four = hyper_threaded(4);
        assert_eq!(plan(&four, 9, 0, 1), None);
        assert_eq!(plan(&four, 3, 0, 1), None);
        assert_eq!(plan(&four, usize::MAX, 0, 2), None);
        // Two cores for three ranks: one would have none.
        let two: Vec<Core> = vec![vec![0], vec![1]];
        assert!((0..3).all(|rank| plan(&two, 1, rank, 3).is_none()));
        assert_eq!(plan(&[], 1, 0, 1), None);
    }

    #[test]
    fn siblings_outside_of_the_set_do_not_count() {
        let siblings = |cpu: usize| vec![cpu % 4, cpu % 4 + 4];
        assert_eq!(cores(&[1, 2, 5, 7], siblings), [vec![1, 5], vec![2], vec![7]]);
        // What the system says of a processor may be nonsense.
        assert_eq!(cores(&[0, 1], |_| vec![9]), [vec![0], vec![1]]);
    }

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(parse_list("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_list("5"), Some(vec![5]));
        assert_eq!(parse_list(""), None);
        assert_eq!(parse_list("0-99999999999"), None);
    }
}
