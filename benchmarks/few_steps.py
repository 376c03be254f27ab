"""Measure samplers of one trained model at few and many steps: distances of their images to real ones.

    python benchmarks/few_steps.py MODEL [--num_images 1000] [--steps 5 10 20 50 100 1000] [--methods ...]

Images go to --samples_dir; those that are there already are not sampled again, so that a stopped run goes on. (Delete
those of `optimal` and `analytic_ddim` after another calibration of the same network.) The results are written after
every cell, beside those of earlier runs on as many images of the same model, and `python docs/make_few_steps.py` makes
docs/few_steps.md of them.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from tqdm import tqdm

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.data.config import EMBEDDED_TEST_SET
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.evaluation import likelihood as likelihood
from ddpm_from_scratch.evaluation.calibration import calibrate
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from ddpm_from_scratch.evaluation.metrics import frechet_distance, kernel_distance_with_error
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling import samplers
from ddpm_from_scratch.sampling.generate import to_unit_range
from ddpm_from_scratch.training.config import TrainingConfig

ROOT = Path(__file__).parents[1]


def solver(kind: type[SchedulerMixin], config: Mapping[str, Any]) -> SchedulerMixin:
    """One of diffusers' solvers, on the process of a configuration."""
    return samplers.solver(kind, ScratchDDPMScheduler.from_config(config))


# From the configuration of the model's scheduler to that of a method. Each of them calls the network once a step.
scratch = ScratchDDPMScheduler.from_config
METHODS: dict[str, Callable[[Mapping[str, Any]], SchedulerMixin]] = {
    "fixed_small": partial(scratch, variance_type="fixed_small", eta=1.0, optimal_variance=False),
    "fixed_small_linspace": partial(
        scratch, variance_type="fixed_small", eta=1.0, optimal_variance=False, timestep_spacing="linspace"
    ),
    "fixed_large": partial(scratch, variance_type="fixed_large", eta=1.0, optimal_variance=False),
    "optimal": partial(scratch, eta=1.0, optimal_variance=True),
    "ddim": partial(scratch, eta=0.0, optimal_variance=False),
    "analytic_ddim": partial(scratch, eta=0.0, optimal_variance=True),
    "dpmsolver++": partial(solver, DPMSolverMultistepScheduler),
    "unipc": partial(solver, UniPCMultistepScheduler),
}
CALIBRATED = ("optimal", "analytic_ddim")  # need x_0_mse
STEPS = (5, 10, 20, 50, 100, 1000)

# Chains whose variational bound is measured, from t = T - 1 to 0.
BOUNDS: dict[str, Callable[[Mapping[str, Any]], ScratchDDPMScheduler]] = {
    "fixed_small": partial(
        scratch, variance_type="fixed_small", eta=1.0, optimal_variance=False, timestep_spacing="linspace"
    ),
    "fixed_large": partial(
        scratch, variance_type="fixed_large", eta=1.0, optimal_variance=False, timestep_spacing="linspace"
    ),
    "optimal": partial(scratch, eta=1.0, optimal_variance=True, timestep_spacing="linspace"),
    "optimal_chosen": partial(scratch, eta=1.0, optimal_variance=True, timestep_choice="likelihood"),
}
BOUND_STEPS = (5, 10, 20, 50, 100)
BOUND_IMAGES = 200  # of the embedded test images

# What the images depend on besides the network, the method and its steps.
SCHEDULER_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_spacing",
    "steps_offset",
    "timestep_choice",
)
PRECISION = torch.bfloat16  # of the network
BATCH = 100  # images sampled at once
CALIBRATION_IMAGES = 512
SUBSETS = 10  # over which the standard error is estimated
SIZE = 112  # side of the images in pixels that the extractor sees
Distances = dict[str, float]


# --- images --------------------------------------------------------------------------------------------------------


def replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, then move it there: it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    with unfinished.open("wb") as file:
        write(file)
    unfinished.replace(path)


def replace_json(path: Path, values: Mapping[str, Any]) -> None:
    """Readable, with a final newline; whole or absent."""
    replace(path, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))


