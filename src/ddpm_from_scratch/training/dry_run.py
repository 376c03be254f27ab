"""Plan of a run, from a few timed steps; nothing is written."""

import time
from datetime import timedelta

import torch

from ..runtime.devices import device_name
from ..runtime.results import versions
from .loop import advance, passes_from
from .plan import (
    TIMED_STEPS,
    Pace,
    fix_length,
    images_per_second,
    in_words,
    pace_of,
    peak_memory,
    steps_to_grid,
    synchronize,
)
from .run import Run


def dry_run(run: Run) -> None:
    """Print the configuration, the environment, and the time and memory that the run will take.

    Args:
        run: as built; its weights are changed by the timed steps.
    """
    done = run.progress.step
    if done == run.total_steps:
        return print(
            f"the run is done: {done} steps. Give it more (--max_train_steps or --max_train_minutes).", flush=True
        )
    pace = time_steps(run, min(TIMED_STEPS, run.total_steps - done))
    step_seconds = pace.typical
    run.progress.step = done
    fix_length(run, step_seconds, run.progress.seconds)
    steps_left = run.total_steps - done
    first = steps_to_grid(run)
    grids = 1 + (steps_left // run.config.sample_steps if run.config.sample_steps else 0)
    grid_seconds = seconds_per_call(run) * run.config.ddpm_num_inference_steps
    facts = {
        "training images": len(run.data.images),
        "image": " x ".join(map(str, (run.data.channels, *run.data.size))),
        **run.data.describe_labels(run.config),
        "parameters": run.trained_unet.num_parameters(),
        "optimiser steps": steps_left,
        "images per optimiser step": run.global_batch_size,
        "seconds per step": round(step_seconds, 3),
        "speed": images_per_second(run.global_batch_size, pace),
        "time for training": timedelta(seconds=round(step_seconds * steps_left)),
        **({"time to the first sample grid": in_words(first * step_seconds)} if first is not None else {}),
        "time for sample grids": timedelta(seconds=round(grid_seconds * grids)),
        "peak memory": f"{peak_memory(run.accelerator.device) / 2**30:.2f} GiB",
        "device": device_name(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "precision": run.accelerator.mixed_precision,
        **versions(),
    }
    if run.accelerator.is_main_process:
        print(run.config.to_yaml())
        print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)


def time_steps(run: Run, count: int) -> Pace:
    """Take some optimiser steps; how fast they were."""
    run.unet.train()
    passes = passes_from(run, run.progress.step)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        advance(run, passes)
        synchronize(run.accelerator.device)
        seconds.append(time.perf_counter() - start)
    return pace_of(run, seconds)


@torch.no_grad()
def seconds_per_call(run: Run) -> float:
    """The time of one call of the network on the images of a grid."""
    unet, device = run.eval_unet, run.accelerator.device
    shape = (run.config.eval_batch_size, run.data.channels, *run.data.size)
    x_t, t = torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.long, device=device)
    y = torch.zeros_like(t) if run.data.labels else None
    with run.accelerator.autocast():
        unet(x_t, t, class_labels=y)
        start = time.perf_counter()
        unet(x_t, t, class_labels=y)
        synchronize(device)
    return time.perf_counter() - start
