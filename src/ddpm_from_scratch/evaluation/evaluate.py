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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..data.config import EMBEDDED_TEST_SET, DataConfig
from ..data.dataset import TrainingData, load_data
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..runtime.devices import COMPILE_MODE, computes_on_cpu, prepare_cpu, resolve_precision
from ..runtime.errors import told
from ..runtime.privacy import looks_local, public_name
from ..runtime.results import merge_results, read_results
from ..sampling.generate import Samples, SampleSpec, describe
from ..sampling.kept_images import describe_origin, generate_once, place, read_images, read_kept
from ..sampling.models import class_names, image_form, load_pipeline
from .features import CACHE_DIR, EXTRACTORS
from .figures import neighbors_picture, plot_bound, save_samples
from .measures import (
    LEAST_IMAGES,
    Evaluated,
    Options,
    RealImages,
    all_specs,
    check_enough,
    check_options,
    evaluate,
    taken,
    to_array,
)

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
    samples.add_argument(
        "--num_inference_steps", type=int, nargs="+", default=[50], help="one or more numbers of steps"
    )
    samples.add_argument(
        "--num_images", type=int, nargs="+", default=[1000], help="one number, or one for each number of steps"
    )
    samples.add_argument("--balanced_labels", action="store_true", help="the classes in turn, not the null label")
    samples.add_argument("--images", type=Path, help="measure those of this .npz instead (see --images_dir)")
    samples.add_argument(
        "--images_dir",
        type=Path,
        help="keep the images in this folder, in an .npz for each number of steps (`images`, uint8 [N, H, W, C], and "
        "how they came about); those that are there already are not drawn again, so that a stopped evaluation goes on",
    )
    samples.add_argument("--extractor", default="efficientnet-lite0", choices=tuple(EXTRACTORS))
    samples.add_argument(
        "--size", type=int, nargs="+", help="side in pixels to which the extractor's images are scaled; one or more"
    )
    samples.add_argument("--cache_dir", type=Path, default=CACHE_DIR, help="of the features of real images")
    judged = parser.add_argument_group("classes")
    judged.add_argument(
        "--num_class_images",
        type=int,
        default=0,
        help="also draw so many images of the classes in turn, in the first number of steps, and let a classifier, "
        "trained on the training images, judge them",
    )
    judged.add_argument("--label_column", help="as for train.py")
    bound = parser.add_argument_group("bound")
    bound.add_argument("--num_bound_images", type=int, default=64, help="held-out images; 0 leaves the bound out")
    bound.add_argument("--num_terms", type=int, help="estimate it from so many of its T terms for each image")
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
    if len(args.num_images) not in (1, len(args.num_inference_steps)):
        raise ValueError(
            f"--num_images has {len(args.num_images)} numbers, --num_inference_steps {len(args.num_inference_steps)}: "
            "give one number of images, or one for each number of steps."
        )
    if args.images and args.images_dir:
        raise ValueError("--images_dir is for images that are to be drawn, and --images holds some: give one.")
    if args.images and len(args.num_inference_steps) > 1:
        raise ValueError("--images holds the images of one --num_inference_steps: give one number.")
    if args.label_column and not args.num_class_images:
        raise ValueError("--label_column is of the images that a classifier learns from: it needs --num_class_images.")
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


LEAST = {
    "num_inference_steps": 1,
    "num_images": LEAST_IMAGES,
    "size": 1,
    "num_class_images": 0,
    "num_bound_images": 0,
    "num_terms": 2,
    "batch_size": 1,
    "seed": 0,
}


def check_numbers(args: argparse.Namespace) -> None:
    """Every number is large enough."""
    for name, least in LEAST.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise ValueError(f"--{name} {value}: it must be at least {least}.")


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
    folder = output_dir(args)
    for name, path in {"output_dir": folder, "images_dir": args.images_dir}.items():
        if path and path.exists() and not path.is_dir():
            raise ValueError(f"--{name} {path} is a file.")
    read_results(folder / RESULTS)


