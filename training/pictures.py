"""The figures of an evaluation."""

from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from PIL import Image

from ddpm_from_scratch.metrics import Neighbors
from report import image_grid

GRID = 64  # images in samples.png
PAIRS = 16  # of a generated image and its nearest training image in neighbors.png


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 [N, H, W, C] as pictures."""
    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]


def draw_samples(images: np.ndarray, path: Path) -> None:
    """The first images, in rows."""
    image_grid(to_pil(images[:GRID])).save(path)


def draw_neighbors(images: np.ndarray, training: np.ndarray, near: Neighbors, path: Path) -> None:
    """The generated images that come nearest to a training image, each above that one; nearest first."""
    order = np.argsort(near.distance, kind="stable")[:PAIRS]
    rows = [np.concatenate(list(of), axis=1) for of in (images[order], training[near.row[order]])]
    strip = to_pil(np.concatenate(rows, axis=0)[None])[0]
    scale = max(1, 56 // images.shape[1])
    strip.resize((scale * strip.width, scale * strip.height), Image.Resampling.NEAREST).save(path)


def draw_bound(bound: dict[str, Any], path: Path) -> None:
    """The terms of the bound over t."""
    known = [(t, term) for t, term in zip(bound["timesteps"], bound["terms"], strict=True) if term is not None]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*known, strict=True), color="tab:blue", marker="." if len(known) < 100 else "", linewidth=1)
    axes.set(xlabel="t, counted from 0", ylabel="bits per dimension", yscale="log")
    total, error = ("∞" if bound["bits_per_dim"] is None else f"{bound['bits_per_dim']:.3f}"), bound["error"]
    total += "" if error is None else f" ± {error:.3f}"
    axes.set_title(f"The bound: {total} bits per dimension, {bound['num_images']} images", fontsize=10)
    figure.savefig(path, dpi=120)
