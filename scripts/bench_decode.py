#!/usr/bin/env python3
"""Decode and prefill speed at batch 1 on the CPU, beside llama.cpp in the same precision in the same run.

    python3 scripts/bench_decode.py [--bin target/release] [--threads 2] [--runs 5] [--peer-python PYTHON]

Ours: one shard on SmolLM2 (weights dequantized to bfloat16), driven by our benchmark over its socket: 64 greedy steps
after 128 tokens, and a prefill of 512 tokens. llama.cpp: the same through its C calls, on a bf16 file that its own
quantizer makes of the same GGUF; PYTHON is an interpreter with llama-cpp-python and numpy installed
(CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python). Without it only ours is timed.
The two alternate, so that a noisy machine disturbs both. Prints one JSON line with medians and their ratio.
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
PROMPT, STEPS, PREFILL = 128, 64, 512


def smollm2():
    fetch = [sys.executable, str(HERE / "fetch_smollm2.py")]
    return subprocess.run(fetch, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Shard:
    """One shard process, ended on exit."""

    def __init__(self, options, model, folder):
        self.prefix = f"{folder}/shard"
        command = [f"{options.bin}/shard", "serve", model, "--uds-path", self.prefix, "--threads", str(options.threads)]
        command += ["--dtype", "bfloat16"]  # what the peer runs; without it a GGUF file is run from its blocks
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


def ours(options, model, prefix, prompt, new_tokens, field):
    """The median over the runs of one benchmark call."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [f"{options.bin}/benchmark", "--tokenizer-name", model, "--master-shard-uds-path", f"{prefix}-0"]
        command += ["--sequence-length", str(prompt), "--decode-length", str(new_tokens), "--batch-size", "1"]
        command += ["--runs", "3", "--no-tui", "--output-json", report.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        runs = json.loads(Path(report.name).read_text())["batches"][0]["runs"]
        return statistics.median(run[field] for run in runs)


def bf16_file(options, model, folder):
    target = f"{folder}/bf16.gguf"
    subprocess.run([options.peer_python, str(HERE / "peer_llama_cpp.py"), "convert", model, target], check=True)
    return target


def peer(options, file):
    command = [options.peer_python, str(HERE / "peer_llama_cpp.py"), "time", file, str(options.threads)]
    command += [str(PROMPT), str(STEPS), str(PREFILL)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-python", metavar="PYTHON")
    options = parser.parse_args()
    model = smollm2()
    results = {"ours": {"decode": [], "prefill": []}, "llama.cpp": {"decode": [], "prefill": []}}
    with tempfile.TemporaryDirectory() as folder:
        file = bf16_file(options, model, folder) if options.peer_python else None
        for _ in range(options.runs):
            with Shard(options, model, folder) as shard:
                decode = ours(options, model, shard.prefix, PROMPT, STEPS + 1, "decode_throughput")
                prefill = ours(options, model, shard.prefix, PREFILL, 1, "prefill_throughput")
            results["ours"]["decode"].append(decode)
            results["ours"]["prefill"].append(prefill)
            if file:
                for what, value in peer(options, file).items():
                    results["llama.cpp"][what].append(value)
    report = {"threads": options.threads, "weights": "bfloat16", "load_average_at_end": os.getloadavg()[0]}
    for name, series in results.items():
        for what, values in series.items():
            if values:
                report[f"{name} {what} tokens/s"] = round(statistics.median(values), 1)
                report[f"{name} {what} runs"] = [round(value, 1) for value in values]
    for what in ("decode", "prefill"):
        if file:
            report[f"{what} ratio"] = round(report[f"ours {what} tokens/s"] / report[f"llama.cpp {what} tokens/s"], 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
