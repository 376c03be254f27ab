"""`ddpm train` on a CPU: processes share the batch, and a terminal's Ctrl-C stops them all, with one checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from ddpm_from_scratch.runtime.locks import locked
from ddpm_from_scratch.sampling.checkpoints import read_state
from ddpm_from_scratch.training.checkpoint import find_checkpoint
from ddpm_from_scratch.training.config import TrainingConfig
from ddpm_from_scratch.training.run import split_batch
from helpers.paths import ROOT
from helpers.runs import run_main

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BATCH, MANY = 8, 10_000  # images; steps that are not reached
FLAGS = ("--train_batch_size", BATCH, "--model.dropout", 0.0, "--checkpointing_steps", 5, "--log_steps", 1)


def ddpm_train(inputs, folder, steps, *flags):
    """Start `ddpm train` with two threads, in a group of its own as a terminal does."""
    arguments = ["train", inputs.preset, *FLAGS, "--max_train_steps", steps, "--output_dir", folder, *flags]
    command = [sys.executable, "-m", "ddpm_from_scratch.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "2"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def wait_for_a_checkpoint(process, folder):
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("step_*")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)


def test_ctrl_c_and_the_same_command_again(inputs, tmp_path):
    folder = tmp_path / "model"
    with ddpm_train(inputs, folder, MANY) as process:
        wait_for_a_checkpoint(process, folder)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=600)
    reached = read_state(find_checkpoint("latest", folder / "checkpoints"))["progress"]["step"]
    last = err.strip().splitlines()[-1]
    assert process.returncode == 75 and out == "" and "Traceback" not in err
    assert last.startswith(f"ddpm train: stopped after step {reached}; a checkpoint is written")
    with ddpm_train(inputs, folder, reached + 5) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0 and out.splitlines()[-1] == str(folder), err
    results = json.loads((folder / "results.json").read_text())
    assert results["num_processes"] == 2 and results["images_seen"] == BATCH * (reached + 5)


def assert_refused(process, folder):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith(f"ddpm train: {folder} is in use by process ") and "--output_dir" in line


def test_a_second_run_into_the_same_folder_is_refused(inputs, tmp_path):
    """Each has two processes. A run that was killed holds the folder no longer, although nothing cleared up."""
    folder = tmp_path / "model"
    with ddpm_train(inputs, folder, MANY) as first:
        wait_for_a_checkpoint(first, folder)
        with ddpm_train(inputs, folder, MANY) as second:
            assert_refused(second, folder)
        assert first.poll() is None
        os.killpg(first.pid, signal.SIGKILL)
    reached = read_state(find_checkpoint("latest", folder / "checkpoints"))["progress"]["step"]
    with ddpm_train(inputs, folder, reached + 1) as again:
        assert again.wait(timeout=600) == 0, again.stderr.read()
    assert not (folder / ".lock").exists()


@pytest.mark.full
@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_a_refused_run_touches_nothing(inputs, tmp_path, flags):
    """What a run clears up at its start may be what another one is writing; a dry run clears up too."""
    unfinished = tmp_path / "model" / "checkpoints" / ".unfinished-step_00000005"
    unfinished.mkdir(parents=True)
    with locked(tmp_path / "model"):
        before = sorted(tmp_path.rglob("*"))
        with ddpm_train(inputs, tmp_path / "model", MANY, *flags) as process:
            assert_refused(process, tmp_path / "model")
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.full
def test_the_processes_train_what_one_trains(inputs, tmp_path):
    with ddpm_train(inputs, tmp_path / "two", 20) as process:
        assert process.wait(timeout=600) == 0
    expected = load_file(run_main(inputs, tmp_path / "one", *FLAGS, "--max_train_steps", 20) / WEIGHTS)
    for name, weight in load_file(tmp_path / "two" / WEIGHTS).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_batch_that_cannot_be_split_is_refused(inputs, tmp_path):
    config = TrainingConfig(train_batch_size=6, split_batches=True)
    assert split_batch(config, 3).train_batch_size == 2 and not split_batch(config, 3).split_batches
    with pytest.raises(ValueError, match="4 processes cannot share a train_batch_size of 6"):
        split_batch(config, 4)
    assert run_main(inputs, tmp_path / "model", "--split_batches", "true") == tmp_path / "model"
