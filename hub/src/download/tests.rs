//! Downloads from a small Hub on the loopback interface.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::part_file::PartFile;
use super::*;
use crate::args::DownloadOptions;
use crate::weight_choice::{PYTORCH_INDEX, SAFETENSORS_INDEX};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the Hub holds and what it was asked.
#[derive(Default)]
struct FakeHub {
    /// Name, content, etag.
    files: Vec<(String, Vec<u8>, String)>,
    /// The status of every answer, when it is to fail.
    status: Option<u16>,
    /// Leaves sizes and hashes out of the list, as mirrors do.
    is_terse: bool,
    /// How many of the next long answers break off in the middle.
    num_broken: AtomicUsize,
    /// Path and Authorization header of every request.
    requests: Mutex<Vec<(String, String)>>,
}

impl FakeHub {
    fn with_file(mut self, name: &str, content: impl AsRef<[u8]>) -> Self {
        let content = content.as_ref().to_owned();
        let etag = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        self.files.push((name.to_owned(), content, etag));
        self
    }

    /// A complete tiny repository.
    fn tiny() -> Self {
        Self::default()
            .with_file("README.md", "nobody needs this")
            .with_file("config.json", r#"{"model_type": "llama", "eos_token_id": 2}"#)
            .with_file("tokenizer_config.json", r#"{"eos_token": "</s>"}"#)
            .with_file("tokenizer.json", "{}")
            .with_file(
                SAFETENSORS_INDEX,
                r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#,
            )
            .with_file("m-1.safetensors", vec![1; 70_000])
            .with_file("m-2.safetensors", vec![2; 30_000])
            .with_file("unlisted.safetensors", "not in the index")
    }

    /// Serves until the test process ends; returns the address.
    fn serve(self) -> (Arc<Self>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Arc::new(self);
        let served = Arc::clone(&hub);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let hub = Arc::clone(&served);
                std::thread::spawn(move || hub.answer(stream.unwrap()));
            }
        });
        (hub, address)
    }

    fn answer(&self, mut stream: TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
        let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
        let (mut start, mut end, mut authorization) = (0, None, String::new());
        for line in lines.take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            if name.eq_ignore_ascii_case("range") {
                let (from, to) = value.trim_start_matches("bytes=").split_once('-').unwrap();
                (start, end) = (from.parse().unwrap(), to.parse::<usize>().ok());
            } else if name.eq_ignore_ascii_case("authorization") {
                authorization = value.to_owned();
            }
        }
        self.requests.lock().unwrap().push((path.clone(), authorization));
        let response = match self.status {
            Some(status) => response(status, &[], b"no"),
            None if path == "/api/models/org/tiny/revision/main?blobs=true" => {
                let sibling = |(name, content, etag): &(String, Vec<u8>, String)| {
                    let lfs = json!({"sha256": etag, "size": content.len()});
                    if self.is_terse {
                        json!({"rfilename": name})
                    } else {
                        json!({"rfilename": name, "lfs": lfs})
                    }
                };
                let siblings: Vec<_> = self.files.iter().map(sibling).collect();
                response(200, &[], json!({"sha": COMMIT, "siblings": siblings}).to_string().as_bytes())
            }
            None => self.content(&path, start, end),
        };
        let is_broken = response.len() > 10_000
            && self
                .num_broken
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                .is_ok();
        let end = if is_broken { response.len() / 2 } else { response.len() };
        // A client that has gone away is no concern of ours.
        let _ = stream.write_all(&response[..end]);
    }

    fn content(&self, path: &str, start: usize, end: Option<usize>) -> Vec<u8> {
        let name = path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")).unwrap_or_default();
        let Some((_, content, etag)) = self.files.iter().find(|file| file.0 == name) else {
            return response(404, &[], b"not here");
        };
        let size = content.len();
        if start >= size {
            return response(416, &[], b"");
        }
        let end = end.unwrap_or(usize::MAX).min(size - 1);
        let headers = [
            format!("Content-Range: bytes {start}-{end}/{size}"),
            format!("ETag: \"{etag}\""),
            format!("X-Repo-Commit: {COMMIT}"),
        ];
        response(206, &headers, &content[start..=end])
    }

    fn num_requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