def real_images(args: argparse.Namespace, channels: int, size: int, names: list[str]) -> RealImages:
    """The training images, and the held-out ones if there are any; with their classes if some are to be judged.

    Args:
        args: the flags.
        channels: of the images.
        size: their side.
        names: of the model's classes.

    Raises:
        ValueError: they cannot be read, or their classes are not the model's.
    """
    judged = {"class_conditional": True, "label_column": args.label_column} if args.num_class_images else {}
    config = DataConfig(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        dataset_revision=args.dataset_revision,
        train_data_dir=args.train_data_dir,
        streaming=args.streaming,
        **judged,
    )
    data = load_data(config, channels, size)
    training, facts = to_array(data.images, size), {"training": data.describe(config)}
    labels = labels_of_array(data, size, names)
    test_set = args.test_set or (str(EMBEDDED_TEST_SET) if config.trains_on_embedded_data else None)
    if test_set:
        config = DataConfig(dataset_name=test_set, **judged)
    elif not args.test_split:
        return RealImages(training, None, facts, labels)
    held_out = load_data(config, channels, size, args.test_split or "train")
    facts["held_out"] = held_out.describe(config) | ({"split": args.test_split} if args.test_split else {})
    held_out_labels = labels_of_array(held_out, size, names)
    return RealImages(training, to_array(held_out.images, size), facts, labels, held_out_labels)


def labels_of_array(data: TrainingData, size: int, names: list[str]) -> np.ndarray | None:
    """The classes of the images that `to_array` takes; None if they are not needed.

    Raises:
        ValueError: they are not the model's.
    """
    if data.labels is None:
        return None
    if list(data.labels.names) != names:
        raise ValueError(
            f"the classes of the images are {', '.join(data.labels.names)}; those of the model {', '.join(names)}: "
            "they must be the same, or --num_class_images 0."
        )
    return data.labels.of_images[taken(data.images, size)].numpy()


def output_dir(args: argparse.Namespace) -> Path:
    """Where the results go."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    return Path(args.model) if Path(args.model).is_dir() else Path("outputs", "evaluation", args.model)


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
    on_cpu = computes_on_cpu()
    if on_cpu:
        prepare_cpu()
    accelerator = Accelerator(cpu=on_cpu)
    with accelerator.main_process_first():  # downloads happen once
        pipeline = load(args, accelerator)
        channels, size = image_form(pipeline)
        form = (size, size, channels)
        given = read_images(args.images, form, LEAST_IMAGES) if args.images else None
        options = make_options(args, given)
        check_options(pipeline, options)
        real = real_images(args, channels, size, class_names(pipeline))
    for spec in options.sample_specs:
        check_enough(real, spec.num_images)
    if args.images_dir:  # what cannot be used there is told before any work
        for spec in all_specs(options):
            read_kept(place(spec, args.images_dir), describe_origin(pipeline, spec))
    prepare(pipeline, accelerator.device, args.compile)

    def draw(spec: SampleSpec) -> Samples:
        if given and spec in options.sample_specs:
            return given
        images = generate_once(pipeline, spec, accelerator, args.images_dir)
        return Samples(images, describe(pipeline, spec))

    evaluated = evaluate(pipeline, real, options, accelerator, draw)
    path = output_dir(args) / RESULTS
    if evaluated is not None:
        write(path, {"model": public_name(args.model), "revision": args.revision}, evaluated, real)
        print(path, flush=True)
    accelerator.wait_for_everyone()  # a launcher ends the others with the one that leaves
    accelerator.end_training()
    return path


def make_options(args: argparse.Namespace, given: Samples | None) -> Options:
    """What the flags ask for, of images that are to be drawn or are given."""
    how = {"batch_size": args.batch_size, "seed": args.seed}
    counts = [len(given.images)] if given else args.num_images
    steps = args.num_inference_steps
    sample_specs = [
        SampleSpec(number, count, args.balanced_labels, **how)
        for number, count in zip(steps, counts * (len(steps) // len(counts)), strict=True)
    ]
    judged = SampleSpec(steps[0], args.num_class_images, True, **how) if args.num_class_images else None
    same = {name: getattr(args, name) for name in ("extractor", "num_bound_images", "num_terms", "cache_dir")}
    return Options(sample_specs, judged, sizes=args.size or [None], **same, **how)


def write(path: Path, model: dict[str, Any], evaluated: Evaluated, real: RealImages) -> None:
    """The results, and all pictures beside them."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    merge_results(path, "evaluation", {**model, **evaluated.results})
    save_samples(evaluated.images, folder / "samples.png")
    neighbors_picture(evaluated.images, real.training, evaluated.neighbors, folder / "neighbors.png")
    bound = evaluated.results.get("bound", {})
    if "terms" in bound:
        plot_bound(bound, folder / "bound.png")
    else:  # that of an earlier evaluation would be taken for this one's
        (folder / "bound.png").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(told(main, "evaluate", sys.argv[1:]))
