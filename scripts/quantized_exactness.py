#!/usr/bin/env python3
"""How far a server that runs a GGUF file from its quantized blocks is from one that has the same weights in float32.

    python3 scripts/quantized_exactness.py MODEL.gguf PROMPTS.jsonl [--bin target/release] [--limit 0.01] [--prompt-limit 0.05]

Writes a copy of the file whose tensors are the blocks' exact values in float32 (with gguf's own dequantization), serves both
through /generate, greedily, and compares ids and log-probabilities of prompt and answer. An id may differ where the two best
were nearly as good. PROMPTS has an object with a "prompt" on each line. Needs numpy and gguf (PyPI). Exit code 1 when an id or a
log-probability differs by more than the limit; a prompt's tokens may be very improbable, where small errors of logits show.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

TOKENS = 48
# Two best tokens closer than this are a tie, after which texts part.
TIE = 0.02


def write_float32(source, target):
    """A copy whose quantized tensors are float32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(port, prompt):
    parameters = {"max_new_tokens": TOKENS, "details": True, "decoder_input_details": True, "top_n_tokens": 2}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = json.dumps({"inputs": prompt, "parameters": parameters})
    connection.request("POST", "/generate", body, {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    if "details" not in answer:
        sys.exit(f"/generate answered {answer}")
    return answer["details"]


def answers(binaries, model, prompts, folder):
    """What a server of `model` answers to each prompt."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [f"{binaries}/launcher", "--model-id", str(model), "--port", str(port), "--hostname", "127.0.0.1"]
    command += ["--shard-uds-path", f"{folder}/shard", "--enable-prefill-logprobs"]
    with open(f"{folder}/log", "w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            while True:
                if launcher.poll() is not None:
                    sys.exit(f"the launcher ended: {Path(folder, 'log').read_text()[-2000:]}")
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            return [ask(port, prompt) for prompt in prompts]
        finally:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(60)


def compare(blocks, exact):
    """Compared and equal ids, and the largest difference of a prompt's and of an answer's log-probability."""
    compared = equal = 0
    prefill = max(
        (abs(a["logprob"] - b["logprob"]) for a, b in zip(blocks["prefill"][1:], exact["prefill"][1:])), default=0.0
    )
    generated = 0.0
    for index, (a, b) in enumerate(zip(blocks["tokens"], exact["tokens"])):
        best, second = (token["logprob"] for token in exact["top_tokens"][index][:2])
        if best - second < TIE:
            break
        compared += 1
        equal += a["id"] == b["id"]
        generated = max(generated, abs(a["logprob"] - b["logprob"]))
        if a["id"] != b["id"]:
            break
    return compared, equal, prefill, generated


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--limit", type=float, default=0.01)
    parser.add_argument("--prompt-limit", type=float, default=0.05)
    options = parser.parse_args()
    cases = map(json.loads, options.prompts.read_text().splitlines())
    prompts = [case["prompt"] for case in cases if case.get("prompt")]
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder, "exact.gguf")
        write_float32(options.model, exact)
        served = [answers(options.bin, model, prompts, folder) for model in (options.model, exact)]
    results = [compare(*pair) for pair in zip(*served)]
    report = {
        "model": options.model.name,
        "prompts": len(prompts),
        "ids_compared": sum(result[0] for result in results),
        "ids_equal": sum(result[1] for result in results),
        "largest_difference_prompt": round(max(result[2] for result in results), 6),
        "largest_difference_generated": round(max(result[3] for result in results), 6),
    }
    print(json.dumps(report))
    is_far = report["largest_difference_generated"] > options.limit
    is_far |= report["largest_difference_prompt"] > options.prompt_limit
    sys.exit(is_far or report["ids_equal"] < report["ids_compared"])


if __name__ == "__main__":
    main()
