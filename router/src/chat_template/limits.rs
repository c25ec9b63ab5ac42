//! What a template may cost. A chat template is a program that comes with a model, and runs on what clients send.

use std::io;
use std::thread::{Builder, scope};

use hub::catch_panic;
use minijinja::{Environment, Error, ErrorKind};

use super::TemplateError;

/// The longest published templates have some 40 KiB.
const MAX_SOURCE_BYTES: usize = 128 << 10;
/// One unit is an instruction, or 64 bytes of text made: a template takes at most 64 MiB and a fraction of a second. A
/// conversation of 2 MiB in a thousand messages takes a fifth of it.
const FUEL: u64 = 1_000_000;
/// Macros that call themselves walk through nested objects, which are never as deep.
const MAX_RECURSION: usize = 64;
/// Chains such as `a.b.b.b` are compiled, and lists in lists dropped, by calls in calls: two bytes of source, or a few units of
/// fuel, make a level. Pages are taken only as far as the stack grows, which is 100 KiB for published templates.
const STACK_BYTES: usize = 256 << 20;
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

/// Compiles or renders on a thread with room for the deepest template that the other limits allow.
///
/// # Errors
/// Those of `work`, or there can be no thread.
pub(super) fn with_deep_stack<T: Send>(
    work: impl FnOnce() -> Result<T, TemplateError> + Send,
) -> Result<T, TemplateError> {
    let failed =
        |problem: String| TemplateError::Render(format!("the chat template cannot be run: {problem}"));
    let gone = || io::Error::other("its thread has ended");
    let outcome = scope(|scope| {
        let builder = Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES);
        let thread = builder.spawn_scoped(scope, || catch_panic(work))?;
        thread.join().map_err(|_| gone())
    });
    outcome.map_err(|error| failed(error.to_string()))?.map_err(failed)?
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
