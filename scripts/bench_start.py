#!/usr/bin/env python3
"""Time from the launcher's start to /health 200, and the peak memory of each process, as medians.

    python3 scripts/bench_start.py [--bin target/release] [--model PATH] [--ranks 1] [--runs 5]

Polls /health every 2 ms. The model file is read once before the first run, so that it lies in the page cache.
Prints one JSON line.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def generate(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"inputs": "The capital of France is", "parameters": {"max_new_tokens": 32}})
    connection.request("POST", "/generate", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        sys.exit(f"/generate answered {answer.status}")


def peaks_mib(launcher):
    """Peak resident memory by program, in MiB; the shards' are split into what files back and what does not."""
    out = {}
    for entry in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in entry.read_text().splitlines())
        except OSError:
            continue
        pid = int(entry.parent.name)
        if pid == launcher or int(fields["PPid"]) == launcher:
            kib = {key: int(fields[key].split()[0]) for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem")}
            name = fields["Name"].strip()
            out.setdefault(name, []).append({key: round(value / 1024, 1) for key, value in kib.items()})
    return out


def run(options, model):
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{options.bin}/launcher", "--model-id", model, "--port", str(port), "--num-shard", str(options.ranks)]
        command += ["--hostname", "127.0.0.1", "--shard-uds-path", f"{folder}/shard"]
        log = open(f"{folder}/log", "w+")
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        while not healthy(port):
            if process.poll() is not None:
                log.seek(0)
                sys.exit(f"the launcher ended with {process.returncode}:\n{log.read()}")
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        generate(port)
        memory = peaks_mib(process.pid)
        process.send_signal(signal.SIGTERM)
        if process.wait(30) != 0:
            sys.exit(f"the launcher ended with {process.returncode} on SIGTERM")
        return seconds, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", default="target/release")
    parser.add_argument("--model", help="default: SmolLM2 from scripts/fetch_smollm2.py")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    fetch = [sys.executable, str(Path(__file__).with_name("fetch_smollm2.py"))]
    model = options.model or subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip()
    results = [run(options, model) for _ in range(options.runs)]
    report = {
        "model": Path(model).name,
        "ranks": options.ranks,
        "seconds_to_health_median": round(statistics.median(seconds for seconds, _ in results), 3),
        "seconds_to_health": [round(seconds, 3) for seconds, _ in results],
        "peak_memory_mib": results[-1][1],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
