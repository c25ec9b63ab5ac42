//! Downloads from a Hub that behaves badly: what comes in the end is whole, what does not is one line that says why.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hub::{DownloadOptions, HubOptions, ModelFiles, ModelRef, ProgressOutput, fetch, locate};
use integration_tests::fake_hub::{COMMIT, FakeHub, Fault, RunningHub, noise};
use serde_json::json;

/// Reads of one buffer a connection, and what the kernel takes before a reader is asked: what a broken connection may cost.
const LOST_PER_CONNECTION: u64 = 256 << 10;
const WEIGHTS: &str = "model.safetensors";

/// A repository of one weight file of 1 MB and the small files.
fn tiny() -> FakeHub {
    FakeHub::default()
        .file("config.json", r#"{"model_type": "llama"}"#)
        .file("tokenizer.json", "{}")
        .file("README.md", "nobody needs this")
        .file(WEIGHTS, noise(1_000_000))
        .file("consolidated.safetensors", noise(20_000))
        .file("original/model.safetensors", noise(20_000))
        .file("pytorch_model.bin", noise(20_000))
}

/// A cache of its own and options that go with `hub`.
struct Cache {
    dir: tempfile::TempDir,
    options: HubOptions,
}

impl Cache {
    fn of(hub: &RunningHub) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let download = DownloadOptions {
            connections: 3,
            segment_bytes: 128 << 10,
            stall_timeout: Duration::from_secs(1),
            first_pause: Duration::from_millis(10),
            progress: ProgressOutput::Lines,
        };
        let (cache_dir, endpoint) = (dir.path().join("cache"), hub.endpoint.clone());
        Self { dir, options: HubOptions { cache_dir, endpoint, download, ..HubOptions::default() } }
    }

    fn fetch(&self) -> Result<ModelFiles, String> {
        fetch(&ModelRef::new("org/tiny"), &self.options).map_err(|error| error.to_string())
    }

    /// Fetches, and compares what came with what the Hub has.
    fn fetch_whole(&self, hub: &RunningHub) -> ModelFiles {
        let files = self.fetch().unwrap();
        let found = std::fs::read(&files.weights.paths()[0]).unwrap();
        assert!(found == hub.content(WEIGHTS), "{} bytes are not what the Hub has", found.len());
        self.assert_sound(hub);
        files
    }

    /// The error, which must be one line; nothing of the model may be trusted then.
    fn refusal(&self, hub: &RunningHub) -> String {
        let error = self.fetch().unwrap_err();
        assert!(!error.contains('\n'), "{error}");
        assert!(locate(&ModelRef::new("org/tiny"), &self.options).is_err(), "{error}");
        self.assert_sound(hub);
        error
    }

    /// Whatever has the name of a whole file is whole, and nothing lies outside of the repository's folders.
    fn assert_sound(&self, hub: &RunningHub) {
        for path in tree(self.dir.path()) {
            let place = path.strip_prefix(&self.options.cache_dir).unwrap();
            let is_ours =
                place.starts_with("models--org--tiny") || place.starts_with(".locks/models--org--tiny");
            assert!(is_ours, "{} is outside of the cache's folders", path.display());
            let is_snapshot = place.starts_with(format!("models--org--tiny/snapshots/{COMMIT}"));
            if is_snapshot && let Some(name) = place.file_name().and_then(|name| name.to_str()) {
                assert!(std::fs::read(&path).unwrap() == hub.content(name), "{name} is not whole");
            }
        }
    }
}

/// All files below a directory, links to files too.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(tree(&path)) } else { files.push(path) }
    }
    files
}

#[test]
fn fetches_in_ranges_only_what_is_needed_and_then_asks_nobody() {
    let hub = tiny().serve();
    let cache = Cache::of(&hub);
    let files = cache.fetch_whole(&hub);
    assert_eq!(files.sha.as_deref(), Some(COMMIT));
    let requests = hub.requests();
    let unneeded = ["README", "consolidated", "original", ".bin"];
    assert!(requests.iter().all(|request| unneeded.iter().all(|name| !request.path.contains(name))));
    // 1,000,000 bytes in pieces of 131,072, over connections that are used again.
    let ranges = requests.iter().filter(|request| request.is_storage).count();
    assert_eq!(ranges, 8, "{requests:?}");
    assert!(hub.num_connections() <= 8, "{}", hub.num_connections());
    let before = (hub.requests().len(), tree(cache.dir.path()));
    cache.fetch_whole(&hub);
    assert_eq!((hub.requests().len(), tree(cache.dir.path())), before);
}

