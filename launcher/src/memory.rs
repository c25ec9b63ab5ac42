//! How much memory this process and its children can still get.

use std::path::{Path, PathBuf};

/// Memory that is free or can be freed, and what bounds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Available {
    /// Bytes.
    pub bytes: u64,
    /// What to enlarge, for an error message.
    pub bound: &'static str,
}

/// Reads the machine's and the control group's numbers; `None` where the kernel does not tell.
pub fn available() -> Option<Available> {
    available_below(Path::new("/"))
}

/// The tighter of machine and control group, read from the tree at `root`.
fn available_below(root: &Path) -> Option<Available> {
    let machine =
        machine_available(root).map(|bytes| Available { bytes, bound: "this machine's free memory" });
    let group = group_available(root).map(|bytes| Available { bytes, bound: "the container's memory limit" });
    [machine, group].into_iter().flatten().min_by_key(|available| available.bytes)
}

fn machine_available(root: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A control group's files, whose names differ between the two versions of the interface.
struct GroupFiles {
    limit: &'static str,
    usage: &'static str,
    reclaimable: [&'static str; 2],
}

const VERSION_2: GroupFiles = GroupFiles {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: ["inactive_file", "active_file"],
};
const VERSION_1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
};

/// The tightest limit of this process's control group and the groups around it.
fn group_available(root: &Path) -> Option<u64> {
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let rooms = groups.lines().flat_map(|line| {
        // `hierarchy:controllers:path`; version 2 names no controllers.
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (mount, files) = match controllers {
            "" => ("sys/fs/cgroup", &VERSION_2),
            list if list.split(',').any(|controller| controller == "memory") => {
                ("sys/fs/cgroup/memory", &VERSION_1)
            }
            _ => return Vec::new(),
        };
        let mount = root.join(mount);
        let own: PathBuf = mount.join(path.trim_start_matches('/'));
        let around = own.ancestors().take_while(|dir| dir.starts_with(&mount)).map(Path::to_path_buf);
        around.filter_map(|dir| room_in(&dir, files)).collect::<Vec<_>>()
    });
    rooms.min()
}

/// Limit less usage, where usage does not count the page cache: the kernel gives that back.
fn room_in(dir: &Path, files: &GroupFiles) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" means no limit; so do the astronomic numbers of version 1.
    let limit = number(files.limit).filter(|&limit| limit < 1 << 60)?;
    let statistics = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let reclaimable: u64 = statistics
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| files.reclaimable.contains(name))
        .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
        .sum();
    let used = number(files.usage).unwrap_or(0).saturating_sub(reclaimable);
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 4000 kB\nMemAvailable:    2000 kB\n");

    #[test]
    fn machine_alone() {
        let root = tree(&[MEMINFO, ("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "max\n")]);
        let available = available_below(root.path()).unwrap();
        assert_eq!(available.bytes, 2000 * 1024);
        assert!(available.bound.contains("machine"));
    }

    #[test]
    fn group_without_its_page_cache() {
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/pod/container\n"),
            ("sys/fs/cgroup/pod/memory.max", "900000\n"),
            ("sys/fs/cgroup/pod/memory.current", "500000\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 100000\ninactive_file 300000\nactive_file 100000\n"),
            ("sys/fs/cgroup/pod/container/memory.max", "max\n"),
        ]);
        let available = available_below(root.path()).unwrap();
        assert_eq!(available.bytes, 800_000);
        assert!(available.bound.contains("container"));
    }

    #[test]
    fn version_1_group() {
        let root = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "5:cpu:/x\n4:hugetlb,memory:/x\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1000000\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "250000\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!(available_below(root.path()).unwrap().bytes, 750_000);
    }

    #[test]
    fn this_machine_answers() {
        assert!(available().is_some_and(|available| available.bytes > 0));
        assert_eq!(available_below(Path::new("/nonexistent")), None);
    }
}
