"""Plan of a run: what it will take, told from its first steps, and the length that a budget of time gives it."""

import logging
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils import broadcast_object_list

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger("train")

TIMED_STEPS, SETTLING_STEPS = 12, 4  # timed from the start on; the first of them, which set things up, do not count
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of ru_maxrss


class Stopwatch:
    """The seconds of a run's first steps, from which its plan follows."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.seconds: list[float] = []
        self.start = time.perf_counter()

    def lap(self) -> None:
        """Note the end of a step; after the last one that is timed, fix the length of the run and tell the plan."""
        if len(self.seconds) == TIMED_STEPS:
            return
        synchronize(self.run.accelerator.device)
        now = time.perf_counter()
        self.seconds.append(now - self.start)
        self.start = now
        if len(self.seconds) == TIMED_STEPS:
            pace = pace_of(self.run, self.seconds)
            fix_length(self.run, pace.typical, sum(self.seconds))
            tell_plan(self.run, pace)


class Pace(NamedTuple):
    """Seconds of a step."""

    typical: float  # the median, the same for all processes
    fastest: float
    slowest: float


def pace_of(run: "Run", seconds: Sequence[float]) -> Pace:
    """How fast the timed steps were, without those that set things up."""
    settled = seconds[SETTLING_STEPS:] or seconds
    median = torch.tensor(statistics.median(settled), device=run.accelerator.device)
    return Pace(float(run.accelerator.reduce(median, reduction="mean")), min(settled), max(settled))


def images_per_second(batch_size: int, pace: Pace) -> str:
    """The speed, and its spread over the timed steps: 58 images/s (51 to 60)."""
    return (
        f"{batch_size / pace.typical:.0f} images/s ({batch_size / pace.slowest:.0f} to {batch_size / pace.fastest:.0f})"
    )


def budget_of(run: "Run") -> list[float | None]:
    """The budget of time and the most steps, from which the length of a run follows."""
    return [run.config.max_train_minutes, run.config.max_train_steps]


def fix_length(run: "Run", step_seconds: float, spent: float) -> None:
    """Turn a budget of time, if there is one, into a number of steps, which is part of the run from now on."""
    minutes, progress = run.config.max_train_minutes, run.progress
    if minutes is None or progress.total_steps is not None:
        return
    left = max(0.0, 60 * minutes - max(spent, progress.seconds))
    most = run.total_steps  # as long as it is not fixed
    # One process decides: each has a clock of its own.
    total = broadcast_object_list([min(most, progress.step + round(left / step_seconds))])
    progress.total_steps, progress.budget = total[0], budget_of(run)


def renew_length(run: "Run") -> None:
    """Give a run that goes on the length that its budget says now, at the speed that it has had so far.

    Raises ValueError if it has trained for longer already.
    """
    minutes, progress = run.config.max_train_minutes, run.progress
    if progress.budget == budget_of(run) or (minutes is None and progress.total_steps is None):
        return
    progress.total_steps, progress.budget = None, None
    if minutes is None or progress.step < TIMED_STEPS:
        return
    if progress.seconds >= 60 * minutes:
        raise ValueError(
            f"this run has trained for {progress.seconds / 60:.1f} minutes already, and max_train_minutes is "
            f"{minutes:g}: give it more, or start anew in another --output_dir"
        )
    steps = round(60 * minutes * progress.step / progress.seconds)
    progress.total_steps, progress.budget = min(run.total_steps, steps), budget_of(run)


def tell_plan(run: "Run", pace: Pace) -> None:
    """Log how fast the run is, what it will see, and when to expect pictures."""
    if not run.accelerator.is_main_process:
        return
    step, total = run.progress.step, run.total_steps
    images = total * run.global_batch_size
    logger.info(
        "%s, %.2f GiB of memory; %d steps of %d images, which is each image %.1f times; the end in %s",
        images_per_second(run.global_batch_size, pace),
        peak_memory(run.accelerator.device) / 2**30,
        total,
        run.global_batch_size,
        images / len(run.data.images),
        in_words((total - step) * pace.typical),
    )
    if (first := steps_to_grid(run)) is not None:
        logger.info("the next sample grid in %s, after step %d", in_words(first * pace.typical), step + first)


def steps_to_grid(run: "Run") -> int | None:
    """How many steps there are to the next sample grid on the way; None if there is none."""
    every, step = run.config.sample_steps, run.progress.step
    first = every - step % every if every else None
    return first if first is not None and step + first <= run.total_steps else None


def in_words(seconds: float) -> str:
    """A time from now on, without the pictures on the way: 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
