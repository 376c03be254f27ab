"""Train our default recipe and the usual one for equal times, and measure their samples on the way.

    python benchmarks/time_to_quality.py [--minutes 10] [--short 2] [--num_images 500]

The network, data and machine are the same. Ours is the quick preset by `training/train.py`'s own parts, once with a
length that takes --short minutes and once with one that takes --minutes: its learning rate rises in the first twentieth
of a run and falls to zero at the end. The usual recipe is diffusers' network and scheduler in float32, batches of 16,
AdamW at 1e-4 after a warm-up of 500 steps; its images are in memory. Its average has a clock of its own, which counts
the updates too, so that the weights without average are not charged for them.

The recipes take turns of some seconds each, so that what else the machine does falls on all alike. Samples are drawn
after the training: 20 steps of DPM-Solver++, the same for all. Results are written to --results, from which
`python docs/make_speed.py` makes its table and figure.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UNet2DModel
from diffusers.training_utils import EMAModel
from few_steps import ROOT, replace_json, solver
from torch import Tensor
from torch.nn import functional as F

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchUNet2DModel
from ddpm_from_scratch.data.arrays import to_unit_range
from ddpm_from_scratch.data.config import EMBEDDED_TEST_SET
from ddpm_from_scratch.data.dataset import TrainingData, load_data
from ddpm_from_scratch.evaluation.features import extract
from ddpm_from_scratch.evaluation.measures import to_array
from ddpm_from_scratch.evaluation.metrics import kernel_distance_with_error
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.generate import SampleSpec, generate
from ddpm_from_scratch.training.arguments import parse
from ddpm_from_scratch.training.config import PRESETS, TrainingConfig
from ddpm_from_scratch.training.loop import advance, passes_from, train_step
from ddpm_from_scratch.training.run import Run, build
from ddpm_from_scratch.training.validation import ValidationSet, build_validation_set

RESULTS = ROOT / "docs" / "results"
PRESET = PRESETS / "fashion_mnist_quick.yaml"
MARKS = (0.25, 0.5, 1.0)  # of a run's length: when its weights are measured
TURN = 10.0  # seconds
WARM_UP_SHARE = 0.05
TRIAL = 20  # steps from which the length of ours is found
STEPS = 20  # of the sampler
# The recipe of diffusers' example script, without its cosine over 100 epochs.
BATCH, WARM_UP = 16, 500
ADAMW = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
AVERAGE = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}


@dataclass
class Snapshot:
    """The weights at some time of a run."""

    recipe: str
    seconds: float  # of training, until then
    step: int
    weights: dict[str, Tensor]
    scheduler: SchedulerMixin


@dataclass
class Recipe:
    """A run that can be continued for some time, and what was kept of it."""

    name: str
    length: float  # in seconds, or in steps if its learning rate ends with a number of them
    in_steps: bool
    step: Callable[[], object]
    weights: Callable[[], dict[str, Tensor]]
    scheduler: SchedulerMixin
    seconds: float = 0.0
    steps: int = 0
    snapshots: list[Snapshot] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all snapshots are taken."""
        return len(self.snapshots) == len(MARKS)

    def go_on(self, seconds: float) -> None:
        """Train for some time, and keep the weights where a mark is passed."""
        until = self.seconds + seconds
        while self.seconds < until and not self.finished:
            start = time.perf_counter()
            self.step()
            self.steps += 1
            self.count(time.perf_counter() - start)

    def count(self, seconds: float) -> None:
        """Advance the clock."""
        self.seconds += seconds
        done = (self.steps if self.in_steps else self.seconds) / self.length
        if not self.finished and done >= MARKS[len(self.snapshots)]:
            copies = {name: weight.detach().clone() for name, weight in self.weights().items()}
            self.snapshots.append(Snapshot(self.name, self.seconds, self.steps, copies, self.scheduler))
            print(f"{self.name}: {self.seconds:.0f} s, {self.steps} steps", flush=True)


def our_recipe(minutes: float, seconds_per_step: float, folder: Path) -> tuple[Recipe, Run]:
    """The quick preset with as many steps as fit into the time."""
    steps = round(60 * minutes / seconds_per_step)
    run = build_run(folder, steps)
    batches = passes_from(run, 0)
    run.unet.train()

    name = f"ours, a run of {minutes:g} minutes"
    return Recipe(name, steps, True, lambda: advance(run, batches), run.eval_unet.state_dict, run.scheduler), run


