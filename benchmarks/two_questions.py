"""Answer two questions by experiment: why not predict x_0, and why not jump from x_T to x_0 at once?

    python benchmarks/two_questions.py predictions                     # four trainings: 40 minutes on 2 cores
    python benchmarks/two_questions.py jumps models/ddpm-fashion-mnist  # chains of 1 to 1000 steps: ten minutes

The trainings are those of `make train` but for what the network predicts: the same network, images, noise and timesteps
at every step. Models that are in --models_dir are not trained again. Each question has its results file and pictures,
from which `python docs/make_questions.py` makes docs/questions.md.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from few_steps import (
    METHODS,
    ROOT,
    SIZE,
    describe,
    distances,
    replace,
    replace_json,
    sample,
)
from learned_variance import images_of, load, training_facts

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data.config import EMBEDDED_TEST_SET
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.random_streams import generator
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.generate import to_unit_range
from ddpm_from_scratch.training.config import PRESETS

PRESET = PRESETS / "fashion_mnist_quick.yaml"
# What differs from the preset. The last one has the network of the second and the loss of the first.
PREDICTIONS = {
    "epsilon": {"prediction_type": "epsilon"},
    "x_0": {"prediction_type": "sample"},
    "v": {"prediction_type": "v_prediction"},
    "x_0, weighted as epsilon": {"prediction_type": "sample", "loss_weighting": "epsilon"},
}
STEPS = (1, 2, 5, 10, 50, 1000)
LONG = 100  # steps: of chains of more than these, fewer images are drawn
TIMESTEPS = (0, 1, 2, 5, 10, 20, 50, *range(100, 1000, 100), 950, 980, 990, 999)
PICTURES = 12  # of a row
TRAINING_IMAGES = 10_000  # the embedded ones, whose mean is taken
LENGTH = ("--max_train_steps=2000", "--train_batch_size=32", "--lr_warmup_steps=100", "--optimizer=adamw")
Numbers = dict[str, Any]


# --- why not predict x_0? ------------------------------------------------------------------------------------------


def train(name: str, folder: Path) -> None:
    """The quick preset's network with another prediction, by AdamW and in as many steps on every machine."""
    if (folder / "model_index.json").is_file():
        return print(f"{folder} is there", flush=True)
    script = [sys.executable, str(ROOT / "training" / "train.py"), str(PRESET)]
    chosen = [f"--{key}={value}" for key, value in PREDICTIONS[name].items()]
    subprocess.run([*script, *chosen, *LENGTH, "--logger=none", f"--output_dir={folder}"], check=True)


@torch.no_grad()
def errors(pipeline: ScratchDDPMPipeline, images: torch.Tensor, timesteps: Sequence[int]) -> list[Numbers]:
    """E‖x_0 - x̂_0(x_t)‖² / d, without clipping, with its standard error; the same noise for every network."""
    scheduler = ScratchDDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    rows = []
    for t in timesteps:
        noise = torch.randn(images.shape, generator=generator(0, "errors", t))
        x_t = scheduler.add_noise(images, noise, t)
        x_0 = scheduler.predict(pipeline.unet(x_t, t).sample, x_t, t).x_0
        squares = (x_0 - images).square().flatten(1).mean(1).double()
        standard_error = float(squares.std() / len(squares) ** 0.5)
        rows.append({"t": t, "error": float(squares.mean()), "standard_error": standard_error})
    return rows


def measure_prediction(name: str, folder: Path, reference: np.ndarray, args: argparse.Namespace) -> Numbers:
    """Errors and likelihood in float32, samples in bfloat16, which draws the same images twice as fast."""
    pipeline = ScratchDDPMPipeline.from_pretrained(folder)
    network = pipeline.unet.config
    form = network.in_channels, network.sample_size
    tests = to_unit_range(images_of(str(EMBEDDED_TEST_SET), max(args.num_error_images, args.num_bound_images), *form))
    found = errors(pipeline, tests[: args.num_error_images], args.timesteps)
    few = min(args.num_terms, len(pipeline.scheduler))
    bits = bits_per_dim(pipeline.unet, pipeline.scheduler, tests[: args.num_bound_images], num_terms=few)
    pipeline = load(folder, torch.bfloat16)
    images = sample(pipeline, args.num_inference_steps, args.num_images, name)
    replace(args.models_dir / f"{folder.name}.npz", partial(np.savez_compressed, images=images))
    return {
        "prediction": name,
        **distances(efficientnet_lite0_features(images, SIZE), reference),
        "bits_per_dim": float(bits.mean().total),
        "bits_per_dim_error": float(bits.standard_error().total),
        "errors": found,
        "model": training_facts(folder, pipeline),
    }


def predictions(args: argparse.Namespace) -> None:
    """Train with each prediction, and measure."""
    folders = {name: args.models_dir / name.replace(", ", "-").replace(" ", "-") for name in PREDICTIONS}
    for name, folder in folders.items():
        train(name, folder)
    pipeline = ScratchDDPMPipeline.from_pretrained(folders["v"])
    reference, floor = real_images(pipeline, args.num_images)
    results: Numbers = {
        **about(pipeline, args.num_images, floor),
        "num_inference_steps": args.num_inference_steps,
        "num_error_images": args.num_error_images,
        "num_bound_images": args.num_bound_images,
        "num_terms": args.num_terms,
        "alpha_bar": {str(t): float(pipeline.scheduler.alphas_cumprod[t]) for t in args.timesteps},
        "rows": [],
    }
    for name, folder in folders.items():
        results["rows"].append(measure_prediction(name, folder, reference, args))
        replace_json(args.results_dir / "predictions.json", results)
        print({key: value for key, value in results["rows"][-1].items() if key not in ("errors", "model")}, flush=True)
    drawn = {name: np.load(args.models_dir / f"{folder.name}.npz")["images"] for name, folder in folders.items()}
    draw_rows(drawn, args.figures_dir / "questions_predictions.png")


