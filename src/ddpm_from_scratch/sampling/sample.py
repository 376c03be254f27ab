"""Draw images with a model, in rows: `ddpm sample MODEL --num_images 16 --num_inference_steps 50 --out grid.png`."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..diffusion.checks import check_whole
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..runtime.atomic_files import replace_file
from ..runtime.devices import PRECISIONS, prepare_cpu, resolve_precision
from ..runtime.random_streams import generator
from .generate import STEPS, own_steps
from .models import load_pipeline
from .previews import image_grid, to_pil
from .samplers import SAMPLERS

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="ddpm sample", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="folder or Hub name of a saved pipeline")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="file of the picture")
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--num_inference_steps", type=int, help=f"steps of the chain: the model's own, or {STEPS}")
    parser.add_argument("--class_labels", nargs="+", help="names or numbers, given to the images in turn")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="above 1, images follow their labels more")
    parser.add_argument("--seed", type=int, default=0, help="image i follows from it and i, whatever the batch")
    parser.add_argument("--scheduler", choices=tuple(SAMPLERS), default="ddpm", help="ddpm: the model's own")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a call of the network")
    parser.add_argument("--mixed_precision", choices=("auto", *PRECISIONS), default="auto", help="of the network")
    parser.add_argument("--revision", help="of a Hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code of a Hub model that names its own")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Check the flags before anything is loaded; ValueError for one that is not allowed."""
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(args, name) is not None:
            check_whole(f"--{name}", getattr(args, name))
    check_whole("--seed", args.seed, 0)
    if args.out.suffix.lower() not in SUFFIXES or args.out.is_dir():
        raise ValueError(f"--out {args.out} must be a file that ends in {', '.join(SUFFIXES)}.")
    if args.guidance_scale != 1 and not args.class_labels:
        raise ValueError("--guidance_scale needs --class_labels to follow.")


def draw(pipeline: DiffusionPipeline, args: argparse.Namespace) -> list[Image.Image]:
    """Draw the images in batches."""
    steps = args.num_inference_steps or own_steps(pipeline)
    labels = [int(label) if label.isdigit() else label for label in args.class_labels or ()]
    images: list[Image.Image] = []
    while numbers := range(len(images), min(len(images) + args.batch_size, args.num_images)):
        options: dict[str, Any] = {"batch_size": len(numbers), "num_inference_steps": steps}
        if labels:
            options["class_labels"] = [labels[number % len(labels)] for number in numbers]
            options["guidance_scale"] = args.guidance_scale
        generators = [generator(args.seed, "sample", number) for number in numbers]
        drawn = np.asarray(pipeline(generator=generators, output_type="np", **options).images)
        images += to_pil((drawn * 255).round().astype(np.uint8))
    return images


def main(arguments: Sequence[str]) -> None:
    """Load the model, draw the images and write the grid.

    Raises ValueError if a flag, or what it asks of the model, is not allowed; FileNotFoundError if there is no such
    model.
    """
    args = parse(arguments)
    check(args)
    device = (None if prepare_cpu() else torch.accelerator.current_accelerator()) or torch.device("cpu")
    dtype = PRECISIONS[resolve_precision(args.mixed_precision, device)]
    pipeline = load_pipeline(args.model, dtype=dtype, revision=args.revision, trust_remote_code=args.trust_remote_code)
    if args.class_labels and not isinstance(pipeline, ScratchDDPMPipeline):
        raise ValueError(f"--class_labels: {type(pipeline).__name__} is drawn from without classes.")
    if pipeline.unet.config.in_channels == 4 and args.out.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"--out {args.out}: JPEG has no transparency, which this model draws: take .png or .webp.")
    pipeline.scheduler = SAMPLERS[args.scheduler](pipeline.scheduler)
    image_grid(draw(pipeline.to(device), args)).save(
        file := io.BytesIO(), Image.registered_extensions()[args.out.suffix.lower()]
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, file.getvalue())
    print(args.out)
