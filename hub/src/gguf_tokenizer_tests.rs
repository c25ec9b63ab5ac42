//! Tests of gguf_tokenizer.rs.