def identity(model: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one model's images from another's: the hash of the weights, and the scheduler's configuration."""
    digest = hashlib.sha256()
    for path in sorted((model / "unet").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return {"unet_sha256": digest.hexdigest(), "scheduler": {key: config[key] for key in SCHEDULER_KEYS}}


def claim(samples_dir: Path, model: Mapping[str, Any]) -> None:
    """Mark a folder as that of a model's images.

    Raises:
        ValueError: it holds those of another model, or of an unknown one.
    """
    mark = samples_dir / "model.json"
    if mark.is_file():
        found = json.loads(mark.read_text(encoding="utf-8"))
        differ = [key for key, value in model.items() if found.get(key) != value]
        if differ:
            raise ValueError(
                f"{samples_dir} holds images of another model (see {mark}: {', '.join(differ)}). "
                "Choose another --samples_dir."
            )
    elif any(samples_dir.glob("*.npz")):
        raise ValueError(
            f"{samples_dir} holds images, but no model.json that says whose. Choose another --samples_dir."
        )
    else:
        replace_json(mark, model)


def cached(path: Path, num_images: int) -> np.ndarray | None:
    """The first num_images of a file, or None if it is not there or has fewer."""
    if not path.is_file():
        return None
    images: np.ndarray = np.load(path)["images"]
    return images[:num_images] if len(images) >= num_images else None


def sample(pipeline: ScratchDDPMPipeline, steps: int, num_images: int, name: str) -> np.ndarray:
    """Images uint8 [N, H, W] (gray) or [N, H, W, C]; image number i is drawn from the seed i."""
    batches = []
    for first in tqdm(range(0, num_images, BATCH), desc=name):
        seeds = range(first, min(first + BATCH, num_images))
        images, *_ = pipeline(
            batch_size=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            output_type="np",
            return_dict=False,
        )
        batches.append((images * 255).round().astype(np.uint8))
    images = np.concatenate(batches)
    return images[..., 0] if images.shape[3] == 1 else images


# --- distances -----------------------------------------------------------------------------------------------------


def distances(features: np.ndarray, reference: np.ndarray) -> Distances:
    """Of two sets of N features; the standard error of the kernel distance from disjoint subsets of both."""
    # No seed: the rows are in no order, or the classes take turns.
    kernel = kernel_distance_with_error(features, reference, num_subsets=SUBSETS, seed=None)
    return {
        "kernel_distance": kernel.value,
        "kernel_distance_error": kernel.error,
        "frechet_distance": frechet_distance(features, reference),
    }


def bits_per_dim(unet: ScratchUNet2DModel, scheduler: ScratchDDPMScheduler, images: torch.Tensor) -> torch.Tensor:
    """The variational bound of a scheduler's chain in bits per dimension: [N], float32."""
    chain = scheduler.timesteps.tolist()
    return likelihood.bits_per_dim(unet.eval(), scheduler, images, timesteps=chain, batch_size=BATCH).total.float()


def measure_bounds(unet: ScratchUNet2DModel, config: Mapping[str, Any], images: torch.Tensor) -> list[dict[str, Any]]:
    """The mean bound over images with its standard error, for every chain and number of steps."""
    rows = []
    for name, make in BOUNDS.items():
        scheduler = make(config)
        for steps in BOUND_STEPS:
            scheduler.set_timesteps(steps)
            bits = bits_per_dim(unet, scheduler, images)
            error = float(bits.std() / len(bits) ** 0.5)
            rows.append({"chain": name, "steps": steps, "bits_per_dim": float(bits.mean()), "error": error})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def earlier(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The rows and bounds of an earlier run that measured the same: the same model, numbers of images and features."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found.get(key) == results[key] for key in ("unet_sha256", "num_images", "features", "precision"))
    return {key: found[key] for key in ("rows", "num_bound_images", "bounds") if same and key in found}


def describe(model: Path, pipeline: ScratchDDPMPipeline) -> dict[str, Any]:
    """The model's name and size; how long it was trained, if the training script says so beside it."""
    results = model / "results.json"
    trained = json.loads(results.read_text(encoding="utf-8"))["steps"] if results.is_file() else None
    return {
        "name": model.resolve().name,
        "parameters": sum(weight.numel() for weight in pipeline.unet.parameters()),
        "training_steps": trained,
    }


# --- the run -------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a saved pipeline")
    parser.add_argument("--num_images", type=int, default=1000, help="generated, and real ones as reference")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS))
    parser.add_argument("--no_bounds", action="store_true", help="leave the variational bounds out")
    parser.add_argument("--samples_dir", type=Path, default=ROOT / "outputs" / "few_steps")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "few_steps.json")
    return parser.parse_args(arguments)


