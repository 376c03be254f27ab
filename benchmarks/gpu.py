"""Measure training and sampling on a GPU, in parts of a few minutes each, and check there what a CPU cannot show.

    python benchmarks/gpu.py --results results.jsonl                   # all parts
    python benchmarks/gpu.py --results results.jsonl --parts shipped   # one
    python benchmarks/gpu.py --results results.jsonl --smoke           # all of it in small, on a CPU

Every part is a process of its own that ends by itself after its time; every row is a line of JSON that is written at
once, so that nothing measured is lost. `python docs/make_speed.py` makes a table of docs/results/gpu.jsonl.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = ("about", "shipped", "cifar10", "right", "sampling", "curve")
PART_SECONDS = 230


def here(name: str, args: argparse.Namespace) -> bool:
    """Do a part in this process; whether all of it went well."""
    from gpu_parts import PARTS  # the process that starts the others needs no PyTorch
    from gpu_timing import Recorder

    record = Recorder(name, args.results, args.smoke)
    PARTS[name](record)
    return not record.failed


def in_a_process(name: str, args: argparse.Namespace) -> bool:
    """Do a part in a process of its own; whether all of it went well in its time."""
    command = [sys.executable, "-u", __file__, "--results", str(args.results), "--part", name]
    try:
        return subprocess.run(command, timeout=args.seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts one after the other; 1 if one of them failed or took too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--results", type=Path, required=True, help="a file of lines of JSON, which is added to")
    parser.add_argument("--smoke", action="store_true", help="everything once, in small")
    parser.add_argument("--seconds", type=int, default=PART_SECONDS, help="that a part may take")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of a process that does one
    args = parser.parse_args(arguments)
    do = here if args.smoke or args.part else in_a_process
    failed = [name for name in ([args.part] if args.part else args.parts) if not do(name, args)]
    for name in failed:
        print(f"part {name} failed, or took too long", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
