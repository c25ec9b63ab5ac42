#!/usr/bin/env python3
"""Run libFuzzer on the fuzz targets, one after the other, and print what each run reached.

    python3 fuzz/run.py [--seconds 60] [--json FILE] [TARGET ...]

Builds the program first (`fuzz/instrument.sh` says how). The corpus of earlier runs, kept in target/fuzz/corpus, is used
again beside the seeds in fuzz/seeds. A finding ends its target's run and is written to target/fuzz/findings; the exit code
is then 1. Needs a C++ compiler for libFuzzer itself.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ROOT / "fuzz" / "seeds"
# Seconds for one input, and MiB for the process.
TIMEOUT, MAX_RSS = 20, 2048


def build(target_dir):
    environment = os.environ | {"RUSTC_WORKSPACE_WRAPPER": str(ROOT / "fuzz" / "instrument.sh")}
    command = ["cargo", "build", "--release", "--locked", "--workspace", "--bin", "libfuzzer"]
    command += ["--features", "fuzz/libfuzzer"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return target_dir / "release" / "libfuzzer"


def run(program, name, seconds, place):
    """Runs one target: its figures."""
    corpus, findings, bin_dir = (place / part for part in [f"corpus/{name}", "findings", "bin"])
    for directory in [corpus, findings, bin_dir]:
        directory.mkdir(parents=True, exist_ok=True)
    # The program takes the target it is named after.
    link = bin_dir / name
    link.unlink(missing_ok=True)
    link.symlink_to(program)
    log = place / f"{name}.log"
    with log.open("w") as output, tempfile.TemporaryDirectory(prefix="quartet-fuzz-") as scratch:
        command = [link, f"-max_total_time={seconds}", f"-timeout={TIMEOUT}", f"-rss_limit_mb={MAX_RSS}"]
        command += ["-print_final_stats=1", "-max_len=65536", f"-artifact_prefix={findings}/{name}-", corpus, SEEDS / name]
        environment = os.environ | {"TMPDIR": scratch}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    text = log.read_text(errors="replace")
    last = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)[-1:] or [("0", "0", "0")]
    numbers = {"edges": int(last[0][0]), "features": int(last[0][1]), "corpus": int(last[0][2])}
    for key, pattern in {
        "executions": r"number_of_executed_units:\s+(\d+)",
        "edges_in_program": r"Loaded 1 modules\s+\((\d+) inline",
        "peak_rss_mib": r"peak_rss_mb:\s+(\d+)",
    }.items():
        found = re.search(pattern, text)
        numbers[key] = int(found[1]) if found else None
    return {"target": name, "seconds": seconds, **numbers, "found": code != 0}


def main():
    names = sorted(path.name for path in SEEDS.iterdir())
    parser = argparse.ArgumentParser(description="Run libFuzzer on the fuzz targets.")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(names)}; default: all")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.targets if name not in names]
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(names)}")
    target_dir = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
    program = build(target_dir)
    rows = []
    print(f"{'target':16} {'seconds':>7} {'executions':>11} {'edges':>7} {'corpus':>7} {'peak MiB':>9}")
    for name in arguments.targets or names:
        row = run(program, name, arguments.seconds, target_dir / "fuzz")
        rows.append(row)
        note = f"  FOUND something: {target_dir}/fuzz/{name}.log" if row["found"] else ""
        shown = [row[key] if row[key] is not None else "?" for key in ["executions", "edges", "corpus", "peak_rss_mib"]]
        print(f"{name:16} {row['seconds']:7} {shown[0]:>11} {shown[1]:>7} {shown[2]:>7} {shown[3]:>9}{note}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["found"] for row in rows))


if __name__ == "__main__":
    main()