def check(num_images: int, available: int, steps: Sequence[int], train_steps: int) -> None:
    """Raise ValueError for numbers that do not fit the data or the chain."""
    least = 2 * SUBSETS
    if not least <= num_images <= available // 2:
        raise ValueError(
            f"--num_images {num_images}: from {least} to {available // 2} are allowed, since the distance between two "
            f"sets of real images is measured too, and there are {available}."
        )
    wrong = [count for count in steps if not 1 <= count <= train_steps]
    if wrong:
        raise ValueError(f"--steps {wrong[0]}: the model's chain has {train_steps} steps.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample what is missing, and measure."""
    args = parse(arguments)
    if not (args.model / "model_index.json").is_file():
        raise FileNotFoundError(f"{args.model} has no model_index.json: pass the folder of a saved pipeline.")
    pipeline = ScratchDDPMPipeline.from_pretrained(args.model, dtype=PRECISION)
    unet, config = pipeline.unet, pipeline.scheduler.config
    data = load_data(TrainingConfig(), unet.config.in_channels, unet.config.sample_size)
    check(args.num_images, len(data.images), args.steps, config["num_train_timesteps"])
    model = identity(args.model, config)
    claim(args.samples_dir, model)

    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    embedded = torch.stack([data.images[index] for index in range(max(2 * args.num_images, CALIBRATION_IMAGES))])
    real = embedded.permute(0, 2, 3, 1).numpy()
    paths = {
        (method, steps): args.samples_dir / f"{method}-{steps}.npz" for steps in args.steps for method in args.methods
    }
    missing = [method for (method, _), path in paths.items() if cached(path, args.num_images) is None]
    calibrated = bool(set(missing) & set(CALIBRATED)) or not args.no_bounds
    if calibrated and config["x_0_mse"] is None:
        config = calibrate(unet, pipeline.scheduler, to_unit_range(real[:CALIBRATION_IMAGES])).config
    if missing or not args.no_bounds:
        unet.to(memory_format=torch.channels_last)
        unet.compile()
        pipeline(batch_size=min(BATCH, args.num_images), num_inference_steps=1)  # compiles, which is not to be timed

    reference, others = np.split(efficientnet_lite0_features(real[: 2 * args.num_images], SIZE), 2)
    results: dict[str, Any] = {
        "num_images": args.num_images,
        "features": {"network": "EfficientNet-Lite0", "size": SIZE},
        "floor": distances(others, reference),
        "device": device_name(pipeline.device),
        "precision": str(PRECISION).removeprefix("torch."),
        "versions": versions(),
        "model": describe(args.model, pipeline),
        "unet_sha256": model["unet_sha256"],
        "rows": [],
    }
    results |= earlier(args.results, results)
    if not args.no_bounds:
        test_set = TrainingConfig(dataset_name=str(EMBEDDED_TEST_SET))
        tests = load_data(test_set, unet.config.in_channels, unet.config.sample_size).images
        held_out = torch.stack([tests[index] for index in range(BOUND_IMAGES)]).float() / 127.5 - 1
        bounds = measure_bounds(unet, config, held_out.to(pipeline.device))
        results |= {"num_bound_images": BOUND_IMAGES, "bounds": bounds}
    for (method, steps), path in paths.items():
        images, seconds = cached(path, args.num_images), None
        if images is None:
            pipeline.scheduler = METHODS[method](config)
            start = time.perf_counter()
            images = sample(pipeline, steps, args.num_images, path.stem)
            seconds = time.perf_counter() - start
            replace(path, partial(np.savez_compressed, images=images))
        row = {
            "method": method,
            "steps": steps,
            "network_calls": steps,
            **distances(efficientnet_lite0_features(images, SIZE), reference),
            "seconds": seconds,
        }
        kept = [other for other in results["rows"] if (other["method"], other["steps"]) != (method, steps)]
        results["rows"] = sorted([*kept, row], key=lambda r: (r["steps"], list(METHODS).index(r["method"])))
        replace_json(args.results, results)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
