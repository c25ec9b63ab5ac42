//! Rules about the text of a single file, and the view of Rust source without comments and strings that other rules
//! need.

use super::Violation;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 5] = ["utils.rs", "util.rs", "helpers.rs", "common.rs", "misc.rs"];

/// Words for unfinished work; it belongs into the issue tracker, or is done now.
const MARKERS: [&str; 3] = ["TODO", "FIXME", "XXX"];

/// Macros for unfinished work.
const MARKER_MACROS: [&str; 2] = ["todo!", "unimplemented!"];

/// Files that must name the markers.
const MARKER_EXEMPTIONS: [(&str, &str); 1] =
    [("xtask/src/tidy/", "the rules and their tests name what they forbid")];

/// Whether any rule reads the content of this file.
pub(super) fn is_checked(path: &str) -> bool {
    [".rs", ".cu", ".cuh", ".md"].iter().any(|extension| path.ends_with(extension))
}

/// Files named after nothing.
pub(super) fn file_name(path: &str) -> Option<Violation> {
    let name = path.rsplit('/').next().unwrap_or(path);
    EMPTY_NAMES.contains(&name).then(|| {
        Violation::new(path, 1, format!("file is named {name}; expected the noun its functions belong to"))
    })
}

/// Rust files that do not begin by saying what they are for.
pub(super) fn header(path: &str, content: &str) -> Option<Violation> {
    let first = content.lines().next().unwrap_or_default();
    let described = first.strip_prefix("//!").is_some_and(|rest| !rest.trim().is_empty());
    (!described).then(|| {
        Violation::new(path, 1, "does not begin with `//!`; expected a line that says what the file is for")
    })
}

/// Unfinished work left in code, comments or documents. In a document, a word in backticks is a quotation.
pub(super) fn markers(path: &str, content: &str) -> Vec<Violation> {
    if MARKER_EXEMPTIONS.iter().any(|(prefix, _)| path.starts_with(prefix)) {
        return Vec::new();
    }
    let is_document = path.ends_with(".md");
    let mut violations = Vec::new();
    for (index, line) in content.lines().enumerate() {
        let line = if is_document { without_code_spans(line) } else { line.to_string() };
        let word = MARKERS.into_iter().find(|word| has_word(&line, word));
        let marker = word.or_else(|| MARKER_MACROS.into_iter().find(|name| has_word(&line, name)));
        if let Some(marker) = marker {
            let message = format!("`{marker}`; expected finished work, or an issue in the tracker");
            violations.push(Violation::new(path, index + 1, message));
        }
    }
    violations
}

/// Tests that are switched off without a word. `code` comes from [`code_only`].
pub(super) fn ignored_tests(path: &str, code: &str) -> Vec<Violation> {
    code.lines()
        .enumerate()
        .filter(|(_, line)| {
            let line: String = line.split_whitespace().collect();
            line.contains("#[ignore]") || (line.contains("cfg_attr(") && line.contains(",ignore)"))
        })
        .map(|(index, _)| {
            Violation::new(path, index + 1, "test is ignored without a reason; expected #[ignore = \"why\"]")
        })
        .collect()
}

/// Whether `needle` stands in `text` with no identifier character touching it.
pub(super) fn has_word(text: &str, needle: &str) -> bool {
    word_positions(text, needle).next().is_some()
}

/// Byte positions of `needle` in `text` where no identifier character touches it.
pub(super) fn word_positions<'a>(text: &'a str, needle: &'a str) -> impl Iterator<Item = usize> + 'a {
    let is_identifier = |character: char| character.is_alphanumeric() || character == '_';
    text.match_indices(needle).map(|(position, _)| position).filter(move |&position| {
        let before = text[..position].chars().next_back();
        let after = text[position + needle.len()..].chars().next();
        !before.is_some_and(is_identifier) && !after.is_some_and(is_identifier)
    })
}

/// The line with everything between backticks blanked.
fn without_code_spans(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join(" ")
}

/// Rust source with comments and the contents of string and character literals blanked; line numbers are kept.
pub(super) fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    let mut after_identifier = false;
    while let Some(character) = rest.chars().next() {
        let skipped = if after_identifier && character != '"' { 0 } else { literal_or_comment(rest) };
        if skipped == 0 {
            code.push(character);
            rest = &rest[character.len_utf8()..];
            // `r` and `b` begin a literal only at the start of a word; a quote always does.
            after_identifier = character.is_alphanumeric() || character == '_';
        } else {
            let (blanked, remaining) = rest.split_at(skipped);
            code.extend(blanked.chars().map(|character| if character == '\n' { '\n' } else { ' ' }));
            rest = remaining;
            after_identifier = false;
        }
    }
    code
}

