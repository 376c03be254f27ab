"""What can be said of a model in numbers: its images beside real ones, and the bound on held-out images."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from data import Images
from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.features import CACHE_DIR, cached_features, extract
from ddpm_from_scratch.likelihood import BitsPerDim, bits_per_dim
from ddpm_from_scratch.metrics import measure, memorization, nearest_neighbors
from draws import derived_seed, generator
from report import device_name, image_grid, versions

LEAST_IMAGES = 20  # that the standard error of the kernel distance needs
MOST_TRAINING = 100_000  # images that are looked at; of more, so many evenly spaced ones
MOST_HELD_OUT = 2000  # images to which the distances of generated ones to the training set are compared
QUANTILE = 0.05
GRID = 64  # images in samples.png
PAIRS = 16  # of a generated image and its nearest training image in neighbors.png
OWN_PIPELINES = ("DDPMPipeline", "ScratchDDPMPipeline")  # those that our class loads


@dataclass(frozen=True)
class RealImages:
    """Real images to compare with: uint8 [N, H, W, C]."""

    training: np.ndarray
    held_out: np.ndarray | None  # None: nobody named any
    facts: dict[str, Any]  # where they are from


@dataclass(frozen=True)
class Options:
    """What is measured, and how."""

    num_images: int = 1000
    num_inference_steps: Sequence[int] = (50,)
    balanced_labels: bool = False  # classes in turn instead of the null label
    extractor: str = "efficientnet-lite0"
    size: int | None = None
    num_bound_images: int = 64
    num_terms: int | None = None
    batch_size: int = 64
    seed: int = 0
    cache_dir: Path | None = CACHE_DIR


# --- parts ---------------------------------------------------------------------------------------------------------


def load_pipeline(
    name: str, *, dtype: torch.dtype, stock: bool = False, revision: str | None = None, trust_remote_code: bool = False
) -> DiffusionPipeline:
    """A pipeline that draws images from noise alone: ours for DDPM models, or the one that the model names.

    Args:
        name: a folder or Hub name.
        dtype: of its parts.
        stock: take the one that the model names for DDPM models too.
        revision: of the repository.
        trust_remote_code: run code of the repository, if it names a pipeline of its own; ours never does.

    Raises:
        ValueError: it takes a prompt, or gives no pixels.
    """
    named = DiffusionPipeline.load_config(name, revision=revision)["_class_name"]
    named = named[-1] if isinstance(named, list) else named
    options = {"dtype": dtype, "revision": revision}
    if named in OWN_PIPELINES and not stock:
        return ScratchDDPMPipeline.from_pretrained(name, **options)
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    if not hasattr(pipeline, "unet") or hasattr(pipeline, "vae") or hasattr(pipeline, "vqvae"):
        raise ValueError(f"{name} is a {named}: only pipelines with a `unet` on pixels can be evaluated.")
    return pipeline


def image_form(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Channels and side of a pipeline's images.

    Raises:
        ValueError: they are not square, or of unknown size.
    """
    channels, size = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"sample_size={size!r} of the network must be one number: images are square here.")
    return channels, size


