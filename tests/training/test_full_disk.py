"""A real training process whose output folder lies on a disk that becomes full: a small one, in memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm_from_scratch.runtime.errors import CannotSave
from ddpm_from_scratch.training import checkpoint
from helpers.crashes import WEIGHTS, assert_same_checkpoint, names_in
from helpers.paths import ROOT
from helpers.runs import STEPS, run_main

pytestmark = pytest.mark.full

DISK = 16 * 2**20
FLAGS = ("--checkpointing_steps", "2", "--log_steps", "2")
MOUNT = f'mount -t tmpfs -o size={DISK} tmpfs "$1" && echo mounted && exec cat'  # cat ends with the test


@pytest.fixture
def disk(tmp_path):
    """Its folder, which only the processes in its namespace see under its own name."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed: it mounts the disk where nobody else sees it")
    place, said = tmp_path / "disk", []
    place.mkdir()
    for flags in ("-rm", "-m"):  # as root in a namespace of users, or as the one that the tests run as
        command = ["unshare", flags, "sh", "-c", MOUNT, "sh", str(place)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
            if holder.stdout.readline() == b"mounted\n":
                yield Path(f"/proc/{holder.pid}/root{place}")
                return
            said.append(holder.stderr.read().decode().strip())
    pytest.skip(f"no disk of its own size can be mounted here: {'; '.join(said)}")


def used(folder):
    """Bytes that its files take, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def fill(disk, room):
    """A file that leaves so much room."""
    filler = disk / "filler"
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - room)
    return filler


def train_on(disk, preset):
    """Its exit code, and what it said."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), preset, "--output_dir", str(disk / "model"), *FLAGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    return run_main(inputs, tmp_path_factory.mktemp("undisturbed") / "model", *FLAGS)


def check_whole(model, undisturbed, steps):
    """There are checkpoints of these steps and nothing else, and they are those of the undisturbed run."""
    expected = {f"step_{step:08d}" for step in steps}
    assert names_in(model / "checkpoints") == expected
    for name in expected:
        assert checkpoint.damage(model / "checkpoints" / name) is None
        assert_same_checkpoint(model / "checkpoints" / name, undisturbed / "checkpoints" / name)


def test_a_disk_that_becomes_full(disk, inputs, undisturbed):
    """It says so and keeps what was there, whenever it is run again; with room for it the same command goes on."""
    size, model = used(undisturbed / "checkpoints" / "step_00000002"), disk / "model"
    filler = fill(disk, room=int(2.5 * size))
    for _ in range(2):
        code, said = train_on(disk, inputs.preset)
        assert code == CannotSave.code == 74, said
        expected = "train.py: the checkpoint of step 6 cannot be written: [Errno 28] No space left on device"
        assert (
            expected in said and "The checkpoints that are there are whole: make room and run the same command" in said
        )
        assert "Traceback" not in said
        check_whole(model, undisturbed, (2, 4))
        assert shutil.disk_usage(disk).free > 0.4 * size, "what was written of the third one still fills the disk"
        assert not (model / "model_index.json").exists()

    filler.unlink()
    filler = fill(disk, room=3 * size + used(undisturbed / "unet") // 2)  # for all checkpoints, and not for the model
    code, said = train_on(disk, inputs.preset)
    assert code == CannotSave.code and "No space left on device" in said, said
    check_whole(model, undisturbed, range(2, STEPS + 1, 2))
    assert not (model / "model_index.json").exists(), "half a model that looks like one"

    filler.unlink()
    code, said = train_on(disk, inputs.preset)
    assert code == 0, said
    check_whole(model, undisturbed, range(2, STEPS + 1, 2))
    weights, expected = load_file(model / WEIGHTS), load_file(undisturbed / WEIGHTS)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert (model / "model_index.json").read_bytes() == (undisturbed / "model_index.json").read_bytes()
