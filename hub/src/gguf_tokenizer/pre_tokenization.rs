//! How text is cut before byte-pair encoding, by the name llama.cpp gave each family's way.

use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use crate::error::HubError;
use crate::gguf::quote;
use crate::gguf_config::MetadataReader;

/// Words, numbers, punctuation and white space, as GPT-2 cuts text.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The same with numbers of up to three digits and line breaks apart, as Llama 3 cuts text.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits, as Qwen 2 cuts text.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words are cut where small letters become capital ones.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with contractions and numbers of up to three digits.
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Everything between white space and punctuation.
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const LINE_BREAK: &str = r"[\r\n]";
const EAST_ASIAN: &str = "[一-龥ࠀ-一가-퟿]+";

/// A family's way; text is cut by one pattern after the other.
struct Way {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    /// Characters are composed first.
    composes: bool,
    /// A piece that is a token needs no merges to become it.
    ignores_merges: bool,
    /// The BOS token comes first when the file does not say.
    adds_bos: bool,
}

const PLAIN: Way = Way { names: &[], patterns: &[], composes: false, ignores_merges: false, adds_bos: false };

const WAYS: &[Way] = &[
    Way {
        names: &["default"],
        patterns: &[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..PLAIN
    },
    Way {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        patterns: &[LLAMA3],
        ignores_merges: true,
        adds_bos: true,
        ..PLAIN
    },
    Way {
        names: &[
            "gpt-2",
            "phi-2",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "jais",
            "trillion",
            "exaone4",
            "granite-docling",
        ],
        patterns: &[GPT2],
        ..PLAIN
    },
    Way { names: &["mpt", "olmo"], patterns: &[GPT2], composes: true, ..PLAIN },
    Way {
        names: &["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"],
        patterns: &[r"\p{N}", GPT2],
        ..PLAIN
    },
    Way { names: &["command-r"], patterns: &[r"\p{N}", GPT2], composes: true, ..PLAIN },
    Way { names: &["falcon"], patterns: &[r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"], ..PLAIN },
    Way { names: &["dbrx", "smaug-bpe", "chatglm-bpe", "glm4"], patterns: &[LLAMA3], ..PLAIN },
    Way {
        names: &["qwen2", "deepseek-r1-qwen", "megrez", "kormo"],
        patterns: &[QWEN2],
        composes: true,
        ..PLAIN
    },
    Way { names: &["stablelm2", "hunyuan", "grok-2"], patterns: &[QWEN2], ..PLAIN },
    Way {
        names: &["deepseek-llm"],
        // The letters are those with a case.
        patterns: &[
            LINE_BREAK,
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            EAST_ASIAN,
            r"\p{N}+",
        ],
        ..PLAIN
    },
    Way {
        names: &["deepseek-coder"],
        patterns: &[LINE_BREAK, r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}"],
        ..PLAIN
    },
    Way {
        names: &["deepseek-v3", "hunyuan-dense"],
        patterns: &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
        ..PLAIN
    },
    Way { names: &["tekken"], patterns: &[TEKKEN], ignores_merges: true, adds_bos: true, ..PLAIN },
    Way { names: &["gpt-4o", "llama4"], patterns: &[GPT_4O], ..PLAIN },
    Way { names: &["bloom", "poro-chat", "gpt3-finnish"], patterns: &[BLOOM], ..PLAIN },
    Way { names: &["viking"], patterns: &[BLOOM, r"\p{N}"], ..PLAIN },
    Way { names: &["bailingmoe", "llada-moe"], patterns: &[BAILING], ..PLAIN },
    Way { names: &["seed-coder"], patterns: &[SEED], ..PLAIN },
];

/// Every name there is.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    WAYS.iter().flat_map(|way| way.names).copied()
}

/// How a file's text is cut.
pub(super) struct PreTokenization {
    pub(super) pre_tokenizer: PreTokenizerWrapper,
    pub(super) normalizer: Option<NormalizerWrapper>,
    /// Whether a piece that is a token needs no merges to become it.
    pub(super) ignore_merges: bool,
    /// Whether the family puts the BOS token first when the file does not say.
    pub(super) add_bos: bool,
}

/// The way that `tokenizer.ggml.pre` names.
pub(super) fn pre_tokenization(reader: &MetadataReader<'_>) -> Result<PreTokenization, HubError> {
    let name = reader.str("tokenizer.ggml.pre")?.unwrap_or_else(|| {
        tracing::warn!("{}: it has no tokenizer.ggml.pre; text is cut the default way", reader.origin);
        "default"
    });
    let Some(way) = WAYS.iter().find(|way| way.names.contains(&name)) else {
        let names: Vec<_> = names().collect();
        return Err(reader.unsupported(&format!("tokenizer.ggml.pre {}", quote(name)), &names.join(", ")));
    };
    let split = |pattern: &&str| {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map(PreTokenizerWrapper::from)
            .map_err(|error| reader.wrong(error.to_string()))
    };
    let mut steps = way.patterns.iter().map(split).collect::<Result<Vec<_>, _>>()?;
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(PreTokenization {
        pre_tokenizer: Sequence::new(steps).into(),
        normalizer: way.composes.then(|| NFC.into()),
        ignore_merges: way.ignores_merges,
        add_bos: way.adds_bos,
    })
}
