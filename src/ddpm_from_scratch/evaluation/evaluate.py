"""Evaluate a saved model and write the results: `ddpm evaluate MODEL [--dataset_name ...]`."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..data.dataset import TrainingData, check_same_range, load_data
from ..data.images import MEND
from ..data.sizes import Size
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..runtime.devices import PRECISIONS, compile_mode, prepare_cpu, resolve_precision
from ..runtime.errors import told
from ..runtime.privacy import public_name
from ..runtime.results import merge_results
from ..sampling.generate import STEPS, Samples, SampleSpec, describe, own_steps
from ..sampling.kept_images import describe_origin, generate_once, place, read_images, read_kept
from ..sampling.models import class_names, image_form, load_pipeline
from .config import LEAST_IMAGES, RESULTS, EvaluationConfig, check_trained_range, parse
from .figures import neighbors_picture, plot_bound, save_samples
from .measures import Evaluated, Options, RealImages, all_specs, check_enough, check_options, evaluate, taken, to_array


def real_images(config: EvaluationConfig, channels: int, size: Size, names: list[str]) -> RealImages:
    """Load the training images and any held-out ones, with their classes if generated images are to be classified.

    Args:
        config: names the data sets.
        channels: of the images.
        size: their height and width.
        names: of the model's classes.

    Raises:
        ValueError: they cannot be read, or their classes or the range of their values are not the model's.
    """
    data = load_data(config.data, channels, size, remedy=MEND)
    check_trained_range(config.model, config.value_range, data.value_range)
    training, facts = to_array(data.images, size), {"training": data.describe(config.data)}
    labels = labels_of_array(data, size, names)
    held_out = (None, config.test_split) if config.test_split else config.data.held_out(config.test_set)
    if held_out is None:
        return RealImages(training, None, facts, labels, deep=data.value_range is not None)
    name, split = held_out
    tests_config = replace(config.data.of_another_set(name), **config.judged) if name else config.data
    tests = load_data(tests_config, channels, size, split, MEND)
    check_same_range(data, tests)
    facts["held_out"] = tests.describe(tests_config) | ({"split": config.test_split} if config.test_split else {})
    tests_labels, deep = labels_of_array(tests, size, names), bool(data.value_range or tests.value_range)
    return RealImages(training, to_array(tests.images, size), facts, labels, tests_labels, deep)


def labels_of_array(data: TrainingData, size: Size, names: list[str]) -> np.ndarray | None:
    """The classes of the images that `to_array` takes; None if they are not needed.

    Raises ValueError if they are not the model's.
    """
    if data.labels is None:
        return None
    if list(data.labels.names) != names:
        raise ValueError(
            f"the classes of the images are {', '.join(data.labels.names)}; those of the model {', '.join(names)}: "
            "they must be the same, or --num_class_images 0."
        )
    return data.labels.of_images[taken(data.images, size)].numpy()


def load(config: EvaluationConfig, accelerator: Accelerator) -> DiffusionPipeline:
    """Load the model in its precision.

    Raises ValueError if it cannot be evaluated, or not in this precision; FileNotFoundError if there is no such model.
    """
    pipeline = load_pipeline(
        config.model,
        dtype=PRECISIONS[resolve_precision(config.mixed_precision, accelerator.device)],
        stock=config.stock,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if config.mixed_precision in ("bf16", "fp16") and not isinstance(pipeline, ScratchDDPMPipeline):
        raise ValueError(
            f"--mixed_precision {config.mixed_precision} is for ScratchDDPMPipeline, which keeps the chain itself in "
            f"float32; {config.model} is drawn from by {type(pipeline).__name__}: leave it out."
        )
    return pipeline


def prepare(pipeline: DiffusionPipeline, device: torch.device, compiled: bool) -> None:
    """Move the pipeline to the device and set it up to compute fast there."""
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    if compiled:
        # A CUDA graph's output is overwritten by the next call, and multistep schedulers keep several.
        one_step = isinstance(pipeline.scheduler, ScratchDDPMScheduler)
        pipeline.unet.compile(mode=compile_mode(device) if one_step else "default")


def main(arguments: Sequence[str]) -> Path:
    """Load the model and the images, evaluate, and write the results.

    Returns:
        The results file.
    """
    config = parse(arguments)
    config.validate()
    on_cpu = prepare_cpu()
    accelerator = Accelerator(cpu=on_cpu)
    with accelerator.main_process_first():  # downloads happen once
        pipeline = load(config, accelerator)
        channels, size = image_form(pipeline)
        form = (*size, channels)
        given = read_images(config.images, form, LEAST_IMAGES) if config.images else None
        steps = config.num_inference_steps or (own_steps(pipeline),)
        options = make_options(replace(config, num_inference_steps=steps), given)
        check_options(pipeline, options)
        real = real_images(config, channels, size, class_names(pipeline))
    for spec in options.sample_specs:
        check_enough(real, spec.num_images)
    if config.images_dir:  # what cannot be used there is told before any work
        for spec in all_specs(options):
            read_kept(place(spec, config.images_dir), describe_origin(pipeline, spec))
    prepare(pipeline, accelerator.device, config.compile)

    def draw(spec: SampleSpec) -> Samples:
        if given and spec in options.sample_specs:
            return given
        images = generate_once(pipeline, spec, accelerator, config.images_dir)
        return Samples(images, describe(pipeline, spec))

    evaluated = evaluate(pipeline, real, options, accelerator, draw)
    path = config.folder / RESULTS
    if evaluated is not None:
        write(path, {"model": public_name(config.model), "revision": config.revision}, evaluated, real)
        print(path, flush=True)
    accelerator.wait_for_everyone()  # a launcher ends the others with the one that leaves
    accelerator.end_training()
    return path


def make_options(config: EvaluationConfig, given: Samples | None) -> Options:
    """The measures that the configuration asks for, of given images or of images to be drawn."""
    how: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
    counts = [len(given.images)] if given else list(config.num_images)
    steps = config.num_inference_steps or (STEPS,)
    sample_specs = [
        SampleSpec(number, count, config.balanced_labels, **how)
        for number, count in zip(steps, counts * (len(steps) // len(counts)), strict=True)
    ]
    judged = SampleSpec(steps[0], config.num_class_images, True, **how) if config.num_class_images else None
    same = {name: getattr(config, name) for name in ("extractor", "num_bound_images", "num_terms", "cache_dir")}
    return Options(sample_specs, judged, sizes=config.size or [None], **same, **how)


def write(path: Path, model: dict[str, Any], evaluated: Evaluated, real: RealImages) -> None:
    """Write the results and the pictures."""
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
