"""The examples run as a reader would run them."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline
from helpers.paths import ROOT


@pytest.mark.full
def test_own_loop_trains_samples_and_saves(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, ROOT / "examples" / "own_loop.py", "25", tmp_path / "model"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    with Image.open(tmp_path / "model" / "sample.png") as sample:
        assert sample.size == (16, 16)
    assert ScratchDDPMPipeline.from_pretrained(tmp_path / "model").unet.config.sample_size == 16
