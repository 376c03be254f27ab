"""Gather the wheels that `gpu.py` needs on a machine that has PyTorch and accelerate, but no network.

    python benchmarks/gpu_wheels.py .whl

There: python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl, then
PYTHONPATH=/tmp/site:src python3 benchmarks/gpu.py --results results.jsonl
"""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

# What machines with PyTorch do not bring as a rule; all of it pure Python.
PACKAGES = ("diffusers", "datasets", "dill", "importlib_metadata", "jsonargparse", "multiprocess")
LIMIT = 64 * 2**20  # bytes that travel


def main() -> None:
    """Download, and say how much it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the other machine")
    args = parser.parse_args()
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES]
    target = ["--no-deps", "--only-binary=:all:", "--python-version", args.python]
    command = [sys.executable, "-m", "pip", "download", "-q", *target, "-d", str(args.folder), *versions]
    subprocess.run(command, check=True)
    wheels = sorted(args.folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in wheels)
    print(*(path.name for path in wheels), f"{size / 2**20:.1f} MiB of {LIMIT / 2**20:.0f} in {args.folder}", sep="\n")
    if size > LIMIT:
        sys.exit("more than travels")


if __name__ == "__main__":
    main()
