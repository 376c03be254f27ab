"""Reproduce the model of this repository from nothing: `python benchmarks/reproduce.py [preset]`, or `make reproduce`.

Says what it will take here; then trains, halves the weights' precision, calibrates, measures, writes the page, and says
how far the figures are from those of the model that is shipped. The same command goes on after a stop: training from
its last checkpoint, measuring from the images that are drawn.

With --model, a finished model is measured again and compared, and stays as it is.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from math import hypot
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.evaluation.config import RESULTS, EvaluationConfig
from ddpm_from_scratch.evaluation.config import parse as parse_evaluation
from ddpm_from_scratch.evaluation.evaluate import make_options
from ddpm_from_scratch.evaluation.measures import all_specs
from ddpm_from_scratch.hub.publish import CONFIG
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.errors import told
from ddpm_from_scratch.training import arguments
from ddpm_from_scratch.training.config import PRESETS, TrainingConfig
from ddpm_from_scratch.training.dry_run import TIMED_STEPS, seconds_per_call, time_steps
from ddpm_from_scratch.training.run import build

HERE = Path(__file__).parent
DDPM = ("-m", "ddpm_from_scratch.cli")
SHIPPED = HERE.parent / "models" / "ddpm-fashion-mnist"
# How the shipped model was measured. Of the long chain fewer images, since each takes twenty times as long.
EVALUATION = (
    "--num_inference_steps 50 10 20 1000 --num_images 5000 5000 5000 192 --size 112 224 --num_class_images 1000 "
    "--num_bound_images 10000 --num_terms 11"
)
KEPT = (RESULTS, CONFIG, "loss.png")  # of the folder of the training, beside the model


class Part(NamedTuple):
    """A part of the work."""

    name: str
    what: str
    do: Callable[[], object]
    seconds: float | None = None  # None: short, or unknown


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("preset", type=Path, nargs="?", default=PRESETS / "fashion_mnist.yaml")
    parser.add_argument("--model", type=Path, help="measure the model in this folder, instead of training one")
    parser.add_argument("--dataset_name", help="the training images, as for `ddpm train`; default: the preset's")
    parser.add_argument("--test_set", help="held-out images, as for `ddpm evaluate`; default: the split `test`")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs", "reproduced"), help="for all that is written"
    )
    parser.add_argument("--evaluation", default=EVALUATION, help=f"flags of `ddpm evaluate`; default: {EVALUATION}")
    parser.add_argument("--license", help="of the weights, for the page")
    parser.add_argument(
        "--reference", type=Path, default=SHIPPED, help="folder of the model to compare the figures with"
    )
    parser.add_argument("--plan_only", action="store_true", help="only say what it will take")
    return parser.parse_args(arguments)


# --- the parts -----------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[Part]:
    """What is to be done, with the time that the long parts will take here."""
    config, _ = arguments.parse([str(args.preset), *flags(dataset_name=args.dataset_name)])
    training, model = args.output_dir / "training", model_folder(args)
    overrides = flags(dataset_name=args.dataset_name, output_dir=training)
    data = flags(dataset_name=config.dataset_name)
    held_out = flags(test_set=args.test_set) or (flags(test_split="test") if config.dataset_name else [])
    places = flags(images_dir=args.output_dir / "images", output_dir=args.output_dir / "again" if args.model else None)
    evaluation = shlex.split(args.evaluation)
    calls = network_calls(parse_evaluation([str(model), *evaluation]), config.ddpm_num_steps or 1000)
    measuring = partial(command, *DDPM, "evaluate", model, *evaluation, *data, *held_out, *places)
    what = f"{calls:,} images through the network: {args.evaluation}"
    if args.model:
        return [Part("measure", what, measuring)]
    steps, training_seconds, seconds_per_image = timings(replace(config, output_dir=str(training)))
    return [
        Part(
            "train",
            f"{steps:,} steps",
            partial(command, *DDPM, "train", args.preset, *overrides),
            training_seconds,
        ),
        Part("halve", "the weights in half precision", partial(halve, training, model)),
        Part("calibrate", "the variances of few-step sampling", partial(command, *DDPM, "calibrate", model, *data)),
        Part("measure", what, measuring, calls * seconds_per_image),
        Part(
            "page",
            str(model / "README.md"),
            partial(command, *DDPM, "publish", model, "--page_only", *flags(license=args.license)),
        ),
    ]


def model_folder(args: argparse.Namespace) -> Path:
    """Where the model comes to lie, or lies."""
    config, _ = arguments.parse([str(args.preset)])
    return args.model or args.output_dir / Path(config.output_dir).name


def flags(**values: object) -> list[str]:
    """For a command line, of those that are not None."""
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def command(*arguments: object) -> None:
    """Run Python in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def timings(config: TrainingConfig) -> tuple[int, float, float]:
    """Steps that are left to train, the seconds that they take, and those of an image in the network, from a few."""
    run = build(config)
    left = run.total_steps - run.progress.step
    seconds = 0.0
    if left:
        seconds = time_steps(run, min(TIMED_STEPS, left)).typical * left
    return left, seconds, seconds_per_call(run) / config.eval_batch_size


