//! What travels over HTTP: serde types, field for field text-generation-inference's. No logic, no axum.

mod chat;
mod completions;
mod generate;
mod info;
mod tokenize;

pub use chat::{
    ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprob, ChatLogprobs,
    ChatMessage, ChatRequest, ChatTopLogprob, Content, ContentPart, ImageUrl, OutputMessage, Stop,
    StreamOptions, Usage,
};
pub use completions::{
    Completion, CompletionChoice, CompletionChunk, CompletionChunkEnd, CompletionRequest, Prompt,
};
pub use generate::{
    BestOfSequence, CompatGenerateRequest, Details, ErrorResponse, FinishReason, GenerateParameters,
    GenerateRequest, GenerateResponse, PrefillToken, StreamDetails, StreamResponse, Token,
};
pub use info::{Info, ModelInfo, ModelsInfo, Phase, RankPhases, Startup};
pub use tokenize::{ChatTokenizeResponse, SimpleToken};
