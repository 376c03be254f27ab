"""Generate images with any number of processes: image i depends only on the seed and i."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm import tqdm

from ..runtime.random_streams import generator
from .models import classes, image_form

STEPS = 50  # of the chains of models that name no number


def own_steps(pipeline: DiffusionPipeline) -> int:
    """The number of steps that a model names, or STEPS."""
    return pipeline.config.get("num_inference_steps") or STEPS


@dataclass(frozen=True)
class SampleSpec:
    """What images to generate. Image i depends only on the seed and i."""

    num_inference_steps: int
    num_images: int
    balanced_labels: bool = False  # classes in turn instead of the null label
    batch_size: int = 64
    seed: int = 0


class Samples(NamedTuple):
    """Generated images, uint8 [N, H, W, C], and the settings that they were drawn with."""

    images: np.ndarray
    facts: dict[str, Any]


def describe(pipeline: DiffusionPipeline, spec: SampleSpec) -> dict[str, Any]:
    """The settings with which a pipeline draws images, for results."""
    return {
        "num_inference_steps": spec.num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        **({"labels": "balanced" if spec.balanced_labels else "null"} if classes(pipeline) else {}),
        "seed": spec.seed,
    }


def generate(
    pipeline: DiffusionPipeline, spec: SampleSpec, accelerator: Accelerator, progress: bool = True
) -> np.ndarray:
    """Generate images, uint8 [N, H, W, C], on every process; ValueError if an image is not finite."""
    return np.concatenate(list(draw_from(pipeline, spec, accelerator, 0, progress)))


def draw_from(
    pipeline: DiffusionPipeline, spec: SampleSpec, accelerator: Accelerator, first: int, progress: bool = True
) -> Iterator[np.ndarray]:
    """Yield the images from number `first` on, which begins a batch, in parts of one batch from each process.

    Batches are always whole and dealt out to the processes as they are, so that neither their number nor N changes an
    image.

    Raises ValueError if an image is not finite.
    """
    rank, world_size, size = accelerator.process_index, accelerator.num_processes, spec.batch_size
    channels, (height, width) = image_form(pipeline)
    starts = range(first, spec.num_images, world_size * size)
    title = f"{spec.num_inference_steps} steps"
    for start in tqdm(starts, desc=title, unit="batch", disable=rank > 0 or not progress):
        own = start + rank * size
        # What no batch fills stays in its place: every process has to gather as many.
        batch = torch.zeros(size, height, width, channels, dtype=torch.uint8)
        if own < spec.num_images:
            batch = draw_batch(pipeline, spec, range(own, own + size))
        together = accelerator.gather(batch.to(accelerator.device)).cpu()
        yield together[: spec.num_images - start].numpy()


def draw_batch(pipeline: DiffusionPipeline, spec: SampleSpec, numbers: range) -> torch.Tensor:
    """Generate the images with these numbers: uint8 [B, H, W, C]; ValueError if one is not finite."""
    of = classes(pipeline) if spec.balanced_labels else []
    images = np.asarray(
        pipeline(
            batch_size=len(numbers),
            generator=[generator(spec.seed, "evaluation", number) for number in numbers],
            num_inference_steps=spec.num_inference_steps,
            output_type="np",
            **({"class_labels": labels_of(of, numbers)} if of else {}),
        ).images
    )
    if not np.isfinite(images).all():
        raise ValueError(f"the model gives images that are not finite, in {spec.num_inference_steps} steps.")
    return torch.from_numpy((images * 255).round().astype(np.uint8))


def labels_of(of: list[int], numbers: range) -> list[int]:
    """The labels of images with these numbers: the classes in turn."""
    return [of[number % len(of)] for number in numbers]


def to_unit_range(images: np.ndarray) -> torch.Tensor:
    """Convert uint8 images [N, H, W, C] to float [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
