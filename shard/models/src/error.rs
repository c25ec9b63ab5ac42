//! Why a model cannot be loaded or run.

use backend::BackendError;

/// A failed load or step.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The files contradict themselves, one another or what this program can run. One line a mistake.
    #[error("{}", .0.join("\n"))]
    Unusable(Vec<String>),
    /// A file of the model could not be read.
    #[error(transparent)]
    Hub(#[from] hub::HubError),
    /// The device or a peer failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