#[test]
fn the_token_goes_to_the_hub_and_nobody_else() {
    let hub = tiny().serve();
    let mut cache = Cache::of(&hub);
    cache.options.token = Some("hf_secret".into());
    cache.fetch_whole(&hub);
    let (storage, direct): (Vec<_>, Vec<_>) =
        hub.requests().into_iter().partition(|request| request.is_storage);
    assert!(!storage.is_empty() && storage.iter().all(|request| request.authorization.is_none()));
    assert!(direct.iter().all(|request| request.authorization.as_deref() == Some("Bearer hf_secret")));
}

#[test]
fn connections_that_are_cut_cost_little() {
    let hub = tiny().fault("/stored/", Fault::CutAfter(50_000), 12).serve();
    let cache = Cache::of(&hub);
    cache.fetch_whole(&hub);
    let sent = hub.num_bytes();
    let needed = 1_000_000 + 100;
    assert!(sent <= needed + 12 * LOST_PER_CONNECTION.min(50_000), "{sent} bytes were sent for {needed}");
}

#[test]
fn a_connection_without_a_byte_is_made_anew() {
    let hub = tiny().fault("/stored/", Fault::StallAfter(50_000), 3).serve();
    let cache = Cache::of(&hub);
    let started = Instant::now();
    cache.fetch_whole(&hub);
    assert!(started.elapsed() >= Duration::from_secs(1));
    // Storage that never says a word ends with a line, after as many tries as a broken connection.
    let dead = tiny().fault("/stored/", Fault::StallAfter(0), usize::MAX).serve();
    let mut cache = Cache::of(&dead);
    cache.options.download.stall_timeout = Duration::from_millis(100);
    let error = cache.refusal(&dead);
    assert!(error.contains("nothing came for 0.1 s") && error.contains(WEIGHTS), "{error}");
}

#[test]
fn a_busy_hub_is_asked_again_when_it_says() {
    let retry_after = |text: &str| Fault::Status(429, vec![format!("Retry-After: {text}")]);
    let hub = tiny()
        .fault("/api/models/", retry_after("1"), 1)
        .fault("/api/models/", Fault::Status(503, Vec::new()), 2)
        .fault("/stored/", retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), 2)
        .fault("/resolve/", Fault::Status(500, Vec::new()), 3)
        .serve();
    let cache = Cache::of(&hub);
    let started = Instant::now();
    cache.fetch_whole(&hub);
    assert!(started.elapsed() >= Duration::from_secs(1), "Retry-After was not kept");
    // A pause nobody waits for is the end.
    let hub = tiny().fault("/api/models/", retry_after("86400"), usize::MAX).serve();
    let error = Cache::of(&hub).refusal(&hub);
    assert!(
        error.contains("429") && error.contains("Retry-After 86400 s") && error.contains("HF_TOKEN"),
        "{error}"
    );
    assert_eq!(hub.requests().len(), 1);
}

#[test]
fn a_server_without_ranges_sends_each_file_once() {
    let hub = tiny().fault("/stored/", Fault::IgnoreRange, usize::MAX).serve();
    let cache = Cache::of(&hub);
    cache.fetch_whole(&hub);
    let sent = hub.num_bytes();
    // Others had asked before the first answer showed that there are no ranges; they hang up at once, but a loopback
    // connection takes the whole megabyte before that.
    assert!(sent <= 3 * 1_000_000 + 100, "{sent}");
    assert!(hub.num_ranges() <= 3 + 2, "{:?}", hub.requests());
}

