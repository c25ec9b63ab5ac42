//! Several sequences of one prompt, the most probable first.

use futures::future::try_join_all;
use tracing::Span;

use super::{Generated, Infer, InferError, SpecialTokens, request_log};
use crate::types::GenerateRequest;

impl Infer {
    /// Generates as many sequences as `best_of` says and sorts the best to the front.
    ///
    /// Each takes a permit of its own. When one fails the others are dropped, which cancels them.
    ///
    /// # Errors
    /// The first failure among them.
    pub async fn generate_best_of(
        &self,
        request: GenerateRequest,
        special_tokens: SpecialTokens,
    ) -> Result<Vec<Generated>, InferError> {
        let best_of = self.validation.best_of(&request).map_err(|error| self.count(error.into()))?;
        if best_of == 1 {
            return Ok(vec![self.generate(request, special_tokens).await?]);
        }
        let calls = (0..best_of).map(|_| self.generate_one(request.clone(), special_tokens));
        let mut sequences = try_join_all(calls).await?;
        let best = (sequences.iter().enumerate())
            .max_by(|(_, a), (_, b)| a.mean_logprob().total_cmp(&b.mean_logprob()))
            .map_or(0, |(index, _)| index);
        let best = sequences.remove(best);
        // One request, one line: that of the sequence it is answered with.
        request_log::succeeded(&Span::current(), &best.times, best.generated_text.seed);
        sequences.insert(0, best);
        Ok(sequences)
    }
}
