"""Tiny training runs, in this process and in others."""

import io
import os
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import train as script
import yaml
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from ddpm_from_scratch.runtime.random_streams import stratified_uniforms
from ddpm_from_scratch.training import loop
from ddpm_from_scratch.training.objectives import UniformSampler
from helpers.paths import ROOT

NUM_IMAGES, SIZE, BATCH, STEPS = 22, 8, 4, 10  # an epoch is 5.5 steps, so batches straddle its end

TOKEN = "hf_secret0123456789"

TINY = {
    "model": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "dropout": 0.1,
    },
    "train_batch_size": BATCH,
    "max_train_steps": STEPS,
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "random_flip": True,
    "mixed_precision": "no",
    "eval_batch_size": 4,
    "sample_scheduler": "ddim",
    "ddpm_num_inference_steps": 2,
    "logger": "none",
    "log_steps": 3,
    "checkpointing_steps": None,
}


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """Each test is a fresh process to accelerate, offline, and single-threaded, which is fastest for tiny networks."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def picture(mode="L", size=(SIZE, SIZE), seed=0):
    """A random image of a PIL mode."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path, images):
    """A parquet file with an image column; an entry is a picture, or bytes that are to stand for one."""
    rows = [{"bytes": image if isinstance(image, bytes) else encode(image), "path": None} for image in images]
    pyarrow.parquet.write_table(pyarrow.table({"label": list(range(len(rows))), "picture": rows}), path)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The tiny preset, with its data set."""
    folder = tmp_path_factory.mktemp("inputs")
    parquet = write_parquet(folder / "tiny.parquet", [picture(seed=seed) for seed in range(NUM_IMAGES)])
    preset = folder / "tiny.yaml"
    preset.write_text(yaml.safe_dump({**TINY, "dataset_name": str(parquet)}))
    return SimpleNamespace(folder=folder, preset=str(preset), parquet=str(parquet))


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory):
    """An uninterrupted run with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main([inputs.preset, "--output_dir", str(folder), "--checkpointing_steps", "1", "--sample_steps", "5"])
    return folder


def run_main(inputs, output, *flags):
    """Train in this process; the model folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return script.main([inputs.preset, "--output_dir", str(output), *map(str, flags)])


def stop_in_step(monkeypatch, number, by=signal.SIGTERM):
    """The next run gets a signal in its step of this number: 1, 2, ..."""
    train_step = loop.train_step

    def signalled(run, passes, step):
        if step == number - 1:
            os.kill(os.getpid(), by)
        return train_step(run, passes, step)

    monkeypatch.setattr(loop, "train_step", signalled)


def run_process(command, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600)


def checkpoint_tensors(folder, step=STEPS):
    path = folder / "checkpoints" / f"step_{step:08d}"
    return {
        f"{name}/{key}": tensor
        for name in ("unet", "ema", "optimizer")
        for key, tensor in load_file(path / f"{name}.safetensors").items()
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def stratified_timesteps(seed, step, global_batch_size, num_train_timesteps):
    """The timesteps of an optimiser step with uniform sampling."""
    return UniformSampler(num_train_timesteps).draw(stratified_uniforms(seed, step, global_batch_size))[0]
