"""Measure classifier-free guidance of a class-conditional model: how well its images follow their labels, at what cost.

    python benchmarks/guidance.py MODEL [--images_per_class 50] [--scales 1 1.5 2 4 8] [--steps 50]

A small classifier, trained here on the embedded images, judges the labels. The results are written after every row, the
figure at the end, and `python docs/make_sampling_pages.py` makes docs/guidance.md of them.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from few_steps import (
    BATCH,
    PRECISION,
    ROOT,
    SIZE,
    describe,
    distances,
    replace,
    replace_json,
)
from tqdm import tqdm

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.data.config import EMBEDDED_DATA, EMBEDDED_TEST_SET
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.diffusion.guidance import Guidance
from ddpm_from_scratch.evaluation.classifier import accuracy, classify, train_classifier
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.training.config import TrainingConfig

PRESET = "fashion_mnist_conditional_quick"
SCALES = (1.0, 1.5, 2.0, 4.0, 8.0)
VARIED = (Guidance(4.0, rescale=0.7), Guidance(4.0, interval=(0.2, 0.8)))  # measured besides the scales

LEAST = 2  # images of a class: for its spread, and 20 in all for the standard errors


# --- real images ---------------------------------------------------------------------------------------------------


def embedded(path: Path, channels: int, size: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """A labelled data set: images uint8 [N, H, W, C], labels [N], and the names of the classes."""
    config = TrainingConfig(dataset_name=str(path), class_conditional=True)
    data = load_data(config, channels, size)
    assert data.labels is not None  # since they were asked for
    images = torch.stack([data.images[index] for index in range(len(data.images))])
    return images.permute(0, 2, 3, 1).numpy(), data.labels.of_images.numpy(), data.labels.id2label


def places(labels: np.ndarray, per_class: int, skipped: int = 0) -> np.ndarray:
    """Where per_class images of each class are, after as many that are skipped: the classes in turn."""
    of_classes = [np.flatnonzero(labels == name)[skipped : skipped + per_class] for name in range(labels.max() + 1)]
    return np.stack(of_classes, axis=1).reshape(-1)


# --- generated images ----------------------------------------------------------------------------------------------


def sample(
    pipeline: ScratchDDPMPipeline, guidance: Guidance | None, classes: int, steps: int, num_images: int
) -> np.ndarray:
    """Images uint8 [N, H, W, C]; number i is drawn from the seed i and, unless guidance is None, of class i % classes.

    Without guidance of any kind every image gets the null label.
    """
    batches = []
    for first in tqdm(range(0, num_images, BATCH), desc="no labels" if guidance is None else str(guidance)):
        numbers = range(first, min(first + BATCH, num_images))
        scale, rescale, interval = guidance or Guidance()
        images, *_ = pipeline(
            batch_size=len(numbers),
            generator=[torch.Generator().manual_seed(number) for number in numbers],
            num_inference_steps=steps,
            class_labels=None if guidance is None else [number % classes for number in numbers],
            guidance_scale=scale,
            guidance_rescale=rescale,
            guidance_interval=interval,
            output_type="np",
            return_dict=False,
        )
        batches.append((images * 255).round().astype(np.uint8))
    return np.concatenate(batches)


def spread(images: np.ndarray, classes: int) -> float:
    """Diversity: the standard deviation over the images of a class, in [0, 1], mean over its pixels and the classes.

    Image number i, of [N, H, W, C] uint8, is of class i % classes.
    """
    return float(np.mean([(images[first::classes] / 255).std(axis=0, ddof=1).mean() for first in range(classes)]))


def kernel(images: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The kernel distance of images uint8 [N, H, W, C] to features, with its standard error.

    The Fréchet distance is left out: of so few images it would be bias for the most part.
    """
    found = distances(efficientnet_lite0_features(images, SIZE), reference)
    return {key: value for key, value in found.items() if key.startswith("kernel")}