fn response(status: u16, headers: &[String], body: &[u8]) -> Vec<u8> {
    let mut head =
        format!("HTTP/1.1 {status} Status\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    headers.iter().for_each(|header| head.push_str(&format!("{header}\r\n")));
    [format!("{head}\r\n").as_bytes(), body].concat()
}

fn options(cache: &Path, endpoint: String) -> HubOptions {
    let download = DownloadOptions { first_pause: Duration::from_millis(5), ..DownloadOptions::default() };
    HubOptions { cache_dir: cache.to_owned(), endpoint, download, ..HubOptions::default() }
}

fn tiny() -> ModelRef {
    ModelRef::new("org/tiny")
}

#[test]
fn fetches_what_is_needed_and_then_works_offline() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, endpoint) = FakeHub::tiny().serve();
    let mut options = options(cache.path(), endpoint);
    options.token = Some("secret".into());
    let files = fetch(&tiny(), &options).unwrap();
    assert_eq!(files.sha.as_deref(), Some(COMMIT));
    let names: Vec<_> = files.weights.paths().iter().map(|path| path.file_name().unwrap()).collect();
    assert_eq!(names, ["m-1.safetensors", "m-2.safetensors"]);
    assert_eq!(std::fs::read(&files.weights.paths()[0]).unwrap(), vec![1; 70_000]);
    for requested in hub.requests.lock().unwrap().iter() {
        assert!(!requested.0.ends_with("README.md") && !requested.0.ends_with("unlisted.safetensors"));
        assert_eq!(requested.1, "Bearer secret");
    }

    // Everything is there: neither a second fetch nor an offline one asks the Hub again.
    let asked = hub.num_requests();
    options.offline = true;
    let offline = fetch(&tiny(), &options).unwrap();
    assert_eq!(offline.config().unwrap().model_type(), Some("llama"));
    assert_eq!(offline.generation_config().unwrap().eos_token_ids, [2]);
    assert_eq!(offline.tokenizer_config().unwrap().eos_token.as_deref(), Some("</s>"));
    options.offline = false;
    assert_eq!(fetch(&tiny(), &options).unwrap().fingerprint().unwrap(), offline.fingerprint().unwrap());
    assert_eq!(hub.num_requests(), asked);
}

#[test]
fn fetches_the_files_of_a_pytorch_index() {
    let cache = tempfile::tempdir().unwrap();
    let shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"];
    let (hub, endpoint) = FakeHub::default()
        .with_file("config.json", "{}")
        .with_file("tokenizer.json", "{}")
        .with_file(PYTORCH_INDEX, json!({"weight_map": {"a": shards[0], "b": shards[1]}}).to_string())
        .with_file(shards[0], "one")
        .with_file(shards[1], "two")
        .with_file("optimizer.bin", "not in the index")
        .serve();
    let files = fetch(&tiny(), &options(cache.path(), endpoint)).unwrap();
    assert_eq!(files.weights, WeightFiles::Pytorch(shards.map(|shard| files.root.join(shard)).to_vec()));
    assert!(hub.requests.lock().unwrap().iter().all(|request| !request.0.ends_with("optimizer.bin")));
}

#[test]
fn offline_names_what_is_missing_and_asks_nobody() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, endpoint) = FakeHub::tiny().serve();
    let options = HubOptions { offline: true, ..options(cache.path(), endpoint) };
    let error = fetch(&tiny(), &options).unwrap_err().to_string();
    assert!(error.contains("revision \"main\" of model \"org/tiny\" is not in"), "{error}");
    assert!(error.contains("models--org--tiny") && error.contains("HF_HUB_OFFLINE is set"), "{error}");
    assert_eq!(hub.num_requests(), 0);
}

#[test]
fn goes_on_where_an_interrupted_download_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, endpoint) = FakeHub::tiny().serve();
    let blobs = cache.path().join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    let part = |name: &str| {
        let etag = &hub.files.iter().find(|file| file.0 == name).unwrap().2;
        blobs.join(etag).with_extension("quartet-part")
    };
    // One file is half there, one complete but not renamed, one complete but wrong, one is something else.
    let half = PartFile::open(&part("m-1.safetensors"), 70_000, 10_000).unwrap();
    half.write(0, &[1; 25_000]).unwrap();
    half.write(50_000, &[1; 10_000]).unwrap();
    std::fs::write(part("m-2.safetensors"), vec![2; 30_000]).unwrap();
    std::fs::write(part("tokenizer.json"), "[]").unwrap();
    std::fs::write(part("config.json"), vec![0; 5000]).unwrap();
    let files = fetch(&tiny(), &options(cache.path(), endpoint)).unwrap();
    assert_eq!(std::fs::read(&files.weights.paths()[0]).unwrap(), vec![1; 70_000]);
    assert_eq!(std::fs::read(&files.weights.paths()[1]).unwrap(), vec![2; 30_000]);
    assert_eq!(std::fs::read(files.root.join("tokenizer.json")).unwrap(), b"{}");
    assert_eq!(files.config().unwrap().model_type(), Some("llama"));
    let asked =
        |name: &str| hub.requests.lock().unwrap().iter().filter(|request| request.0.ends_with(name)).count();
    // Four of seven segments were not complete, all of the second file was there.
    assert_eq!((asked("m-1.safetensors"), asked("m-2.safetensors"), asked("tokenizer.json")), (4, 0, 1));
    let left: Vec<_> = std::fs::read_dir(blobs).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.iter().all(|path| path.extension().is_none()), "{left:?}");
}

