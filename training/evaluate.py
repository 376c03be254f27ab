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
import os
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline

from config import EMBEDDED_TEST_SET, TrainingConfig, looks_local, public_name
from data import load_data
from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.features import CACHE_DIR, EXTRACTORS
from evaluation import (
    LEAST_IMAGES,
    Drawn,
    Evaluated,
    Options,
    RealImages,
    check_enough,
    check_options,
    describe_chain,
    evaluate,
    generate,
    to_array,
)
from models import image_form, load_pipeline
from optimization import prepare_cpu, resolve_precision
from pictures import draw_bound, draw_neighbors, draw_samples
from report import write_json
from run import COMPILE_MODE

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = "results.json"


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
    data.add_argument("--dataset_revision", help="as for train.py")
    data.add_argument("--train_data_dir", help="as for train.py")
    data.add_argument("--streaming", action="store_true", help="as for train.py")
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
    samples.add_argument(
        "--save_images",
        type=Path,
        help="write them to this .npz: `images`, uint8 [N, H, W, C], and how they came about",
    )
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
        "--mixed_precision", default="auto", choices=("auto", *PRECISIONS), help="of our pipeline's network"
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
        FileNotFoundError: a file or folder is missing.
    """
    check_numbers(args)
    check_paths(args)
    if len(args.num_inference_steps) > 1 and (args.images or args.save_images):
        raise ValueError("--images and --save_images hold the images of one --num_inference_steps: give one number.")
    if args.images and args.balanced_labels:
        raise ValueError("--balanced_labels is about images that are to be drawn, and --images holds some: give one.")
    if args.test_set and args.test_split:
        raise ValueError("--test_set and --test_split both name the held-out images: give one.")
    if args.dataset_name and args.train_data_dir:
        raise ValueError("--dataset_name and --train_data_dir both name the training images: give one.")
    if args.dataset_config_name and not args.dataset_name:
        raise ValueError("--dataset_config_name needs --dataset_name.")
    if args.dataset_revision and (not args.dataset_name or Path(args.dataset_name).exists()):
        raise ValueError("--dataset_revision is of a --dataset_name on the Hub: leave it out.")
    if args.test_split and not (args.dataset_name or args.train_data_dir):
        raise ValueError("--test_split names a split of --dataset_name or --train_data_dir: give one of them.")
    if args.revision and Path(args.model).is_dir():
        raise ValueError(f"--revision is of a Hub model, and {args.model} is a folder: leave it out.")


def check_numbers(args: argparse.Namespace) -> None:
    """Every number is large enough."""
    least = {"num_images": LEAST_IMAGES, "num_bound_images": 0, "batch_size": 1, "seed": 0, "num_terms": 2, "size": 1}
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ValueError(f"--{name} {value}: it must be at least {smallest}.")
    wrong = [steps for steps in args.num_inference_steps if steps < 1]
    if wrong:
        raise ValueError(f"--num_inference_steps {wrong[0]}: it must be at least 1.")


def check_paths(args: argparse.Namespace) -> None:
    """What can only be local is there, and results can be written."""
    for name in ("model", "dataset_name", "test_set"):
        value = getattr(args, name)
        if value and looks_local(value) and not Path(value).expanduser().exists():
            raise FileNotFoundError(f"{name}: no file or folder {value}")
    if args.train_data_dir and not Path(args.train_data_dir).is_dir():
        raise FileNotFoundError(f"--train_data_dir: no folder {args.train_data_dir}")
    if args.streaming and not args.dataset_name:
        raise ValueError("--streaming is of a --dataset_name.")
    if args.images and not args.images.is_file():
        raise FileNotFoundError(f"--images: no file {args.images}")
    if args.save_images and args.save_images.suffix != ".npz":
        raise ValueError(f"--save_images {args.save_images}: its name must end in .npz.")
    folder = output_dir(args)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file.")
    read_results(folder / RESULTS)


def real_images(args: argparse.Namespace, channels: int, size: int) -> RealImages:
    """The training images, and the held-out ones if there are any."""
    config = TrainingConfig(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        dataset_revision=args.dataset_revision,
        train_data_dir=args.train_data_dir,
        streaming=args.streaming,
    )
    data = load_data(config, channels, size)
    training, facts = to_array(data.images, size), {"training": data.describe(config)}
    test_set = args.test_set or (str(EMBEDDED_TEST_SET) if config.trains_on_embedded_data else None)
    if test_set:
        config = TrainingConfig(dataset_name=test_set)
    elif not args.test_split:
        return RealImages(training, None, facts)
    held_out = load_data(config, channels, size, args.test_split or "train")
    facts["held_out"] = held_out.describe(config) | ({"split": args.test_split} if args.test_split else {})
    return RealImages(training, to_array(held_out.images, size), facts)


def output_dir(args: argparse.Namespace) -> Path:
    """Where the results go."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    return Path(args.model) if Path(args.model).is_dir() else Path("outputs", "evaluation", args.model)


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


