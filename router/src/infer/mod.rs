//! A request's life: permit → validation → scheduler → tokens. The HTTP side calls this, and nothing below it.

mod best_of;
mod chat;
mod completions;
mod error;
mod generate;
mod permits;
mod request_log;
mod stream;

use std::sync::Arc;
use std::time::Instant;

use process::TRACES_TARGET;
use tracing::{Instrument, Span};

pub use chat::chat_parameters;
pub use completions::completion_requests;
pub use error::InferError;
pub use generate::Generated;
pub use permits::{Permit, Permits};
pub use stream::GenerateStream;

use crate::chat_template::{ChatTemplate, TemplateError};
use crate::metrics::{Failure, Metrics};
use crate::scheduler::Scheduler;
use crate::types::{ChatMessage, GenerateRequest};
use crate::validation::{Validation, ValidationError};

/// Everything a handler needs to answer. Cloning is cheap.
#[derive(Clone)]
pub struct Infer {
    validation: Validation,
    scheduler: Scheduler,
    template: Arc<Result<ChatTemplate, TemplateError>>,
    permits: Permits,
    metrics: Arc<Metrics>,
}

/// Whether the tokenizer adds its special tokens (`<s>` and the like).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Plain prompts.
    Add,
    /// Prompts from a chat template, which wrote them itself.
    LeaveOut,
}

impl Infer {
    /// Puts the parts together.
    pub fn new(
        validation: Validation,
        scheduler: Scheduler,
        template: Result<ChatTemplate, TemplateError>,
        permits: Permits,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { validation, scheduler, template: Arc::new(template), permits, metrics }
    }

    /// Where it counts.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Who is let in.
    pub fn permits(&self) -> &Permits {
        &self.permits
    }

    /// Its rules and tokenizer.
    pub fn validation(&self) -> &Validation {
        &self.validation
    }

    /// Whether the shards can still compute a token; waits for the running step.
    pub async fn probe(&self) -> bool {
        self.scheduler.probe().await
    }

    /// The prompt of a conversation.
    ///
    /// # Errors
    /// [`InferError::Template`].
    pub fn apply_chat_template(&self, messages: &[ChatMessage]) -> Result<String, InferError> {
        let rendered = match self.template.as_ref() {
            Ok(template) => template.render(messages),
            Err(error) => Err(error.clone()),
        };
        rendered.map_err(|error| self.count(error.into()))
    }

    /// Schedules a request and answers with its tokens as they come. Dropping the stream cancels it.
    ///
    /// # Errors
    /// No permit, a broken rule, or no scheduler.
    pub async fn generate_stream(
        &self,
        request: GenerateRequest,
        special_tokens: SpecialTokens,
    ) -> Result<GenerateStream, InferError> {
        let parameters = &request.parameters;
        if parameters.best_of.is_some_and(|best_of| best_of != 1) {
            return Err(self.count(ValidationError::BestOfStream.into()));
        }
        if parameters.decoder_input_details {
            return Err(self.count(ValidationError::PrefillDetailsStream.into()));
        }
        let arrived = Instant::now();
        let permit = self.permit()?;
        let stream = self.schedule(request, special_tokens, arrived, permit).await?;
        Ok(stream.that_tells_of_its_success())
    }

    /// Generates one sequence.
    ///
    /// # Errors
    /// As [`Self::generate_stream`], and whatever went wrong on the way.
    pub async fn generate(
        &self,
        request: GenerateRequest,
        special_tokens: SpecialTokens,
    ) -> Result<Generated, InferError> {
        let generated = self.generate_one(request, special_tokens).await?;
        request_log::succeeded(&Span::current(), &generated.times, generated.generated_text.seed);
        Ok(generated)
    }

    /// As [`Self::generate`], but the caller tells of its success.
    async fn generate_one(
        &self,
        request: GenerateRequest,
        special_tokens: SpecialTokens,
    ) -> Result<Generated, InferError> {
        let arrived = Instant::now();
        let permit = self.permit()?;
        let stream = self.schedule(request, special_tokens, arrived, permit).await?;
        generate::collect(stream).await
    }

    fn permit(&self) -> Result<Permit, InferError> {
        self.permits.take().map_err(|error| self.count(error))
    }

    async fn schedule(
        &self,
        request: GenerateRequest,
        special_tokens: SpecialTokens,
        arrived: Instant,
        permit: Permit,
    ) -> Result<GenerateStream, InferError> {
        let add_special_tokens = special_tokens == SpecialTokens::Add;
        let validating = tracing::info_span!(target: TRACES_TARGET, "validate");
        let valid = self.validation.validate(request, add_special_tokens).instrument(validating).await;
        let valid = valid.map_err(|error| self.count(error.into()))?;
        let input_length = valid.input_length();
        self.metrics.request_validated(input_length as usize, valid.stopping_parameters.max_new_tokens);
        let scheduled = self.scheduler.schedule(valid).map_err(|error| self.count(error.into()))?;
        Ok(GenerateStream::new(scheduled, input_length, arrived, permit, Arc::clone(&self.metrics)))
    }

    /// Counts a failure, logs it and hands it on.
    fn count(&self, error: InferError) -> InferError {
        request_log::failed(&Span::current(), &error);
        self.metrics.request_failed(match &error {
            InferError::Overloaded { .. } | InferError::Recovering { .. } | InferError::Stopping => {
                Failure::Overloaded
            }
            InferError::Validation(_) | InferError::Suffix | InferError::BatchSize { .. } => {
                Failure::Validation
            }
            InferError::Template(_) | InferError::Tool(_) => Failure::Template,
            InferError::Generation(_) => Failure::Generation,
            InferError::Incomplete | InferError::IncompleteStream => Failure::Incomplete,
        });
        error
    }
}
