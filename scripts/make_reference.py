#!/usr/bin/env python3
"""Makes a tiny random model of an architecture and what transformers answers with it, for check_golden and models_table.py.

    python3 scripts/make_reference.py glm4 TARGET [KEY=VALUE ...]
    python3 scripts/make_reference.py glm4 TARGET --tokenizer tokenizer.json --text 'Once upon a time' ...

TARGET becomes a model's directory with golden.json beside it. The first word is a `model_type`; KEY=VALUE (the value as JSON)
changes its configuration: give windows, groups and factors values that matter in a prompt of 100 tokens. Prompts are random
ids, unless a tokenizer (of a vocabulary as large as the model's) and texts are given. Needs torch and transformers.
"""

import argparse
import json
import pathlib
import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

# Uneven on 2 and 3 ranks: five groups of query heads, and a feed-forward that is no multiple of 64.
SIZES = {
    "hidden_size": 60,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LENGTHS, STEPS = (1, 7, 33, 100), 24
# Prompts are drawn again until no step is as close as this to another choice.
SMALLEST_GAP, TRIES = 0.02, 50


def make_model(model_type, changes):
    keys = AutoConfig.for_model(model_type).to_dict()
    config = AutoConfig.for_model(model_type, **{key: SIZES[key] for key in SIZES if key in keys} | changes)
    set_seed(1234)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms matter too, and every weight is a bfloat16 number, whatever type it is loaded as.
            center = 1.0 if parameter.dim() == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_((torch.randn_like(parameter) * 0.2 + center).bfloat16().float())
    return model


def log_softmax(model, ids):
    """[tokens, vocab_size]: the whole sequence again at every step, without a cache."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    return torch.log_softmax(logits, -1)


@torch.no_grad()
def answer(model, ids):
    """Greedy continuation of a prompt."""
    first = log_softmax(model, ids)
    case = {
        "input_ids": ids,
        "prefill": [None] + [round(first[i, ids[i + 1]].item(), 6) for i in range(len(ids) - 1)],
        "last_logprobs": [round(value, 6) for value in first[-1].tolist()],
        "generated_ids": [],
        "logprobs": [],
        "gaps": [],
    }
    ids = list(ids)
    for _ in range(STEPS):
        last = log_softmax(model, ids)[-1]
        values, indices = last.topk(2)
        ids.append(indices[0].item())
        case["generated_ids"].append(ids[-1])
        case["logprobs"].append(round(values[0].item(), 6))
        case["gaps"].append(round((values[0] - values[1]).item(), 6))
    return case


def random_prompt(model, length, draw):
    best = None
    for _ in range(TRIES):
        case = answer(model, [draw.randrange(3, model.config.vocab_size) for _ in range(length)])
        if best is None or min(case["gaps"]) > min(best["gaps"]):
            best = case
        if min(best["gaps"]) >= SMALLEST_GAP:
            break
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_type")
    parser.add_argument("target", type=pathlib.Path)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--tokenizer", type=pathlib.Path)
    parser.add_argument("--text", nargs="*", default=[])
    arguments = parser.parse_args()
    pairs = (change.split("=", 1) for change in arguments.changes)
    model = make_model(arguments.model_type, {key: json.loads(value) for key, value in pairs})
    model.save_pretrained(arguments.target)
    (arguments.target / "generation_config.json").unlink(missing_ok=True)
    if arguments.tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
        prompts = [{"prompt": text, **answer(model, tokenizer.encode(text).ids)} for text in arguments.text]
    else:
        draw = random.Random(1234)
        prompts = [random_prompt(model, length, draw) for length in LENGTHS]
    (arguments.target / "golden.json").write_text(json.dumps({"prompts": prompts}))
    print(f"{sum(p.numel() for p in model.parameters())} weights; smallest gaps {[min(p['gaps']) for p in prompts]}")


if __name__ == "__main__":
    main()
