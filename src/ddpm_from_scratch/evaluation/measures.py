"""Sample quality against real images, and bits per dimension on held-out images."""

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..data.arrays import to_8_bits
from ..data.images import Images
from ..data.sizes import Size, center_crop
from ..data.sources import evenly
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import JUMPS, jumps
from ..runtime.devices import device_name
from ..runtime.random_streams import derived_seed
from ..runtime.results import versions
from ..sampling.generate import Samples, SampleSpec
from ..sampling.models import class_names, classes, has_null_label
from .classifier import accuracy, accuracy_by_class, classify, train_classifier
from .features import CACHE_DIR, Features, cached_features, extract
from .likelihood import bits_per_dim
from .metrics import Neighbors, measure, memorization, nearest_neighbors

MOST_IMAGES, MOST_BYTES = 100_000, 2**31  # of a real set that are looked at; of more, so many evenly spaced ones
MOST_HELD_OUT = 2000  # images to which the distances of generated ones to the training set are compared
ENTRIES = 2**25  # of images in float64, 256 MiB, that are compared at once
QUANTILE = 0.05
NO_LEVELS = "the images are not 8-bit, and bits per dimension are those of 8-bit levels"


@dataclass(frozen=True)
class RealImages:
    """Real images to compare with: uint8 [N, H, W, C], and their classes [N] where a classifier needs them.

    Deep images are rounded to 8 bits here, as generated ones are, but have no bits per dimension.
    """

    training: np.ndarray
    held_out: np.ndarray | None  # None: nobody named any
    facts: dict[str, Any]  # where they are from
    labels: np.ndarray | None = None  # of the training images
    held_out_labels: np.ndarray | None = None
    deep: bool = False  # whether the files hold other values than 8-bit levels


@dataclass(frozen=True)
class Options:
    """What to measure, and how."""

    sample_specs: Sequence[SampleSpec]
    class_samples: SampleSpec | None = None  # whose images a classifier judges
    extractor: str = "efficientnet-lite0"
    sizes: Sequence[int | None] = (None,)  # None: as the extractor has it
    num_bound_images: int = 64
    num_terms: int | None = None
    batch_size: int = 64
    seed: int = 0
    cache_dir: Path | None = CACHE_DIR


class Evaluated(NamedTuple):
    """The results, and the images of the first number of steps with their nearest training images."""

    results: dict[str, Any]
    images: np.ndarray
    neighbors: Neighbors


# --- before any work -----------------------------------------------------------------------------------------------


def all_specs(options: Options) -> list[SampleSpec]:
    """All images to draw: those to compare, and those of the classes."""
    return [*options.sample_specs, *([options.class_samples] if options.class_samples else [])]


def check_options(pipeline: DiffusionPipeline, options: Options) -> None:
    """Check that the model can do what the options ask for, before any work.

    Raises ValueError if it has no such labels, or not so many steps or terms.
    """
    sample_specs = all_specs(options)
    conditional, balanced = bool(classes(pipeline)), any(spec.balanced_labels for spec in sample_specs)
    if balanced and not conditional:
        raise ValueError("images of the classes were asked for, but this model has no classes.")
    if conditional and not has_null_label(pipeline) and not all(spec.balanced_labels for spec in sample_specs):
        raise ValueError("each label of this model is a class, and none is null: ask for balanced labels.")
    if balanced and "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"{type(pipeline).__name__} takes no class_labels.")
    config = pipeline.scheduler.config
    steps = max(spec.num_inference_steps for spec in sample_specs)
    most = config.get("num_train_timesteps")
    if "beta_schedule" in config and steps > most:
        raise ValueError(f"{steps} steps were asked for, and the chain of this model has {most}.")
    scheduler = bound_scheduler(pipeline)
    terms = options.num_terms
    if options.num_bound_images and terms and not isinstance(scheduler, str) and terms > len(scheduler):
        raise ValueError(f"{terms} terms of the bound were asked for, and there are {len(scheduler)}.")


# --- real images ---------------------------------------------------------------------------------------------------


