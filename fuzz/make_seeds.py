#!/usr/bin/env python3
"""Make the seeds of the fuzz targets that are not text written by hand: fuzz/seeds/TARGET/NAME.

    python3 fuzz/make_seeds.py

Needs nothing but Python. The same files come out every time. The seeds of `config`, `chat_template` and most of `tokenizer`
are text that was written by hand; this leaves them alone.
"""

import io
import json
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

SEEDS = Path(__file__).resolve().parent / "seeds"

# The tiny Llama of fuzz/src/targets/loading.rs.
HIDDEN, FFN, HEAD_DIM, VOCAB = 16, 32, 8, 8
TENSORS = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (2 * HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (HEAD_DIM, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, 2 * HEAD_DIM),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.gate_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, FFN),
    "model.norm.weight": (HIDDEN,),
}


def save(target, name, data):
    path = SEEDS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def size(shape):
    elements = 1
    for dimension in shape:
        elements *= dimension
    return elements


def f32(count):
    return struct.pack(f"<{count}f", *((index % 7 - 3) / 8 for index in range(count)))


def bf16(count):
    return b"".join(struct.pack("<f", (index % 7 - 3) / 8)[2:] for index in range(count))


# --- safetensors ------------------------------------------------------------


def safetensors(tensors, dtype, metadata=None):
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, shape in tensors.items():
        part = {"F32": f32, "BF16": bf16}[dtype](size(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def make_safetensors():
    save("safetensors", "f32", safetensors(TENSORS, "F32", {"format": "pt"}))
    save("safetensors", "bf16", safetensors(TENSORS, "BF16"))
    without_prefix = {name.removeprefix("model."): shape for name, shape in TENSORS.items()}
    save("safetensors", "no-prefix", safetensors(without_prefix, "BF16"))
    missing = dict(list(TENSORS.items())[:-1]) | {"lm_head.weight": (VOCAB, HIDDEN), "extra\n": (1, 1)}
    save("safetensors", "missing", safetensors(missing, "BF16"))
    save("safetensors", "empty", safetensors({}, "F32"))


# --- index ------------------------------------------------------------------


def make_index():
    def index(name, files):
        weight_map = {f"model.layers.{number}.weight": file for number, file in enumerate(files)}
        save("index", name, json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map}))

    index("two", ["a.safetensors", "b.safetensors"])
    index("two-bin", ["a.bin", "b.bin", "a.bin"])
    index("parent", ["a.safetensors", "../a.safetensors"])
    index("absolute", ["/etc/passwd"])
    index("link", ["outside.safetensors"])
    index("link-bin", ["outside.bin"])
    index("missing", ["a.safetensors", "c.safetensors", "d\n.safetensors"])


# --- pickle and PyTorch -----------------------------------------------------


def fake_torch():
    """The few names of torch that a pickle of tensors refers to."""
    torch, helpers = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*_):
        return None

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    helpers._rebuild_tensor_v2 = _rebuild_tensor_v2
    for name in ["FloatStorage", "BFloat16Storage", "LongStorage"]:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    sys.modules |= {"torch": torch, "torch._utils": helpers}
    return torch, helpers


TORCH, HELPERS = fake_torch()


class Storage:
    def __init__(self, kind, key, elements):
        self.kind, self.key, self.elements = kind, key, elements


class Tensor:
    def __init__(self, storage, shape, offset=0, strides=None):
        self.arguments = (storage, offset, tuple(shape), strides or dense(shape), False, OrderedDict())

    def __reduce__(self):
        return HELPERS._rebuild_tensor_v2, self.arguments


def dense(shape):
    return tuple(size(shape[axis + 1 :]) for axis in range(len(shape)))


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", getattr(TORCH, value.kind), value.key, "cpu", value.elements
        return None


def pickled(value):
    stream = io.BytesIO()
    Pickler(stream, 2).dump(value)
    return stream.getvalue()


def state_dict(kind):
    """Each tensor in a storage of its own; the storages' sizes as well."""
    tensors, sizes = OrderedDict(), {}
    for key, (name, shape) in enumerate(TENSORS.items()):
        tensors[name] = Tensor(Storage(kind, str(key), size(shape)), shape)
        sizes[str(key)] = size(shape)
    return tensors, sizes


def zipped(data_pkl, storages):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        parts = {"data.pkl": data_pkl, "byteorder": b"little", "version": b"3\n"}
        parts |= {f"data/{key}": data for key, data in storages.items()}
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return stream.getvalue()


