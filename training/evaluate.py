"""Measure a model: `accelerate launch training/evaluate.py MODEL [--dataset_name ...]`.

Draws images, compares them with real ones, and computes the variational bound on held-out images. Writes into
--output_dir, which is the model's folder if it has one:

- results.json: every figure, under "evaluation"; what else is in the file stays
- samples.png: the first images
- neighbors.png: the generated images nearest to a training image, each above that one
- bound.png: the terms of the bound over t

The model is a folder or a Hub name of any pipeline of diffusers that draws pixels from noise alone.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from config import EMBEDDED_DATA, TrainingConfig
from data import load_data
from ddpm_from_scratch.features import CACHE_DIR, EXTRACTORS
from evaluation import (
    LEAST_IMAGES,
    Options,
    RealImages,
    draw_bound,
    draw_neighbors,
    draw_samples,
    evaluate,
    generate,
    image_form,
    load_pipeline,
    to_array,
)
from optimization import resolve_precision, use_all_cores
from report import write_json
from run import COMPILE_MODE

logger = logging.getLogger("evaluate")

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMBEDDED_TEST_SET = EMBEDDED_DATA.with_name("fashion_mnist_test.parquet")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or Hub name of a saved pipeline")
    data = parser.add_argument_group("real images")
    data.add_argument("--dataset_name", help="the training images, as for train.py; without it: the embedded ones")
    data.add_argument("--dataset_config_name", help="as for train.py")
    data.add_argument("--train_data_dir", help="as for train.py")
    data.add_argument(
        "--test_set", help="held-out images, like --dataset_name; default: the embedded ones, for the embedded data"
    )
    data.add_argument("--test_split", help="held-out images: a split of the data set itself")
    samples = parser.add_argument_group("generated images")
    samples.add_argument("--num_images", type=int, default=1000)
    samples.add_argument(
        "--num_inference_steps", type=int, nargs="+", default=[50], help="one or more numbers of steps"
    )
    samples.add_argument("--balanced_labels", action="store_true", help="the classes in turn, not the null label")
    samples.add_argument("--images", type=Path, help="measure the images of this .npz instead (see --save_images)")
    samples.add_argument("--save_images", type=Path, help="write them to this .npz: `images`, uint8 [N, H, W, C]")
    samples.add_argument("--extractor", default="efficientnet-lite0", choices=tuple(EXTRACTORS))
    samples.add_argument("--size", type=int, help="side in pixels to which the extractor's images are scaled")
    samples.add_argument("--cache_dir", type=Path, default=CACHE_DIR, help="of the features of real images")
    bound = parser.add_argument_group("bound")
    bound.add_argument("--num_bound_images", type=int, default=64, help="held-out images; 0 leaves the bound out")
    bound.add_argument("--num_terms", type=int, help="estimate it from so many of its T terms")
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, help="default: the model's folder, or outputs/evaluation/<name>")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--batch_size", type=int, default=64)
    run.add_argument(
        "--mixed_precision", default="auto", choices=("auto", *PRECISIONS), help="of the network's weights"
    )
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the network")
    run.add_argument("--stock", action="store_true", help="diffusers' own pipeline for DDPM models, instead of ours")
    run.add_argument("--revision", help="of a Hub model")
    run.add_argument("--trust_remote_code", action="store_true", help="run code of a Hub model that names its own")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Raise for flags that cannot work, before anything is loaded.

    Raises:
        ValueError: a number or combination is not allowed.
        FileNotFoundError: a file is missing.
    """
    least = {"num_images": LEAST_IMAGES, "num_bound_images": 0, "batch_size": 1, "seed": 0, "num_terms": 2, "size": 1}
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name} {value}: it must be at least {smallest}.")
    wrong = [steps for steps in args.num_inference_steps if steps < 1]
    if wrong:
        raise ValueError(f"--num_inference_steps {wrong[0]}: it must be at least 1.")
    if len(args.num_inference_steps) > 1 and (args.images or args.save_images):
        raise ValueError("--images and --save_images hold the images of one --num_inference_steps: give one number.")
    if args.test_set and args.test_split:
        raise ValueError("--test_set and --test_split both name the held-out images: give one.")
    if args.dataset_name and args.train_data_dir:
        raise ValueError("--dataset_name and --train_data_dir both name the training images: give one.")
    if args.images and not args.images.is_file():
        raise FileNotFoundError(f"--images: no file {args.images}")


