"""Measure a model that was tuned for few steps beside the one it was tuned from.

    ddpm train fashion_mnist_few_steps --model_config_name_or_path models/ddpm-fashion-mnist
    python benchmarks/few_step_tuning.py outputs/ddpm-fashion-mnist-few-steps models/ddpm-fashion-mnist

Distances of images in 1, 2 and 4 steps, without a class and of the classes in turn, also as diffusers' own classes draw
them from the tuned model's folder, and the time of one image. Rows are written as they are measured; those of the
teacher, and of the same training, are not measured again.
`python docs/make_questions.py` makes a table of them.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, UNet2DModel
from few_steps import ROOT, SIZE, replace_json
from guidance import embedded
from own_images import processor
from recipes import real_features
from two_questions import PICTURES, draw_rows

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.data.config import EMBEDDED_DATA, EMBEDDED_TEST_SET
from ddpm_from_scratch.evaluation.classifier import accuracy, classify, train_classifier
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from ddpm_from_scratch.evaluation.metrics import kernel_distance_with_error, precision_recall
from ddpm_from_scratch.runtime.devices import device_name, keep_freed_memory
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.generate import SampleSpec, generate
from ddpm_from_scratch.sampling.samplers import consistency

RESULTS = ROOT / "docs" / "results" / "few_step_tuning.json"
STEPS = (1, 2, 4)
LABELS = {"null": False, "in turn": True}  # the classes of the images, as `SampleSpec` has them
STOCK = "tuned, by stock classes"
LONG = 50  # steps of the chain that the time of an image is compared with
Numbers = dict[str, Any]


def load(folder: Path) -> ScratchDDPMPipeline:
    """A model, ready to draw from in float32."""
    pipeline = ScratchDDPMPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.unet.to(memory_format=torch.channels_last).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_fresh_noise(pipeline: ScratchDDPMPipeline) -> ScratchDDPMPipeline:
    """The model as it is, with the sampler of the tuned one."""
    return ScratchDDPMPipeline(pipeline.unet, consistency(pipeline.scheduler), pipeline.config.id2label)


@torch.no_grad()
def drawn_by_stock(folder: Path, spec: SampleSpec) -> np.ndarray:
    """Images without a class, uint8 [N, H, W, C], by the classes of diffusers that a folder names."""
    network = UNet2DModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    generator = torch.Generator().manual_seed(spec.seed)
    size, classes = network.config.sample_size, network.config.num_class_embeds
    images = []
    for start in range(0, spec.num_images, spec.batch_size):
        count = min(spec.batch_size, spec.num_images - start)
        x = torch.randn(count, network.config.in_channels, size, size, generator=generator)
        labels = None if classes is None else torch.full((count,), classes - 1)
        scheduler.set_timesteps(spec.num_inference_steps)  # for each batch: it counts the steps
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t, class_labels=labels).sample, t, x, generator).prev_sample
        images.append(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(images).numpy()


def drawn(pipeline: ScratchDDPMPipeline, spec: SampleSpec) -> np.ndarray:
    """Images, uint8 [N, H, W, C], by a pipeline."""
    return generate(pipeline, spec, Accelerator(cpu=True))


def measure(images: np.ndarray, reference: np.ndarray) -> Numbers:
    """Distances of images to as many real ones, given by their features."""
    features = efficientnet_lite0_features(images, SIZE)
    kernel = kernel_distance_with_error(features, reference)
    near = precision_recall(features, reference)
    return {
        "kernel_distance": kernel.value,
        "kernel_distance_error": kernel.error,
        "precision": near.precision,
        "recall": near.recall,
    }


def taken_for_their_class(images: np.ndarray, judge: Any, classes: int) -> float:  # noqa: ANN401
    """The share of images of all classes in turn that a network takes for what they were to be."""
    return float(accuracy(classify(judge, images), np.arange(len(images)) % classes)["accuracy"])


def pictures(models: Mapping[str, ScratchDDPMPipeline]) -> dict[str, np.ndarray]:
    """A row of images for each model and number of steps, the classes in turn, from the same noise."""
    rows = {}
    for name, pipeline in models.items():
        for steps in STEPS:
            spec = SampleSpec(steps, PICTURES, balanced_labels=True)
            title = f"{steps} step{'s' if steps > 1 else ''}, {name}"
            rows[title] = generate(pipeline, spec, Accelerator(cpu=True), progress=False)[..., 0]
    return rows


def seconds_of(pipeline: ScratchDDPMPipeline, steps: int) -> float:
    """Seconds of one image."""
    start = time.perf_counter()
    pipeline(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np")
    return time.perf_counter() - start


def times(tuned: ScratchDDPMPipeline, teacher: ScratchDDPMPipeline, rounds: int) -> Numbers:
    """Seconds of one image of each in turns, the median of the rounds, after one that warms up."""
    turns = [
        {**{str(steps): seconds_of(tuned, steps) for steps in STEPS}, "teacher": seconds_of(teacher, LONG)}
        for _ in range(rounds + 1)
    ][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]} | {"teacher_steps": LONG}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tuned", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--rounds", type=int, default=5, help="of the times")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "figures" / "questions_tuning.png")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    training = json.loads((args.tuned / "results.json").read_text(encoding="utf-8"))
    rows = rows_of(args.results, training, args.num_images)
    tuned, teacher = load(args.tuned), load(args.teacher)
    models = {"tuned": tuned, "teacher": teacher, "teacher, noise fresh": with_fresh_noise(teacher)}
    draw_rows(pictures({"before": models["teacher, noise fresh"], "tuned": tuned}), args.picture)
    reference = real_features(EMBEDDED_DATA, args.num_images)
    images, labels, _ = embedded(EMBEDDED_DATA, 1, 28)
    judge = train_classifier(images, labels)
    found: Numbers = {
        **conditions(training, reference),
        "evaluated": {"tuned": evaluated(args.tuned), "teacher": evaluated(args.teacher)},
        "seconds": times(tuned, teacher, args.rounds),
        "rows": rows,
    }
    by = {name: partial(drawn, pipeline) for name, pipeline in models.items()}
    cases = [*itertools.product(by.items(), args.steps, LABELS.items())]
    cases += [((STOCK, partial(drawn_by_stock, args.tuned)), steps, ("null", False)) for steps in args.steps]
    for (name, draw), steps, (classes, in_turn) in cases:
        row = f"{name}, {steps} steps, {classes}"
        if row not in rows:
            drawing = draw(SampleSpec(steps, args.num_images, in_turn))
            figures = measure(drawing, reference)
            if in_turn:
                figures["accuracy"] = taken_for_their_class(drawing, judge, len(tuned.config.id2label))
            rows[row] = {"model": name, "steps": steps, "labels": classes, "num_images": args.num_images, **figures}
            print(row, rows[row], flush=True)
        replace_json(args.results, found)


def conditions(training: Numbers, reference: np.ndarray) -> Numbers:
    """What the distances to the features of these real images are of, and the floor below them."""
    floor = kernel_distance_with_error(real_features(EMBEDDED_TEST_SET, len(reference)), reference)
    return {
        "num_images": len(reference),
        "training": training,
        "floor": {"kernel_distance": floor.value, "kernel_distance_error": floor.error},
        "features": {"network": "EfficientNet-Lite0", "size": SIZE},
        "device": device_name(torch.device("cpu")),
        "processor": processor(),
        "versions": versions(),
    }


def rows_of(path: Path, training: Numbers, num_images: int) -> Numbers:
    """The rows that are there already: of as many images, and of this training where they depend on it."""
    found: Numbers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}, "training": None}
    same = found["training"] == training
    return {
        name: row
        for name, row in found["rows"].items()
        if row["num_images"] == num_images and (same or row["model"] not in ("tuned", STOCK))
    }


def evaluated(folder: Path) -> list[Numbers]:
    """What `ddpm evaluate` has found of a model at this size."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    samples = results.get("evaluation", {"samples": []})["samples"]
    return [
        {"steps": sample["num_inference_steps"], "num_images": sample["num_generated"]}
        | {key: sample[key] for key in ("kernel_distance", "kernel_distance_error", "precision", "recall")}
        for sample in samples
        if sample["size"] == SIZE
    ]


if __name__ == "__main__":
    main()
