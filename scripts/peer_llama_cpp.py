#!/usr/bin/env python3
"""llama.cpp as a peer to measure against, through the C calls of llama-cpp-python (which must be installed).

    peer_llama_cpp.py convert bf16|q8_0 IN.gguf OUT.gguf               # the same weights in that type
    peer_llama_cpp.py time FILE.gguf THREADS PROMPT STEPS PREFILL      # one JSON line: tokens/s, medians of 3
"""

import ctypes
import json
import sys

import llama_cpp as lib
import numpy as np

from peer_session import measure

QUIET = lib.llama_log_callback(lambda level, text, data: None)


FILE_TYPES = {"bf16": lib.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0}


def convert(kind, source, target):
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = FILE_TYPES[kind], True
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not write {target}")


class Session:
    def __init__(self, path, threads):
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def start(self):
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def feed(self, ids):
        """Computes `ids` and returns the best next token."""
        array = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(ids))):
            sys.exit("llama_decode failed")
        logits = lib.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())


def main():
    lib.llama_log_set(QUIET, ctypes.c_void_p(0))
    match sys.argv[1:]:
        case ["convert", kind, source, target] if kind in FILE_TYPES:
            convert(kind, source, target)
        case ["time", path, threads, *numbers] if len(numbers) == 3:
            print(json.dumps(measure(Session(path, int(threads)), *map(int, numbers))))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
