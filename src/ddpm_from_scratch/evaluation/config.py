"""The configuration of an evaluation, and the flags of `ddpm evaluate`."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.arrays import OWN_RANGES, ValueRange
from ..data.config import BACKGROUND, DataConfig, check_local
from ..data.fields import TWO_NUMBERS, all_at_least, at_least, check_fields, knob, one_of
from ..runtime.devices import PRECISIONS
from ..runtime.results import read_results
from ..sampling.checkpoints import is_checkpoint, read_manifest
from ..sampling.generate import STEPS
from .features import CACHE_DIR, EXTRACTORS

DESCRIPTION = """Measure a model: draw images, compare them with real ones, and compute the variational bound on
held-out images. The model is a folder or a Hub name of any pipeline of diffusers that draws pixels from noise alone.

Writes into --output_dir, which is the model's folder if it has one:

- results.json: every figure, under "evaluation"; what else is in the file stays
- samples.png: the first images
- neighbors.png: the generated images nearest to a training image, each above that one
- bound.png: the terms of the bound over t"""
RESULTS = "results.json"
LEAST_IMAGES = 20  # that the standard error of the kernel distance needs

# The group of `--help` that begins with each field.
GROUPS = {
    "dataset_name": "real images",
    "num_inference_steps": "generated images",
    "num_class_images": "classes",
    "num_bound_images": "bound",
    "output_dir": "run",
}

SEVERAL = ("num_inference_steps", "num_images", "size")  # take one or more numbers


def trained_range(model: str) -> ValueRange | None:
    """The values that became -1 and 1 in training, if a local model or checkpoint says them."""
    folder = Path(model)
    if is_checkpoint(folder):
        found = read_manifest(folder)["config"].get("value_range")
    else:
        found = (read_results(folder / RESULTS).get("dataset") or {}).get("value_range")
    return (float(found[0]), float(found[1])) if found else None


def check_trained_range(model: str, wanted: Sequence[float] | None, found: ValueRange | None) -> None:
    """Refuse real images whose values are scaled in another way than in the model's training.

    Args:
        model: its folder.
        wanted: the range that the user asks for, which is taken as it is.
        found: that of the images, if the user asks for none; None for 8-bit images.

    Raises:
        ValueError: the ranges differ.
    """
    trained, own = trained_range(model), found or OWN_RANGES["uint8"]
    if wanted is None and trained is not None and trained != own:
        low, high = trained
        raise ValueError(
            f"the values {low:g} to {high:g} became -1 to 1 when {model} was trained, and of these images {own[0]:g} "
            f"to {own[1]:g} would: pass --value_range {low:g} {high:g} for images with the values of the training, "
            f"or --value_range {own[0]:g} {own[1]:g} if theirs are on a scale of their own"
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """The model to evaluate, what to measure of it, and how."""

    model: str  # a folder or Hub name

    dataset_name: str | None = knob(None, "the training images, as for `ddpm train`; without it: the embedded ones")
    dataset_config_name: str | None = knob(None, "as for `ddpm train`")
    dataset_revision: str | None = knob(None, "as for `ddpm train`")
    train_data_dir: str | None = knob(None, "as for `ddpm train`")
    split: str | None = knob(None, "as for `ddpm train`")
    image_column: str | None = knob(None, "as for `ddpm train`")
    background: str = knob(BACKGROUND, "as for `ddpm train`")
    value_range: Sequence[float] | None = knob(None, "as for `ddpm train`")
    streaming: bool = knob(False, "as for `ddpm train`")
    test_set: str | None = knob(
        None, "held-out images, like --dataset_name; default: the embedded ones, for the embedded data"
    )
    test_split: str | None = knob(None, "held-out images: a split of the data set itself")

    num_inference_steps: Sequence[int] | None = knob(
        None, f"one or more numbers of steps; left out: the model's own, or {STEPS}", all_at_least(1)
    )
    num_images: Sequence[int] = knob((1000,), "one number, or one for each number of steps", all_at_least(LEAST_IMAGES))
    balanced_labels: bool = knob(False, "the classes in turn, not the null label")
    images: Path | None = knob(None, "measure those of this .npz instead (see --images_dir)")
    images_dir: Path | None = knob(
        None,
        "keep the images in this folder, in an .npz for each number of steps (`images`, uint8 [N, H, W, C], and how "
        "they came about); those that are there already are not drawn again, so that a stopped evaluation goes on",
    )
    extractor: str = knob("efficientnet-lite0", "the network of the features", one_of(EXTRACTORS))
    size: Sequence[int] | None = knob(
        None, "side in pixels to which the extractor's images are scaled; one or more", all_at_least(1)
    )
    cache_dir: Path = knob(CACHE_DIR, "of the features of real images")

    num_class_images: int = knob(
        0,
        "also draw so many images of the classes in turn, in the first number of steps, and let a classifier, trained "
        "on the training images, judge them",
        at_least(0),
    )
    label_column: str | None = knob(None, "as for `ddpm train`")

    num_bound_images: int = knob(64, "held-out images; 0 leaves the bound out", at_least(0))
    num_terms: int | None = knob(None, "estimate it from so many of its T terms for each image", at_least(2))

    output_dir: Path | None = knob(
        None, "default: the model's folder; RUN/evaluation/<step> of a checkpoint; else outputs/evaluation/<name>"
    )
    seed: int = knob(0, "of the images and of the bound", at_least(0))
    batch_size: int = knob(64, "images in a call of the network", at_least(1))
    mixed_precision: str = knob("auto", "of our pipeline's network", one_of(("auto", *PRECISIONS)))
    compile: bool = knob(True, "compile the network")
    stock: bool = knob(False, "diffusers' own pipeline for DDPM models, instead of ours")
    revision: str | None = knob(None, "of a Hub model")
    trust_remote_code: bool = knob(False, "run code of a Hub model that names its own")

    @property
    def data(self) -> DataConfig:
        """The training images, with their classes if generated images are to be classified."""
        names = (
            *("dataset_name", "dataset_config_name", "dataset_revision", "train_data_dir", "split", "streaming"),
            *("image_column", "background", "value_range"),
        )
        return DataConfig(**{name: getattr(self, name) for name in names}, **self.judged)

    @property
    def judged(self) -> dict[str, Any]:
        """Options that load the classes of real images, empty unless generated images are to be classified."""
        return {"class_conditional": True, "label_column": self.label_column} if self.num_class_images else {}

    @property
    def folder(self) -> Path:
        """The folder for the results: output_dir, or one that follows from the model."""
        if self.output_dir is not None:
            return self.output_dir
        path = Path(self.model)
        if is_checkpoint(path):  # not in the checkpoint itself, which the run deletes once newer ones are there
            return path.resolve().parent.parent / "evaluation" / path.name
        return path if path.is_dir() else Path("outputs", "evaluation", self.model)

    def validate(self) -> None:
        """Check all settings before anything is loaded.

        Raises ValueError if a number or combination is not allowed; FileNotFoundError if a file or folder is missing.
        """
        check_fields(self)
        self.data.validate()
        check_local("model", self.model)
        check_local("test_set", self.test_set)
        self._check_combinations()
        for name, path in {"output_dir": self.folder, "images_dir": self.images_dir}.items():
            if path and path.exists() and not path.is_dir():
                raise ValueError(f"--{name} {path} is a file.")
        read_results(self.folder / RESULTS)

    def _check_combinations(self) -> None:
        chains = len(self.num_inference_steps or (STEPS,))
        if len(self.num_images) not in (1, chains):
            raise ValueError(
                f"--num_images has {len(self.num_images)} numbers, --num_inference_steps {chains}: give one number of "
                "images, or one for each number of steps."
            )
        if self.images and not self.images.is_file():
            raise FileNotFoundError(f"--images: no file {self.images}")
        for name in ("images_dir", "balanced_labels"):
            if self.images and getattr(self, name):
                raise ValueError(f"--{name} is for images that are to be drawn, and --images holds some: give one.")
        if self.images and chains > 1:
            raise ValueError("--images holds the images of one --num_inference_steps: give one number.")
        if self.label_column and not self.num_class_images:
            raise ValueError("--label_column is of the images that a classifier learns from: give --num_class_images.")
        if self.test_set and self.test_split:
            raise ValueError("--test_set and --test_split both name the held-out images: give one.")
        if self.test_split and self.data.trains_on_embedded_data:
            raise ValueError("--test_split names a split of --dataset_name or --train_data_dir: give one of them.")
        if self.revision and Path(self.model).is_dir():
            raise ValueError(f"--revision is of a Hub model, and {self.model} is a folder: leave it out.")


def parse(arguments: Sequence[str]) -> EvaluationConfig:
    """Read the command line; SystemExit after `--help` or a wrong flag."""
    parser = argparse.ArgumentParser(
        prog="ddpm evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or Hub name of a saved pipeline")
    types, group = typing.get_type_hints(EvaluationConfig), parser.add_argument_group()
    for field in dataclasses.fields(EvaluationConfig)[1:]:
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        options: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        allowed, kind = field.metadata["allowed"], (typing.get_args(types[field.name]) or (types[field.name],))[0]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in SEVERAL:
            options |= {"type": int, "nargs": "+"}
        elif field.name == "value_range":
            options |= {"type": float, **TWO_NUMBERS}
        else:
            options |= {"type": kind, "choices": allowed.choices if allowed and allowed.choices else None}
        group.add_argument(f"--{field.name}", **options)
    return EvaluationConfig(**vars(parser.parse_args(arguments)))
