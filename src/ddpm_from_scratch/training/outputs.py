"""Output of a run beside its checkpoints: trackers, sample grids, and the model folder that it ends in."""

import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..data.arrays import to_8_bits
from ..evaluation.config import LEAST_IMAGES
from ..evaluation.figures import LOSS_LABELS, plot_losses
from ..runtime.atomic_files import replace_file, replacing_files
from ..runtime.devices import prepare_cpu
from ..runtime.errors import Diverged, Refused, Stopped, saving
from ..runtime.locks import InUse, locked
from ..runtime.results import write_json
from ..sampling.generate import SampleSpec, generate
from ..sampling.previews import image_grid, to_pil
from ..sampling.samplers import SAMPLERS
from .config import TrainingConfig, config_with_header
from .optimizer import peak_rate
from .run import Run, results

SHOWN_IMAGES = 64  # of the training images, in data.png
FEW_IMAGES = 1000  # fewer are learned by heart
IMAGE_TRACKERS = ("wandb", "swanlab")  # those of accelerate, beside tensorboard, that take lists of pictures

logger = logging.getLogger("train")


@contextmanager
def holding_output(config: TrainingConfig, only_dry: bool) -> Iterator[None]:
    """Keep other runs out of the output folder; the main process does, and all processes learn whether it can.

    A dry run creates no folder.

    Raises Refused if another process has it.
    """
    folder = Path(config.output_dir)
    state = PartialState(cpu=prepare_cpu())
    with ExitStack() as stack:
        refusal = None
        if state.is_main_process and (folder.exists() or not only_dry):
            try:
                stack.enter_context(locked(folder))
            except InUse as error:
                refusal = f"{error}: wait until that has ended, or choose another folder (--output_dir)"
            except OSError as error:
                refusal = f"output_dir {folder} cannot be written to: {error}"
        (refusal,) = broadcast_object_list([refusal])
        if refusal is not None:
            raise Refused(refusal)
        yield


def start_output(run: Run, config: TrainingConfig) -> None:
    """Create the output folder with the configuration as it was given, and the trackers."""
    if run.accelerator.is_main_process:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "training_config.yaml", config_with_header(config).encode())
        if run.progress.step == 0:
            save_picture(data_grid(run), folder / "data.png")
            log_start(run)
    # Trackers take plain values; a list, a mapping or None becomes text.
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in run.config.to_dict().items()}
    run.accelerator.init_trackers("ddpm", config=plain)


def data_grid(run: Run) -> Image.Image:
    """The first training images exactly as the network sees them: cropped, resized and mirrored."""
    shown, stream = min(SHOWN_IMAGES, len(run.data.images)), run.stream
    images = [to_8_bits(stream[position]) for position in range(shown)]
    return image_grid(to_pil(torch.stack(images).permute(0, 2, 3, 1).numpy()))


def log_start(run: Run) -> None:
    """Say what is trained on what, and warn where the network will learn its images by heart."""
    network, count = run.trained_unet.config, len(run.data.images)
    logger.info(
        "a network of %.1f M parameters for images of %dx%dx%d (channels, height, width), its levels %s wide, dropout "
        "%g; learning rate %g; %s shows images as it sees them",
        run.trained_unet.num_parameters() / 1e6,
        run.data.channels,
        *run.data.size,
        ", ".join(map(str, network.block_out_channels)),
        network.dropout,
        peak_rate(run.config),
        Path(run.config.output_dir, "data.png"),
    )
    if count < FEW_IMAGES:
        logger.warning(
            "%d images are few: a long run learns them by heart. `ddpm evaluate --num_images %d` shows the nearest "
            "training image of each sample (neighbors.png); fine-tuning a model (--model_config_name_or_path) needs "
            "fewer images",
            count,
            max(LEAST_IMAGES, count // 2),
        )


def draw_grid(run: Run, title: str | None = None) -> Image.Image:
    """Sample with the network as it is now, from the same noise each time; the processes share the work.

    Of a class-conditional network, the classes in turn. With a title, a bar shows how far it is.
    """
    config, unet, accelerator = run.config, run.eval_unet, run.accelerator
    pipeline = run.pipeline
    pipeline.scheduler = SAMPLERS[config.sample_scheduler](run.scheduler)
    pipeline.set_progress_bar_config(desc=title, disable=title is None or not accelerator.is_main_process)
    each = math.ceil(config.eval_batch_size / accelerator.num_processes)
    spec = SampleSpec(
        config.ddpm_num_inference_steps, config.eval_batch_size, run.id2label is not None, each, config.seed
    )
    was_training = unet.training
    unet.eval()
    with accelerator.autocast():
        images = generate(pipeline, spec, accelerator, progress=False)
    unet.train(was_training)
    return image_grid(to_pil(images))


def save_grid(run: Run, grid: Image.Image) -> None:
    """Keep a grid on the way, in a file and in the trackers; one process does; CannotSave if it cannot be written."""
    if run.accelerator.is_main_process:
        save_picture(grid, Path(run.config.output_dir, "samples", f"step_{run.progress.step}.png"))
        track_grid(run, grid)


def track_grid(run: Run, grid: Image.Image) -> None:
    """Show a grid in the trackers that show images."""
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.asarray(grid.convert("RGB"))[None]
            tracker.log_images({"samples": pixels}, step=run.progress.step, dataformats="NHWC")
        elif tracker.name in IMAGE_TRACKERS:
            tracker.log_images({"samples": [grid]}, step=run.progress.step)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture; CannotSave if it cannot be written."""
    with saving(path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def finish(run: Run) -> None:
    """Write the model folder: the network, samples, the loss curve and results.

    Raises CannotSave if it cannot be written; files that were there are whole.
    """
    grid = draw_grid(run, title="drawing samples.png")
    if not run.accelerator.is_main_process:
        return
    track_grid(run, grid)
    folder = Path(run.config.output_dir)
    with saving("the model"), replacing_files(folder) as unfinished:
        run.pipeline.save_pretrained(unfinished)
        grid.save(unfinished / "samples.png")
        plot_losses(run.progress.losses, LOSS_LABELS[run.config.loss], unfinished / "loss.png")
        write_json(results(run), unfinished / "results.json")
    for picture in ("neighbors.png", "bound.png"):  # of an evaluation of the model that was here before
        (folder / picture).unlink(missing_ok=True)
    name = shlex.quote(str(folder))
    more = "--max_train_minutes" if run.config.max_train_minutes else "--max_train_steps"
    logger.info(
        f"next: ddpm sample {name} | ddpm evaluate {name} | ddpm publish {name}; the same command with a higher {more} "
        "goes on with this run"
    )


def log_to_stderr(level: str) -> None:
    """Show what the run says from a level of `LOG_LEVELS` on, without every request and archive of the libraries.

    Of several processes the first says what all of them have to say; the others only warn.
    """
    least = logging.getLevelNamesMapping()[level.upper()]
    if os.environ.get("RANK", "0") != "0":
        least = max(least, logging.WARNING)
    logging.basicConfig(level=least, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2", "fsspec"):
        logging.getLogger(library).setLevel(logging.WARNING)


@contextmanager
def leaving_together(run: Run) -> Iterator[None]:
    """At the end of a run, or where all its processes stop at the same step: none leaves before the others are ready.

    A launcher ends all processes as soon as one fails, though another may be writing a checkpoint. And a process that
    leaves in the wake of a collective call can hang: torch's gloo frees its tensors with the help of the interpreter,
    which waits for gloo.
    """
    try:
        yield
    except (Stopped, Diverged):
        run.accelerator.wait_for_everyone()
        raise
    run.accelerator.wait_for_everyone()