def network_calls(evaluation: EvaluationConfig, num_terms: int) -> int:
    """How many images the network is given for an evaluation, if the bound has so many terms."""
    drawn = all_specs(make_options(evaluation, None))
    terms = evaluation.num_terms or num_terms
    return sum(one.num_images * one.num_inference_steps for one in drawn) + evaluation.num_bound_images * terms


def halve(trained: Path, model: Path) -> None:
    """Save a trained model with its weights in float16, half the bytes; the chain stays in float32 when it draws."""
    ScratchDDPMPipeline.from_pretrained(trained, dtype=torch.float16).save_pretrained(model)
    for name in KEPT:
        if (trained / name).is_file():
            shutil.copyfile(trained / name, model / name)


# --- beside the shipped model --------------------------------------------------------------------------------------


def estimates(results: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """The figures of an evaluation that have a standard error, with it."""
    evaluation = results["evaluation"]
    for sample in evaluation["samples"]:
        name = f"kernel distance, {sample['num_inference_steps']} steps, {sample['size']} px"
        yield name, sample["kernel_distance"], sample["kernel_distance_error"]
    if "classes" in evaluation:
        yield "accuracy of the classes", evaluation["classes"]["accuracy"], evaluation["classes"]["accuracy_error"]
    if (bound := evaluation.get("bound", {})).get("error"):
        yield "bits per dimension", bound["bits_per_dim"], bound["error"]


def compare(found: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """A line for every estimate that two evaluations share: both, and their difference in its standard errors."""
    known = {name: (value, error) for name, value, error in estimates(reference)}
    lines = []
    for name, value, error in estimates(found):
        if name in known:
            there, its_error = known[name]
            apart = abs(value - there) / hypot(error, its_error)
            lines.append(
                f"{name}: {value:.4f} ± {error:.4f}, shipped {there:.4f} ± {its_error:.4f}: {apart:.1f} standard errors"
            )
    return lines


# --- the run -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, do, compare."""
    args = parse(arguments)
    parts = plan(args)
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"On {device}, everything in {args.output_dir}:")
    for number, part in enumerate(parts, 1):
        takes = "" if part.seconds is None else f"; about {timedelta(seconds=round(part.seconds))}"
        print(f"{number}. {part.name}: {part.what}{takes}", flush=True)
    if args.plan_only:
        return
    for part in parts:
        print(f"{part.name} ...", flush=True)
        try:
            part.do()
        except subprocess.CalledProcessError as error:
            print(
                f"reproduce.py: {part.name} ended with code {error.returncode}; what it says is above. The same "
                "command goes on from here.",
                file=sys.stderr,
            )
            sys.exit(error.returncode)
    results = (args.output_dir / "again" if args.model else model_folder(args)) / RESULTS
    for line in compare(
        *(json.loads(path.read_text(encoding="utf-8")) for path in (results, args.reference / RESULTS))
    ):
        print(line)


if __name__ == "__main__":
    sys.exit(told(main, "reproduce", sys.argv[1:]))
