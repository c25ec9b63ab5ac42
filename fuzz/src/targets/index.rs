//! The index of a model in several files, safetensors and PyTorch: the input is each.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::LazyLock;

use super::loading;
use crate::scratch::Scratch;

static MODELS: LazyLock<Vec<Scratch>> = LazyLock::new(|| {
    let model = |suffix: &str| {
        let model = Scratch::with(&[("config.json", loading::CONFIG.as_bytes())]);
        ["a", "b"].iter().for_each(|name| model.write(&format!("{name}.{suffix}"), b""));
        symlink("/etc/hostname", model.file(&format!("outside.{suffix}"))).expect("a link");
        model
    };
    vec![model("safetensors"), model("bin")]
});

const NAMES: [&str; 2] = ["model.safetensors.index.json", "pytorch_model.bin.index.json"];

/// Finds the files.
///
/// # Panics
/// One of them is not in the model's directory.
pub fn run(input: &[u8]) {
    for (model, name) in MODELS.iter().zip(NAMES) {
        model.write(name, input);
        let Some(files) = loading::locate(model.path()) else { continue };
        assert!(!files.weights.paths().is_empty(), "a model without weights");
        for path in files.weights.paths() {
            let parent = fs::canonicalize(path).ok().and_then(|path| path.parent().map(Path::to_owned));
            assert_eq!(parent, fs::canonicalize(model.path()).ok(), "{}", path.display());
        }
    }
}
