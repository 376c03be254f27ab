"""The small evaluation in the course of a training run, and the best model so far."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.dataset import TrainingData, check_same_range, load_data
from ..data.images import MEND
from ..evaluation.features import Features, extract
from ..evaluation.likelihood import bits_per_dim
from ..evaluation.measures import NO_LEVELS, to_array
from ..evaluation.metrics import kernel_distance_with_error
from ..runtime.atomic_files import begin_folder, finish_folder
from ..runtime.results import write_json
from ..sampling.generate import SampleSpec, generate
from .config import TrainingConfig
from .run import Run

logger = logging.getLogger("train")

BEST = "best"  # folder of the best model, inside output_dir
NUM_BOUND_IMAGES = 32
NUM_TERMS = 32  # of the bound, for each image


@dataclass(frozen=True)
class ValidationSet:
    """Real images that the network is measured against, the same at every evaluation."""

    reference: Features  # of as many training images as are generated
    held_out: torch.Tensor | None  # uint8 [N, C, H, W]; None: nobody named any, or they have no bound


def build_validation_set(config: TrainingConfig, data: TrainingData) -> ValidationSet:
    """Read the real images, and the features of those to compare samples with.

    Raises ValueError if there are fewer training images than are to be generated, or the held-out ones cannot be read
    or are scaled from other values.
    """
    if config.eval_num_images > len(data.images):
        raise ValueError(
            f"eval_num_images {config.eval_num_images} exceeds the {len(data.images)} training images it takes to "
            f"compare with"
        )
    chosen = [data.images[index] for index in data.evenly(config.eval_num_images)]
    reference = extract(to_array(chosen, data.size))
    if config.loss == "consistency" or (held_out := config.held_out(config.test_set)) is None:
        return ValidationSet(reference, None)
    name, split = held_out
    tests = load_data(config.of_another_set(name), data.channels, data.size, split, MEND)
    check_same_range(data, tests)
    if data.value_range or tests.value_range:
        logger.warning("the bound of the held-out images is left out: %s", NO_LEVELS)
        return ValidationSet(reference, None)
    some = [tests.images[index] for index in tests.evenly(NUM_BOUND_IMAGES)]
    return ValidationSet(reference, torch.from_numpy(to_array(some, data.size)).permute(0, 3, 1, 2).contiguous())


def evaluate_run(run: Run, validation_set: ValidationSet) -> dict[str, float]:
    """Figures of the network as it is now, the average if there is one; the same on every process.

    The kernel distance is that of few images, of which the standard error beside it tells; the bound, where there are
    held-out images, is an unbiased estimate from some of its terms.
    """
    config, unet = run.config, run.eval_unet
    pipeline = run.pipeline
    pipeline.set_progress_bar_config(disable=True)
    spec = SampleSpec(
        config.ddpm_num_inference_steps, config.eval_num_images, batch_size=config.eval_batch_size, seed=config.seed
    )
    was_training = unet.training
    unet.eval()
    figures: dict[str, float] = {"step": run.progress.step}
    with run.accelerator.autocast():
        images = generate(pipeline, spec, run.accelerator, progress=False)
        kernel = kernel_distance_with_error(extract(images).values, validation_set.reference.values)
        figures |= {"kernel_distance": kernel.value, "kernel_distance_error": kernel.error}
        if validation_set.held_out is not None:
            bits = bits_per_dim(
                unet,
                run.scheduler,
                validation_set.held_out,
                num_terms=min(NUM_TERMS, run.scheduler.config.num_train_timesteps),
                seed=config.seed,
                progress=False,
                accelerator=run.accelerator,
            )
            error = bits.standard_error().total
            figures |= {"bits_per_dim": float(bits.mean().total), "bits_per_dim_error": float(error)}
    unet.train(was_training)
    return figures


def is_best(evaluations: list[dict[str, float]]) -> bool:
    """Whether the last evaluation has the smallest kernel distance."""
    return min(evaluations, key=lambda figures: figures["kernel_distance"]) is evaluations[-1]


def keep_best(run: Run, figures: dict[str, Any]) -> None:
    """Put the model into the folder of the best one, whole, with its figures; one process does."""
    folder = Path(run.config.output_dir, BEST)
    unfinished = begin_folder(folder)
    run.pipeline.save_pretrained(unfinished)
    write_json(figures, unfinished / "evaluation.json")
    finish_folder(folder)
