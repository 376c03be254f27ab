"""Figures of evaluations and training runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from PIL import Image

from ..sampling.previews import image_grid, to_pil
from .metrics import Neighbors

GRID = 64  # images in samples.png
PAIRS = 16  # of a generated image and its nearest training image in neighbors.png


def save_samples(images: np.ndarray, path: Path) -> None:
    """Save a grid of the first images."""
    image_grid(to_pil(images[:GRID])).save(path)


def neighbors_picture(images: np.ndarray, training: np.ndarray, near: Neighbors, path: Path) -> None:
    """Save the generated images nearest to a training image, each above that image, the nearest first."""
    order = np.argsort(near.distance, kind="stable")[:PAIRS]
    rows = [np.concatenate(list(of), axis=1) for of in (images[order], training[near.row[order]])]
    strip = to_pil(np.concatenate(rows, axis=0)[None])[0]
    scale = max(1, 56 // images.shape[1])
    strip.resize((scale * strip.width, scale * strip.height), Image.Resampling.NEAREST).save(path)


def plot_bound(bound: dict[str, Any], path: Path) -> None:
    """Plot the terms of the bound over t."""
    known = [(t, term) for t, term in zip(bound["timesteps"], bound["terms"], strict=True) if term is not None]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*known, strict=True), color="tab:blue", marker="." if len(known) < 100 else "", linewidth=1)
    axes.set(xlabel="t, counted from 0", ylabel="bits per dimension", yscale="log")
    total, error = ("∞" if bound["bits_per_dim"] is None else f"{bound['bits_per_dim']:.3f}"), bound["error"]
    total += "" if error is None else f" ± {error:.3f}"
    axes.set_title(f"The bound: {total} bits per dimension, {bound['num_images']} images", fontsize=10)
    figure.savefig(path, dpi=120)


LOSS_LABELS = {
    "simple": r"$L_\mathrm{simple}$",
    "vlb": r"$L_\mathrm{vlb}$, bits per dimension",
    "hybrid": r"$L_\mathrm{hybrid}$",
    "consistency": r"$L_\mathrm{consistency}$",
}


def smoothed(values: Sequence[float], horizon: int) -> list[float]:
    """The exponential moving average with a horizon in entries, corrected for its start at 0."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average += (value - average) / horizon
        weight += (1 - weight) / horizon
        result.append(average / weight)
    return result


def plot_losses(losses: Sequence[tuple[int, float]], label: str, path: Path) -> None:
    """Plot the loss over optimiser steps, as logged and smoothed; `label` names its axis."""
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")  # draws without a display
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.3, label="logged")
    axes.plot(steps, smoothed(values, max(1, len(values) // 20)), color="tab:blue", label="smoothed")
    axes.set(xlabel="optimiser step", ylabel=label, yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