def taken(images: Images, size: Size) -> list[int]:
    """Which images are looked at: all, or so many evenly spaced ones."""
    most = min(MOST_IMAGES, MOST_BYTES // (len(images[0]) * size[0] * size[1]))
    return evenly(most, len(images)).tolist()


def to_array(images: Images, size: Size) -> np.ndarray:
    """The images of `taken`, cropped at the centre: uint8 [N, H, W, C]; deep ones are rounded to 8 bits."""
    cropped = [to_8_bits(center_crop(images[index], size)) for index in taken(images, size)]
    return torch.stack(cropped).permute(0, 2, 3, 1).numpy()


# --- its images beside real ones -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Real images to compare a number of generated ones with, in features of one size."""

    features: Features  # of as many training images
    others: Features  # of as many other real images, for the floor
    floor_of: str
    floor: dict[str, float] = field(default_factory=dict)  # once it is known


def gives_floor(real: RealImages, count: int) -> bool:
    """Whether there are as many held-out images as generated ones."""
    return real.held_out is not None and len(real.held_out) >= count


def check_enough(real: RealImages, count: int) -> None:
    """Refuse more generated images than there are real ones for; ValueError if there are too few training images."""
    there, shares = len(real.training), 1 if gives_floor(real, count) else 2
    if shares * count > there:
        floor = "" if shares == 1 else ", and as many others, or held-out ones, for the floor"
        raise ValueError(
            f"{count} images need as many training images as reference{floor}; there are {there} training images: take "
            f"at most {there // shares} images."
        )


def prepare_reference(
    real: RealImages, count: int, size: int | None, options: Options, device: torch.device
) -> Reference:
    """Draw `count` training images without replacement, and other real images for the floor.

    The others are held-out images, or other training images where there are too few held-out ones.

    Raises ValueError if there are too few images.
    """
    check_enough(real, count)
    order = np.random.default_rng(derived_seed(options.seed, "reference")).permutation(len(real.training))
    others, floor_of = real.training[order[count : 2 * count]], "other training images"
    if real.held_out is not None and gives_floor(real, count):
        others, floor_of = real.held_out[evenly(count, len(real.held_out))], "held-out images"
    features = [
        cached_features(images, options.extractor, size=size, cache_dir=options.cache_dir, device=device, progress=True)
        for images in (real.training[order[:count]], others)
    ]
    return Reference(features[0], features[1], floor_of)


def compare(
    images: np.ndarray, reference: Reference, size: int | None, options: Options, device: torch.device
) -> dict[str, Any]:
    """Distances of generated images to real ones, each with its floor."""
    features = extract(images, options.extractor, size=size, device=device, progress=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = measure(features, reference.features, reference.others, floor=reference.floor or None)
    for warning in caught:
        warnings.warn(warning.message, stacklevel=2)
    reference.floor.update(found["floor"])
    return {**found, "floor_of": reference.floor_of, "warnings": [str(warning.message) for warning in caught]}


# --- copies of training images -------------------------------------------------------------------------------------


def usual_distances(real: RealImages) -> np.ndarray | None:
    """Distances of held-out images to the training images; None without any.

    Raises ValueError if half of the held-out images are in the training set.
    """
    if real.held_out is None:
        return None
    usual = nearest(real.held_out[evenly(MOST_HELD_OUT, len(real.held_out))], real.training).distance
    if np.median(usual) == 0:
        raise ValueError("half of the held-out images are in the training set: name others.")
    return usual


def describe_copies(near: Neighbors, usual: np.ndarray | None, num_training: int) -> dict[str, Any]:
    """Describe how many generated images are nearer to training images than held-out images are."""
    if usual is None:
        return {}
    # The distances are known: as features of one column, they are those to a training set of the origin alone.
    columns = near.distance[:, None], np.zeros((1, 1)), usual[:, None]
    share = memorization(*columns, quantile=QUANTILE)._asdict()
    return {"memorization": {"space": "pixels", "num_training": num_training, **share}}


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
    """Flatten images to [N, H W C] in 0..1."""
    return images.reshape(len(images), -1) / 255


# --- classes -------------------------------------------------------------------------------------------------------


def judge_classes(drawn: Samples, pipeline: DiffusionPipeline, real: RealImages) -> dict[str, Any]:
    """Train a classifier on the training images, and measure how often it finds the class that an image was drawn for.

    Its accuracy on held-out images, if there are any, says how far it can be trusted.
    """
    assert real.labels is not None  # since it was asked for
    network = train_classifier(real.training, real.labels)
    names = class_names(pipeline)  # those of the training images too, which count them from 0
    wanted = np.arange(len(drawn.images)) % len(names)  # in turn, as they were drawn
    judge: dict[str, Any] = {"num_training": len(real.training)}
    if real.held_out is not None and real.held_out_labels is not None:
        judge |= {
            "num_held_out": len(real.held_out),
            **accuracy(classify(network, real.held_out), real.held_out_labels),
        }
    found = accuracy_by_class(classify(network, drawn.images), wanted, names)
    return {**drawn.facts, "num_generated": len(drawn.images), **found, "classifier": judge}


# --- the bound -----------------------------------------------------------------------------------------------------


def bound_scheduler(pipeline: DiffusionPipeline) -> ScratchDDPMScheduler | str:
    """The scheduler for the bound, or the reason why the model has no bound."""
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
    if jumps(scheduler.config):
        return f"{JUMPS}, which the bound needs"
    return "the bound is infinite at eta=0" if scheduler.config["eta"] == 0 else scheduler


def measure_bound(
    pipeline: DiffusionPipeline, real: RealImages, options: Options, accelerator: Accelerator
) -> dict[str, Any]:
    """Every term of the bound on held-out images, as plain numbers; or why it is left out."""
    scheduler = bound_scheduler(pipeline)
    if isinstance(scheduler, str):
        return {"left_out": scheduler}
    if real.deep:
        return {"left_out": NO_LEVELS}
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
    """Convert to float, or to None if not finite, since JSON has no NaN."""
    return float(value) if value.isfinite() else None


# --- the whole -----------------------------------------------------------------------------------------------------


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds that the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


class Known(NamedTuple):
    """Distances and features of real images, computed before images are drawn."""

    usual: np.ndarray | None  # see `usual_distances`
    references: dict[tuple[int, int | None], Reference]  # by the number of images and the size of features


def prepare_known(real: RealImages, options: Options, device: torch.device) -> Known:
    """Compute `Known` for all numbers of images and sizes; ValueError if there are too few real images."""
    counts = sorted({spec.num_images for spec in options.sample_specs})
    return Known(
        usual_distances(real),
        {
            (count, size): prepare_reference(real, count, size, options, device)
            for count in counts
            for size in options.sizes
        },
    )


def compare_all(
    real: RealImages,
    known: Known | None,
    options: Options,
    accelerator: Accelerator,
    draw: Callable[[SampleSpec], Samples],
    seconds: dict[str, float],
) -> tuple[list[dict[str, Any]], tuple[np.ndarray, Neighbors] | None]:
    """Draw images, and compare them where real ones are known.

    Returns:
        Their figures, and the first images with their nearest training images; nothing on other processes.
    """
    rows: list[dict[str, Any]] = []
    first: tuple[np.ndarray, Neighbors] | None = None
    for spec in options.sample_specs:
        steps = f"{spec.num_inference_steps} steps"
        with timed(seconds, f"{spec.num_images} images, {steps}"):
            images, facts = draw(spec)
        with timed(seconds, f"measures, {steps}"):
            if known:
                near = nearest(images, real.training)
                first = first or (images, near)
                copies = describe_copies(near, known.usual, len(real.training))
                for size in options.sizes:
                    reference = known.references[spec.num_images, size]
                    rows.append({**facts, **compare(images, reference, size, options, accelerator.device), **copies})
            accelerator.wait_for_everyone()
    return rows, first


def evaluate(
    pipeline: DiffusionPipeline,
    real: RealImages,
    options: Options,
    accelerator: Accelerator,
    draw: Callable[[SampleSpec], Samples],
) -> Evaluated | None:
    """Measure a model; the same on any number of processes.

    Args:
        pipeline: on the accelerator's device.
        real: images to compare with.
        options: what to measure.
        accelerator: shares the work out.
        draw: gives the images.

    Returns:
        On the main process, plain numbers for a file of results and what pictures are made of; None on others.

    Raises:
        ValueError: there are too few real images, or half of the held-out ones are training images.
    """
    seconds: dict[str, float] = {}
    known = None
    if accelerator.is_main_process:  # before images are drawn: what is missing for it is told now
        with timed(seconds, "reference"):
            known = prepare_known(real, options, accelerator.device)
    accelerator.wait_for_everyone()
    samples, first = compare_all(real, known, options, accelerator, draw, seconds)
    more: dict[str, Any] = {}
    if options.class_samples:
        with timed(seconds, f"{options.class_samples.num_images} images of the classes"):
            drawn = draw(options.class_samples)
        with timed(seconds, "classifier"):
            if known:
                more["classes"] = judge_classes(drawn, pipeline, real)
            accelerator.wait_for_everyone()
    if options.num_bound_images:
        with timed(seconds, "bound"):
            more["bound"] = measure_bound(pipeline, real, options, accelerator)
    if first is None:
        return None
    environment = {
        "pipeline": type(pipeline).__name__,
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "batch_size": options.batch_size,
        "images": real.facts,
        "versions": versions(),
    }
    return Evaluated({**environment, "samples": samples, "seconds": seconds, **more}, *first)
