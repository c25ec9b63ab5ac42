//! Directories, files and the shared cache.

use tempfile::TempDir;

use super::*;
use crate::weight_choice::SAFETENSORS_INDEX;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn directory(names: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::write(dir.path().join(name), "{}").unwrap();
    }
    dir
}

fn locate_in(dir: &TempDir) -> Result<Vec<String>, String> {
    locate_path(dir.path().to_str().unwrap())
}

fn locate_path(model_id: &str) -> Result<Vec<String>, String> {
    match locate(&ModelRef::new(model_id), &HubOptions::default()) {
        Ok(files) => {
            let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
            Ok(files.weights.paths().iter().map(name).collect())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn directory_yields_its_safetensors_sorted() {
    let dir =
        directory(&["config.json", "b.safetensors", "a.safetensors", "training_args.safetensors", "x.bin"]);
    assert_eq!(locate_in(&dir).unwrap(), ["a.safetensors", "b.safetensors"]);
}

#[test]
fn a_series_without_one_of_its_files_is_not_complete() {
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let error = locate_in(&directory(&["config.json", first])).unwrap_err();
    assert!(error.contains(second), "{error}");
    assert_eq!(locate_in(&directory(&["config.json", first, second])).unwrap(), [first, second]);
}

#[test]
fn a_second_copy_of_the_weights_is_left_out() {
    let dir = directory(&["config.json", "consolidated.safetensors", "model.safetensors"]);
    assert_eq!(locate_in(&dir).unwrap(), ["model.safetensors"]);
    let dir = directory(&["config.json", "consolidated.safetensors"]);
    assert_eq!(locate_in(&dir).unwrap(), ["consolidated.safetensors"]);
}

#[test]
fn the_index_decides_and_its_files_must_be_there() {
    let dir = directory(&["config.json", "a.safetensors", "b.safetensors"]);
    let index = |text: &str| std::fs::write(dir.path().join(SAFETENSORS_INDEX), text).unwrap();
    index(r#"{"weight_map": {"x": "b.safetensors", "y": "b.safetensors"}}"#);
    assert_eq!(locate_in(&dir).unwrap(), ["b.safetensors"]);
    index(r#"{"weight_map": {"x": "c.safetensors"}}"#);
    assert!(locate_in(&dir).unwrap_err().contains("c.safetensors of model"));
    index(r#"{"weight_map": {"x": "c.safetensors", "y": "a.safetensors", "z": "\u001b\n.safetensors"}}"#);
    assert!(locate_in(&dir).unwrap_err().starts_with("\\u{1b}\\n.safetensors, c.safetensors of model"));
    for name in ["../../secret.safetensors", "/etc/secret.safetensors", "..", "", "config.json", "a.bin"] {
        index(&format!(r#"{{"weight_map": {{"x": "{name}"}}}}"#));
        let error = locate_in(&dir).unwrap_err();
        let words =
            format!("weight_map: found {name:?}, expected names of files beside it that end in .safetensors");
        assert!(error.contains(&words), "{error}");
    }
    index(r#"{"weight_map": {"x": 7}}"#);
    assert!(locate_in(&dir).unwrap_err().contains("found 7"));
    index(r#"{"weight_map": {}}"#);
    assert!(locate_in(&dir).unwrap_err().contains("weight_map: found none"));
    index("[".repeat(100_000).as_str());
    assert!(locate_in(&dir).unwrap_err().contains("not valid JSON"));
    index("{}");
    assert!(locate_in(&dir).unwrap_err().contains("weight_map: found no object"));
}

#[test]
fn pytorch_files_where_there_are_no_safetensors() {
    let dir = directory(&["config.json", "pytorch_model.bin", "training_args.bin", "optimizer.bin"]);
    assert_eq!(locate_in(&dir).unwrap(), ["pytorch_model.bin"]);
    std::fs::write(dir.path().join(PYTORCH_INDEX), r#"{"weight_map": {"x": "optimizer.bin"}}"#).unwrap();
    assert_eq!(locate_in(&dir).unwrap(), ["optimizer.bin"]);
    std::fs::write(dir.path().join("model.safetensors"), "").unwrap();
    assert_eq!(locate_in(&dir).unwrap(), ["model.safetensors"]);
    let error = locate_in(&directory(&["pytorch_model.bin"])).unwrap_err();
    assert!(error.contains("config.json of model"), "{error}");
}

#[test]
fn links_may_not_leave_the_model() {
    let secret = directory(&["secret", "config.json"]);
    let link = |from: PathBuf, to: PathBuf| std::os::unix::fs::symlink(to, from).unwrap();
    for name in ["model.safetensors", "pytorch_model.bin", "m.gguf", "config.json", "tokenizer.json"] {
        let dir = directory(&["config.json", "a.safetensors"]);
        let _ = std::fs::remove_file(dir.path().join(name));
        if name.ends_with(".bin") || name.ends_with(".gguf") {
            std::fs::remove_file(dir.path().join("a.safetensors")).unwrap();
        }
        link(dir.path().join(name), secret.path().join("secret"));
        let error = locate_in(&dir).unwrap_err();
        assert!(error.contains(&format!("{name}: found a link to ")) && error.contains("secret"), "{error}");
    }
    // Within the directory, and through the directory itself, they are fine.
    let dir = directory(&["config.json", "real"]);
    link(dir.path().join("model.safetensors"), "real".into());
    assert_eq!(locate_in(&dir).unwrap(), ["model.safetensors"]);
    link(secret.path().join("model"), dir.path().to_owned());
    assert_eq!(locate_path(secret.path().join("model").to_str().unwrap()).unwrap(), ["model.safetensors"]);
    // What an older Hub client leaves with --local-dir.
    let blobs = secret.path().join("models--org--name/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join("hash"), "{}").unwrap();
    link(dir.path().join("b.safetensors"), blobs.join("hash"));
    assert_eq!(locate_in(&dir).unwrap(), ["b.safetensors", "model.safetensors"]);
}

#[test]
fn gguf_by_path_or_as_the_only_one() {
    let dir = directory(&["m.gguf", "README.md"]);
    assert_eq!(locate_in(&dir).unwrap(), ["m.gguf"]);
    assert_eq!(locate_path(dir.path().join("m.gguf").to_str().unwrap()).unwrap(), ["m.gguf"]);
    let dir = directory(&["m.gguf", "n.gguf"]);
    let error = locate_in(&dir).unwrap_err();
    assert!(error.contains("2 GGUF files (m.gguf, n.gguf)") && error.contains("/m.gguf"), "{error}");
    let dir = directory(&["m.gguf", "model.safetensors", "config.json"]);
    assert_eq!(locate_in(&dir).unwrap(), ["model.safetensors"]);
}

#[test]
fn what_is_missing_is_named() {
    assert!(locate_in(&directory(&["model.safetensors"])).unwrap_err().contains("config.json of model"));
    assert!(
        locate_in(&directory(&["config.json"]))
            .unwrap_err()
            .contains("a weight file (*.safetensors, pytorch_model*.bin or *.gguf)")
    );
    let error = locate_in(&directory(&["config.json", "consolidated.00.pth"])).unwrap_err();
    assert!(error.contains("its weights as consolidated.00.pth only; expected *.safetensors,"), "{error}");
    let dir = directory(&["notes.txt"]);
    let error = locate_path(dir.path().join("notes.txt").to_str().unwrap()).unwrap_err();
    assert!(error.contains("not .gguf"), "{error}");
}

#[test]
fn other_ids_are_refused_before_any_path_is_built() {
    for model_id in
        ["", "...", "../x", "a/..", "/nowhere/at/all", "a/b/c", "a b/c", "nowhere/m.gguf", "m.gguf"]
    {
        let error = locate_path(model_id).unwrap_err();
        assert!(error.contains("neither an existing path nor a Hub id"), "{model_id}: {error}");
    }
    let id = HubId::parse("org/name/m.gguf").unwrap();
    assert_eq!((id.repository.as_str(), id.gguf.as_deref()), ("org/name", Some("m.gguf")));
    assert_eq!(HubId::parse("gpt2").unwrap().repository, "gpt2");
}

/// A cache as all Hugging Face libraries write it: blobs, and snapshots with links to them.
fn cache() -> TempDir {
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("models--org--name");
    let snapshot = folder.join("snapshots").join(COMMIT);
    for (part, text) in [("refs/main", COMMIT), ("refs/refs/pr/1", COMMIT), ("refs/gone", "feed")] {
        let path = folder.join(part);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    std::fs::create_dir_all(folder.join("blobs")).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::write(folder.join("blobs").join(name), "{}").unwrap();
        std::os::unix::fs::symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    cache
}

#[test]
fn cache_is_read_by_branch_and_by_commit() {
    let cache = cache();
    let options = HubOptions { cache_dir: cache.path().to_owned(), ..HubOptions::default() };
    for revision in [None, Some("main"), Some("refs/pr/1"), Some(COMMIT), Some("")] {
        let model = ModelRef { model_id: "org/name".to_owned(), revision: revision.map(str::to_owned) };
        let files = locate(&model, &options).unwrap();
        assert_eq!(files.sha.as_deref(), Some(COMMIT));
        assert!(files.config().unwrap().raw.is_empty());
        assert!(files.weights.paths()[0].is_file());
    }
    for revision in ["gone", "other", "../../main", "/etc"] {
        let model = ModelRef { model_id: "org/name".to_owned(), revision: Some(revision.to_owned()) };
        let error = locate(&model, &options).unwrap_err().to_string();
        assert!(error.contains(&format!("{revision:?}")), "{error}");
    }
}

#[test]
fn a_link_to_nothing_counts_as_missing() {
    let cache = cache();
    std::fs::remove_file(cache.path().join("models--org--name/blobs/model.safetensors")).unwrap();
    let options = HubOptions { cache_dir: cache.path().to_owned(), ..HubOptions::default() };
    let error = locate(&ModelRef::new("org/name"), &options).unwrap_err().to_string();
    assert!(error.contains("a weight file"), "{error}");
}

#[test]
fn weights_can_be_overridden() {
    let cache = cache();
    let flat = directory(&["other.safetensors"]);
    let mut options = HubOptions {
        cache_dir: cache.path().to_owned(),
        weights_cache_override: Some(flat.path().to_owned()),
        ..HubOptions::default()
    };
    let files = locate(&ModelRef::new("org/name"), &options).unwrap();
    assert_eq!(files.weights.paths(), [flat.path().join("other.safetensors")]);
    assert!(files.root.starts_with(cache.path()));
    std::fs::write(flat.path().join("config.json"), "{}").unwrap();
    assert_eq!(locate(&ModelRef::new("org/name"), &options).unwrap().root, flat.path());
    options.weights_cache_override = Some(flat.path().join("nowhere"));
    assert!(locate(&ModelRef::new("org/name"), &options).is_err());
}

#[test]
fn fingerprint_follows_sizes_and_configuration() {
    let dir = directory(&["config.json", "model.safetensors"]);
    let fingerprint = || {
        let files = locate(&ModelRef::new(dir.path().to_str().unwrap()), &HubOptions::default()).unwrap();
        files.fingerprint().unwrap()
    };
    let first = fingerprint();
    assert_eq!(first.len(), 64);
    assert_eq!(first, fingerprint());
    std::fs::write(dir.path().join("model.safetensors"), "longer").unwrap();
    let second = fingerprint();
    assert_ne!(first, second);
    std::fs::write(dir.path().join("config.json"), r#"{"vocab_size": 1}"#).unwrap();
    assert_ne!(second, fingerprint());
}
