//! Names of calls that all ranks must carry out or none.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tonic::Request;

/// The header that carries it.
const HEADER: &str = "quartet-call";

/// Which call of which client: the same on every rank it is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallId {
    /// A random number for each client of a group.
    pub client: u64,
    /// Counts its calls from 1.
    pub number: u64,
}

impl CallId {
    /// The name of a call that has arrived. TGI's router gives none.
    pub fn of<T>(request: &Request<T>) -> Option<Self> {
        request.metadata().get(HEADER)?.to_str().ok()?.parse().ok()
    }

    /// `message` as the call of this name.
    pub(crate) fn name<T>(self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        // Digits and a dash are what a header may hold.
        if let Ok(value) = self.to_string().parse() {
            request.metadata_mut().insert(HEADER, value);
        }
        request
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:016x}-{}", self.client, self.number)
    }
}

impl FromStr for CallId {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (client, number) = text.split_once('-').unwrap_or((text, ""));
        Ok(Self { client: u64::from_str_radix(client, 16)?, number: number.parse()? })
    }
}

/// Counts the calls of one client. Clones count together.
#[derive(Debug, Clone)]
pub(crate) struct CallCounter {
    client: u64,
    last: Arc<AtomicU64>,
}

impl CallCounter {
    pub(crate) fn new() -> Self {
        // The standard library seeds its hash maps with random numbers.
        let client = RandomState::new().build_hasher().finish();
        Self { client, last: Arc::default() }
    }

    pub(crate) fn next(&self) -> CallId {
        CallId { client: self.client, number: self.last.fetch_add(1, Ordering::Relaxed) + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_the_wire() {
        let counter = CallCounter::new();
        let (first, second) = (counter.next(), counter.clone().next());
        assert_eq!((first.number, second.number, first.client), (1, 2, second.client));
        assert_eq!(CallId::of(&first.name(())), Some(first));
        assert_ne!(CallCounter::new().client, first.client);
        assert_eq!(CallId::of(&Request::new(())), None);
        for wrong in ["", "-", "1", "x-1", "1-x", "1-", "-1", "11111111111111111-1", "1-1-1"] {
            assert!(wrong.parse::<CallId>().is_err(), "{wrong}");
        }
    }
}
