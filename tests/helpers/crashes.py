"""Folders and checkpoints of runs that were killed."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpm_from_scratch.sampling import checkpoints

WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")


def names_in(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def tensors_of(path):
    """The tensor files of a checkpoint."""
    return {name: load_file(path / f"{name}.safetensors") for name in ("unet", "optimizer", "ema")}


def assert_same_checkpoint(path, expected):
    """All tensors and all logged losses, bit for bit."""
    actual, wanted = tensors_of(path), tensors_of(expected)
    for name, tensors in wanted.items():
        assert actual[name].keys() == tensors.keys()
        assert not [key for key in tensors if not torch.equal(actual[name][key], tensors[key])], f"{path.name}: {name}"
    losses, wanted_losses = (checkpoints.read_state(p)["progress"]["losses"] for p in (path, expected))
    assert losses == wanted_losses, f"{path.name}: the logged losses differ"
