//! Where the programs `shard` and `router` are.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Our name first, then the one text-generation-inference installs it under.
pub const SHARD_NAMES: [&str; 2] = ["shard", "text-generation-server"];
/// Likewise.
pub const ROUTER_NAMES: [&str; 2] = ["router", "text-generation-router"];

/// Directories to search, in order.
#[derive(Clone, Debug, Default)]
pub struct SearchPath {
    near: Vec<PathBuf>,
    path: Vec<PathBuf>,
}

impl SearchPath {
    /// `bin_dir` when given, the directory of the launcher's own executable, then the directories of `PATH`.
    pub fn new(bin_dir: Option<&Path>, executable: Option<&Path>, path: Option<&OsStr>) -> Self {
        let beside = executable.and_then(Path::parent).map(Path::to_path_buf);
        Self {
            near: bin_dir.map(Path::to_path_buf).into_iter().chain(beside).collect(),
            path: path.map(|path| std::env::split_paths(path).collect()).unwrap_or_default(),
        }
    }

    /// The first program of one of these names; a directory is searched for all names before the next one is.
    ///
    /// # Errors
    /// One line that says what was looked for and where.
    pub fn find(&self, names: &[&str]) -> Result<PathBuf, String> {
        let candidates =
            self.near.iter().chain(&self.path).flat_map(|dir| names.iter().map(move |name| dir.join(name)));
        candidates.into_iter().find(|candidate| is_program(candidate)).ok_or_else(|| {
            let near: Vec<String> = self.near.iter().map(|dir| dir.display().to_string()).collect();
            format!(
                "the program {} was not found: looked in {} and on PATH; put it beside the launcher or set \
                 QUARTET_BIN_DIR to its directory",
                names.join(" or "),
                near.join(", ")
            )
        })
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn program(path: &Path) {
        std::fs::write(path, "").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn nearer_directories_and_our_names_win() {
        let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
        let path = std::env::join_paths([dirs[2].path()]).unwrap();
        let executable = dirs[1].path().join("launcher");
        let search = SearchPath::new(Some(dirs[0].path()), Some(&executable), Some(&path));
        assert!(search.find(&SHARD_NAMES).unwrap_err().contains("shard or text-generation-server"));
        let in_order = [
            dirs[2].path().join("text-generation-server"),
            dirs[1].path().join("shard"),
            dirs[0].path().join("shard"),
        ];
        for expected in in_order {
            program(&expected);
            assert_eq!(search.find(&SHARD_NAMES), Ok(expected));
        }
    }

    #[test]
    fn a_file_that_cannot_be_executed_is_no_program() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("shard"), "").unwrap();
        assert!(SearchPath::new(Some(dir.path()), None, None).find(&SHARD_NAMES).is_err());
    }
}
