#!/usr/bin/env python3
"""Makes the table of docs/models.md: every reference model on 1, 2 and 3 ranks, whole, in chunks and in a batch.

    python3 scripts/models_table.py GOLDENS [--bin PATH/TO/check_golden] [NAME ...]

GOLDENS is a folder of model folders, each with a golden.json of reference outputs (see the header of
shard/models/examples/check_golden); without NAMEs all of them but quantized models, adapters and kinds that are not run.
Prints Markdown; exit code 1 when an id differs or an error is above the limit.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

LIMIT = 0.002
RANKS = (1, 2, 3)
WAYS = ([], ["--chunk", "7"], ["--batch", "8"], ["--batch", "8", "--chunk", "5"])
# Refused by the kind they are of.
NOT_RUN = ("mamba", "t5")
LAST_LINE = re.compile(r"^all +\d+ +(\d+) of +(\d+) +([\d.]+|NaN|inf) +([\d.]+|NaN|inf)", re.M)


def is_run(folder):
    """Whether a folder holds a whole decoder whose weights are plain numbers."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    is_quantized = "quantization_config" in config or (folder / "quantize_config.json").exists()
    return config.get("architectures") and config.get("model_type") not in NOT_RUN and not is_quantized


def run(program, folder, ranks, way):
    """(equal, comparable, error), or the last line of what went wrong."""
    command = [program, folder, folder / "golden.json", "--ranks", str(ranks), *way]
    done = subprocess.run(command, capture_output=True, text=True)
    found = LAST_LINE.search(done.stderr)
    if not found:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    equal, comparable, generated, last = found.groups()
    return int(equal), int(comparable), max(float(generated), float(last))


def row(program, folder):
    """The cells of a model and whether all is well."""
    cells, is_well = [], True
    for ranks in RANKS:
        results = [run(program, folder, ranks, way) for way in WAYS]
        problem = next((result for result in results if isinstance(result, str)), None)
        if problem:
            return [problem], False
        equal, comparable = (sum(result[i] for result in results) for i in (0, 1))
        error = max(result[2] for result in results)
        is_well &= equal == comparable and error <= LIMIT
        cells += [f"{equal} of {comparable}", f"{error:.6f}"]
    return cells, is_well


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goldens", type=pathlib.Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--bin", default="target/release/examples/check_golden")
    arguments = parser.parse_intermixed_args()
    folders = sorted(path.parent for path in arguments.goldens.glob("*/golden.json"))
    names = arguments.names or [folder.name for folder in folders if is_run(folder)]
    print("| model | " + " | ".join(f"ids, {n} rank{'s' * (n > 1)} | error" for n in RANKS) + " |")
    print("|---" * (1 + 2 * len(RANKS)) + "|")
    all_well = True
    for name in names:
        cells, is_well = row(arguments.bin, arguments.goldens / name)
        all_well &= is_well
        mark = "" if is_well else " **differs**"
        print(f"| `{name}`{mark} | " + " | ".join(cells) + " |", flush=True)
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