def to_array(images: Images, size: int) -> np.ndarray:
    """uint8 [N, H, W, C], cropped at the centre."""
    squares = []
    for index in np.linspace(0, len(images) - 1, min(len(images), MOST_TRAINING)).round().astype(int).tolist():
        image = images[index]
        top, left = ((side - size) // 2 for side in image.shape[1:])
        squares.append(image[:, top : top + size, left : left + size])
    return torch.stack(squares).permute(0, 2, 3, 1).numpy()


def generate(
    pipeline: DiffusionPipeline, steps: int, options: Options, accelerator: Accelerator, progress: bool = True
) -> np.ndarray:
    """Images that a pipeline draws: uint8 [N, H, W, C], on every process.

    Image i is drawn from a seed of its own. Batches are always whole and dealt out to the processes as they are, so
    that neither their number nor N changes an image.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    batches = math.ceil(options.num_images / options.batch_size)
    each = math.ceil(batches / world_size)
    own = []
    for turn in tqdm(range(each), desc=f"{steps} steps", unit="batch", disable=rank > 0 or not progress):
        first = (turn * world_size + rank) * options.batch_size
        if first < options.num_images:
            numbers = range(first, first + options.batch_size)
            images = pipeline(
                batch_size=options.batch_size,
                generator=[generator(options.seed, "evaluation", number) for number in numbers],
                num_inference_steps=steps,
                output_type="np",
                **class_labels(pipeline, numbers, options.balanced_labels),
            ).images
            own.append(torch.from_numpy((np.asarray(images) * 255).round().astype(np.uint8)))
        else:  # a batch that nobody needs keeps the processes in step
            own.append(torch.zeros_like(own[0]))
    gathered = accelerator.gather(torch.stack(own).to(accelerator.device)).cpu()  # [processes x turns, B, H, W, C]
    in_order = gathered.unflatten(0, (world_size, each)).transpose(0, 1).flatten(0, 2)
    return in_order[: options.num_images].numpy()


def class_labels(pipeline: DiffusionPipeline, numbers: Sequence[int], balanced: bool) -> dict[str, list[int]]:
    """The classes in turn, if asked for.

    Raises:
        ValueError: the model has no classes.
    """
    if not balanced:
        return {}
    if not has_classes(pipeline):
        raise ValueError("balanced labels were asked for, but this model has no named classes (id2label).")
    return {"class_labels": [number % len(pipeline.config.id2label) for number in numbers]}


def has_classes(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline draws images of named classes."""
    return bool(pipeline.config.get("id2label"))


def measure_samples(images: np.ndarray, real: RealImages, options: Options) -> dict[str, Any]:
    """Distances of generated images to real ones, each with its floor, and how near they come to training images.

    The reference is as many training images, drawn without replacement; the floor is that of held-out images, or of
    other training images where there are too few of these.
    """
    order = np.random.default_rng(derived_seed(options.seed, "reference")).permutation(len(real.training))
    count = len(images)
    reference, rest = real.training[order[:count]], real.training[order[count : 2 * count]]
    enough = real.held_out is not None and len(real.held_out) >= count
    others = real.held_out[:count] if enough and real.held_out is not None else rest
    kept = partial(cached_features, cache_dir=options.cache_dir)
    chosen: dict[str, Any] = {"extractor": options.extractor, "size": options.size}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = measure(extract(images, **chosen), kept(reference, **chosen), kept(others, **chosen))
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    found["floor_of"] = "held-out images" if enough else "other training images"
    found["warnings"] = [str(warning.message) for warning in caught if warning.category is UserWarning]
    if real.held_out is not None:
        flat = [of.reshape(len(of), -1) / 255 for of in (images, real.training, real.held_out[:MOST_HELD_OUT])]
        near = memorization(*flat, quantile=QUANTILE)
        found["memorization"] = {"space": "pixels", "num_training": len(real.training), **near._asdict()}
    return found


def bound_scheduler(pipeline: DiffusionPipeline) -> ScratchDDPMScheduler | str:
    """The scheduler whose bound is meant; or why the model has none."""
    scheduler = pipeline.scheduler
    if isinstance(scheduler, ScratchDDPMScheduler):
        return scheduler
    name = type(scheduler).__name__
    if "beta_schedule" not in scheduler.config:
        return f"{name} is not on a discrete chain of betas"
    return ScratchDDPMScheduler.from_config(scheduler.config)


def measure_bound(
    pipeline: DiffusionPipeline,
    scheduler: ScratchDDPMScheduler,
    images: np.ndarray,
    options: Options,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], BitsPerDim]:
    """Every term of the bound on the first held-out images, as plain numbers and as it is."""
    x_0 = torch.from_numpy(images[: options.num_bound_images]).permute(0, 3, 1, 2).contiguous()
    bits = bits_per_dim(
        pipeline.unet,
        scheduler,
        x_0,
        num_terms=options.num_terms,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=accelerator.is_main_process,
        accelerator=accelerator,
    )
    mean, error = bits.mean(), bits.standard_error()
    found = {
        "num_images": len(x_0),
        "num_terms": options.num_terms or len(scheduler),
        "variance_type": "optimal" if scheduler.config["optimal_variance"] else scheduler.variance_type,
        "clip_sample": scheduler.config["clip_sample"],
        "bits_per_dim": finite(mean.total),
        "error": finite(error.total),
        "prior": finite(mean.prior),
        "timesteps": bits.timesteps.tolist(),
        "terms": [finite(term) for term in mean.terms],
        "terms_error": [finite(term) for term in error.terms],
    }
    return found, bits


