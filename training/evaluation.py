"""What can be said of a model in numbers: its images beside real ones, and the bound on held-out images."""

import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ddpm_from_scratch import ScratchDDPMScheduler
from ddpm_from_scratch.features import CACHE_DIR, Features, cached_features, extract
from ddpm_from_scratch.likelihood import bits_per_dim
from ddpm_from_scratch.metrics import Neighbors, measure, memorization, nearest_neighbors
from draws import derived_seed, generator
from images import Images
from models import classes, has_null_label, image_form
from report import device_name, versions
from sources import evenly

LEAST_IMAGES = 20  # that the standard error of the kernel distance needs
MOST_IMAGES, MOST_BYTES = 100_000, 2**31  # of a real set that are looked at; of more, so many evenly spaced ones
MOST_HELD_OUT = 2000  # images to which the distances of generated ones to the training set are compared
ENTRIES = 2**25  # of images in float64, 256 MiB, that are compared at once
QUANTILE = 0.05


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


class Drawn(NamedTuple):
    """Images, uint8 [N, H, W, C], and how they came about."""

    images: np.ndarray
    facts: dict[str, Any]


class Evaluated(NamedTuple):
    """What was found, and the images of the first number of steps with their nearest training images."""

    results: dict[str, Any]
    images: np.ndarray
    neighbors: Neighbors


# --- before any work -----------------------------------------------------------------------------------------------


def check_options(pipeline: DiffusionPipeline, options: Options) -> None:
    """Refuse what the model cannot do, before any work.

    Raises:
        ValueError: it has no such labels, or not so many steps or terms.
    """
    conditional = bool(classes(pipeline))
    if options.balanced_labels and not conditional:
        raise ValueError("balanced labels were asked for, but this model has no classes.")
    if conditional and not options.balanced_labels and not has_null_label(pipeline):
        raise ValueError("each label of this model is a class, and none is null: ask for balanced labels.")
    if options.balanced_labels and "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{type(pipeline).__name__} takes no class_labels.")
    config = pipeline.scheduler.config
    steps, most = max(options.num_inference_steps), config.get("num_train_timesteps")
    if "beta_schedule" in config and steps > most:
        raise ValueError(f"{steps} steps were asked for, and the chain of this model has {most}.")
    scheduler = bound_scheduler(pipeline)
    terms = options.num_terms
    if options.num_bound_images and terms and not isinstance(scheduler, str) and terms > len(scheduler):
        raise ValueError(f"{terms} terms of the bound were asked for, and there are {len(scheduler)}.")


# --- its images ----------------------------------------------------------------------------------------------------


