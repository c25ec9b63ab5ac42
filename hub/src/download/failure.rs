//! Why a request failed, whether it is worth another try, and how long to wait before that.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::time::Duration;

/// A server that asks for a longer pause than this is not waited for; the Hub's own windows are five minutes.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(310);
/// Pauses stop growing here.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Tries in a row that bring nothing, after which a broken or silent connection counts as a broken server.
const MAX_TRIES_BROKEN: u32 = 6;
/// The same for a server that says it is busy: it lives, and says so.
const MAX_TRIES_BUSY: u32 = 10;

/// What went wrong with one request.
#[derive(Debug)]
pub(super) enum Failure {
    /// The connection could not be made, broke, stalled, or carried something that another try may not.
    Connection(String),
    /// The server refused.
    Status {
        /// The HTTP status.
        status: u16,
        /// The Hub's name for the reason, such as `GatedRepo`; empty when it gives none.
        code: String,
        /// The pause the server asks for.
        retry_after: Option<Duration>,
        /// Whether the Hub itself answered, rather than a server it sent us to.
        from_hub: bool,
    },
    /// The answer contradicts what the Hub said before, or is none of a Hub.
    Wrong(String),
    /// This disk refused.
    Disk(io::Error),
    /// Another part of the same download failed.
    Stopped,
}

impl Failure {
    /// How long to wait before the next try; `None` when there is no point in one. `num_tries` is how many failed in a row
    /// without bringing a byte.
    pub(super) fn pause(&self, num_tries: u32, first_pause: Duration) -> Option<Duration> {
        match self {
            Failure::Connection(_) if num_tries < MAX_TRIES_BROKEN => {
                Some(stretched(backoff(num_tries, first_pause)))
            }
            // Links to storage expire; the next try gets a new one.
            Failure::Status { status: 403, from_hub: false, .. } if num_tries < MAX_TRIES_BROKEN => {
                Some(stretched(backoff(num_tries, first_pause)))
            }
            Failure::Status { retry_after, .. } if self.is_busy() && num_tries < MAX_TRIES_BUSY => {
                match retry_after {
                    Some(asked) if *asked > LONGEST_RETRY_AFTER => None,
                    Some(asked) => Some(stretched((*asked).max(first_pause))),
                    None => Some(stretched(backoff(num_tries, first_pause))),
                }
            }
            _ => None,
        }
    }

    /// Whether the server said that the same request may succeed later.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Failure::Status { status: 408 | 425 | 429 | 500 | 502 | 503 | 504, .. })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connection(problem) | Failure::Wrong(problem) => f.write_str(problem),
            Failure::Status { status, code, retry_after, .. } => {
                write!(f, "HTTP status {status}")?;
                if !code.is_empty() {
                    write!(f, " ({code})")?;
                }
                match retry_after {
                    Some(pause) if self.is_busy() => write!(f, ", Retry-After {} s", pause.as_secs()),
                    _ => Ok(()),
                }
            }
            Failure::Disk(error) => write!(f, "{error}"),
            Failure::Stopped => f.write_str("stopped"),
        }
    }
}

fn backoff(num_tries: u32, first_pause: Duration) -> Duration {
    first_pause.saturating_mul(1 << num_tries.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

/// Up to a quarter longer, by chance: many machines that were refused together should not come back together.
fn stretched(pause: Duration) -> Duration {
    // The standard library's hash keys are random, which is chance enough here.
    let chance = RandomState::new().build_hasher().finish() % 256;
    pause + pause.mul_f64(chance as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(500);

    fn busy(status: u16, retry_after: Option<u64>) -> Failure {
        let retry_after = retry_after.map(Duration::from_secs);
        Failure::Status { status, code: String::new(), retry_after, from_hub: true }
    }

    fn is_about(pause: Option<Duration>, expected: Duration) -> bool {
        pause.is_some_and(|pause| pause >= expected && pause <= expected.mul_f64(1.25))
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_end() {
        let broken = Failure::Connection("reset".to_owned());
        assert!(is_about(broken.pause(1, FIRST), FIRST));
        assert!(is_about(broken.pause(5, FIRST), FIRST * 16));
        assert_eq!(broken.pause(6, FIRST), None);
        assert!(is_about(busy(503, None).pause(9, FIRST), LONGEST_PAUSE));
        assert_eq!(busy(503, None).pause(10, FIRST), None);
    }

    #[test]
    fn the_servers_own_pause_is_kept_unless_it_is_absurd() {
        assert!(is_about(busy(429, Some(7)).pause(1, FIRST), Duration::from_secs(7)));
        assert!(is_about(busy(503, Some(0)).pause(1, FIRST), FIRST));
        assert_eq!(busy(429, Some(3600)).pause(1, FIRST), None);
    }

    #[test]
    fn refusals_are_final_except_of_an_expired_link() {
        for status in [400, 401, 403, 404, 416] {
            assert_eq!(busy(status, None).pause(1, FIRST), None, "{status}");
        }
        let expired =
            Failure::Status { status: 403, code: String::new(), retry_after: None, from_hub: false };
        assert!(expired.pause(1, FIRST).is_some());
        assert_eq!(Failure::Wrong("size".to_owned()).pause(1, FIRST), None);
    }
}
