"""A budget of time: the first steps are timed, and from then on the run is a function of a number of steps."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ddpm_from_scratch.runtime.errors import Stopped
from ddpm_from_scratch.sampling.checkpoints import read_state
from ddpm_from_scratch.training import arguments, plan
from ddpm_from_scratch.training.config import TrainingConfig
from ddpm_from_scratch.training.optimizer import learning_rate
from helpers.paths import ROOT
from helpers.runs import assert_equal, checkpoint_tensors, run_main, stop_in_step

EACH = 3.0  # seconds of a step, by the clock of these tests
BUDGET = ("--max_train_minutes", "1", "--checkpointing_steps", "2")
SCRIPT = str(ROOT / "training" / "train.py")
TOTAL = 20  # 12 steps are timed, and what is left of a minute after them is 24 seconds


@pytest.fixture
def pace(monkeypatch):
    """Steps take as many seconds as this says, whatever they take."""
    seconds = {"each": EACH}

    def lap(self):
        if len(self.seconds) < plan.TIMED_STEPS:
            self.seconds.append(seconds["each"])
            if len(self.seconds) == plan.TIMED_STEPS:
                plan.fix_length(self.run, plan.pace_of(self.run, self.seconds).typical, sum(self.seconds))

    monkeypatch.setattr(plan.Stopwatch, "lap", lap)
    return seconds


def steps_of(folder):
    return json.loads((folder / "results.json").read_text())["steps"]


def test_a_minute_is_as_many_steps_as_it_takes(inputs, tmp_path, pace):
    assert steps_of(run_main(inputs, tmp_path / "model", *BUDGET)) == TOTAL
    progress = progress_of(tmp_path / "model", TOTAL)
    assert progress["total_steps"] == TOTAL and progress["budget"] == [1, None]


def test_never_more_than_max_train_steps(inputs, tmp_path, pace):
    assert steps_of(run_main(inputs, tmp_path / "model", *BUDGET, "--max_train_steps", "15")) == 15
    assert steps_of(run_main(inputs, tmp_path / "short", *BUDGET, "--max_train_steps", "5")) == 5


@pytest.mark.parametrize("stop", [12, 16])
def test_a_stopped_run_goes_on_to_the_same_weights_on_a_faster_machine(inputs, tmp_path, pace, monkeypatch, stop):
    whole = run_main(inputs, tmp_path / "whole", *BUDGET)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_in_step(patch, stop)
        run_main(inputs, tmp_path / "stopped", *BUDGET)
    pace["each"] = 0.1
    resumed = run_main(inputs, tmp_path / "stopped", *BUDGET)
    assert steps_of(resumed) == TOTAL
    assert_equal(checkpoint_tensors(resumed, TOTAL), checkpoint_tensors(whole, TOTAL))


def test_more_minutes_go_on_with_a_run_that_is_done(inputs, tmp_path, pace):
    done = run_main(inputs, tmp_path / "model", *BUDGET)
    weights = load_file(done / "unet/diffusion_pytorch_model.safetensors")
    assert steps_of(run_main(inputs, tmp_path / "model", *BUDGET)) == TOTAL
    assert_equal(load_file(done / "unet/diffusion_pytorch_model.safetensors"), weights)
    seconds = progress_of(done, TOTAL)["seconds"]  # that its steps took in truth
    more = ("--checkpointing_steps", "2", "--max_train_minutes", 1.5 * seconds / 60)
    assert steps_of(run_main(inputs, tmp_path / "model", *more)) == 1.5 * TOTAL
    with pytest.raises(ValueError, match=r"has trained for .* minutes already"):
        run_main(inputs, tmp_path / "model", "--max_train_minutes", seconds / 60)


def test_more_steps_go_on_within_the_budget(inputs, tmp_path, pace):
    assert steps_of(run_main(inputs, tmp_path / "model", *BUDGET, "--max_train_steps", "15")) == 15
    assert steps_of(run_main(inputs, tmp_path / "model", *BUDGET, "--max_train_steps", "18")) == 18
    assert steps_of(run_main(inputs, tmp_path / "model", "--max_train_steps", "22")) == 22  # and no budget


def progress_of(folder, step):
    return read_state(folder / "checkpoints" / f"step_{step:08d}")["progress"]


@pytest.mark.full
def test_two_processes_agree_on_the_length(inputs, tmp_path):
    """Each has a clock of its own, and one of them writes files before the other waits for it."""
    flags = ("--max_train_minutes", "0.02", "--checkpointing_steps", "5", "--log_steps", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", SCRIPT, inputs.preset, *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "model")], env=environment, timeout=300, check=False
    )
    assert done.returncode == 0
    steps = steps_of(tmp_path / "model")
    assert steps >= plan.TIMED_STEPS and progress_of(tmp_path / "model", steps)["total_steps"] == steps


def test_flags_for_the_length_replace_that_of_the_preset(inputs, tmp_path):
    preset = tmp_path / "timed.yaml"
    preset.write_text("max_train_minutes: 5\nmax_train_steps: 100\nmodel: {block_out_channels: [8]}\n")
    lengths = {
        (): (5, 100),
        ("--max_train_steps", "7"): (None, 7),
        ("--max_train_minutes", "2"): (2, None),
        ("--max_train_minutes", "2", "--max_train_steps", "7"): (2, 7),
        ("--num_epochs", "3"): (None, None),
    }
    for flags, expected in lengths.items():
        config, _ = arguments.parse([str(preset), *flags])
        assert (config.max_train_minutes, config.max_train_steps) == expected, flags


def test_the_warm_up_is_a_tenth_of_a_short_run_at_most():
    budget = TrainingConfig(max_train_minutes=1, lr_warmup_steps=100, learning_rate=1.0)
    assert learning_rate(4, budget, 1000) == pytest.approx(0.05)
    assert learning_rate(4, budget, 50) == pytest.approx(1.0)
    assert learning_rate(1, budget, 50) == pytest.approx(0.4)
    steps = TrainingConfig(lr_warmup_steps=100, learning_rate=1.0)
    assert learning_rate(4, steps, 50) == pytest.approx(0.05)


def test_the_plan_is_told_after_the_timed_steps(inputs, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run_main(inputs, tmp_path / "short", "--max_train_steps", "11")
    assert "images/s" not in caplog.text
    run_main(inputs, tmp_path / "long", "--max_train_steps", "40", "--sample_steps", "30")
    assert "40 steps of 4 images, which is each image 7.3 times; the end in" in caplog.text
    assert "the next sample grid in 0:00:0" in caplog.text and "after step 30" in caplog.text


def test_a_median_ignores_the_steps_that_set_things_up(monkeypatch):
    class Accelerator:
        device = torch.device("cpu")

        def reduce(self, value, reduction):
            return value

    class Run:
        accelerator = Accelerator()

    seconds = [60.0, 9.0, 9.0, 9.0] + [1.0] * 5 + [50.0] * 3
    pace = plan.pace_of(Run, seconds)
    assert pace == (1.0, 1.0, 50.0)
    assert plan.images_per_second(32, pace) == "32 images/s (1 to 32)"