def to_array(images: Images, size: int) -> np.ndarray:
    """uint8 [N, H, W, C], cropped at the centre."""
    squares = []
    most = min(MOST_IMAGES, MOST_BYTES // (len(images[0]) * size**2))
    for index in evenly(most, len(images)).tolist():
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

    Raises:
        ValueError: an image is not finite.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    each = math.ceil(options.num_images / options.batch_size / world_size)
    channels, size = image_form(pipeline)
    # What no batch fills stays in its place: every process has to gather as many.
    own = torch.zeros(each, options.batch_size, size, size, channels, dtype=torch.uint8)
    for turn in tqdm(range(each), desc=f"{steps} steps", unit="batch", disable=rank > 0 or not progress):
        first = (turn * world_size + rank) * options.batch_size
        if first < options.num_images:
            own[turn] = draw_batch(pipeline, steps, range(first, first + options.batch_size), options)
    gathered = accelerator.gather(own.to(accelerator.device)).cpu()  # [processes x turns, B, H, W, C]
    in_order = gathered.unflatten(0, (world_size, each)).transpose(0, 1).flatten(0, 2)
    return in_order[: options.num_images].numpy()


def draw_batch(pipeline: DiffusionPipeline, steps: int, numbers: range, options: Options) -> torch.Tensor:
    """The images of these numbers: uint8 [B, H, W, C].

    Raises:
        ValueError: one is not finite.
    """
    of = classes(pipeline) if options.balanced_labels else []
    images = np.asarray(
        pipeline(
            batch_size=len(numbers),
            generator=[generator(options.seed, "evaluation", number) for number in numbers],
            num_inference_steps=steps,
            output_type="np",
            **({"class_labels": [of[number % len(of)] for number in numbers]} if of else {}),
        ).images
    )
    if not np.isfinite(images).all():
        raise ValueError(f"the model gives images that are not finite, in {steps} steps.")
    return torch.from_numpy((images * 255).round().astype(np.uint8))


def describe_chain(pipeline: DiffusionPipeline, steps: int, options: Options) -> dict[str, Any]:
    """How `generate` draws."""
    return {
        "num_inference_steps": steps,
        "scheduler": type(pipeline.scheduler).__name__,
        **({"labels": "balanced" if options.balanced_labels else "null"} if classes(pipeline) else {}),
        "seed": options.seed,
    }


# --- its images beside real ones -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What generated images are measured against, the same for every number of steps."""

    features: Features  # of as many training images
    others: Features  # of as many other real images, for the floor
    floor_of: str
    num_training: int
    usual_distances: np.ndarray | None  # of held-out images to these training images


def gives_floor(real: RealImages, count: int) -> bool:
    """Whether there are as many held-out images as generated ones."""
    return real.held_out is not None and len(real.held_out) >= count


def check_enough(real: RealImages, count: int) -> None:
    """Refuse more generated images than there are real ones for.

    Raises:
        ValueError: there are too few training images.
    """
    there, shares = len(real.training), 1 if gives_floor(real, count) else 2
    if shares * count > there:
        floor = "" if shares == 1 else ", and as many others, or held-out ones, for the floor"
        raise ValueError(
            f"{count} images need as many training images as reference{floor}; there are {there} training images: take "
            f"at most {there // shares} images."
        )


def prepare_reference(real: RealImages, options: Options, device: torch.device) -> Reference:
    """As many training images as are generated, drawn without replacement, and the others for the floor.

    These are held-out images, or other training images where there are too few of them.

    Raises:
        ValueError: half of the held-out images are in the training set, or there are too few images.
    """
    count = options.num_images
    check_enough(real, count)
    order = np.random.default_rng(derived_seed(options.seed, "reference")).permutation(len(real.training))
    others, floor_of = real.training[order[count : 2 * count]], "other training images"
    usual = None
    if real.held_out is not None:
        if gives_floor(real, count):
            others, floor_of = real.held_out[evenly(count, len(real.held_out))], "held-out images"
        usual = nearest(real.held_out[evenly(MOST_HELD_OUT, len(real.held_out))], real.training).distance
        if np.median(usual) == 0:
            raise ValueError("half of the held-out images are in the training set: name others.")
    features = [
        cached_features(
            images, options.extractor, size=options.size, cache_dir=options.cache_dir, device=device, progress=True
        )
        for images in (real.training[order[:count]], others)
    ]
    return Reference(features[0], features[1], floor_of, len(real.training), usual)


def measure_samples(
    images: np.ndarray, near: Neighbors, reference: Reference, options: Options, device: torch.device
) -> dict[str, Any]:
    """Distances of generated images to real ones, each with its floor, and how near they come to training images."""
    features = extract(images, options.extractor, size=options.size, device=device, progress=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = measure(features, reference.features, reference.others)
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    found["floor_of"] = reference.floor_of
    found["warnings"] = [str(warning.message) for warning in caught]
    if reference.usual_distances is not None:
        # The distances are known: as features of one column, they are those to a training set of the origin alone.
        columns = near.distance[:, None], np.zeros((1, 1)), reference.usual_distances[:, None]
        share = memorization(*columns, quantile=QUANTILE)._asdict()
        found["memorization"] = {"space": "pixels", "num_training": reference.num_training, **share}
    return found


def nearest(images: np.ndarray, training: np.ndarray) -> Neighbors:
    """The nearest training image of every image, in pixels 0..1. Parts of both sets at a time, to spare memory."""
    rows = max(1, ENTRIES // training[0].size)
    distance, row = np.full(len(images), np.inf), np.zeros(len(images), np.int64)
    for first in range(0, len(images), rows):
        part = slice(first, first + rows)
        for start in range(0, len(training), rows):
            found = nearest_neighbors(flat(images[part]), flat(training[start : start + rows]))
            nearer = found.distance < distance[part]
            distance[part] = np.where(nearer, found.distance, distance[part])
            row[part] = np.where(nearer, start + found.row, row[part])
    return Neighbors(distance, row)


def flat(images: np.ndarray) -> np.ndarray:
    """[N, H W C] in 0..1."""
    return images.reshape(len(images), -1) / 255


# --- the bound -----------------------------------------------------------------------------------------------------


def bound_scheduler(pipeline: DiffusionPipeline) -> ScratchDDPMScheduler | str:
    """The scheduler whose bound is meant; or why the model has none."""
    scheduler = pipeline.scheduler
    if "beta_schedule" not in scheduler.config:
        return f"{type(scheduler).__name__} is not on a discrete chain of betas"
    if classes(pipeline) and not has_null_label(pipeline):
        return "each label of the network is a class, and none is null, whose bound is measured"
    if not isinstance(scheduler, ScratchDDPMScheduler):
        try:
            scheduler = ScratchDDPMScheduler.from_config(scheduler.config)
        except ValueError as error:  # of a kind that only other schedulers know
            return str(error)
    return "the bound is infinite at eta=0" if scheduler.config["eta"] == 0 else scheduler


def measure_bound(
    pipeline: DiffusionPipeline, real: RealImages, options: Options, accelerator: Accelerator
) -> dict[str, Any]:
    """Every term of the bound on held-out images, as plain numbers; or why it is left out."""
    scheduler = bound_scheduler(pipeline)
    if isinstance(scheduler, str):
        return {"left_out": scheduler}
    if real.held_out is None:
        return {"left_out": "there are no held-out images: name them with --test_set or --test_split"}
    images = real.held_out[evenly(options.num_bound_images, len(real.held_out))]
    bits = bits_per_dim(
        pipeline.unet,
        scheduler,
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        num_terms=options.num_terms,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=accelerator.is_main_process,
        accelerator=accelerator,
    )
    mean, error = bits.mean(), bits.standard_error()
    return {
        "num_images": len(images),
        "num_terms": options.num_terms or len(scheduler),
        "variance_type": "optimal" if scheduler.config["optimal_variance"] else scheduler.variance_type,
        "clip_sample": scheduler.config["clip_sample"],
        **({"labels": "null"} if classes(pipeline) else {}),
        "seed": options.seed,
        "bits_per_dim": finite(mean.total),
        "error": finite(error.total),
        "prior": finite(mean.prior),
        "timesteps": bits.timesteps.tolist(),
        "terms": [finite(term) for term in mean.terms],
        "terms_error": [finite(term) for term in error.terms],
    }


def finite(value: torch.Tensor) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(value) if value.isfinite() else None


# --- the whole -----------------------------------------------------------------------------------------------------


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long it took."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def evaluate(
    pipeline: DiffusionPipeline,
    real: RealImages,
    options: Options,
    accelerator: Accelerator,
    draw: Callable[[int], Drawn],
) -> Evaluated | None:
    """Measure a model; the same on any number of processes.

    Args:
        pipeline: on the accelerator's device.
        real: images to compare with.
        options: what to measure.
        accelerator: shares the work out.
        draw: gives the images for a number of steps.

    Returns:
        On the main process, plain numbers for a file of results and what pictures are made of; None on others.

    Raises:
        ValueError: there are too few real images, or half of the held-out ones are training images.
    """
    seconds: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    first: tuple[np.ndarray, Neighbors] | None = None
    device = accelerator.device
    if accelerator.is_main_process:  # before images are drawn: what is missing for it is told now
        with timed(seconds, "reference"):
            reference = prepare_reference(real, options, device)
    accelerator.wait_for_everyone()
    for steps in options.num_inference_steps:
        with timed(seconds, f"{options.num_images} images, {steps} steps"):
            images, facts = draw(steps)
        with timed(seconds, f"measures, {steps} steps"):
            if accelerator.is_main_process:
                near = nearest(images, real.training)
                samples.append({**facts, **measure_samples(images, near, reference, options, device)})
                first = first or (images, near)
            accelerator.wait_for_everyone()
    bound = {}
    if options.num_bound_images:
        with timed(seconds, "bound"):
            bound["bound"] = measure_bound(pipeline, real, options, accelerator)
    if first is None:
        return None
    environment = {
        "pipeline": type(pipeline).__name__,
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": device_name(device),
        "num_processes": accelerator.num_processes,
        "batch_size": options.batch_size,
        "images": real.facts,
        "versions": versions(),
    }
    return Evaluated({**environment, "samples": samples, "seconds": seconds, **bound}, *first)