#[test]
fn a_server_that_loses_its_ranges_midway_is_followed() {
    let hub = tiny()
        .fault("/stored/", Fault::CutAfter(10_000), 2)
        .fault("/stored/", Fault::IgnoreRange, 1)
        .fault("/stored/", Fault::CutAfter(100), 2)
        .serve();
    Cache::of(&hub).fetch_whole(&hub);
}

#[test]
fn wrong_ranges_are_not_taken() {
    let hub = tiny().fault("/stored/", Fault::ShiftRange, 3).serve();
    Cache::of(&hub).fetch_whole(&hub);
    let hub = tiny().fault("/stored/", Fault::ShiftRange, usize::MAX).serve();
    let error = Cache::of(&hub).refusal(&hub);
    assert!(error.contains("found Content-Range") && error.contains("expected \"bytes "), "{error}");
}

#[test]
fn sizes_that_differ_from_the_list_are_named() {
    let hub = tiny().fault("/stored/", Fault::ClaimSize(999), usize::MAX).serve();
    let error = Cache::of(&hub).refusal(&hub);
    assert!(error.contains("a file of 999 bytes, expected 1000000"), "{error}");
    // A list that promises more than there is.
    let lie = json!({"sha": COMMIT, "siblings": [
        {"rfilename": "config.json", "size": 5_000, "blobId": "ab".repeat(20)},
        {"rfilename": WEIGHTS, "size": 1_000_000, "blobId": "cd".repeat(20)}]});
    let hub = tiny().listing(lie).serve();
    let error = Cache::of(&hub).refusal(&hub);
    assert!(error.contains("bytes, expected 5000") || error.contains("Git hash"), "{error}");
}

