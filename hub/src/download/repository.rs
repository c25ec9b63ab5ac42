//! What a repository on the Hub holds.

use serde::Deserialize;

use super::checksum::Checksum;
use super::client::{Client, one_line};
use super::failure::Failure;

/// The longest list of files that is read; real ones have some hundred bytes a file.
const MAX_LISTING_BYTES: u64 = 32 << 20;
/// Characters that stand for themselves in a path of the Hub.
const PLAIN: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~";

/// The files of one commit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listing {
    /// The commit, in letters and digits.
    pub(super) commit: String,
    /// Sorted by name.
    pub(super) files: Vec<ListedFile>,
}

/// A file as the list has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListedFile {
    /// Its path in the repository; may have slashes, and is whatever the server says.
    pub(super) name: String,
    /// Size and content, where the list tells.
    pub(super) content: Option<Content>,
}

/// A file's size in bytes and hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) size: u64,
    pub(super) checksum: Checksum,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Asks the Hub.
    ///
    /// # Errors
    /// The Hub does not answer, refuses, or answers something else.
    pub(super) fn fetch(client: &Client, repository: &str, revision: &str) -> Result<Self, Failure> {
        let revision = encoded(revision);
        // With sizes and hashes, so that there is one request for all files instead of one more for each.
        let path = format!("/api/models/{repository}/revision/{revision}?blobs=true");
        Self::parse(&client.get_text(&path, MAX_LISTING_BYTES)?)
    }

    fn parse(text: &str) -> Result<Self, Failure> {
        let answer: Answer = serde_json::from_str(text).map_err(|error| {
            Failure::Wrong(format!("the answer is no list of files: {}", one_line(&error.to_string())))
        })?;
        let commit = answer.sha;
        if commit.is_empty() || commit.len() > 64 || !commit.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Failure::Wrong(format!(
                "found commit {:?}, expected hexadecimal digits",
                one_line(&commit)
            )));
        }
        let mut files: Vec<ListedFile> = answer.siblings.into_iter().map(ListedFile::from).collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        files.dedup_by(|a, b| a.name == b.name);
        Ok(Self { commit, files })
    }
}

impl From<Sibling> for ListedFile {
    fn from(sibling: Sibling) -> Self {
        let (size, tag) = match sibling.lfs {
            // The Git blob is a pointer then, not the content.
            Some(lfs) => (Some(lfs.size), Some(lfs.sha256)),
            None => (sibling.size, sibling.blob_id),
        };
        let checksum = tag.and_then(|tag| Checksum::from_tag(&tag));
        let content = size.zip(checksum).map(|(size, checksum)| Content { size, checksum });
        Self { name: sibling.rfilename, content }
    }
}

/// Where the Hub has a file's content.
pub(super) fn content_path(repository: &str, commit: &str, name: &str) -> String {
    let name: Vec<String> = name.split('/').map(encoded).collect();
    format!("/{repository}/resolve/{commit}/{}", name.join("/"))
}

/// Asks the Hub for one file's size and hash.
///
/// # Errors
/// The Hub does not answer, refuses, or does not say.
pub(super) fn ask_content(client: &Client, path: &str) -> Result<Content, Failure> {
    let linked = client.head(path)?.linked;
    let size = linked.size.ok_or_else(|| Failure::Wrong("the answer has no size".to_owned()))?;
    let tag = linked.etag.unwrap_or_default();
    let checksum = Checksum::from_tag(&tag).ok_or_else(|| {
        Failure::Wrong(format!("found entity tag {:?}, expected a hash of the file", one_line(&tag)))
    })?;
    Ok(Content { size, checksum })
}

fn encoded(text: &str) -> String {
    let byte = |byte: u8| match PLAIN.contains(&byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_hub_answers() {
        let sha256 = "ab".repeat(32);
        let git = "cd".repeat(20);
        let text = format!(
            r#"{{"sha": "0123abc", "private": false, "siblings": [
                {{"rfilename": "w.safetensors", "size": 9, "blobId": "{git}",
                  "lfs": {{"sha256": "{sha256}", "size": 9, "pointerSize": 134}}}},
                {{"rfilename": "config.json", "size": 7, "blobId": "{git}"}},
                {{"rfilename": "plain.txt"}}]}}"#
        );
        let listing = Listing::parse(&text).unwrap();
        assert_eq!(listing.commit, "0123abc");
        let file = |name: &str, content| ListedFile { name: name.to_owned(), content };
        assert_eq!(
            listing.files,
            [
                file("config.json", Some(Content { size: 7, checksum: Checksum::GitBlob(git) })),
                file("plain.txt", None),
                file("w.safetensors", Some(Content { size: 9, checksum: Checksum::Sha256(sha256) })),
            ]
        );
    }

    #[test]
    fn what_is_no_list_is_said_in_one_line() {
        for bad in [
            "",
            "<html>\n</html>",
            "[]",
            "{}",
            r#"{"sha": "../x", "siblings": []}"#,
            r#"{"sha": "a", "siblings": 1}"#,
        ] {
            let text = Listing::parse(bad).unwrap_err().to_string();
            assert!(
                !text.contains('\n') && text.contains("found") | text.contains("no list"),
                "{bad}: {text}"
            );
        }
    }

    #[test]
    fn paths_are_encoded() {
        assert_eq!(encoded("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(content_path("o/n", "c", "a b?/ä.json"), "/o/n/resolve/c/a%20b%3F/%C3%A4.json");
    }
}
