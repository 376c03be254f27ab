"""Measure calls on a device, and write each figure down at once."""

import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ddpm_from_scratch.training.plan import peak_memory, synchronize

BLOCKS, BLOCK_SECONDS, WARM_UP, HOST_CALLS = 5, 0.5, 12, 4


class Recorder:
    """Rows of a part, each written as soon as it is measured."""

    def __init__(self, part: str, path: Path, smoke: bool) -> None:
        self.part, self.path, self.smoke = part, path, smoke
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.start = time.perf_counter()
        self.failed = False  # so far

    def count(self, number: int) -> int:
        """That many, or one when everything is done in small."""
        return 1 if self.smoke else number

    def add(self, name: str, **values: Any) -> None:  # noqa: ANN401
        """Write a row."""
        about = {"part": self.part, "name": name, "at": round(time.perf_counter() - self.start, 1)}
        line = json.dumps({**about, **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def time(
        self,
        name: str,
        call: Callable[[], object],
        images: int,
        warm_up: int = WARM_UP,
        **values: Any,  # noqa: ANN401
    ) -> None:
        """Time a call that is about so many images, in blocks, after some that warm up, and write a row."""
        with self.trying(name, **values):
            self.add(name, **timed(call, self, images, warm_up), **values)

    @contextmanager
    def trying(self, name: str, **values: Any) -> Iterator[None]:  # noqa: ANN401
        """Write down what goes wrong, and go on: the next row tells more than none."""
        try:
            yield
        except Exception:
            self.failed = True
            self.add(name, failed=traceback.format_exc()[-3000:], **values)


def timed(call: Callable[[], object], record: Recorder, images: int, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Seconds of a call: median and range of blocks that wait for the device at their ends alone, and the host's own.

    The host's are those of a few calls before which the device is idle, until the last of them has been handed over.
    """
    device, calls = record.device, record.count(HOST_CALLS)
    start = time.perf_counter()
    for _ in range(record.count(warm_up)):
        call()
    synchronize(device)
    set_up = time.perf_counter() - start
    host = time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - host) / calls
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    count = record.count(max(1, math.ceil(BLOCK_SECONDS / (time.perf_counter() - start))))
    blocks = [block(call, device, count) for _ in range(record.count(BLOCKS))]
    median = statistics.median(blocks)
    return {
        "seconds": median,
        "fastest": min(blocks),
        "slowest": max(blocks),
        "host_seconds": host,
        "images_per_second": images / median,
        "set_up": set_up,
        "peak_memory": peak_memory(device),
    }


def block(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Seconds of a call, over so many."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / count


def kernels(call: Callable[[], object], device: torch.device, steps: int) -> dict[str, Any]:
    """Where the time of some calls goes: the device's kernels by name in milliseconds a call, and how busy it is."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    start = time.perf_counter()
    with profile(activities=activities) as record:
        for _ in range(steps):
            call()
        synchronize(device)
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