#[test]
fn damaged_content_is_fetched_again_and_then_refused() {
    let hub = tiny().fault("/stored/", Fault::Corrupt, 1).serve();
    Cache::of(&hub).fetch_whole(&hub);
    let hub = tiny().fault("/stored/", Fault::Corrupt, usize::MAX).serve();
    let error = Cache::of(&hub).refusal(&hub);
    assert!(error.contains("does not have the SHA-256") && error.contains("fetched 2 times"), "{error}");
    let hub = tiny().fault("tokenizer.json", Fault::Corrupt, usize::MAX).serve();
    let error = Cache::of(&hub).refusal(&hub);
    assert!(error.contains("tokenizer.json does not have the Git hash"), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let refused = |status: u16, code: &str| {
        let lines = vec![format!("X-Error-Code: {code}")];
        let hub = tiny().fault("/api/models/", Fault::Status(status, lines), usize::MAX).serve();
        let mut cache = Cache::of(&hub);
        cache.options.token = Some("hf_secret".into());
        let error = cache.refusal(&hub);
        assert_eq!(hub.requests().len(), 1, "a refusal is not asked for again");
        assert!(!error.contains("hf_secret") && error.contains(&status.to_string()), "{error}");
        error
    };
    let gated = refused(403, "GatedRepo");
    assert!(
        gated.contains("accept its licence at http://") && gated.contains("/org/tiny, and set HF_TOKEN"),
        "{gated}"
    );
    assert!(refused(401, "GatedRepo").contains("accept its licence"));
    let unknown = refused(401, "RepoNotFound");
    assert!(
        unknown.contains("check --model-id") && unknown.contains("HF_TOKEN") && unknown.contains("has none"),
        "{unknown}"
    );
    let revision = refused(404, "RevisionNotFound");
    assert!(revision.contains("no revision \"main\": check --revision"), "{revision}");
    assert!(refused(404, "RepoNotFound").contains("check --model-id and --revision"));
}

#[test]
fn hostile_answers_are_one_line_each_and_write_nothing_elsewhere() {
    let ok = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
    let length = |body: &str| format!("{ok}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes();
    let huge = format!("{ok}{}\r\n", "X-Padding: yes, a lot of it\r\n".repeat(10_000)).into_bytes();
    let names = |names: &[&str]| {
        let siblings: Vec<_> = names
            .iter()
            .map(|name| json!({"rfilename": name, "size": 3, "blobId": "ab".repeat(20)}))
            .collect();
        length(&json!({"sha": COMMIT, "siblings": siblings}).to_string())
    };
    let escape =
        json!({"sha": COMMIT, "siblings": [{"rfilename": WEIGHTS, "size": 3, "blobId": "../../../../etc"}]});
    let answers = [
        (Fault::Raw(huge), "headers"),
        (Fault::Raw(b"SSH-2.0-OpenSSH\r\n".to_vec()), ""),
        (Fault::Raw(Vec::new()), ""),
        (Fault::Raw(length("<html>\nsign in to the wireless network\n</html>")), "no list of files"),
        (Fault::Raw(length(r#"{"sha": 7}"#)), "no list of files"),
        (Fault::Raw(length(&"[".repeat(100_000))), "no list of files"),
        (Fault::Raw(length(r#"{"sha": "../../x", "siblings": []}"#)), "found commit"),
        (Fault::Endless(format!("{ok}\r\n{{").into_bytes(), vec![b' '; 1 << 16]), "more than 32 MiB"),
        (Fault::Endless(ok.as_bytes().to_vec(), b"X-More: of it\r\n".repeat(100)), ""),
        (
            Fault::Raw(names(&[
                "../../../evil.safetensors",
                "/etc/evil.safetensors",
                "tokenizer/../../x.json",
            ])),
            "a weight file",
        ),
        (Fault::Raw(names(&["a\\..\\b.safetensors"])), "leads out of the model's directory"),
        (Fault::Raw(length(&escape.to_string())), ""),
        (
            Fault::Status(302, vec!["Location: file:///etc/passwd".to_owned()]),
            "redirect to what is no HTTP address",
        ),
        (Fault::Status(302, vec!["Location: /api/models/again".to_owned()]), "8 redirects in a row"),
        (Fault::Status(204, Vec::new()), "no list of files"),
    ];
    for (fault, text) in answers {
        let shown: String = format!("{fault:?}").chars().take(100).collect();
        let hub = tiny().fault("/api/models/", fault, usize::MAX).serve();
        let error = Cache::of(&hub).refusal(&hub);
        assert!(error.contains(text) && error.len() < 1500, "{shown}: {error}");
    }
}

#[test]
fn an_index_may_not_lead_out_of_the_model() {
    let index = r#"{"weight_map": {"a": "../../../evil.safetensors"}}"#;
    let hub = tiny().file("model.safetensors.index.json", index).serve();
    let error = Cache::of(&hub).refusal(&hub);
    assert!(error.contains("expected names of files beside it"), "{error}");
}

#[test]
fn a_named_gguf_file_is_all_that_is_fetched() {
    let hub = tiny().file("a.Q4_0.gguf", noise(300_000)).file("b.Q8_0.gguf", noise(50_000)).serve();
    let cache = Cache::of(&hub);
    let files = fetch(&ModelRef::new("org/tiny/a.Q4_0.gguf"), &cache.options).unwrap();
    assert!(std::fs::read(&files.weights.paths()[0]).unwrap() == hub.content("a.Q4_0.gguf"));
    assert!(hub.requests().iter().skip(1).all(|request| request.path.contains("a.Q4_0.gguf")));
}

#[test]
fn what_another_program_left_broken_is_replaced() {
    let hub = tiny().serve();
    let cache = Cache::of(&hub);
    let folder = cache.options.cache_dir.join("models--org--tiny");
    let (snapshot, blobs) = (folder.join("snapshots").join(COMMIT), folder.join("blobs"));
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(&blobs).unwrap();
    // A file with too few bytes, a link to a blob with too few, a link that leads nowhere; no configuration yet.
    std::fs::write(snapshot.join("tokenizer.json"), "{").unwrap();
    let digest = "0".repeat(64);
    std::fs::write(blobs.join(&digest), "short").unwrap();
    std::os::unix::fs::symlink(format!("../../blobs/{digest}"), snapshot.join(WEIGHTS)).unwrap();
    std::os::unix::fs::symlink("../../blobs/nowhere", snapshot.join("config.json")).unwrap();
    cache.fetch_whole(&hub);
    assert_eq!(std::fs::read(snapshot.join("tokenizer.json")).unwrap(), b"{}");
}
