#!/usr/bin/env python3
"""transformers as a peer to measure against (it and torch must be installed).

    peer_transformers.py DIR THREADS PROMPT STEPS PREFILL      # one JSON line: tokens/s, medians of 3

bfloat16, sdpa attention, a dynamic cache, logits of the last position only.
"""

import json
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM


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


def tokens_per_second(work, count):
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


@torch.inference_mode()
def measure(directory, threads, prompt, steps, prefill):
    torch.set_num_threads(threads)
    session = Session(directory)
    ids = torch.randint(1000, 20000, (max(prompt, prefill),), generator=torch.Generator().manual_seed(0)).tolist()
    decode_rates, prefill_rates = [], []
    for _ in range(4):  # the first round warms up
        session.start()
        prefill_rates.append(tokens_per_second(lambda: session.feed(ids[:prefill]), prefill))
        session.start()
        token = session.feed(ids[:prompt])

        def decode():
            nonlocal token
            for _ in range(steps):
                token = session.feed([token])

        decode_rates.append(tokens_per_second(decode, steps))
    return {"decode": statistics.median(decode_rates[1:]), "prefill": statistics.median(prefill_rates[1:])}


def main():
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))


if __name__ == "__main__":
    main()
