//! The fault matrix: within ten seconds nothing lives, or all is back.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail the test by panicking, as the test does")]

use integration_tests::faults::{self, During, End, Fault};

/// What must become of the server.
fn expected(fault: Fault, during: During) -> End {
    match (fault, during) {
        (Fault::KillLauncher, _) => End::Gone(None),
        // A start that fails is reported and not repeated.
        (_, During::Download | During::Load) => End::Gone(Some(1)),
        (_, During::WarmUp | During::Steady) => End::Back,
    }
}

#[test]
fn every_fault_in_every_phase_ends_well_within_ten_seconds() {
    for (fault, during) in faults::all() {
        let seen =
            faults::inject(fault, during).unwrap_or_else(|error| panic!("{fault}, {during}: {error:#}"));
        assert_eq!(seen.end, expected(fault, during), "{fault}, {during}: {seen}");
        if matches!(fault, Fault::KillShard(_) | Fault::StopShard(_)) {
            assert_eq!(seen.streams.1, 0, "{fault}, {during}: {seen}");
        }
    }
}
