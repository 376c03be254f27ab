"""Measure training and sampling on a GPU, in parts of a few minutes each, and check there what a CPU cannot show.

    python benchmarks/gpu.py --results results.jsonl                   # all parts
    python benchmarks/gpu.py --results results.jsonl --parts shipped   # one
    python benchmarks/gpu.py --results results.jsonl --smoke           # all of it in small, on a CPU

Every part is a process of its own that ends by itself after its time; every row is a line of JSON that is written at
once, so that nothing measured is lost. `python docs/make_speed.py` makes a table of the results in docs/results/gpu.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

BLOCKS, BLOCK_SECONDS, WARM_UP = 5, 0.5, 12
PART_SECONDS = 230


class Recorder:
    """Rows of a part, each written as soon as it is measured."""

    def __init__(self, part: str, path: Path, smoke: bool) -> None:
        self.part, self.path, self.smoke = part, path, smoke
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.start = time.perf_counter()
        self.failed = False  # so far

    def add(self, name: str, **values: Any) -> None:  # noqa: ANN401
        """Write a row."""
        about = {"part": self.part, "name": name, "at": round(time.perf_counter() - self.start, 1)}
        line = json.dumps({**about, **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def time(self, name: str, call: Callable[[], object], images: int, **values: Any) -> None:  # noqa: ANN401
        """Time a call that is about so many images, in blocks, and write a row."""
        with self.trying(name, **values):
            self.add(name, **timed(call, self.device, self.smoke, images), **values)

    @contextmanager
    def trying(self, name: str, **values: Any) -> Iterator[None]:  # noqa: ANN401
        """Write down what goes wrong, and go on: the next row tells more than none."""
        try:
            yield
        except Exception:
            self.failed = True
            self.add(name, failed=traceback.format_exc()[-3000:], **values)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, smoke: bool, images: int) -> dict[str, Any]:
    """Seconds of a call: median and range of blocks that wait for the device at their ends alone, and the host's own.

    The host's are those of a few calls before which the device is idle, until the last of them has been handed over.
    """
    start = time.perf_counter()
    for _ in range(1 if smoke else WARM_UP):
        call()
    wait_for(device)
    set_up = time.perf_counter() - start
    host = time.perf_counter()
    for _ in range(1 if smoke else 4):
        call()
    host = (time.perf_counter() - host) / (1 if smoke else 4)
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    count = 1 if smoke else max(1, math.ceil(BLOCK_SECONDS / (time.perf_counter() - start)))
    blocks = [block(call, device, count) for _ in range(1 if smoke else BLOCKS)]
    median = statistics.median(blocks)
    return {
        "seconds": median,
        "fastest": min(blocks),
        "slowest": max(blocks),
        "host_seconds": host,
        "images_per_second": images / median,
        "set_up": set_up,
        **({"peak_memory": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}),
    }


def block(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds of a call, over so many."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait_for(device)
    return (time.perf_counter() - start) / count


def kernels(call: Callable[[], object], device: torch.device, steps: int) -> dict[str, Any]:
    """Where the time of some calls goes: the device's kernels by name in milliseconds a call, and how busy it is."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    start = time.perf_counter()
    with profile(activities=activities) as record:
        for _ in range(steps):
            call()
        wait_for(device)
    seconds = (time.perf_counter() - start) / steps
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {
        event.key: (getattr(event, kind) / steps / 1e3, event.count / steps)
        for event in record.key_averages()
        if getattr(event, kind) and (not on_gpu or event.device_type.name == "CUDA")
    }
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:30]
    return {
        "seconds": seconds,
        "busy": sum(milliseconds for milliseconds, _ in times.values()) / 1e3,
        "calls": sum(count for _, count in times.values()),
        "kernels": {name[:90]: [round(value, 4) for value in found] for name, found in longest},
    }


def run_part(name: str, path: Path, smoke: bool) -> bool:
    """Do one part in this process; whether all of it went well."""
    from gpu_parts import PARTS

    record = Recorder(name, path, smoke)
    PARTS[name](record)
    return not record.failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts one after the other; 1 if one of them failed or took too long."""
    names = ("about", "shipped", "cifar10", "right", "sampling", "curve")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--results", type=Path, required=True, help="a file of lines of JSON, which is added to")
    parser.add_argument("--smoke", action="store_true", help="everything once, in small")
    parser.add_argument("--seconds", type=int, default=PART_SECONDS, help="that a part may take")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of a process that does one
    args = parser.parse_args(arguments)
    if args.part:
        return int(not run_part(args.part, args.results, args.smoke))
    if args.smoke:
        return int(sum(not run_part(name, args.results, args.smoke) for name in args.parts) > 0)
    failed = 0
    for name in args.parts:
        command = [sys.executable, "-u", __file__, "--results", str(args.results), "--part", name]
        try:
            code = subprocess.run(command, timeout=args.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -1
        print(f"part {name}: exit code {code}", flush=True)
        failed |= code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