def real_images(args: argparse.Namespace, channels: int, size: int) -> RealImages:
    """The training images, and the held-out ones if there are any."""
    named = {"dataset_config_name": args.dataset_config_name, "train_data_dir": args.train_data_dir}
    config = TrainingConfig(dataset_name=args.dataset_name, **named)
    training = load_data(config, channels, size)
    facts: dict[str, Any] = {"training": public(training.describe(config))}
    embedded = args.dataset_name is None and args.train_data_dir is None
    test_set = str(EMBEDDED_TEST_SET) if embedded and not args.test_split else args.test_set
    held_out = None
    if args.test_split:
        held_out = load_data(config, channels, size, args.test_split)
    elif args.test_set or test_set:
        config = TrainingConfig(dataset_name=args.test_set or test_set)
        held_out = load_data(config, channels, size)
    if held_out is not None:
        facts["held_out"] = public(held_out.describe(config)) | ({"split": args.test_split} if args.test_split else {})
    return RealImages(
        to_array(training.images, size), None if held_out is None else to_array(held_out.images, size), facts
    )


def public(facts: dict[str, Any]) -> dict[str, Any]:
    """A local path is nobody else's business: its last part says enough, beside the fingerprint."""
    path = Path(facts["name"])
    return facts | {"name": path.name} if path.exists() else facts


def output_dir(args: argparse.Namespace) -> Path:
    """Where the results go."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    return Path(args.model) if Path(args.model).is_dir() else Path("outputs", "evaluation", args.model.split("/")[-1])


def merge_results(path: Path, evaluation: dict[str, Any]) -> None:
    """Put the evaluation into a results file, which is whole at any time, beside what else is in it."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    unfinished = path.with_name(f".unfinished-{path.name}")
    write_json({**results, "evaluation": evaluation}, unfinished)
    os.replace(unfinished, path)


def read_images(path: Path, form: tuple[int, ...]) -> np.ndarray:
    """The images of an .npz: uint8 [N, H, W, C].

    Raises:
        ValueError: they are not such images.
    """
    with np.load(path, allow_pickle=False) as archive:
        images: np.ndarray = archive["images"]
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.shape[1:] != form or len(images) < LEAST_IMAGES:
        raise ValueError(
            f"--images {path} holds {images.dtype} {list(images.shape)}; uint8 [N, {', '.join(map(str, form))}] with "
            f"N >= {LEAST_IMAGES} is needed."
        )
    return images


def main(arguments: Sequence[str] | None = None) -> Path:
    """Load, measure, write.

    Returns:
        The results file.
    """
    args = parse(arguments)
    check(args)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if on_cpu:
        use_all_cores()
    accelerator = Accelerator(cpu=on_cpu)
    precision = PRECISIONS[resolve_precision(args.mixed_precision, accelerator.device)]
    with accelerator.main_process_first():  # downloads happen once
        pipeline = load_pipeline(
            args.model,
            dtype=precision,
            stock=args.stock,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
        )
        channels, size = image_form(pipeline)
        given = read_images(args.images, (size, size, channels)) if args.images else None
        real = real_images(args, channels, size)
    num_images = args.num_images if given is None else len(given)
    if 2 * num_images > len(real.training):
        raise ValueError(
            f"{num_images} images need as many training images as reference and for the floor, and there are "
            f"{len(real.training)}: take at most {len(real.training) // 2}."
        )
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    if args.compile:
        pipeline.unet.compile(mode=COMPILE_MODE.get(accelerator.device.type, "default"))
    same = ("num_inference_steps", "balanced_labels", "extractor", "size", "num_bound_images", "num_terms")
    options = Options(
        num_images=num_images,
        **{name: getattr(args, name) for name in (*same, "batch_size", "seed", "cache_dir")},
    )
    draw = partial(generate, pipeline, options=options, accelerator=accelerator) if given is None else lambda _: given
    found, images = evaluate(pipeline, real, options, accelerator, draw)
    folder = output_dir(args)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        merge_results(folder / "results.json", {"model": Path(args.model).name, "revision": args.revision, **found})
        write_pictures(folder, found, images, real)
        if args.save_images:
            args.save_images.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(args.save_images, images=images)
        print(folder / "results.json", flush=True)
    accelerator.end_training()
    return folder / "results.json"


def write_pictures(folder: Path, found: dict[str, Any], images: np.ndarray, real: RealImages) -> None:
    """All figures."""
    draw_samples(images, folder / "samples.png")
    draw_neighbors(images, real.training, folder / "neighbors.png")
    if "terms" in found.get("bound", {}):
        draw_bound(found["bound"], folder / "bound.png")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
