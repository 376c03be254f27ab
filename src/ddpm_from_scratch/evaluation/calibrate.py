"""Calibrate a trained model: `ddpm calibrate MODEL [--dataset_name ...]`.

Estimates the second moments that the optimal variance of few-step sampling needs, on the training images, and writes
them into the model's scheduler configuration. Nothing else in the folder changes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..data.arrays import to_unit_range
from ..data.config import DataConfig
from ..data.dataset import load_data
from ..data.fields import TWO_NUMBERS
from ..data.images import MEND
from ..data.sizes import Size, center_crop
from ..diffusion.guidance import null_label
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import JUMPS, jumps
from ..runtime.atomic_files import replacing_files
from ..sampling.models import class_names, image_form
from .calibration import calibrate
from .config import check_trained_range

SCHEDULER_FILE = Path("scheduler", "scheduler_config.json")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="ddpm calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a saved pipeline")
    parser.add_argument("--dataset_name", help="as for `ddpm train`; without it: the embedded Fashion-MNIST")
    parser.add_argument("--train_data_dir", help="as for `ddpm train`")
    parser.add_argument("--value_range", type=float, help="as for `ddpm train`", **TWO_NUMBERS)
    parser.add_argument("--num_images", type=int, default=512, help="of the data set, evenly spaced")
    parser.add_argument("--num_timesteps", type=int, default=64, help="at which the moments are estimated")
    parser.add_argument("--batch_size", type=int, default=64, help="images per call of the network")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser.parse_args(arguments)


def data_config(args: argparse.Namespace) -> DataConfig:
    """The training images that the command line names; errors as of `DataConfig.validate`."""
    config = DataConfig(**{name: getattr(args, name) for name in ("dataset_name", "train_data_dir", "value_range")})
    config.validate()
    return config


def training_images(
    args: argparse.Namespace, config: DataConfig, channels: int, size: Size, names: list[str]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Load `num_images` images, evenly spaced in the data set and cropped at the centre.

    Args:
        args: the command line.
        config: of `data_config`; class-conditional if labels are needed.
        channels: of the images.
        size: their height and width.
        names: of the model's classes.

    Returns:
        The images [N, C, H, W] in [-1, 1], and their labels [N] if they are needed.

    Raises:
        ValueError: there are not as many, or their classes or the range of their values are not the model's.
    """
    data = load_data(config, channels, size, remedy=MEND)
    check_trained_range(str(args.model), config.value_range, data.value_range)
    images = data.images
    if args.num_images > len(images):
        raise ValueError(f"--num_images {args.num_images}: from 1 to {len(images)} are allowed, as many as there are.")
    chosen = [index * len(images) // args.num_images for index in range(args.num_images)]
    pixels = to_unit_range(torch.stack([center_crop(images[index], size) for index in chosen]))
    if data.labels is None:
        return pixels, None
    if list(data.labels.names) != names:
        raise ValueError(
            f"the classes of the images are {', '.join(data.labels.names)}; those of {args.model} {', '.join(names)}: "
            "they must be the same, since none of its labels is null."
        )
    return pixels, data.labels.of_images[chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Estimate the moments and write them into the model's scheduler configuration."""
    args = parse(arguments)
    for name, least in {"num_images": 1, "num_timesteps": 2, "batch_size": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: it must be at least {least}.")
    config = data_config(args)
    if not (args.model / SCHEDULER_FILE).is_file():
        raise FileNotFoundError(f"{args.model} has no {SCHEDULER_FILE}: pass the folder of a saved pipeline.")
    pipeline = ScratchDDPMPipeline.from_pretrained(args.model)
    if not isinstance(pipeline.scheduler, ScratchDDPMScheduler):
        raise ValueError(
            f"{args.model} has a {type(pipeline.scheduler).__name__}, which has no variance to calibrate: save the "
            "model with a DDPMScheduler or ScratchDDPMScheduler."
        )
    if jumps(pipeline.scheduler.config):
        raise ValueError(f"{args.model}: {JUMPS}, whose error a calibration measures.")
    classes = pipeline.unet.config.num_class_embeds
    if classes is not None and null_label(classes, pipeline.config.id2label) is None:
        config = replace(config, class_conditional=True)
    channels, size = image_form(pipeline)
    unet = pipeline.unet.to("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = training_images(args, config, channels, size, class_names(pipeline))
    options = {
        "class_labels": labels,
        "num_timesteps": args.num_timesteps,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }
    calibrated = calibrate(unet, pipeline.scheduler, images, **options)
    place = args.model / SCHEDULER_FILE
    with replacing_files(place.parent) as unfinished:  # so that the file is whole at any time
        calibrated.to_json_file(unfinished / place.name)
    print(args.model)