def build_run(folder: Path, steps: int) -> Run:
    """A run of our script, with the same share of warm-up whatever its length."""
    flags = {
        "max_train_steps": steps,
        "lr_warmup_steps": round(WARM_UP_SHARE * steps),
        "logger": "none",
        "output_dir": folder,
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    config, _ = parse([str(PRESET), *arguments, "--resume_from_checkpoint=null"])
    return build(config)


def trial(folder: Path) -> float:
    """Seconds that a step of ours takes."""
    run = build_run(folder, 2 * TRIAL)
    batches = passes_from(run, 0)
    for number in range(2 * TRIAL):
        if number == TRIAL:
            start = time.perf_counter()
        train_step(run, batches, number)
    return (time.perf_counter() - start) / TRIAL


def usual_recipes(minutes: float, config: dict[str, Any], data: TrainingData) -> list[Recipe]:
    """The usual recipe, without and with an average of the weights: one run, whose step the first of the two does."""
    torch.manual_seed(0)
    unet = UNet2DModel(**config).train()
    average = EMAModel(unet.parameters(), **AVERAGE)
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), **ADAMW)  # type: ignore[arg-type]
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    batches = shuffled(torch.stack([data.images[index] for index in range(len(data.images))]))

    def step() -> None:
        x_0 = to_unit_range(next(batches))
        noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (BATCH,))
        F.mse_loss(unet(scheduler.add_noise(x_0, noise, t), t).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()

    def averaged() -> dict[str, Tensor]:
        names = [name for name, _ in unet.named_parameters()]
        return dict(zip(names, average.shadow_params, strict=True))

    title = f"usual, {minutes:g} minutes"
    usual = Recipe(title, 60 * minutes, False, step, unet.state_dict, scheduler)
    with_average = Recipe(f"{title}, with an average", 60 * minutes, False, lambda: None, averaged, scheduler)

    def both() -> None:
        start = time.perf_counter()
        step()
        trained = time.perf_counter()
        average.step(unet.parameters())
        with_average.steps += 1
        with_average.count(time.perf_counter() - start)
        usual.seconds -= time.perf_counter() - trained  # `go_on` counts it all

    usual.step = both
    return [usual, with_average]


def shuffled(images: Tensor) -> Iterator[Tensor]:
    """Batches of the images, in a new order each time through."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for indices in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(indices) == BATCH:
                yield images[indices]


def train_all(recipes: Sequence[Recipe]) -> list[Snapshot]:
    """Every recipe to its end, in turns."""
    while not all(recipe.finished for recipe in recipes):
        for recipe in recipes:
            recipe.go_on(TURN)
    return [snapshot for recipe in recipes for snapshot in recipe.snapshots]


def measure(snapshot: Snapshot, run: Run, validation_set: ValidationSet, drawing: SampleSpec) -> dict[str, Any]:
    """The kernel distance of the images that a snapshot draws."""
    unet = ScratchUNet2DModel(**run.trained_unet.config).eval()
    unet.load_state_dict(snapshot.weights)
    pipeline = ScratchDDPMPipeline(unet, solver(DPMSolverMultistepScheduler, snapshot.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    with run.accelerator.autocast():
        images = generate(pipeline, drawing, run.accelerator, progress=False)
    kernel = kernel_distance_with_error(extract(images).values, validation_set.reference.values)
    found = {
        "recipe": snapshot.recipe,
        "seconds": snapshot.seconds,
        "steps": snapshot.step,
        "kernel_distance": kernel.value,
        "kernel_distance_error": kernel.error,
    }
    print(found, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--short", type=float, default=2)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--results", type=Path, default=RESULTS / "time_to_quality.json")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds = trial(Path(folder))
        ours = [our_recipe(minutes, seconds, Path(folder)) for minutes in (args.short, args.minutes)]
    run = ours[0][1]
    data = run.data
    usual = usual_recipes(args.minutes, dict(run.trained_unet.config), data)
    # The average's clock runs in the other's step.
    snapshots = train_all([*(recipe for recipe, _ in ours), usual[0]]) + usual[1].snapshots
    validation_set = build_validation_set(TrainingConfig(eval_num_images=args.num_images), data)
    tests = load_data(TrainingConfig(dataset_name=str(EMBEDDED_TEST_SET)), data.channels, data.size)
    real = to_array([tests.images[index] for index in tests.evenly(args.num_images)], data.size)
    floor = kernel_distance_with_error(extract(real).values, validation_set.reference.values)
    drawing = SampleSpec(STEPS, args.num_images, batch_size=100)
    result = {
        "device": device_name(run.accelerator.device),
        "num_images": args.num_images,
        "parameters": run.trained_unet.num_parameters(),
        "sampler_steps": STEPS,
        "floor": {"kernel_distance": floor.value, "kernel_distance_error": floor.error},
        "points": [measure(snapshot, run, validation_set, drawing) for snapshot in snapshots],
        "versions": versions(),
    }
    replace_json(args.results, result)
    print(args.results)


if __name__ == "__main__":
    main()
