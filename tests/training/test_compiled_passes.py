"""Gradients of compiled, checkpointed, distributed and scaled passes are those of plain ones."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import nn

from ddpm_from_scratch.training import loop, run
from ddpm_from_scratch.training.arguments import parse
from ddpm_from_scratch.training.faults import FiniteGuard
from helpers.paths import python_path
from helpers.runs import BATCH, run_main

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PLAIN = ("--model.dropout", 0.0, "--max_train_steps", 3, "--use_ema", "false")
# Traces forward and backward pass as for a compiler, and runs them as they are: kernels would take a minute.
COMPILE = "aot_eager"


@pytest.fixture
def quick_compiler(monkeypatch):
    modes, in_place = [], nn.Module.compile

    def compiled(self, mode=None):
        modes.append(mode)
        in_place(self, backend=COMPILE)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    return modes


def gradients(inputs, folder, monkeypatch, *flags):
    """Of each step, before they are clipped."""
    found, clip = [], loop.clip_gradients

    def noted(weights, max_norm):
        found.append([weight.grad.clone() for weight in weights])
        return clip(weights, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "clip_gradients", noted)
        run_main(inputs, folder, *PLAIN, *flags)
    return found


def assert_close(found, expected):
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        largest = max(float(gradient.abs().max()) for gradient in theirs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest)


@pytest.mark.full
@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing", "true")], ids=["compiled", "checkpointed"])
def test_compiled_passes_add_up_to_the_gradients_of_plain_ones(inputs, tmp_path, monkeypatch, quick_compiler, flags):
    split = ("--gradient_accumulation_steps", 2, "--train_batch_size", BATCH // 2)
    expected = gradients(inputs, tmp_path / "plain", monkeypatch)
    found = gradients(inputs, tmp_path / "compiled", monkeypatch, *split, "--compile", "true", *flags)
    assert_close(found, expected)
    assert quick_compiler == [None]


IN_TWO_PROCESSES = f"""
import sys
from torch import nn
in_place = nn.Module.compile
nn.Module.compile = lambda self, mode=None: in_place(self, backend="{COMPILE}")
from ddpm_from_scratch.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_two_processes_with_compiled_and_checkpointed_passes(inputs, tmp_path):
    plain = run_main(inputs, tmp_path / "plain", *PLAIN)
    several = ("--num_processes", 2, "--split_batches", "true", "--compile", "true", "--gradient_checkpointing", "true")
    arguments = ["train", inputs.preset, "--output_dir", tmp_path / "two", *PLAIN, *several]
    done = subprocess.run(
        [sys.executable, "-c", IN_TWO_PROCESSES, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": python_path("src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "strides" not in done.stderr  # DDP's warning of gradients in another memory order than its buckets
    found, expected = load_file(tmp_path / "two" / WEIGHTS), load_file(plain / WEIGHTS)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5, msg=name)


@pytest.fixture
def as_in_float16(monkeypatch):
    """The engine takes itself for one of float16, whose training needs a GPU: the scaler alone is what is tested."""
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")


def scaled_run(inputs, folder, scaler):
    """A run of the tiny preset, with a gradient scaler if there is one."""
    config, _ = parse([inputs.preset, "--output_dir", str(folder), *map(str, PLAIN)])
    built = run.build(config)
    built.unet.train()
    if scaler is not None:
        built.accelerator.scaler, built.accelerator.native_amp = scaler, True
        built.optimizer = AcceleratedOptimizer(built.optimizer.optimizer, scaler=scaler)
        built.guard = FiniteGuard(None, built.accelerator.device)
    return built


def test_scaled_gradients_give_the_weights_of_plain_ones(inputs, tmp_path, as_in_float16):
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        built = scaled_run(inputs, tmp_path / f"{scaler is None}", scaler)
        passes = loop.passes_from(built, 0)
        for _ in range(3):
            loop.advance(built, passes)
        ends.append([weight.detach().clone() for weight in built.weights])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))  # a power of 2 loses nothing


def test_a_step_that_overflows_is_skipped_and_the_scale_falls(inputs, tmp_path, as_in_float16):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    built = scaled_run(inputs, tmp_path / "model", scaler)
    before = [weight.detach().clone() for weight in built.weights]
    one = next(loop.passes_from(built, 0))
    too_large = one.batch._replace(noise=100 * one.batch.noise)
    loop.advance(built, iter([one._replace(batch=too_large)]))
    assert all(torch.equal(one, other) for one, other in zip(before, built.weights, strict=True))
    assert built.guard.counts() == (1, 1) and scaler.get_scale() == 2.0**126
