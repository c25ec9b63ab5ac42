//! Calls into libraries that panic on what a hostile file or text makes them do.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    /// Calls of [`catch_panic`] under way on this thread.
    static GUARDED: Cell<usize> = const { Cell::new(0) };
}

/// What `call` returns, or what it said when it panicked, in one line. Nothing is printed: the caller has the words.
///
/// Only for calls that leave nothing half changed behind: what they were given for writing is dropped, or never looked at
/// again.
///
/// # Errors
/// `call` panicked.
pub fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    silence();
    GUARDED.with(|guarded| guarded.set(guarded.get() + 1));
    let result = catch_unwind(AssertUnwindSafe(call));
    GUARDED.with(|guarded| guarded.set(guarded.get() - 1));
    result.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        crate::config::one_line(text.unwrap_or("panic without a message"))
    })
}

/// Lets the process's panic hook say nothing about panics that are caught here.
fn silence() {
    static SILENCE: Once = Once::new();
    SILENCE.call_once(|| {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if GUARDED.with(Cell::get) == 0 {
                hook(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_kept_in_one_line() {
        assert_eq!(catch_panic(|| 7), Ok(7));
        assert_eq!(catch_panic(|| -> u8 { panic!("a\n{}", 1) }), Err("a 1".to_owned()));
        let nested = catch_panic(|| catch_panic(|| -> u8 { panic!("inner") }).unwrap_err());
        assert_eq!(nested, Ok("inner".to_owned()));
        assert!(GUARDED.with(Cell::get) == 0);
    }
}
