//! No file grows beyond what can be read in one sitting.

use super::Violation;

/// Lines of code a file may have, inline tests not counted.
const MAX_FILE_LINES: usize = 700;

/// Source files of more than [`MAX_FILE_LINES`] lines before their inline test module.
pub(super) fn file_size(path: &str, content: &str) -> Option<Violation> {
    if ![".rs", ".cu", ".cuh"].iter().any(|extension| path.ends_with(extension)) {
        return None;
    }
    let lines = lines_of_code(content);
    (lines > MAX_FILE_LINES).then(|| {
        let message =
            format!("{lines} lines of code; expected at most {MAX_FILE_LINES}: split the file by noun");
        Violation::new(path, MAX_FILE_LINES + 1, message)
    })
}

/// Lines before the first `#[cfg(test)]` that is followed by `mod NAME {`.
fn lines_of_code(content: &str) -> usize {
    let lines: Vec<&str> = content.lines().collect();
    lines
        .iter()
        .enumerate()
        .position(|(index, line)| line.trim() == "#[cfg(test)]" && opens_module(&lines[index + 1..]))
        .unwrap_or(lines.len())
}

fn opens_module(following: &[&str]) -> bool {
    following
        .iter()
        .map(|line| line.trim())
        .find(|line| !line.is_empty() && !line.starts_with("//") && !line.starts_with("#["))
        .is_some_and(|line| line.starts_with("mod ") && line.ends_with('{'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(lines: usize) -> String {
        "fn f() {}\n".repeat(lines)
    }

    #[test]
    fn seven_hundred_lines_are_the_limit() {
        assert_eq!(file_size("a.rs", &code(700)), None);
        let violation = file_size("a.rs", &code(701)).unwrap();
        assert_eq!(
            violation.to_string(),
            "a.rs:701: 701 lines of code; expected at most 700: split the file by noun"
        );
        assert!(file_size("kernels/norm.cu", &code(701)).is_some());
        assert!(file_size("kernels/vec.cuh", &code(701)).is_some());
        assert_eq!(file_size("generated.json", &code(701)), None);
    }

    #[test]
    fn inline_tests_do_not_count_but_a_test_module_in_its_own_file_does() {
        let inline = format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", code(700), code(500));
        assert_eq!(file_size("a.rs", &inline), None);
        let with_attribute =
            format!("{}#[cfg(test)]\n#[rustfmt::skip]\nmod tests {{\n{}}}\n", code(3), code(800));
        assert_eq!(file_size("a.rs", &with_attribute), None);
        let elsewhere = format!("#[cfg(test)]\nmod tests;\n{}", code(700));
        assert!(file_size("a.rs", &elsewhere).is_some());
    }
}
