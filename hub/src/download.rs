//! Fetching a model from the Hub into the shared cache.

use crate::args::HubOptions;
use crate::error::HubError;
use crate::model_files::ModelFiles;
use crate::snapshot::{ModelRef, locate};

/// locate, else download.
pub fn fetch(model: &ModelRef, options: &HubOptions) -> Result<ModelFiles, HubError> {
    locate(model, options)
}
