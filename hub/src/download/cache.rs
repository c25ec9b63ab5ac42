//! The folders of one repository in the shared cache: blobs, snapshots that link to them, references to snapshots.
//!
//! The layout is the one that all Hugging Face libraries share; hf-hub knows its names. Everything appears by a rename or as
//! a link, so it is there as a whole or not at all.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::checksum::Checksum;
use super::lock::DownloadLock;
use crate::args::HubOptions;
use crate::error::HubError;
use crate::snapshot::HubId;

/// The folders of one repository, locked for this process.
#[derive(Debug)]
pub(super) struct RepositoryCache {
    folder: PathBuf,
    layout: CacheRepo,
    lock: DownloadLock,
}

impl RepositoryCache {
    /// Makes the folders and takes the lock; waits while another process downloads the same repository.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub(super) fn open(id: &HubId, options: &HubOptions) -> Result<Self, HubError> {
        let folder = id.folder(options);
        let read_only = |error: io::Error| match error.kind() {
            ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => HubError::ReadOnlyCache {
                model_id: id.repository.clone(),
                path: folder.clone(),
                source: error,
            },
            _ => HubError::io("create", &folder)(error),
        };
        for sub_folder in ["blobs", "refs", "snapshots"] {
            std::fs::create_dir_all(folder.join(sub_folder)).map_err(read_only)?;
        }
        // Where huggingface_hub has its locks, so that nothing takes it for a part of the model.
        let locks = options.cache_dir.join(".locks").join(folder.file_name().unwrap_or_default());
        std::fs::create_dir_all(&locks).map_err(read_only)?;
        let lock = DownloadLock::take(&locks.join("quartet.lock"), &id.repository)?;
        let repo = Repo::new(id.repository.clone(), RepoType::Model);
        let layout = Cache::new(options.cache_dir.clone()).repo(repo);
        Ok(Self { folder, layout, lock })
    }

    /// Whether another process was at it before us.
    pub(super) fn has_waited(&self) -> bool {
        self.lock.has_waited
    }

    /// The repository's folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The snapshot of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.layout.pointer_path(commit)
    }

    /// Where a content is, when it is there.
    pub(super) fn blob(&self, checksum: &Checksum) -> PathBuf {
        self.layout.blob_path(checksum.blob_name())
    }

    /// Where a content is while it comes. hf-hub and huggingface_hub have other names for theirs.
    pub(super) fn part(&self, checksum: &Checksum) -> PathBuf {
        let mut name = checksum.blob_name().to_owned();
        name.push_str(".quartet-part");
        name.push_str(&self.lock.part_suffix);
        self.layout.blob_path(&name)
    }

    /// Gives a content its name in a snapshot.
    pub(super) fn link(&self, commit: &str, name: &str, checksum: &Checksum) -> io::Result<()> {
        let snapshot = self.snapshot(commit);
        std::fs::create_dir_all(&snapshot)?;
        let target = Path::new("../../blobs").join(checksum.blob_name());
        let pointer = snapshot.join(name);
        match std::os::unix::fs::symlink(&target, &pointer) {
            // A link that leads nowhere, or to a content that was removed as damaged.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                std::fs::remove_file(&pointer)?;
                std::os::unix::fs::symlink(&target, &pointer)
            }
            result => result,
        }
    }

    /// Says which commit a branch or tag is.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        let path = self.folder.join("refs").join(revision);
        let failed = || HubError::io("write the reference", &path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed())?;
        }
        // hf-hub's own truncates the file first.
        let new = self.folder.join("refs").join(".quartet-new");
        std::fs::write(&new, commit).and_then(|()| std::fs::rename(&new, &path)).map_err(failed())
    }
}
