"""Measure what a learned variance gives: a model trained with L_hybrid beside one trained with L_simple alone.

    ddpm train fashion_mnist_quick --max_train_steps 8000 --output_dir outputs/fixed
    ddpm train fashion_mnist_quick --max_train_steps 8000 --output_dir outputs/learned \
        --loss hybrid --ddpm_variance_type learned_range
    python benchmarks/learned_variance.py outputs/fixed outputs/learned

Bits per dimension of held-out images under chains of T and of fewer steps, and kernel distances of samples; the model
with fixed variances is measured with each of them, and with the optimal one after calibration.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_steps import (
    CALIBRATION_IMAGES,
    ROOT,
    SIZE,
    describe,
    distances,
    replace,
    replace_json,
    sample,
    scratch,
)

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data.config import EMBEDDED_TEST_SET
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.evaluation.calibration import calibrate
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from ddpm_from_scratch.runtime.devices import compile_mode, device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.generate import to_unit_range
from ddpm_from_scratch.training.config import TrainingConfig

# By the model that they are measured on.
VARIANCES: dict[str, dict[str, Callable[[Mapping[str, Any]], ScratchDDPMScheduler]]] = {
    "fixed": {
        "fixed_small": partial(scratch, variance_type="fixed_small", optimal_variance=False),
        "fixed_large": partial(scratch, variance_type="fixed_large", optimal_variance=False),
        "optimal": partial(scratch, optimal_variance=True),
    },
    "learned": {"learned_range": partial(scratch, optimal_variance=False)},
}


def load(folder: Path, precision: torch.dtype) -> ScratchDDPMPipeline:
    """A model on the device, compiled where that pays within minutes."""
    pipeline = ScratchDDPMPipeline.from_pretrained(folder, dtype=precision)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.unet.compile(mode=compile_mode(pipeline.device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def training_facts(folder: Path, pipeline: ScratchDDPMPipeline) -> dict[str, Any]:
    """The model's name and size, and how it was trained, if the training script says so beside it."""
    results = folder / "results.json"
    said = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    told = {key: said[key] for key in ("images_seen", "device", "seconds") if key in said}
    return {**describe(folder, pipeline), **told, "training_images": said.get("dataset", {}).get("num_images")}


def images_of(name: str | None, count: int, channels: int, resolution: int) -> np.ndarray:
    """The first images of a data set: uint8 [N, H, W, C]."""
    images = load_data(TrainingConfig(dataset_name=name), channels, resolution).images
    return torch.stack([images[index] for index in range(count)]).permute(0, 2, 3, 1).numpy()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("fixed", type=Path, help="folder of a model trained with L_simple")
    parser.add_argument("learned", type=Path, help="folder of a model trained with L_hybrid, for as many steps")
    parser.add_argument("--dataset_name", help="training images, as for train.py; without it: the embedded ones")
    parser.add_argument("--test_set", default=str(EMBEDDED_TEST_SET))
    parser.add_argument("--num_images", type=int, default=1000, help="generated, and real ones as reference")
    parser.add_argument("--num_bound_images", type=int, default=64, help="held-out images whose bound is measured")
    parser.add_argument("--bound_steps", type=int, nargs="+", default=(100, 1000))
    parser.add_argument("--sample_steps", type=int, nargs="+", default=(100,))
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--batch_size", type=int, default=64, help="images in a call of the network, for the bound")
    parser.add_argument("--samples_dir", type=Path, default=ROOT / "outputs" / "learned_variance")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "learned_variance.json")
    return parser.parse_args(arguments)


def measure_bound(
    pipeline: ScratchDDPMPipeline, steps: int, tests: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """The bound of the pipeline's scheduler under a chain of this many steps, from t = T - 1 to 0."""
    chain = scratch(pipeline.scheduler.config, timestep_spacing="linspace")
    bits = bits_per_dim(pipeline.unet, chain, tests, num_inference_steps=steps, batch_size=args.batch_size)
    mean, error = bits.mean(), bits.standard_error()
    return {
        "steps": steps,
        "bits_per_dim": float(mean.total),
        "error": float(error.total),
        "prior": float(mean.prior),
        "terms": mean.terms.tolist(),
        "timesteps": mean.timesteps.tolist(),
    }


def measure_samples(
    pipeline: ScratchDDPMPipeline, steps: int, name: str, reference: np.ndarray, args: argparse.Namespace
) -> dict[str, Any]:
    """Distances of images drawn in this many steps, which are kept."""
    start = time.perf_counter()
    images = sample(pipeline, steps, args.num_images, f"{name}-{steps}")
    seconds = time.perf_counter() - start
    replace(args.samples_dir / f"{name}-{steps}.npz", partial(np.savez_compressed, images=images))
    return {"steps": steps, **distances(efficientnet_lite0_features(images, SIZE), reference), "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each variance on its model."""
    args = parse(arguments)
    pipelines = {kind: load(getattr(args, kind), getattr(torch, args.precision)) for kind in VARIANCES}
    network = pipelines["fixed"].unet.config
    form = network.in_channels, network.sample_size
    tests = to_unit_range(images_of(args.test_set, args.num_bound_images, *form))
    real = images_of(args.dataset_name, max(2 * args.num_images, CALIBRATION_IMAGES), *form)
    reference, others = np.split(efficientnet_lite0_features(real[: 2 * args.num_images], SIZE), 2)
    results: dict[str, Any] = {
        "num_images": args.num_images,
        "num_bound_images": args.num_bound_images,
        "features": {"network": "EfficientNet-Lite0", "size": SIZE},
        "precision": args.precision,
        "versions": versions(),
        "models": {kind: training_facts(getattr(args, kind), pipeline) for kind, pipeline in pipelines.items()},
        "device": device_name(pipelines["fixed"].device),
        "floor": distances(others, reference),
        "rows": [],
    }
    for kind, pipeline in pipelines.items():
        config = pipeline.scheduler.config
        if kind == "fixed":
            config = calibrate(pipeline.unet, pipeline.scheduler, to_unit_range(real[:CALIBRATION_IMAGES])).config
        for name, make in VARIANCES[kind].items():
            pipeline.scheduler = make(config)
            bounds = [measure_bound(pipeline, steps, tests, args) for steps in args.bound_steps]
            samples = [measure_samples(pipeline, steps, name, reference, args) for steps in args.sample_steps]
            results["rows"].append({"variance": name, "bounds": bounds, "samples": samples})
            replace_json(args.results, results)
            told = [f"{bound['bits_per_dim']:.4f} bits/dim at {bound['steps']}" for bound in bounds]
            told += [f"{drawn['kernel_distance']:.4f} at {drawn['steps']}" for drawn in samples]
            print(kind, name, *told, sep=", ", flush=True)


if __name__ == "__main__":
    main()