# --- why not jump from x_T to x_0 at once? -------------------------------------------------------------------------


def root_mean_square(differences: np.ndarray) -> float:
    """Over pixels and images."""
    return float(np.sqrt(np.square(differences).mean()))


def from_mean(images: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    """How far images [N, H, W] are from the mean of the data, and from their own: root mean squares, levels of 255."""
    return {
        "from_mean_of_data": root_mean_square(images - mean),
        "from_their_own_mean": root_mean_square(images - images.mean(0, dtype=np.float64)),
    }


def jumps(args: argparse.Namespace) -> None:
    """Sample one model in few and many steps, and measure."""
    pipeline = load(args.model, torch.bfloat16)
    network, config = pipeline.unet.config, pipeline.scheduler.config
    reference, floor = real_images(pipeline, args.num_images)
    data = images_of(None, TRAINING_IMAGES, network.in_channels, network.sample_size)[..., 0]
    mean = data.mean(0, dtype=np.float64)
    results: Numbers = {
        **about(pipeline, args.num_images, floor | from_mean(data, mean)),
        "training_images": len(data),
        "model": describe(args.model, pipeline),
        "rows": [],
    }
    drawn = {}
    for steps in args.steps:
        pipeline.scheduler = METHODS["fixed_small"](config)
        count = args.num_images if steps <= LONG else min(args.num_images, args.num_images_of_long)
        images = sample(pipeline, steps, count, f"{steps} steps")
        found = distances(efficientnet_lite0_features(images, SIZE), reference[:count])
        results["rows"].append({"steps": steps, "num_images": count, **found, **from_mean(images, mean)})
        replace_json(args.results_dir / "jumps.json", results)
        print(results["rows"][-1], flush=True)
        drawn["1 step" if steps == 1 else f"{steps} steps"] = images
    average = np.repeat(mean.round().astype(np.uint8)[None], PICTURES, axis=0)
    draw_rows({"mean of the data": average} | drawn | {"data": data}, args.figures_dir / "questions_jumps.png")


# --- both ----------------------------------------------------------------------------------------------------------


def real_images(pipeline: ScratchDDPMPipeline, count: int) -> tuple[np.ndarray, dict[str, float]]:
    """Features of training images, and the distances of as many others from them."""
    network = pipeline.unet.config
    real = images_of(None, 2 * count, network.in_channels, network.sample_size)
    reference, others = np.split(efficientnet_lite0_features(real, SIZE), 2)
    return reference, distances(others, reference)


def about(pipeline: ScratchDDPMPipeline, count: int, real: Mapping[str, float]) -> Numbers:
    """What was measured with."""
    return {
        "device": device_name(pipeline.device),
        "num_images": count,
        "features": {"network": "EfficientNet-Lite0", "size": SIZE},
        "real": dict(real),
        "versions": versions(),
    }


def draw_rows(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """The first images uint8 [N, H, W] of each kind, in a row with its title."""
    figure = matplotlib.figure.Figure(figsize=(9.6, 0.68 * len(rows)), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        axes.imshow(np.concatenate(list(images[:PICTURES]), axis=1), cmap="gray", vmin=0, vmax=255)
        axes.set_ylabel(title.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    replace(path, partial(figure.savefig, format="png", dpi=100))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    questions = parser.add_subparsers(required=True)
    first = questions.add_parser("predictions", help="why not predict x_0?")
    first.add_argument("--models_dir", type=Path, default=ROOT / "outputs" / "predictions")
    first.add_argument("--num_images", type=int, default=1000, help="generated, and real ones as reference")
    first.add_argument("--num_inference_steps", type=int, default=50)
    first.add_argument("--num_error_images", type=int, default=256, help="of the test set, for the errors at each t")
    first.add_argument("--num_bound_images", type=int, default=128, help="of the test set, for bits/dim")
    first.add_argument("--num_terms", type=int, default=100, help="terms of the bound drawn for an image")
    first.add_argument("--timesteps", type=int, nargs="+", default=TIMESTEPS)
    first.set_defaults(answer=predictions)
    second = questions.add_parser("jumps", help="why not jump from x_T to x_0 at once?")
    second.add_argument("model", type=Path, help="folder of a saved pipeline of gray images")
    second.add_argument("--num_images", type=int, default=500, help="generated, and real ones as reference")
    second.add_argument("--num_images_of_long", type=int, default=100, help=f"of chains of more than {LONG} steps")
    second.add_argument("--steps", type=int, nargs="+", default=STEPS)
    second.set_defaults(answer=jumps)
    for question in (first, second):
        question.add_argument("--results_dir", type=Path, default=ROOT / "docs" / "results")
        question.add_argument("--figures_dir", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args(arguments)
    if "model" in args and not (args.model / "model_index.json").is_file():
        raise FileNotFoundError(f"{args.model} has no model_index.json: pass the folder of a saved pipeline.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer one of the questions."""
    args = parse(arguments)
    args.answer(args)


if __name__ == "__main__":
    main()
