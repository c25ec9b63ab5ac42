//! Tests of gguf_config.rs.