def finite(value: torch.Tensor) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(value) if value.isfinite() else None


# --- the whole -----------------------------------------------------------------------------------------------------


def evaluate(
    pipeline: DiffusionPipeline,
    real: RealImages,
    options: Options,
    accelerator: Accelerator,
    draw: Callable[[int], np.ndarray],
) -> tuple[dict[str, Any], np.ndarray]:
    """Measure a model; the same on any number of processes.

    Args:
        pipeline: on the accelerator's device.
        real: images to compare with.
        options: what to measure.
        accelerator: shares the work out.
        draw: gives the images for a number of steps, such as `generate` does.

    Returns:
        Plain numbers for a file of results, on the main process; and the images of the first number of steps.
    """
    found: dict[str, Any] = {"samples": [], "seconds": {}}
    drawn = []
    for steps in options.num_inference_steps:
        start = time.perf_counter()
        images = draw(steps)
        found["seconds"][f"{options.num_images} images, {steps} steps"] = time.perf_counter() - start
        drawn.append(images)
        start = time.perf_counter()
        if accelerator.is_main_process:
            chain = {
                "num_inference_steps": steps,
                "scheduler": type(pipeline.scheduler).__name__,
                **({"labels": "balanced" if options.balanced_labels else "null"} if has_classes(pipeline) else {}),
                "seed": options.seed,
            }
            found["samples"].append({**chain, **measure_samples(images, real, options)})
        accelerator.wait_for_everyone()
        found["seconds"][f"measures, {steps} steps"] = time.perf_counter() - start
    if options.num_bound_images:
        start = time.perf_counter()
        found["bound"] = bound_or_reason(pipeline, real, options, accelerator)
        found["seconds"]["bound"] = time.perf_counter() - start
    environment = {
        "pipeline": type(pipeline).__name__,
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "batch_size": options.batch_size,
        "images": real.facts,
        "versions": versions(),
    }
    return {**environment, **found}, drawn[0]


def bound_or_reason(
    pipeline: DiffusionPipeline, real: RealImages, options: Options, accelerator: Accelerator
) -> dict[str, Any]:
    """The bound, or why it is left out."""
    scheduler = bound_scheduler(pipeline)
    if isinstance(scheduler, str):
        return {"left_out": scheduler}
    if real.held_out is None:
        return {"left_out": "there are no held-out images: name them with --test_set or --test_split"}
    return measure_bound(pipeline, scheduler, real.held_out, options, accelerator)[0]


# --- figures -------------------------------------------------------------------------------------------------------


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """uint8 [N, H, W, C] as pictures."""
    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]


def draw_samples(images: np.ndarray, path: Path) -> None:
    """The first images, in rows."""
    image_grid(to_pil(images[:GRID])).save(path)


def draw_neighbors(images: np.ndarray, training: np.ndarray, path: Path) -> None:
    """The generated images that come nearest to a training image, in pixels, each above that one; nearest first."""
    near = nearest_neighbors(images.reshape(len(images), -1) / 255, training.reshape(len(training), -1) / 255)
    nearest = np.argsort(near.distance, kind="stable")[:PAIRS]
    rows = [np.concatenate(of, axis=1) for of in (images[nearest], training[near.row[nearest]])]
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
    axes.set_title(
        f"The bound: {bound['bits_per_dim']:.3f} ± {bound['error'] or 0:.3f} bits per dimension, "
        f"{bound['num_images']} images",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
