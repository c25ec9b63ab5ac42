//! Hostile inputs for everything in Quartet that reads bytes nobody vouches for.
//!
//! A target ([`targets`]) takes any bytes to the code that would read them in a running server, and panics when something
//! comes out that must not: besides crashes these are broken promises such as an error of two lines. Two things drive the
//! targets, both from the seeds in `fuzz/seeds`: the smoke test (`cargo test -p fuzz`) with a fixed number of
//! [`mutation`]s, and libFuzzer (`make fuzz`), guided by coverage. `docs/fuzzing.md` says more.

pub mod memory;
pub mod message;
pub mod mutation;
pub mod scratch;
pub mod seeds;
pub mod targets;

pub use targets::{TARGETS, Target};

/// Counts for both drivers; see [`memory`].
#[global_allocator]
static ALLOCATOR: memory::CountingAllocator = memory::CountingAllocator;

/// Runs a target on an input.
///
/// # Panics
/// The target does, or it took more memory than [`Target::max_memory`] allows.
pub fn check(target: &Target, input: &[u8]) {
    let input = &input[..input.len().min(target.max_len)];
    let used = memory::peak_of(|| (target.run)(input));
    let limit = target.max_memory;
    assert!(used <= limit, "{} took {used} bytes of memory, expected at most {limit}", target.name);
}
