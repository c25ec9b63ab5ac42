//! Documents name only what exists: a path in backticks or in a link is a promise to the reader.

use super::Violation;

/// Whether paths named in this document are checked.
pub(super) fn is_checked(path: &str) -> bool {
    path.ends_with(".md") && (!path.contains('/') || path.starts_with("docs/"))
}

/// Paths in backticks that begin with a top-level folder of the tree and lead nowhere.
pub(super) fn named_paths(path: &str, content: &str, paths: &[String]) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (line, text) in prose(content) {
        for span in text.split('`').skip(1).step_by(2) {
            let named = span.trim_end_matches(['.', ',', ':']);
            let named = without_line_number(named);
            if !looks_like_path(named, paths) {
                continue;
            }
            for alternative in expand_braces(named) {
                if !exists(&alternative, paths) {
                    let message =
                        format!("names `{alternative}`; expected a path that exists in the repository");
                    violations.push(Violation::new(path, line, message));
                }
            }
        }
    }
    violations
}

/// Relative link targets that lead nowhere.
pub(super) fn links(path: &str, content: &str, paths: &[String]) -> Vec<Violation> {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut violations = Vec::new();
    for (line, text) in prose(content) {
        for (position, _) in text.match_indices("](") {
            let target = text[position + 2..].split([')', ' ']).next().unwrap_or_default();
            let target = target.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains(':') {
                continue;
            }
            if !resolve(folder, target).is_some_and(|resolved| exists(&resolved, paths)) {
                let message =
                    format!("links to `{target}`; expected a path that exists, seen from the document");
                violations.push(Violation::new(path, line, message));
            }
        }
    }
    violations
}

/// Numbered lines outside of fenced blocks: those hold commands and sketches.
fn prose(content: &str) -> Vec<(usize, &str)> {
    let mut is_fenced = false;
    let mut lines = Vec::new();
    for (index, line) in content.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
        } else if !is_fenced {
            lines.push((index + 1, line));
        }
    }
    lines
}

/// `router/src/main.rs:30` names a line of `router/src/main.rs`.
fn without_line_number(named: &str) -> &str {
    match named.rsplit_once(':') {
        Some((file, line)) if !line.is_empty() && line.bytes().all(|byte| byte.is_ascii_digit()) => file,
        _ => named,
    }
}

/// A command, a placeholder or a route is not a path of ours.
fn looks_like_path(named: &str, paths: &[String]) -> bool {
    let Some((top, _)) = named.split_once('/') else { return false };
    let is_plain =
        named.chars().all(|character| character.is_ascii_alphanumeric() || "/._-{},*".contains(character));
    is_plain && paths.iter().any(|path| path.split_once('/').is_some_and(|(folder, _)| folder == top))
}

/// `a/{b,c}.rs` is `a/b.rs` and `a/c.rs`.
fn expand_braces(named: &str) -> Vec<String> {
    let parts = named.split_once('{').and_then(|(before, rest)| {
        let (choices, after) = rest.split_once('}')?;
        Some((before, choices, after))
    });
    match parts {
        None => vec![named.to_string()],
        Some((before, choices, after)) => {
            choices.split(',').flat_map(|choice| expand_braces(&format!("{before}{choice}{after}"))).collect()
        }
    }
}

/// Whether `named` is a file, a folder, or with `*` matches one.
fn exists(named: &str, paths: &[String]) -> bool {
    let wanted: Vec<&str> = named.trim_end_matches('/').split('/').collect();
    if wanted == [""] {
        return true;
    }
    paths.iter().any(|path| {
        let mut segments = path.split('/');
        wanted.iter().all(|pattern| segments.next().is_some_and(|segment| matches(pattern, segment)))
    })
}

/// One path segment against a pattern with any number of `*`.
fn matches(pattern: &str, segment: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == segment,
        Some((before, rest)) => {
            let rest = rest.trim_start_matches('*');
            let Some(remaining) = segment.strip_prefix(before) else { return false };
            (0..=remaining.len())
                .filter(|&end| remaining.is_char_boundary(end))
                .any(|end| matches(rest, &remaining[end..]))
        }
    }
}

/// `target` seen from `folder`, or `None` when it leaves the repository.
fn resolve(folder: &str, target: &str) -> Option<String> {
    let mut segments: Vec<&str> = folder.split('/').filter(|segment| !segment.is_empty()).collect();
    for segment in target.split('/') {
        match segment {
            "" | "." => {}
            ".." => {
                segments.pop()?;
            }
            name => segments.push(name),
        }
    }
    Some(segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Vec<String> {
        ["README.md", "docs/guide.md", "router/src/main.rs", "router/src/server/mod.rs", "shard/src/lib.rs"]
            .map(str::to_string)
            .to_vec()
    }

    fn named(content: &str) -> Vec<String> {
        named_paths("README.md", content, &tree()).iter().map(Violation::to_string).collect()
    }

    #[test]
    fn a_named_path_exists() {
        assert_eq!(
            named("ok\nsee `router/src/queue.rs`.\n"),
            ["README.md:2: names `router/src/queue.rs`; expected a path that exists in the repository"]
        );
        assert_eq!(
            named("`router/src/main.rs`, `router/src/server/`, `router/src` and `router/src/main.rs:12`"),
            [""; 0]
        );
        assert_eq!(named("`router/src/main.r`").len(), 1);
    }

    #[test]
    fn braces_and_stars_are_followed() {
        assert_eq!(named("`router/src/{main,queue}.rs`").len(), 1);
        assert_eq!(named("`{router,shard}/src`"), [""; 0]);
        assert_eq!(named("`router/*/*.rs`"), [""; 0]);
        assert_eq!(named("`router/src/*.cu`").len(), 1);
    }

    #[test]
    fn commands_routes_and_sketches_are_not_paths() {
        assert_eq!(
            named("`cargo run router/x`, `/v1/models`, `text/plain`, `router/<name>/x`, `router`"),
            [""; 0]
        );
        assert_eq!(named("```\n`router/src/none.rs`\n```\n"), [""; 0]);
        assert_eq!(named("```\n```\n`router/src/none.rs`\n").len(), 1);
    }

    #[test]
    fn links_lead_somewhere() {
        let broken = |path: &str, content: &str| links(path, content, &tree()).len();
        assert_eq!(broken("README.md", "[a](docs/guide.md#part) [b](https://example.org/x) [c](#here)"), 0);
        assert_eq!(broken("README.md", "[a](docs/none.md)"), 1);
        assert_eq!(broken("docs/guide.md", "[a](../README.md) [b](../../x) [c](none.md)"), 2);
    }

    #[test]
    fn only_the_readers_documents_are_checked() {
        assert!(is_checked("ARCHITECTURE.md") && is_checked("docs/a/b.md"));
        assert!(!is_checked("shard/notes.md") && !is_checked("docs/a.txt"));
    }
}
