//! What a template may cost. A chat template is a program that comes with a model, and runs on what clients send.

use minijinja::{Environment, Error, ErrorKind};

use super::TemplateError;

/// The longest published templates have some 40 KiB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// One unit is an instruction, or 64 bytes of text made: a template takes at most 128 MiB and a fraction of a second. A
/// conversation of 2 MiB in a thousand messages takes a tenth of it.
const FUEL: u64 = 2_000_000;
/// Macros that call themselves walk through nested objects, which are never as deep. Each level takes some 10 KiB of a
/// stack of 2 MiB.
const MAX_RECURSION: usize = 64;
/// Characters of an error; what a template raises is its own.
const MAX_ERROR: usize = 1000;

/// Sets the limits.
pub(super) fn set(environment: &mut Environment<'_>) {
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
}

/// Whether a template may be compiled.
///
/// # Errors
/// It is too long.
pub(super) fn check_source(source: &str) -> Result<(), TemplateError> {
    if source.len() <= MAX_SOURCE_BYTES {
        return Ok(());
    }
    Err(TemplateError::Render(format!(
        "the chat template has {} bytes, expected at most {MAX_SOURCE_BYTES}",
        source.len()
    )))
}

/// An error in one line of bounded length.
pub(super) fn describe(error: &Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return format!(
            "the chat template takes more than {FUEL} steps; it does not end, or the conversation is too long for it"
        );
    }
    let text = error.to_string();
    let visible = |c: char| if c.is_control() { ' ' } else { c };
    let mut line: String = text.chars().take(MAX_ERROR).map(visible).collect();
    if line.len() < text.len() {
        line.push('…');
    }
    line
}