def make_pytorch():
    tensors, sizes = state_dict("FloatStorage")
    save("pytorch", "zip", zipped(pickled(tensors), {key: f32(count) for key, count in sizes.items()}))
    half, _ = state_dict("BFloat16Storage")
    save("pytorch", "zip-bf16", zipped(pickled(half), {key: bf16(count) for key, count in sizes.items()}))
    save("pytorch", "zip-short", zipped(pickled(tensors), {key: f32(count - 1) for key, count in sizes.items()}))
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps(system, 2)
    legacy += pickled(half) + pickle.dumps(list(sizes), 2)
    legacy += b"".join(struct.pack("<q", count) + bf16(count) for count in sizes.values())
    save("pytorch", "legacy", legacy)


def make_pickle():
    # The target's archive has ten storages of 2,048 bytes.
    shared = Storage("FloatStorage", "0", 512)
    tensors = OrderedDict()
    for number, (name, shape) in enumerate(TENSORS.items()):
        tensors[name] = Tensor(shared, shape, offset=number % 3)
    save("pickle", "shared", pickled(tensors))
    tensors["model.layers.0.self_attn.q_proj.weight"] = Tensor(shared, (16, 16), strides=(1, 16))
    save("pickle", "transposed", pickled(tensors))
    for name, tensor in {
        "outside": Tensor(shared, (512, 512)),
        "strides": Tensor(shared, (4, 4), strides=(1 << 40, 1 << 40)),
        "huge": Tensor(shared, (1 << 40, 1 << 40, 0)),
        "integers": Tensor(Storage("LongStorage", "1", 256), (16, 16)),
    }.items():
        save("pickle", name, pickled({"a": tensor, "b\n": tensor}))
    save("pickle", "values", pickled({"a": [1, -1, 2.5, None, True, "x" * 300, (1, 2, 3, [])], 1: 1 << 70}))
    save("pickle", "code", b"\x80\x02cos\nsystem\nX\x01\0\0\0x\x85R.")
    save("pickle", "memo", b"\x80\x02]" + b"q\0h\0a" * 50 + b".")


# --- GGUF -------------------------------------------------------------------

U8, I32, U32, F32, BOOL, STRING, ARRAY = 0, 5, 4, 6, 7, 8, 9


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def scalar(value):
    if isinstance(value, bool):
        return BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        return U32, struct.pack("<I", value)
    if isinstance(value, float):
        return F32, struct.pack("<f", value)
    return STRING, text(value)


def gguf_value(value):
    if isinstance(value, list):
        kind = I32 if isinstance(value[0], int) else scalar(value[0])[0]
        items = b"".join(struct.pack("<i", item) if kind == I32 else scalar(item)[1] for item in value)
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + items
    kind, data = scalar(value)
    return struct.pack("<I", kind) + data


# Type code, elements and bytes of a block.
GGML = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210)}


