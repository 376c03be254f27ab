"""Draw figures of docs/theory.md and docs/questions.md with this project's code, and write the numbers quoted there.

    python docs/make_figures.py [--only NAME ...]

Pictures go to docs/figures/, numbers to docs/results/figures.json. Everything is seeded: the same machine with the same
versions draws the same bytes again. All of it takes some minutes on a CPU.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import drawings
import matplotlib
import numpy as np
import torch
from drawings import STYLE, Drawn, Schedulers
from torch import Tensor

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data.config import EMBEDDED_TEST_SET, DataConfig
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.diffusion.schedules import BETA_SCHEDULES
from ddpm_from_scratch.diffusion.tensors import mean_of_sample
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import version, versions
from pages import load_script

DOCS = Path(__file__).parent
ROOT = DOCS.parent

points = load_script(ROOT / "examples" / "points.py")
jump = load_script(ROOT / "examples" / "jump.py")  # which imports points
MODEL = ROOT / "models" / "ddpm-fashion-mnist"
POINT_STEPS, NUM_POINTS = 5000, 2000
JUMP_STEPS = 3000  # of training and of tuning


# --- what is drawn ---------------------------------------------------------------------------------------------------


@functools.cache
def shipped() -> ScratchDDPMPipeline:
    """The model in models/, in float32."""
    pipeline = ScratchDDPMPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def held_out(count: int) -> Tensor:
    """The first embedded test images, in [-1, 1]: [N, 1, H, W]."""
    images = load_data(DataConfig(dataset_name=str(EMBEDDED_TEST_SET)), 1, 28).images
    return torch.stack([images[index] for index in range(count)]).float() / 127.5 - 1


def linear_and_cosine() -> Schedulers:
    """DDPM's schedule and iDDPM's."""
    return {"linear": ScratchDDPMScheduler(), "cosine": ScratchDDPMScheduler(beta_schedule="squaredcos_cap_v2")}


def forward() -> Drawn:
    """A shoe turns into noise."""
    x_0 = held_out(1)[0]
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    return drawings.forward(x_0, noise, linear_and_cosine(), (0, 50, 100, 200, 400, 600, 800, 999))


def schedules() -> Drawn:
    """All of them, and the linear one with nothing of the data left at the end, where epsilon would not do."""
    schedulers = {name: ScratchDDPMScheduler(beta_schedule=name) for name in BETA_SCHEDULES}
    rescaled = ScratchDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    return drawings.schedules({**schedulers, "linear, zero terminal SNR": rescaled})


def posterior() -> Drawn:
    """Of the same two schedules."""
    return drawings.posterior(linear_and_cosine())


@torch.no_grad()
def prediction_errors(
    unet: Any,  # noqa: ANN401
    scheduler: ScratchDDPMScheduler,
    images: Tensor,
    times: Sequence[int],
    seed: int = 0,
) -> dict[str, Tensor]:
    """Squared errors of what the network says of ε, x_0 and v, not clipped, mean over the dimensions: [K, N] each."""
    free = ScratchDDPMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
    classes = unet.config.get("num_class_embeds")
    labels = {} if classes is None else {"class_labels": torch.full((len(images),), classes - 1)}  # the null label
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, list[Tensor]] = {"epsilon": [], "x_0": [], "v": []}
    for t in times:
        noise = torch.randn(images.shape, generator=generator)
        x_t = free.add_noise(images, noise, t)
        predicted = free.predict(unet(x_t, torch.full((len(images),), t), **labels).sample, x_t, t)
        v, true_v = free.get_velocity(predicted.x_0, predicted.epsilon, t), free.get_velocity(images, noise, t)
        pairs = ((predicted.epsilon, noise), (predicted.x_0, images), (v, true_v))
        for kept, (found, true) in zip(errors.values(), pairs, strict=True):
            kept.append(mean_of_sample((found - true) ** 2))
    return {name: torch.stack(kept) for name, kept in errors.items()}


def loss() -> Drawn:
    """40 timesteps, closer together towards both ends of the chain, where the errors change fast."""
    pipeline = shipped()
    last = len(pipeline.scheduler) - 1
    times = np.unique((last * (1 - np.cos(np.pi * np.linspace(0, 1, 40))) / 2).round().astype(int)).tolist()
    return drawings.loss(prediction_errors(pipeline.unet, pipeline.scheduler, held_out(64), times), times)


def bound() -> Drawn:
    """All terms for a few images."""
    pipeline = shipped()
    return drawings.bound(bits_per_dim(pipeline.unet, pipeline.scheduler, held_out(8), progress=False))


def chain() -> Drawn:
    """Two images in 1000 steps, of no class in particular."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return drawings.chain(shipped()(2, generators, output_type="np", return_trajectory=9).trajectory)