#[test]
fn a_list_without_hashes_costs_one_more_request_a_file() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, endpoint) = FakeHub { is_terse: true, ..FakeHub::tiny() }.serve();
    let files = fetch(&tiny(), &options(cache.path(), endpoint)).unwrap();
    assert_eq!(std::fs::read(&files.weights.paths()[1]).unwrap(), vec![2; 30_000]);
    // The list, then twice each of index, weights, configuration and tokenizer.
    assert_eq!(hub.num_requests(), 1 + 2 * 6);
}

#[test]
fn goes_on_after_a_broken_connection() {
    let cache = tempfile::tempdir().unwrap();
    let (hub, endpoint) = FakeHub { num_broken: AtomicUsize::new(3), ..FakeHub::tiny() }.serve();
    let files = fetch(&tiny(), &options(cache.path(), endpoint)).unwrap();
    assert_eq!(hub.num_broken.load(Ordering::Relaxed), 0);
    assert_eq!(std::fs::read(&files.weights.paths()[0]).unwrap(), vec![1; 70_000]);
    assert_eq!(std::fs::read(&files.weights.paths()[1]).unwrap(), vec![2; 30_000]);
}

#[test]
fn damaged_files_are_refused_and_removed() {
    let cache = tempfile::tempdir().unwrap();
    let mut hub = FakeHub::tiny();
    hub.files.iter_mut().find(|file| file.0 == "m-2.safetensors").unwrap().1[7] = 99;
    let (_, endpoint) = hub.serve();
    let options = options(cache.path(), endpoint);
    let error = fetch(&tiny(), &options).unwrap_err().to_string();
    assert!(error.contains("m-2.safetensors does not have the SHA-256"), "{error}");
    assert!(error.contains("fetched 2 times"), "{error}");
    let snapshot = cache.path().join("models--org--tiny/snapshots").join(COMMIT);
    assert!(!snapshot.join("m-2.safetensors").exists());
    assert!(locate(&tiny(), &options).is_err());
}

#[test]
fn a_failed_download_leaves_nothing_that_counts_as_complete() {
    let cache = tempfile::tempdir().unwrap();
    let mut hub = FakeHub::tiny();
    hub.files.retain(|file| file.0 != "m-2.safetensors");
    let (_, endpoint) = hub.serve();
    let options = options(cache.path(), endpoint);
    let error = fetch(&tiny(), &options).unwrap_err().to_string();
    assert!(error.contains("cannot download \"m-2.safetensors\"") && error.contains("404"), "{error}");
    assert!(locate(&tiny(), &options).is_err());
    let by_commit = ModelRef { revision: Some(COMMIT.to_owned()), ..tiny() };
    assert!(locate(&by_commit, &options).is_err());
}

#[test]
fn the_hubs_refusals_name_the_remedy() {
    for (status, remedy) in [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "check --model-id and --revision;")]
    {
        let cache = tempfile::tempdir().unwrap();
        let (_, endpoint) = FakeHub { status: Some(status), ..FakeHub::default() }.serve();
        let error = fetch(&tiny(), &options(cache.path(), endpoint.clone())).unwrap_err().to_string();
        assert!(error.contains(&status.to_string()) && error.contains(&endpoint), "{error}");
        assert!(format!("{error};").contains(remedy), "{error}");
    }
}

#[test]
fn a_hub_that_does_not_answer_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = fetch(&tiny(), &options(cache.path(), endpoint.clone())).unwrap_err().to_string();
    assert!(error.contains(&endpoint) && error.contains("HF_HUB_OFFLINE=1"), "{error}");
}

#[test]
fn a_cached_model_without_tokenizer_survives_an_unreachable_hub() {
    let cache = tempfile::tempdir().unwrap();
    let (_, endpoint) = FakeHub { status: Some(404), ..FakeHub::default() }.serve();
    let snapshot = cache.path().join("models--org--tiny/snapshots/abc");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    std::fs::write(snapshot.join("model.safetensors"), "x").unwrap();
    let by_commit = ModelRef { revision: Some("abc".to_owned()), ..tiny() };
    assert!(fetch(&by_commit, &options(cache.path(), endpoint)).is_ok());
}

#[test]
fn overridden_weights_need_only_the_small_files() {
    let cache = tempfile::tempdir().unwrap();
    let weights = tempfile::tempdir().unwrap();
    std::fs::write(weights.path().join("model.safetensors"), "x").unwrap();
    let (hub, endpoint) = FakeHub::tiny().serve();
    let options = HubOptions {
        weights_cache_override: Some(weights.path().to_owned()),
        ..options(cache.path(), endpoint)
    };
    let files = fetch(&tiny(), &options).unwrap();
    assert_eq!(files.weights.paths(), [weights.path().join("model.safetensors")]);
    assert_eq!(files.config().unwrap().model_type(), Some("llama"));
    assert!(hub.requests.lock().unwrap().iter().all(|request| !request.0.ends_with(".safetensors")));
}