/// Bytes of the comment or literal at the start of `text`; 0 if there is none.
fn literal_or_comment(text: &str) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return block_comment(text);
    }
    let prefix = text.len() - text.trim_start_matches(['b', 'c', 'r']).len();
    let after_prefix = &text[prefix..];
    if prefix <= 2 && text[..prefix].ends_with('r') {
        let hashes = after_prefix.len() - after_prefix.trim_start_matches('#').len();
        if after_prefix[hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let start = prefix + hashes + 1;
            return text[start..].find(&close).map_or(text.len(), |end| start + end + close.len());
        }
        return 0;
    }
    match after_prefix.chars().next() {
        Some('"') if prefix <= 1 => prefix + quoted(after_prefix, '"'),
        Some('\'') if prefix <= 1 => match character_literal(after_prefix) {
            0 => 0,
            length => prefix + length,
        },
        _ => 0,
    }
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut position = 0;
    while position < text.len() {
        let rest = &text[position..];
        if rest.starts_with("/*") {
            depth += 1;
            position += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            position += 2;
            if depth == 0 {
                return position;
            }
        } else {
            position += rest.chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// Length of the literal in `quote`s at the start of `text`, both quotes included.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (position, character) in text.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if character == quote => return position + character.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// Length of the character literal at the start of `text`, or 0 for a lifetime.
fn character_literal(text: &str) -> usize {
    let mut characters = text.chars().skip(1);
    match (characters.next(), characters.next()) {
        (Some('\\'), _) | (Some(_), Some('\'')) => quoted(text, '\''),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_after_a_noun() {
        assert!(file_name("router/src/utils.rs").is_some());
        assert!(file_name("common.rs").is_some());
        assert_eq!(file_name("router/src/queue.rs"), None);
        assert_eq!(file_name("router/src/common_prefix.rs"), None);
    }

    #[test]
    fn a_file_begins_with_what_it_is_for() {
        assert!(header("a.rs", "use std::fmt;\n").is_some());
        assert!(header("a.rs", "").is_some());
        assert!(header("a.rs", "//!\n//! text").is_some(), "an empty first line says nothing");
        assert_eq!(header("a.rs", "//! The queue.\n"), None);
    }

    #[test]
    fn unfinished_work_is_found_in_code_comments_and_documents() {
        assert_eq!(markers("a.rs", "fn f() {\n    todo!()\n}\n")[0].line, 2);
        assert_eq!(markers("a.rs", "// FIXME later\n").len(), 1);
        assert_eq!(markers("a.cu", "/* XXX */\n").len(), 1);
        assert_eq!(markers("a.rs", "unimplemented!(\"x\")\n").len(), 1);
        assert_eq!(markers("a.md", "TODO: write\n").len(), 1);
        assert_eq!(markers("a.md", "no `TODO` is left\n"), []);
        assert_eq!(markers("a.rs", "let XXXL = METODOS;\n"), []);
    }

    #[test]
    fn an_ignored_test_has_a_reason() {
        let ignored = |source: &str| ignored_tests("a.rs", &code_only(source)).len();
        assert_eq!(ignored("#[test]\n#[ignore]\nfn f() {}\n"), 1);
        assert_eq!(ignored("#[cfg_attr(miri, ignore)]\n"), 1);
        assert_eq!(ignored("#[ignore = \"needs a GPU\"]\n"), 0);
        assert_eq!(ignored("// #[ignore]\n"), 0);
    }

    #[test]
    fn comments_and_literals_are_blanked_and_lines_kept() {
        let source = "let a = \"tokio::x \\\" y\"; // tokio::z\nlet b = r#\"tokio\"::\"#;\n/* a /* tokio:: */ \n */ c('\\'', '\"', 'é', x);\nfn f<'a>(r: &'a str, b: B) {}\n";
        let code = code_only(source);
        assert!(!code.contains("tokio"), "{code}");
        assert_eq!(code.lines().count(), source.lines().count());
        assert!(code.contains("fn f<'a>(r: &'a str, b: B) {}"), "{code}");
        assert!(code.contains(", x);"), "{code}");
        assert_eq!(code_only("for r in b {}"), "for r in b {}");
        assert_eq!(code_only("let x = b'\\n'; y").trim_end(), "let x =      ; y");
        assert_eq!(code_only("br#\"tokio\"#; y").trim_start(), "; y");
    }
}
