//! The targets: each a function from any bytes to nothing, which panics when a promise is broken.

pub mod chat_template;
pub mod config;
pub mod engine;
pub mod gguf;
pub mod gguf_tokenizer;
pub mod http_request;
pub mod index;
pub mod pickle;
pub mod proto_message;
pub mod pytorch;
pub mod safetensors;
pub mod small_configs;
pub mod tokenizer;

mod loading;

/// Something that reads bytes.
#[derive(Debug)]
pub struct Target {
    /// Also the name of its seeds' directory and of its libFuzzer program.
    pub name: &'static str,
    /// Reads them.
    pub run: fn(&[u8]),
    /// Longer inputs are cut: what they would show, shorter ones show sooner.
    pub max_len: usize,
    /// Bytes of memory it may take at once.
    pub max_memory: usize,
    /// Mutations of the smoke test.
    pub mutations: usize,
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// All of them.
pub const TARGETS: [Target; 13] = [
    Target {
        name: "safetensors",
        run: safetensors::run,
        max_len: 64 * KIB,
        max_memory: 64 * MIB,
        mutations: 500,
    },
    Target { name: "index", run: index::run, max_len: 16 * KIB, max_memory: 16 * MIB, mutations: 500 },
    Target { name: "gguf", run: gguf::run, max_len: 64 * KIB, max_memory: 64 * MIB, mutations: 500 },
    Target { name: "pickle", run: pickle::run, max_len: 16 * KIB, max_memory: 64 * MIB, mutations: 500 },
    Target { name: "pytorch", run: pytorch::run, max_len: 64 * KIB, max_memory: 64 * MIB, mutations: 500 },
    Target {
        name: "tokenizer",
        run: tokenizer::run,
        max_len: 32 * KIB,
        max_memory: 256 * MIB,
        mutations: 500,
    },
    Target {
        name: "gguf_tokenizer",
        run: gguf_tokenizer::run,
        max_len: 64 * KIB,
        max_memory: 256 * MIB,
        mutations: 300,
    },
    Target { name: "config", run: config::run, max_len: 16 * KIB, max_memory: 256 * MIB, mutations: 2000 },
    Target {
        name: "small_configs",
        run: small_configs::run,
        max_len: 16 * KIB,
        max_memory: 16 * MIB,
        mutations: 1000,
    },
    Target {
        name: "chat_template",
        run: chat_template::run,
        max_len: 32 * KIB,
        max_memory: 512 * MIB,
        mutations: 1000,
    },
    Target {
        name: "http_request",
        run: http_request::run,
        max_len: 64 * KIB,
        max_memory: 16 * MIB,
        mutations: 2000,
    },
    Target {
        name: "proto_message",
        run: proto_message::run,
        max_len: 64 * KIB,
        max_memory: 64 * MIB,
        mutations: 3000,
    },
    Target { name: "engine", run: engine::run, max_len: 4 * KIB, max_memory: 256 * MIB, mutations: 500 },
];
