"""What a run shows: sample grids, the loss curve, results and the environment."""

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from PIL import Image

from config import TrainingConfig
from ddpm_from_scratch import ScratchDDPMScheduler

SAMPLERS: dict[str, Callable[[ScratchDDPMScheduler], SchedulerMixin]] = {
    "ddpm": lambda scheduler: scheduler,
    # Trailing spacing starts at t = T - 1, where x_t is noise; leading spacing starts too low.
    "ddim": lambda scheduler: DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing"),
    "dpmsolver++": lambda scheduler: DPMSolverMultistepScheduler.from_config(
        scheduler.config, timestep_spacing="trailing"
    ),
}
PACKAGES = ("ddpm-from-scratch", "torch", "diffusers", "accelerate", "datasets", "numpy", "pillow")
LOSS_LABELS = {
    "simple": r"$L_\mathrm{simple}$",
    "vlb": r"$L_\mathrm{vlb}$, bits per dimension",
    "hybrid": r"$L_\mathrm{hybrid}$",
}
TINY = 64  # pixels; smaller images are enlarged so that a grid can be looked at
FINAL_PART = 0.1  # of the run, over which the final loss is averaged


def image_grid(images: Sequence[Image.Image]) -> Image.Image:
    """The images in rows, as near to a square as their number allows."""
    width, height = images[0].size
    columns = math.ceil(math.sqrt(len(images)))
    grid = Image.new(images[0].mode, (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST) if width < TINY else grid


def smoothed(values: Sequence[float], horizon: int) -> list[float]:
    """Exponential moving average with a horizon in entries, without the pull towards 0 at the start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average += (value - average) / horizon
        weight += (1 - weight) / horizon
        result.append(average / weight)
    return result


def plot_losses(losses: Sequence[tuple[int, float]], label: str, path: Path) -> None:
    """The loss, called `label`, over optimiser steps, as logged and smoothed."""
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")  # draws without a display
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, label="logged")
    axes.plot(steps, smoothed(values, max(1, len(values) // 20)), color="tab:blue", label="smoothed")
    axes.set(xlabel="optimiser step", ylabel=label, yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def final_loss(losses: Sequence[tuple[int, float]]) -> float:
    """Mean of the logged losses of the last tenth of the run."""
    first = (1 - FINAL_PART) * losses[-1][0]
    return float(np.mean([loss for step, loss in losses if step > first]))


def version(package: str) -> str:
    """Of an installed package; the project itself may also run from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def device_name(device: torch.device) -> str:
    """What computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_json(values: dict[str, Any], path: Path) -> None:
    """Readable, with a final newline."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """What is in a results file; nothing if there is none.

    Raises:
        ValueError: it is not such a file.
    """
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): mend it or move it away.") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} does not hold results by name: move it away.")
    return results


def merge_results(path: Path, name: str, content: dict[str, Any]) -> None:
    """Put something into a results file, which is whole at any time, beside what else is in it."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        write_json({**read_results(path), name: content}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def config_with_header(config: TrainingConfig) -> str:
    """The configuration as a preset, with the versions it ran on as a comment."""
    header = ", ".join(f"{package} {version}" for package, version in versions().items())
    return f"# {header}\n{config.to_yaml()}"
