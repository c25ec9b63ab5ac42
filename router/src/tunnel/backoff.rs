//! How long to wait before a tunnel is opened again.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);

/// A tunnel that held this long broke by accident, not because of what was asked for.
const PROVEN: Duration = Duration::from_secs(30);

/// Doubles from a quarter of a second to half a minute.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// The wait after an attempt; `open_since`: when the tunnel opened, if it did.
    pub(super) fn after(&mut self, open_since: Option<Instant>) -> Duration {
        if open_since.is_some_and(|since| since.elapsed() >= PROVEN) {
            self.next = FIRST;
        }
        let wait = self.next;
        self.next = (wait * 2).min(LONGEST);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_half_a_minute_and_a_tunnel_that_held_begins_anew() {
        let mut backoff = Backoff::default();
        let waits: Vec<u128> = (0..9).map(|_| backoff.after(None).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(backoff.after(Some(Instant::now())), LONGEST, "it broke as soon as it was open");
        let Some(long_ago) = Instant::now().checked_sub(PROVEN) else { return };
        assert_eq!(backoff.after(Some(long_ago)), FIRST);
        assert_eq!(backoff.after(None), FIRST * 2);
    }
}
