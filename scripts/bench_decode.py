#!/usr/bin/env python3
"""Decode and prefill speed on the CPU, beside llama.cpp on the same weights in the same run.

    python3 scripts/bench_decode.py [--model FILE.gguf] [--weights bf16|q8_0|file]... [--threads 2] [--runs 5]
                                    [--bin target/release] [--peer-python PYTHON]
                                    [--transformers-python PYTHON --transformers-model DIR]

One shard, driven by our benchmark over its socket: 64 greedy steps after 128 tokens, alone and 8 at a time, and a prefill of
512 tokens. `bf16`: the file's weights dequantized (`--dtype bfloat16`); `q8_0`: a file that llama.cpp's quantizer makes of it;
`file`: its own blocks. llama.cpp does the same through its C calls, for bf16 on a file of its own quantizer; PYTHON is an
interpreter with llama-cpp-python and numpy installed (CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python
llama-cpp-python). Without it only ours is timed, and not in q8_0. transformers (bf16 only) needs an interpreter that has it and torch, and the
same model as a directory of safetensors. All alternate, so that a noisy machine disturbs all, with a loop that only reads memory
(`target/release/examples/kernels --read-only`, where it is built): the limit of decode is what it reads over the weights' bytes.
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
PEERS = ["llama.cpp", "transformers"]


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


def transformers(options):
    command = [options.transformers_python, str(HERE / "peer_transformers.py"), options.transformers_model]
    command += map(str, (options.threads, PROMPT, STEPS, PREFILL))
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def memory_read(options):
    """GB/s of a loop that only reads, on huge pages; nothing where the example is not built."""
    command = [f"{options.bin}/examples/kernels", "--read-only", "--json", "--threads", str(options.threads)]
    if not Path(command[0]).exists():
        return []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(output)["figures"][0]["value"]]


def compare(options, model, kind, folder):
    """Times all, in turn, on one kind of weights."""
    converted = f"{folder}/{kind}.gguf"
    if options.peer_python and kind != "file":
        peer_script(options, "convert", kind, model, converted)
    own_file, peer_file = {"bf16": (model, converted), "q8_0": (converted, converted), "file": (model, model)}[kind]
    series = {"ours": {"decode": [], f"batch {BATCH}": [], "prefill": []}}
    series |= {peer: {"decode": [], "prefill": []} for peer in PEERS}
    bandwidth = []
    for _ in range(options.runs):
        bandwidth += memory_read(options)
        with Shard(options, own_file, folder, "bfloat16" if kind == "bf16" else None) as shard:
            for what, shape, field in [
                ("decode", (PROMPT, STEPS + 1, 1), "decode_throughput"),
                (f"batch {BATCH}", (PROMPT, STEPS + 1, BATCH), "decode_throughput"),
                ("prefill", (PREFILL, 1, 1), "prefill_throughput"),
            ]:
                series["ours"][what].append(ours(options, own_file, shard.prefix, shape, field))
        answers = {}
        if options.peer_python:
            shape = (options.threads, PROMPT, STEPS, PREFILL)
            answers["llama.cpp"] = peer_script(options, "time", peer_file, *shape)
        if options.transformers_python and kind == "bf16":
            answers["transformers"] = transformers(options)
        for peer, answer in answers.items():
            for what, value in json.loads(answer).items():
                series[peer][what].append(value)
    limits = [gigabytes * 1e9 / os.path.getsize(peer_file) for gigabytes in bandwidth if Path(peer_file).exists()]
    return series, limits


def report(options, model, kind, series, limits):
    result = {"model": Path(model).name, "weights": kind, "threads": options.threads}
    result["load_average_at_end"] = os.getloadavg()[0]
    for name, values in ((f"{who} {what}", v) for who, whats in series.items() for what, v in whats.items()):
        if values:
            result[f"{name} tokens/s"] = round(statistics.median(values), 1)
            result[f"{name} runs"] = [round(value, 1) for value in values]
    own = series["ours"]
    # Ratios run by run: what disturbed one of them most likely disturbed the other.
    for peer in PEERS:
        for what, values in series[peer].items():
            if values:
                ratio = statistics.median(a / b for a, b in zip(own[what], values))
                result[f"{what} to {peer}"] = round(ratio, 2)
    if limits:
        result["decode limit tokens/s"] = round(statistics.median(limits), 1)
        result["decode limit runs"] = [round(limit, 1) for limit in limits]
        result["decode to limit"] = round(statistics.median(a / b for a, b in zip(own["decode"], limits)), 2)
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
    parser.add_argument("--transformers-python", metavar="PYTHON")
    parser.add_argument("--transformers-model", metavar="DIR")
    options = parser.parse_args()
    kinds = options.weights or (KINDS if options.peer_python else ["bf16", "file"])
    if "q8_0" in kinds and not options.peer_python:
        sys.exit("--weights q8_0: llama.cpp's quantizer makes that file, so it needs --peer-python")
    if bool(options.transformers_python) != bool(options.transformers_model):
        sys.exit("--transformers-python and --transformers-model belong together")
    model = options.model or smollm2()
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(report(options, model, kind, *compare(options, model, kind, folder))), flush=True)


if __name__ == "__main__":
    main()