def merge_results(path: Path, evaluation: dict[str, Any]) -> None:
    """Put the evaluation into a results file, which is whole at any time, beside what else is in it."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        write_json({**read_results(path), "evaluation": evaluation}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_images(path: Path, form: tuple[int, ...]) -> Drawn:
    """The images of an .npz, uint8 [N, H, W, C] or gray [N, H, W]; and how they came about, if `save_images` wrote it.

    Raises:
        ValueError: they are not such images.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images: np.ndarray = archive["images"]
            facts = {"file": path.name, **(json.loads(str(archive["facts"])) if "facts" in archive else {})}
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"--images {path} cannot be read: {error}") from error
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.shape[1:] != form or len(images) < LEAST_IMAGES:
        raise ValueError(
            f"--images {path} holds {images.dtype} {list(images.shape)}; uint8 [N, {', '.join(map(str, form))}] with "
            f"N >= {LEAST_IMAGES} is needed."
        )
    return Drawn(images, facts)


def save_images(path: Path, drawn: Drawn) -> None:
    """Write an .npz for `read_images`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=drawn.images, facts=np.array(json.dumps(drawn.facts)))


def load(args: argparse.Namespace, accelerator: Accelerator) -> DiffusionPipeline:
    """The model, in its precision.

    Raises:
        ValueError: it cannot be evaluated, or not in this precision.
        FileNotFoundError: there is no such model.
    """
    pipeline = load_pipeline(
        args.model,
        dtype=PRECISIONS[resolve_precision(args.mixed_precision, accelerator.device)],
        stock=args.stock,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    if args.mixed_precision in ("bf16", "fp16") and not isinstance(pipeline, ScratchDDPMPipeline):
        raise ValueError(
            f"--mixed_precision {args.mixed_precision} is for ScratchDDPMPipeline, which keeps the chain itself in "
            f"float32; {args.model} is drawn from by {type(pipeline).__name__}: leave it out."
        )
    return pipeline


def prepare(pipeline: DiffusionPipeline, device: torch.device, compiled: bool) -> None:
    """Bring it to the device, in the form in which it computes fast there."""
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    if compiled:
        # A CUDA graph's output is overwritten by the next call, and multistep schedulers keep several.
        one_step = isinstance(pipeline.scheduler, ScratchDDPMScheduler)
        pipeline.unet.compile(mode=COMPILE_MODE.get(device.type, "default") if one_step else "default")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Load, measure, write.

    Returns:
        The results file.
    """
    args = parse(arguments)
    check(args)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if on_cpu:
        prepare_cpu()
    accelerator = Accelerator(cpu=on_cpu)
    with accelerator.main_process_first():  # downloads happen once
        pipeline = load(args, accelerator)
        channels, size = image_form(pipeline)
        given = read_images(args.images, (size, size, channels)) if args.images else None
        same = ("num_inference_steps", "balanced_labels", "extractor", "size", "num_bound_images", "num_terms")
        options = Options(
            num_images=len(given.images) if given else args.num_images,
            **{name: getattr(args, name) for name in (*same, "batch_size", "seed", "cache_dir")},
        )
        check_options(pipeline, options)
        real = real_images(args, channels, size)
    check_enough(real, options.num_images)
    prepare(pipeline, accelerator.device, args.compile)

    def draw(steps: int) -> Drawn:
        if given:
            return given
        images = generate(pipeline, steps, options, accelerator)
        drawn = Drawn(images, describe_chain(pipeline, steps, options))
        if args.save_images and accelerator.is_main_process:  # now: they took long, and all that follows may fail
            save_images(args.save_images, drawn)
        return drawn

    evaluated = evaluate(pipeline, real, options, accelerator, draw)
    path = output_dir(args) / RESULTS
    if evaluated is not None:
        write(path, {"model": public_name(args.model), "revision": args.revision}, evaluated, real)
        print(path, flush=True)
    accelerator.wait_for_everyone()  # a launcher ends the others with the one that leaves
    accelerator.end_training()
    return path


def write(path: Path, model: dict[str, Any], evaluated: Evaluated, real: RealImages) -> None:
    """The results, and all pictures beside them."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    merge_results(path, {**model, **evaluated.results})
    draw_samples(evaluated.images, folder / "samples.png")
    draw_neighbors(evaluated.images, real.training, evaluated.neighbors, folder / "neighbors.png")
    bound = evaluated.results.get("bound", {})
    if "terms" in bound:
        draw_bound(bound, folder / "bound.png")
    else:  # that of an earlier evaluation would be taken for this one's
        (folder / "bound.png").unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
