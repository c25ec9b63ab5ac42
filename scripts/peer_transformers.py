#!/usr/bin/env python3
"""transformers as a peer to measure against (it and torch must be installed).

    peer_transformers.py DIR THREADS PROMPT STEPS PREFILL      # one JSON line: tokens/s, medians of 3

bfloat16, sdpa attention, a dynamic cache, logits of the last position only.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

from peer_session import measure


class Session:
    def __init__(self, directory):
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True
        ).eval()
        self.cache = None

    def start(self):
        self.cache = None

    def feed(self, ids):
        """Computes `ids` and returns the best next token."""
        output = self.model(
            torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.cache = output.past_key_values
        return int(output.logits[0, -1].argmax())


@torch.inference_mode()
def main():
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    threads, *numbers = map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    print(json.dumps(measure(Session(sys.argv[1]), *numbers)))


if __name__ == "__main__":
    main()
