"""Measure recipes for small budgets: the kernel distance after the same number of images seen.

    python benchmarks/recipes.py [ROW ...] [--images_seen 20000]   # 20 minutes for each row and core
    python benchmarks/recipes.py --speeds                          # with nothing else running: images/s of each row

A row is the baseline with some flags of `ddpm train` changed. It trains on the embedded images in a process of its own
with one thread, so that as many rows can be measured at a time as there are cores, by a command for each; what else the
machine does changes the times alone. Rows that are there already are not measured again, and one that was stopped goes
on. Results are added to docs/results/recipes.json, of which `python docs/make_training.py` makes the table of
docs/training.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would hold up whatever else runs

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from few_steps import ROOT, distances, replace_json
from own_images import FEATURE_SIZE, SAMPLER, measure, processor

from ddpm_from_scratch.data.config import EMBEDDED_DATA, EMBEDDED_TEST_SET, DataConfig
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from ddpm_from_scratch.runtime.devices import device_name, keep_freed_memory
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.generate import SampleSpec
from ddpm_from_scratch.training.arguments import parse as parse_training
from ddpm_from_scratch.training.loop import passes_from, train_step
from ddpm_from_scratch.training.run import build

RESULTS = ROOT / "docs" / "results" / "recipes.json"
STEPS, NUM_IMAGES = 20, 1000  # of SAMPLER, drawn by each
WARM_UP = 0.05  # of a run
TIMED, ROUNDS = 2, 5  # steps of a turn, turns
Numbers = dict[str, Any]

# The network, objective and average of the quick preset, with AdamW; the rows say what is changed of it.
BASELINE: Numbers = {"optimizer": "adamw", "train_batch_size": 16, "learning_rate": 1e-3}
MUON: Numbers = {"optimizer": "muon"}


def network(*channels: int, heads: int = 64) -> Numbers:
    """Flags for a network of these widths."""
    return {"model.block_out_channels": list(channels), "model.attention_head_dim": heads}


ROWS: dict[str, Numbers] = {
    "AdamW, batch 16, rate 0.001": {},
    "batch 8": {"train_batch_size": 8},
    "batch 32": {"train_batch_size": 32},
    "rate 0.002": {"learning_rate": 2e-3},
    "linear decay": {"lr_scheduler": "linear"},
    "min-SNR weights": {"loss_weighting": "min_snr"},
    "16, 32, 128 wide": network(16, 32, 128),
    "48, 96, 192 wide": network(48, 96, 192),
    "two layers a level": {"model.layers_per_block": 2},
    "no average": {"use_ema": False},
    "Muon": MUON,
    "Muon, rate 0.002": {**MUON, "learning_rate": 2e-3},
    "Muon, linear decay": {**MUON, "lr_scheduler": "linear"},
    "Muon, min-SNR weights": {**MUON, "loss_weighting": "min_snr"},
    "Muon, batch 32, rate 0.002": {**MUON, "train_batch_size": 32, "learning_rate": 2e-3},
}


def flags_of(row: str, images_seen: int, folder: Path) -> list[str]:
    """The arguments of `training/train.py` for a row."""
    recipe = {**BASELINE, **ROWS[row]}
    steps = images_seen // recipe["train_batch_size"]
    recipe |= {"max_train_steps": steps, "lr_warmup_steps": round(WARM_UP * steps)}
    recipe |= {"eval_batch_size": 1, "ddpm_num_inference_steps": 1, "sample_steps": None, "logger": "none"}
    recipe |= {"checkpointing_steps": max(1, steps // 10), "output_dir": str(folder)}
    return [
        "fashion_mnist_quick",
        *(f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in recipe.items()),
    ]


def train(row: str, images_seen: int, folder: Path) -> None:
    """Train a row on one thread, or go on with it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "training" / "train.py"), *flags_of(row, images_seen, folder)]
    subprocess.run(command, env=environment, check=True)


def real_features(path: Path, num_images: int) -> np.ndarray:
    """Features of images of a set, taken from all over it."""
    data = load_data(DataConfig(dataset_name=str(path)), 1, 28)
    images = torch.stack([data.images[index] for index in data.evenly(num_images)])
    return efficientnet_lite0_features(images.permute(0, 2, 3, 1).numpy(), FEATURE_SIZE)


def speeds(rows: Sequence[str]) -> dict[str, float]:
    """Images per second of each row's training step with all threads, in turns."""
    turns: dict[str, Callable[[int], object]] = {}
    sizes = {}
    for row in rows:
        config, _ = parse_training([*flags_of(row, 10**6, ROOT / "outputs" / "recipes" / "speeds")])
        run = build(config)
        run.unet.train()
        sizes[row], turns[row] = run.global_batch_size, partial(train_step, run, passes_from(run, 0))
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for round_number in range(1 + ROUNDS):  # the first sets things up
        for row, step in turns.items():
            start = time.perf_counter()
            for number in range(TIMED):
                step(TIMED * round_number + number)
            seconds[row].append((time.perf_counter() - start) / TIMED)
    return {row: sizes[row] / statistics.median(times[1:]) for row, times in seconds.items()}


def add(results: Path, group: str, values: Mapping[str, Any]) -> None:
    """Add values to the results, to which another process may be adding others."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.with_suffix(".lock").open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
        found[group] = {**found.get(group, {}), **values}
        replace_json(results, found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure rows, or time them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; left out: all")
    parser.add_argument("--images_seen", type=int, default=20_000)
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES, help="drawn by each, and real ones as reference")
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    keep_freed_memory()
    rows = args.rows or list(ROWS)
    about = {"processor": processor(), "versions": versions()}
    if args.speeds:
        add(args.results, "images_per_second", speeds(rows))
        return add(args.results, "about", {**about, "device": device_name(torch.device("cpu"))})
    torch.set_num_threads(1)
    group = f"{args.images_seen} images"
    reference = real_features(EMBEDDED_DATA, args.num_images)
    floor = distances(real_features(EMBEDDED_TEST_SET, args.num_images), reference)
    add(args.results, "about", {**about, "num_images": args.num_images, "sampler": SAMPLER, "steps": STEPS})
    add(args.results, "about", {"floor": floor, "baseline": BASELINE})
    for row in rows:
        found = json.loads(args.results.read_text(encoding="utf-8")).get(group, {})
        if row in found:
            continue
        folder = ROOT / "outputs" / "recipes" / group.replace(" ", "_") / row.replace(" ", "_")
        train(row, args.images_seen, folder)
        add(args.results, group, {row: measure(folder, reference, SampleSpec(STEPS, args.num_images))[0]})
        print(group, row, json.loads(args.results.read_text(encoding="utf-8"))[group][row], flush=True)


if __name__ == "__main__":
    main()