def points_there_and_back() -> Drawn:
    """The S-curve of examples/points.py, and how far the clouds of the chain are from those of q."""
    torch.manual_seed(0)
    scheduler, network = ScratchDDPMScheduler(clip_sample=False), points.NoiseNetwork()
    losses = points.train(network, scheduler, POINT_STEPS)
    reverse = points.sample(network, scheduler, NUM_POINTS)
    times = (50, 150, 350, 999)
    clouds = [forward_clouds(points.s_curve(NUM_POINTS), scheduler, times) for _ in range(2)]
    drawn = drawings.points(clouds[0], {t: reverse[t] for t in clouds[0]})
    numbers = {
        "training_steps": POINT_STEPS,
        "last_loss": float(np.mean(losses[-100:])),
        "distance": [points.distance(reverse[t], cloud) for t, cloud in clouds[0].items()],
        "distance_of_other_data": [points.distance(clouds[1][t], cloud) for t, cloud in clouds[0].items()],
        "distance_of_noise": points.distance(reverse[999], clouds[0][-1]),
    }
    return drawn._replace(numbers={**drawn.numbers, **numbers})


def forward_clouds(x_0: Tensor, scheduler: ScratchDDPMScheduler, times: Sequence[int]) -> dict[int, Tensor]:
    """The data, as t = -1, and x_t of it at some times, with one noise."""
    noise = torch.randn_like(x_0)
    return {-1: x_0} | {t: scheduler.add_noise(x_0, noise, t) for t in times}


def points_in_few_steps() -> Drawn:
    """The S-curve by the network of examples/jump.py, before it is tuned and after, and the distances from the data."""
    torch.manual_seed(0)
    scheduler, network = ScratchDDPMScheduler(**jump.PROCESS), jump.NoiseNetwork()
    data, others = jump.s_curve(NUM_POINTS), jump.s_curve(NUM_POINTS)
    rows = {}
    for name, learn in {"as trained": jump.train, "tuned": jump.tune}.items():
        learn(network, scheduler, JUMP_STEPS)
        rows[name] = {steps: jump.jumps(network, scheduler, steps, NUM_POINTS) for steps in (1, 2, 4)}
    drawn = drawings.jumps(rows, data)
    numbers = {
        "training_steps": JUMP_STEPS,
        "distance": {name: [jump.distance(cloud, data) for cloud in row.values()] for name, row in rows.items()},
        "distance_of_other_data": jump.distance(others, data),
    }
    return drawn._replace(numbers={**drawn.numbers, **numbers})


FIGURES: dict[str, Callable[[], Drawn]] = {
    "theory_forward": forward,
    "theory_schedules": schedules,
    "theory_posterior": posterior,
    "theory_loss": loss,
    "theory_bound": bound,
    "theory_chain": chain,
    "theory_points": points_there_and_back,
    "questions_points": points_in_few_steps,
}


# --- the command -----------------------------------------------------------------------------------------------------


def make(name: str, folder: Path) -> dict[str, Any]:
    """Draw a figure into a folder; its numbers, and the seconds that it took."""
    start = time.perf_counter()
    with matplotlib.rc_context(STYLE):
        figure, numbers = FIGURES[name]()
        drawings.save(figure, folder / f"{name}.png")
    return {"seconds": round(time.perf_counter() - start, 1), **numbers}


def surroundings() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "device": device_name(torch.device("cpu")),
        "versions": versions() | {"matplotlib": version("matplotlib")},
        "model": MODEL.name,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what is asked for.

    Raises:
        ValueError: other figures, which are to be kept, come from another device or other versions.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=tuple(FIGURES), choices=tuple(FIGURES), metavar="NAME")
    parser.add_argument("--figures", type=Path, default=DOCS / "figures", help="folder of the pictures")
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "figures.json")
    args = parser.parse_args(arguments)
    results = surroundings()
    earlier = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else {"figures": {}}
    kept = {name: numbers for name, numbers in earlier["figures"].items() if name not in args.only}
    if kept and any(earlier[key] != value for key, value in results.items()):
        raise ValueError(f"{args.results} is from another device or other versions: make all figures, without --only.")
    made = {}
    for name in args.only:
        made[name] = make(name, args.figures)
        print(f"{name}: {made[name]['seconds']} s", flush=True)
    figures = kept | made
    results["figures"] = {name: figures[name] for name in FIGURES if name in figures}
    args.results.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
