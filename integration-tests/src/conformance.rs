//! Every way of asking a server for the same thing gives the reference's tokens.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::golden::{Case, Token, Tolerance, tokens_of};
use crate::http;

/// Requests that run at once in [`check_server`].
const AT_ONCE: usize = 8;

/// The body that asks for a case's answer, greedily.
pub fn request(case: &Case) -> Value {
    json!({
        "inputs": case.prompt,
        "parameters": {"max_new_tokens": case.generated_ids.len(), "details": true, "do_sample": false},
    })
}

/// Asks `/generate`.
///
/// # Errors
/// When the answer is no success or has no tokens.
pub fn unstreamed(port: u16, case: &Case) -> Result<Vec<Token>> {
    let response = http::post(port, "/generate", &request(case))?;
    ensure!(response.status == 200, "status {}: {}", response.status, response.body);
    tokens_of(&response.json()?)
}

/// Asks `/generate_stream`.
///
/// # Errors
/// When the stream breaks or an event has no token.
pub fn streamed(port: u16, case: &Case) -> Result<Vec<Token>> {
    http::stream(port, "/generate_stream", &request(case))?
        .map(|event| {
            let event: Value = serde_json::from_str(&event?)?;
            serde_json::from_value(event["token"].clone()).with_context(|| format!("no token in {event}"))
        })
        .collect()
}

/// Checks every case alone, streamed and not, and then all of them eight at a time, streamed and not mixed, so that
/// prefills meet running batches. `cases` have texts.
///
/// # Errors
/// The first difference from the reference.
pub fn check_server(port: u16, cases: &[Case], tolerance: Tolerance) -> Result<()> {
    for case in cases {
        case.check(&unstreamed(port, case)?, tolerance)?;
        case.check(&streamed(port, case)?, tolerance)?;
    }
    for round in 0..2 {
        let padded: Vec<&Case> = cases.iter().cycle().take(cases.len().next_multiple_of(AT_ONCE)).collect();
        for group in padded.chunks(AT_ONCE) {
            check_at_once(port, group, round, tolerance)?;
        }
    }
    Ok(())
}

fn check_at_once(port: u16, group: &[&Case], round: usize, tolerance: Tolerance) -> Result<()> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = group
            .iter()
            .enumerate()
            .map(|(index, case)| {
                let ask = if (index + round).is_multiple_of(2) { unstreamed } else { streamed };
                scope.spawn(move || case.check(&ask(port, case)?, tolerance))
            })
            .collect();
        asked.into_iter().try_for_each(|answer| answer.join().expect("a client does not panic"))
    })
}