def draw(images: Mapping[float, np.ndarray], names: Sequence[str], path: Path) -> None:
    """The first image of every class (rows) at every scale (columns), from the same seed along a row."""
    figure = matplotlib.figure.Figure(figsize=(1.3 + 0.9 * len(images), 0.9 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(images), squeeze=False)
    for column, (scale, drawn) in enumerate(images.items()):
        axes[0, column].set_title(f"{scale:g}", fontsize=10)
        for row in range(len(names)):
            axes[row, column].imshow(drawn[row].squeeze(), cmap="gray", vmin=0, vmax=255)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
    for row, label in enumerate(names):
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("guidance scale", fontsize=10)
    replace(path, partial(figure.savefig, format="png", dpi=100))


# --- the run -------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a saved class-conditional pipeline")
    parser.add_argument("--images_per_class", type=int, default=50, help="generated, and real ones as reference")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "guidance.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "guidance.png")
    return parser.parse_args(arguments)


def check_model(names: Mapping[int, str] | None, num_class_embeds: int | None, known: Mapping[int, str]) -> None:
    """Raise ValueError for a model that cannot be guided, or whose classes the classifier does not know."""
    if num_class_embeds is None or names is None:
        raise ValueError(f"The model has no classes, or no names for them: train one with {PRESET}.")
    if dict(names) != dict(known):
        listed = (", ".join(classes.values()) for classes in (names, known))
        raise ValueError("The model's classes are {}; the embedded images' are {}.".format(*listed))
    if num_class_embeds != len(names) + 1:
        raise ValueError(
            f"The model has {num_class_embeds} labels for {len(names)} classes: one more, the null, is needed."
        )


def check_numbers(args: argparse.Namespace, available: int, train_steps: int) -> None:
    """Raise ValueError for numbers that do not fit the data or the chain."""
    if not LEAST <= args.images_per_class <= available // 2:
        raise ValueError(
            f"--images_per_class {args.images_per_class}: from {LEAST} to {available // 2} are allowed, since the "
            f"distance between two sets of real images is measured too, and there are {available} of the rarest class."
        )
    for scale in args.scales:
        Guidance(scale).check()
    if not 1 <= args.steps <= train_steps:
        raise ValueError(f"--steps {args.steps}: the model's chain has {train_steps} steps.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the classifier, sample, measure and draw."""
    args = parse(arguments)
    if not (args.model / "model_index.json").is_file():
        raise FileNotFoundError(f"{args.model} has no model_index.json: pass the folder of a saved pipeline.")
    pipeline = ScratchDDPMPipeline.from_pretrained(args.model, dtype=PRECISION)
    unet, names = pipeline.unet, pipeline.config.id2label
    images, labels, known = embedded(EMBEDDED_DATA, unet.config.in_channels, unet.config.sample_size)
    check_model(names, unet.config.num_class_embeds, known)
    check_numbers(args, int(np.bincount(labels).min()), pipeline.scheduler.config.num_train_timesteps)
    classes, count = len(names), args.images_per_class * len(names)

    test_images, test_labels, _ = embedded(EMBEDDED_TEST_SET, unet.config.in_channels, unet.config.sample_size)
    classifier = train_classifier(images, labels)
    ceiling = accuracy(classify(classifier, test_images), test_labels)
    print(json.dumps({"classifier": ceiling}), flush=True)

    real, others = (images[places(labels, args.images_per_class, skipped)] for skipped in (0, args.images_per_class))
    reference = efficientnet_lite0_features(real, SIZE)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    unet.to(memory_format=torch.channels_last)
    unet.compile(dynamic=False)
    for scale in (1.0, 2.0):  # compiles for both sizes of a batch, which is not to be timed
        sample(pipeline, Guidance(scale), classes, 1, min(BATCH, count))

    results: dict[str, Any] = {
        "images_per_class": args.images_per_class,
        "num_images": count,
        "steps": args.steps,
        "features": {"network": "EfficientNet-Lite0", "size": SIZE},
        "real": {
            **ceiling,
            "train_images": len(images),
            "test_images": len(test_images),
            **kernel(others, reference),
            "spread": spread(real, classes),
        },
        "device": device_name(pipeline.device),
        "precision": str(PRECISION).removeprefix("torch."),
        "versions": versions(),
        "model": describe(args.model, pipeline),
        "rows": [],
    }
    wanted, drawn = np.arange(count) % classes, {}
    for guidance in (None, *(Guidance(scale) for scale in args.scales), *VARIED):
        start = time.perf_counter()
        drawn[guidance] = sample(pipeline, guidance, classes, args.steps, count)
        row: dict[str, Any] = {
            "guidance": guidance and guidance._asdict(),
            "seconds": time.perf_counter() - start,
            **kernel(drawn[guidance], reference),
        }
        if guidance is not None:  # images without labels are of no class
            row |= {
                **accuracy(classify(classifier, drawn[guidance]), wanted),
                "spread": spread(drawn[guidance], classes),
            }
        results["rows"].append(row)
        replace_json(args.results, results)
        print(json.dumps(row), flush=True)
    draw({scale: drawn[Guidance(scale)] for scale in args.scales}, list(names.values()), args.figure)


if __name__ == "__main__":
    main()
