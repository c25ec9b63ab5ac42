//! One step of one batch on the model.

use backend::StepInput;
use backend::sampling::SamplingRow;
use models::{CausalLm, ModelError};

use super::batch::Batch;
use super::forward_input::{Row, cut_into_passes, is_sampled, prompt_targets, write_step};
use super::liveness::Liveness;
use super::sequence::Pending;

/// A pass that has been handed to an asynchronous device and whose results have not been fetched.
pub(super) struct Launched {
    pass: Vec<Row>,
}

/// Hands `rows` of `batch` to the device, where one pass is enough.
///
/// # Errors
/// The model's; it is not to be used again.
pub(super) fn launch(
    model: &mut dyn CausalLm,
    step: &mut StepInput,
    batch: &Batch,
    rows: Vec<Row>,
    liveness: &Liveness,
) -> Result<Option<Launched>, ModelError> {
    let tokens: usize = rows.iter().map(|row| row.len).sum();
    if rows.is_empty() || tokens > model.info().max_step_tokens {
        return Ok(None);
    }
    liveness.step_started();
    write_step(step, &batch.sequences, &rows, model.info().block_size);
    model.forward(step)?;
    Ok(Some(Launched { pass: rows }))
}

/// Waits for what was launched and leaves the results pending in the sequences of `batch`, which is as it was then except
/// that some may have ended.
///
/// # Errors
/// The model's; it is not to be used again.
pub(super) fn collect(
    model: &mut dyn CausalLm,
    batch: &mut Batch,
    launched: Launched,
    liveness: &Liveness,
) -> Result<(), ModelError> {
    for row in &launched.pass {
        let sequence = &mut batch.sequences[row.sequence];
        if !sequence.is_finished() {
            sequence.pending = Some(Pending::Chunk);
        }
    }
    fetch(model, batch, &launched.pass)?;
    liveness.step_finished();
    Ok(())
}

/// Computes `rows` of `batch` and leaves the results pending in its sequences. All rows go through the model together,
/// in several passes only when there are more tokens than a pass may have.
///
/// # Errors
/// The model's; it is not to be used again.
pub(super) fn compute(
    model: &mut dyn CausalLm,
    step: &mut StepInput,
    batch: &mut Batch,
    rows: Vec<Row>,
    liveness: &Liveness,
) -> Result<(), ModelError> {
    let max_step_tokens = model.info().max_step_tokens;
    for row in &rows {
        batch.sequences[row.sequence].pending = Some(Pending::Chunk);
    }
    for pass in cut_into_passes(rows.into_iter(), max_step_tokens) {
        liveness.step_started();
        run_pass(model, step, batch, &pass)?;
        liveness.step_finished();
    }
    Ok(())
}

fn run_pass(
    model: &mut dyn CausalLm,
    step: &mut StepInput,
    batch: &mut Batch,
    pass: &[Row],
) -> Result<(), ModelError> {
    write_step(step, &batch.sequences, pass, model.info().block_size);
    model.forward(step)?;
    fetch(model, batch, pass)
}

/// Chooses tokens after a pass, and keeps what else is wanted of it.
fn fetch(model: &mut dyn CausalLm, batch: &mut Batch, pass: &[Row]) -> Result<(), ModelError> {
    let wanted = prompt_targets(&batch.sequences, pass);
    if !wanted.rows.is_empty() {
        let mut logprobs = model.token_logprobs(&wanted.rows, &wanted.targets)?.into_iter();
        for (sequence, count) in wanted.counts {
            if let Some(known) = &mut batch.sequences[sequence].prompt_logprobs {
                known.extend(logprobs.by_ref().take(count));
            }
        }
    }
    let sampled: Vec<usize> = pass
        .iter()
        .filter(|row| is_sampled(row, &batch.sequences[row.sequence]))
        .map(|row| row.sequence)
        .collect();
    if sampled.is_empty() {
        return Ok(());
    }
    let rows: Vec<SamplingRow<'_>> = sampled
        .iter()
        .map(|&index| {
            let sequence = &batch.sequences[index];
            SamplingRow { params: &sequence.sampling, history: &sequence.ids, top_n: sequence.top_n }
        })
        .collect();
    let tokens = model.sample(&rows)?;
    assert_eq!(tokens.len(), sampled.len(), "a model chooses one token a row");
    for (index, token) in sampled.into_iter().zip(tokens) {
        let sequence = &mut batch.sequences[index];
        // One that has ended meanwhile has no use for it.
        if !sequence.is_finished() {
            sequence.pending = Some(Pending::Token(token));
        }
    }
    Ok(())
}
