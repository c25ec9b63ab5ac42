#!/usr/bin/env python3
"""Decode and prefill speed on the CPU, beside llama.cpp on the same weights in the same run.

    python3 scripts/bench_decode.py [--model FILE.gguf] [--weights bf16|q8_0|file]... [--threads 2] [--runs 5]
                                    [--bin target/release] [--peer-python PYTHON]

One shard, driven by our benchmark over its socket: 64 greedy steps after 128 tokens, alone and 8 at a time, and a prefill of
512 tokens. `bf16`: the file's weights dequantized (`--dtype bfloat16`); `q8_0`: a file that llama.cpp's quantizer makes of it;
`file`: its own blocks. llama.cpp does the same through its C calls, for bf16 on a file of its own quantizer; PYTHON is an
interpreter with llama-cpp-python and numpy installed (CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python
llama-cpp-python). Without it only ours is timed, and not in q8_0. The two alternate, so that a noisy machine disturbs both.
Without --model: SmolLM2-135M-Instruct. Prints one JSON line for each kind of weights, with medians and their ratios.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPT, STEPS, PREFILL, BATCH = 128, 64, 512, 8
KINDS = ["bf16", "q8_0", "file"]


def smollm2():
    fetch = [sys.executable, str(HERE / "fetch_smollm2.py")]
    return subprocess.run(fetch, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Shard:
    """One shard process, ended on exit."""

    def __init__(self, options, model, folder, dtype):
        self.prefix = f"{folder}/shard"
        command = [f"{options.bin}/shard", "serve", model, "--uds-path", self.prefix, "--threads", str(options.threads)]
        command += ["--dtype", dtype] if dtype else []
        self.log = open(f"{folder}/log", "w+")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        while not Path(f"{self.prefix}-0").exists():
            if self.process.poll() is not None:
                self.log.seek(0)
                sys.exit(f"the shard ended with {self.process.returncode}:\n{self.log.read()}")
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(10)


def ours(options, model, prefix, shape, field):
    """The median over the runs of one benchmark call; the shape is prompt, new tokens, batch."""
    prompt, new_tokens, batch = shape
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [f"{options.bin}/benchmark", "--tokenizer-name", model, "--master-shard-uds-path", f"{prefix}-0"]
        command += ["--sequence-length", str(prompt), "--decode-length", str(new_tokens), "--batch-size", str(batch)]
        command += ["--runs", "3", "--no-tui", "--output-json", report.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs = json.loads(Path(report.name).read_text())["batches"][0]["runs"]
        return statistics.median(run[field] for run in runs)


def peer_script(options, *arguments):
    command = [options.peer_python, str(HERE / "peer_llama_cpp.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(options, model, kind, folder):
    """Times both, in turn, on one kind of weights."""
    converted = f"{folder}/{kind}.gguf"
    if options.peer_python and kind != "file":
        peer_script(options, "convert", kind, model, converted)
    own_file, peer_file = {"bf16": (model, converted), "q8_0": (converted, converted), "file": (model, model)}[kind]
    series = {"ours": {"decode": [], f"batch {BATCH}": [], "prefill": []}, "llama.cpp": {"decode": [], "prefill": []}}
    for _ in range(options.runs):
        with Shard(options, own_file, folder, "bfloat16" if kind == "bf16" else None) as shard:
            for what, shape, field in [
                ("decode", (PROMPT, STEPS + 1, 1), "decode_throughput"),
                (f"batch {BATCH}", (PROMPT, STEPS + 1, BATCH), "decode_throughput"),
                ("prefill", (PREFILL, 1, 1), "prefill_throughput"),
            ]:
                series["ours"][what].append(ours(options, own_file, shard.prefix, shape, field))
        if options.peer_python:
            for what, value in json.loads(
                peer_script(options, "time", peer_file, options.threads, PROMPT, STEPS, PREFILL)
            ).items():
                series["llama.cpp"][what].append(value)
    return series


def report(options, model, kind, series):
    result = {"model": Path(model).name, "weights": kind, "threads": options.threads}
    result["load_average_at_end"] = os.getloadavg()[0]
    for name, values in ((f"{who} {what}", v) for who, whats in series.items() for what, v in whats.items()):
        if values:
            result[f"{name} tokens/s"] = round(statistics.median(values), 1)
            result[f"{name} runs"] = [round(value, 1) for value in values]
    own, peer = series["ours"], series["llama.cpp"]
    # Ratios run by run: what disturbed one of them most likely disturbed the other.
    for what in peer:
        if peer[what]:
            result[f"{what} ratio"] = round(statistics.median(a / b for a, b in zip(own[what], peer[what])), 2)
    batch = zip(own[f"batch {BATCH}"], own["decode"])
    result[f"batch {BATCH} to 1"] = round(statistics.median(a / b for a, b in batch), 2)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--model", metavar="FILE.gguf")
    parser.add_argument("--weights", action="append", choices=KINDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-python", metavar="PYTHON")
    options = parser.parse_args()
    kinds = options.weights or (KINDS if options.peer_python else ["bf16", "file"])
    if "q8_0" in kinds and not options.peer_python:
        sys.exit("--weights q8_0: llama.cpp's quantizer makes that file, so it needs --peer-python")
    model = options.model or smollm2()
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(report(options, model, kind, compare(options, model, kind, folder))), flush=True)


if __name__ == "__main__":
    main()
