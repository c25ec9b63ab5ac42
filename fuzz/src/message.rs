//! What every error message promises, whatever the input was.

use std::fmt::Display;

use models::ModelError;

/// Characters: names and values from a file are shortened to some hundred; paths come on top.
const MAX_LINE: usize = 2000;

/// One error, one line.
///
/// # Panics
/// The message is empty, longer than a line may be, or has a line break or another control character.
pub fn check_line(error: &dyn Display) {
    let text = error.to_string();
    let length = text.chars().count();
    assert!((1..=MAX_LINE).contains(&length), "{length} characters of message: {:.300}", text);
    assert!(!text.chars().any(char::is_control), "a control character in {text:?}");
}

/// Errors of a model, one line each.
///
/// # Panics
/// As [`check_line`], or there is no mistake in the list of mistakes.
pub fn check_model_error(error: &ModelError) {
    match error {
        ModelError::Unusable(mistakes) => {
            assert!(!mistakes.is_empty(), "an error that says nothing");
            mistakes.iter().for_each(|mistake| check_line(mistake));
        }
        other => check_line(other),
    }
}