def gguf(metadata, tensors):
    """tensors: name -> (shape as in Hugging Face, type)"""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + gguf_value(value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind) in tensors.items():
        code, block, block_bytes = GGML[kind]
        count = size(shape) // block * block_bytes
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", dimension) for dimension in reversed(shape))
        head += struct.pack("<IQ", code, len(data))
        part = f32(size(shape)) if kind == "F32" else bytes(index * 37 % 32 for index in range(count))
        data += part + b"\0" * (-len(part) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def architecture(name, hidden, head_dim, heads, kv_heads):
    return {
        "general.architecture": name,
        f"{name}.block_count": 1,
        f"{name}.context_length": 64,
        f"{name}.embedding_length": hidden,
        f"{name}.feed_forward_length": FFN,
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": kv_heads,
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.rope.dimension_count": head_dim,
        f"{name}.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": [f"t{number}" for number in range(VOCAB)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def layer(hidden, head_dim, heads, kv_heads, kind, narrow, bias=False):
    """narrow: the type of rows that are no multiple of 256"""
    queries, keys = heads * head_dim, kv_heads * head_dim
    tensors = {
        "token_embd.weight": ((VOCAB, hidden), kind),
        "output_norm.weight": ((hidden,), "F32"),
        "blk.0.attn_norm.weight": ((hidden,), "F32"),
        "blk.0.attn_q.weight": ((queries, hidden), kind),
        "blk.0.attn_k.weight": ((keys, hidden), kind),
        "blk.0.attn_v.weight": ((keys, hidden), kind),
        "blk.0.attn_output.weight": ((hidden, queries), narrow),
        "blk.0.ffn_norm.weight": ((hidden,), "F32"),
        "blk.0.ffn_gate.weight": ((FFN, hidden), kind),
        "blk.0.ffn_up.weight": ((FFN, hidden), kind),
        "blk.0.ffn_down.weight": ((hidden, FFN), narrow),
    }
    if bias:
        tensors |= {f"blk.0.attn_{part}.bias": ((rows,), "F32") for part, rows in zip("qkv", [queries, keys, keys])}
    return tensors


def make_gguf():
    save("gguf", "llama-f32", gguf(architecture("llama", 16, 8, 2, 1), layer(16, 8, 2, 1, "F32", "F16")))
    save("gguf", "llama-q8_0", gguf(architecture("llama", 32, 16, 2, 1), layer(32, 16, 2, 1, "Q8_0", "Q4_0")))
    save("gguf", "qwen2-q4_k", gguf(architecture("qwen2", 256, 16, 2, 1), layer(256, 16, 2, 1, "Q4_K", "Q8_0", True)))
    save("gguf", "llama-q6_k", gguf(architecture("llama", 256, 16, 1, 1), layer(256, 16, 1, 1, "Q6_K", "Q4_0")))
    scaled = architecture("llama", 16, 8, 2, 1) | {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    save("gguf", "llama-yarn", gguf(scaled, layer(16, 8, 2, 1, "F16", "F32")))
    for name in ["gemma3", "phi3", "stablelm"]:
        save("gguf", name, gguf(architecture(name, 16, 8, 2, 1), layer(16, 8, 2, 1, "F32", "F32")))


def byte_alphabet():
    """The characters that stand for the 256 bytes in byte-level tokenizers."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + index for index in range(256 - len(printable))]
    characters = {byte: chr(byte) for byte in printable}
    characters |= dict(zip((byte for byte in range(256) if byte not in characters), map(chr, others)))
    return [characters[byte] for byte in range(256)]


def make_gguf_tokenizer():
    tokens = byte_alphabet() + ["he", "ll", "hell", "hello", "Ġhello", "12", "123", "<s>", "</s>", "<tool>"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3"]
    for pre in ["llama-bpe", "qwen2", "gpt-2", "tekken"]:
        metadata = {
            "general.architecture": "llama",
            "llama.context_length": 77,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": len(tokens) - 3,
            "tokenizer.ggml.eos_token_id": len(tokens) - 2,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }
        save("gguf_tokenizer", f"bpe-{pre}", gguf(metadata, {}))
    pieces = {"▁": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "ab": -2.0, "bc": -1.0, "abc": -3.0, "▁a": -4.0, "  ": -1e3, "\n\n": -1e3}
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + list(pieces)
    for name, prefix in [("", True), ("-no-prefix", False)]:
        metadata = {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 8 + [4, 4],
            "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": not prefix,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
        save("gguf_tokenizer", f"sentence-piece{name}", gguf(metadata, {}))


# --- tokenizer.json ---------------------------------------------------------


def added(token_id, content, special=True):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **flags, "special": special}


def tokenizer(name, **parts):
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    whole |= {"pre_tokenizer": None, "post_processor": None, "decoder": None} | parts
    save("tokenizer", f"{name}.json", json.dumps(whole, ensure_ascii=False, separators=(",", ":")))


def numbered(tokens):
    return {token: number for number, token in enumerate(tokens)}


def bpe(vocab, merges, **options):
    defaults = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    defaults |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **defaults, **options, "vocab": vocab, "merges": merges}


def make_tokenizer():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    letters = ["<s>", "</s>", "h", "e", "l", "o", "Ġ", "he", "ll", "hell", "hello", "Ã", "¶"]
    merges = ["h e", "l l", "he ll", "hell o"]
    special = [added(0, "<s>"), added(1, "</s>"), added(13, "<tool>", False)]
    tokenizer("byte-level", added_tokens=special, pre_tokenizer=byte_level, decoder=byte_level, model=bpe(numbered(letters), merges))
    pattern = "(?i:'s|'t|'re)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    sequence = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = single + [{"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair}
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    model = bpe(numbered(letters), [pair.split() for pair in merges], ignore_merges=True)
    tokenizer("llama3", added_tokens=special, pre_tokenizer=sequence, post_processor=template, decoder=byte_level, model=model)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    pieces = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xB6>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
    model = bpe(numbered(pieces), ["a b", "▁ ab"], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer("llama2", added_tokens=[added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")], normalizer=normalizer, decoder=decoder, model=model)
    unigram = {"type": "Unigram", "unk_id": 0, "byte_fallback": True}
    unigram["vocab"] = [["<unk>", 0.0], ["▁", -2.0], ["a", -3.0], ["▁ab", -1.5], ["b", -2.5], ["<0xC3>", -9.0], ["<0xB6>", -9.0]]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    folds = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"}, {"type": "Nmt"}]}
    tokenizer("unigram", added_tokens=[added(0, "<unk>")], normalizer=folds, pre_tokenizer=metaspace, decoder=metaspace, model=unigram)
    bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "hello", "w", "##o", "##r", "##l", "##d", "a", "##a"]
    piece = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": numbered(words)}
    processing = {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]}
    padding = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 3, "pad_type_id": 0, "pad_token": "[PAD]"}
    truncation = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    tokenizer("word-piece", padding=padding, truncation=truncation, added_tokens=[added(3, "[PAD]")], normalizer=bert,
              pre_tokenizer={"type": "BertPreTokenizer"}, post_processor=processing, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}, model=piece)
    word_level = {"type": "WordLevel", "vocab": numbered(["[UNK]", "a", "Hello", "ab"]), "unk_token": "[UNK]"}
    cuts = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"}]}
    tokenizer("word-level", pre_tokenizer=cuts, model=word_level, decoder={"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True})
    # Both make the library panic once they are used.
    unusual = {"pre_tokenizer": {"type": "FixedLength", "length": 0}, "decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 1}}
    tokenizer("panics", model={"type": "WordLevel", "vocab": {" ": 0, "a": 1}, "unk_token": "a"}, **unusual)
    tokenizer("bpe-suffix", model=bpe(numbered(["a", "b</w>", "ab</w>", "b"]), ["a b</w>"], end_of_word_suffix="</w>", unk_token="a"),
              pre_tokenizer={"type": "WhitespaceSplit"}, decoder={"type": "BPEDecoder", "suffix": "</w>"})


# --- small configurations and requests --------------------------------------


def make_small_configs():
    both = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": -1, "max_length": 20}
    both |= {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None, "add_bos_token": True}
    both |= {"chat_template": "{{ messages }}", "model_max_length": 1000000000000000019884624838656, "tokenizer_class": "X"}
    save("small_configs", "one-template", json.dumps(both))
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    save("small_configs", "named-templates", json.dumps({"chat_template": named, "eos_token_id": 3, "model_max_length": 9}))
    save("small_configs", "wrong", json.dumps({"chat_template": [1, "a\nb"], "eos_token_id": ["\n"], "bos_token_id": 1e300}))


def make_http_request():
    every = {"best_of": 2, "temperature": 0.5, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "top_k": 10}
    every |= {"top_p": 0.95, "typical_p": 0.9, "do_sample": True, "max_new_tokens": 20, "return_full_text": False}
    every |= {"stop": ["x", "\n"], "truncate": 5, "watermark": False, "details": True, "decoder_input_details": True}
    every |= {"seed": None, "top_n_tokens": 3, "grammar": None, "adapter_id": None}
    save("http_request", "generate", json.dumps({"inputs": "a b ä", "parameters": every, "stream": False}))
    save("http_request", "generate-short", json.dumps({"inputs": "a"}))
    save("http_request", "grammar", json.dumps({"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "a"}}}))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u"}}]}]
    messages += [{"role": "assistant", "tool_calls": [{"id": "0"}]}, {"role": "tool", "content": "1", "name": "n", "tool_call_id": "0"}]
    chat = {"model": "tgi", "messages": messages, "temperature": 0.7, "top_p": 0.9, "max_tokens": 9, "stop": "x", "n": 1}
    chat |= {"presence_penalty": -0.5, "frequency_penalty": 0.1, "logprobs": True, "top_logprobs": 3, "seed": 1, "stream": True}
    chat |= {"stream_options": {"include_usage": True}, "logit_bias": [], "tools": None, "tool_choice": "none"}
    save("http_request", "chat", json.dumps(chat))
    save("http_request", "chat-tools", json.dumps({"messages": messages[:1], "tools": [{"type": "function"}], "response_format": {"type": "json", "value": {}}}))
    completion = {"model": "tgi", "prompt": ["a", "b b"], "max_tokens": 3, "temperature": 0, "stop": ["x"], "echo": False, "seed": 3}
    save("http_request", "completion", json.dumps(completion))
    save("http_request", "completion-one", json.dumps({"prompt": "a", "suffix": None, "n": 2, "logprobs": 1}))


# --- messages ---------------------------------------------------------------


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(*fields):
    """Fields as (number, value): an int is a varint, a float 32 bits, a list packed varints, bytes and text are themselves."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            data = b"".join(map(varint, value)) if isinstance(value, list) else value
            data = data.encode() if isinstance(data, str) else data
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def request(number, *more):
    parameters = message((1, 0.7), (2, 5), (3, 0.9), (4, 1.0), (5, 1), (6, 42), (7, 1.1), (9, 0.1))
    stopping = message((1, 10), (2, "x"), (3, 1))
    return message((1, number), (2, "hello"), (3, 20), (4, parameters), (5, stopping), (7, 2), *more)


def make_proto_message():
    plain = request(1, (13, 1), (100, [1, 2, 3]), (9, [1]), (10, [16, 17, 18]))
    chunks = request(2, (8, message((1, message((1, "text"))))), (12, 0), (14, 2), (101, [5]))
    image = request(3, (8, message((1, message((2, message((1, b"\xff\xd8"), (2, "image/jpeg"))))))), (11, "adapter"))
    batch = message((1, 7), (2, plain), (2, chunks), (3, 2), (4, 60), (5, 4))
    cached = message((1, 6), (2, [4, 5]), (3, 2), (4, 50), (5, 20))
    save("proto_message", "prefill", message((1, batch), (2, cached)))
    save("proto_message", "batch", batch)
    save("proto_message", "image", message((1, 8), (2, image)))
    save("proto_message", "warmup", message((1, message((1, 1), (2, image))), (2, 10), (3, 4096), (4, 20)))
    save("proto_message", "decode", message((1, cached), (1, cached)))
    save("proto_message", "filter", message((1, 6), (2, [4])))
    tokens = message((1, [5, 6]), (2, struct.pack("<2f", -0.5, -1.0)), (3, "a"), (3, "b"), (4, [0, 1]))
    done = message((1, "ab"), (2, 2), (3, 1), (4, 42))
    save("proto_message", "answer", message((1, message((1, 4), (2, tokens), (3, tokens), (4, done), (5, tokens))), (2, cached), (3, 99)))


# --- engine -----------------------------------------------------------------


def engine_request(number, ids, rest=(1,)):
    """`rest`: 1 for an honest request, else 0 and the bytes of everything in it."""
    return bytes([number, len(ids), *ids, *rest])


def make_engine():
    """Calls as fuzz/src/targets/engine.rs reads them."""
    warm, cold = b"\1", b"\0"

    def prefill(batch, requests, cached=None):
        joined = bytes([0]) if cached is None else bytes([1, cached])
        return bytes([0, batch]) + joined + bytes([len(requests)]) + b"".join(requests)

    decode = bytes([3, 1, 1])
    one, two = engine_request(1, [1, 2, 3]), engine_request(2, [4, 5, 6, 7, 1])
    save("engine", "batch", warm + prefill(1, [one, two]) + decode * 6)
    joined = prefill(1, [one]) + decode + prefill(2, [two], 1) + bytes([3, 2, 1, 2]) + bytes([5, 1, 1, 2]) + decode * 3
    save("engine", "join-and-filter", warm + joined + bytes([6, 1, 1]) + decode)
    save("engine", "no-warmup", cold + prefill(1, [one]) + decode + bytes([5, 3, 0]))
    # Block 1 and some of its slots, a chunk of 3; then the same block for somebody else.
    ends = bytes([0, 32, 0, 1, 3, 0, 2, 6, 0, 1, 0, 0, 0, 0, 0, 5, 0, 3])
    own = bytes([0, 0, 0, 1, 1, 12, *range(16, 28)]) + ends
    save("engine", "blocks", warm + prefill(1, [engine_request(1, [1, 2, 3, 4, 5, 6], own)]) * 2 + decode * 4)
    wrong = bytes([0, 2, 250, 246, 1, 247, 3, 246, 0, 1, 3, 246, 255, 0]) + bytes([2, 246, 246, 1, 246, 1, 247, 246])
    save("engine", "wrong", warm + prefill(1, [one, engine_request(3, [1], wrong)]) + decode * 2)
    warmup = bytes([7, 1]) + one + bytes([1, 20, 30, 1, 40])
    save("engine", "warm-again", warm + prefill(1, [one]) + warmup + decode)


def main():
    make_safetensors()
    make_index()
    make_pytorch()
    make_pickle()
    make_gguf()
    make_gguf_tokenizer()
    make_tokenizer()
    make_small_configs()
    make_http_request()
    make_proto_message()
    make_engine()


if __name__ == "__main__":
    main()
