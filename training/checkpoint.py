"""Checkpoints that are whole or absent, and hold nothing but tensors and JSON."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import LATEST

UNFINISHED = ".unfinished-"  # prefix of a checkpoint that is being written


@dataclass
class Progress:
    """Where a run stands: besides the weights and the optimiser, all that a resumed run needs."""

    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent in training, without sampling and saving
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss since the entry before)
    evaluations: list[dict[str, float]] = field(default_factory=list)  # of --eval_steps
    gradient_scaler: dict[str, float] = field(default_factory=dict)  # fp16's loss scale and its counters


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as a flat mapping `parameter/entry` -> tensor."""
    state = optimizer.state
    return {f"{names[p]}/{entry}": tensor for p, entries in state.items() for entry, tensor in entries.items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Each tensor takes the memory layout of its parameter, since fused kernels walk both in memory order. They want the
    count of steps beside the parameter too; others read it on the host.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    fused = optimizer.defaults["fused"]
    for key, tensor in tensors.items():
        name, entry = key.rsplit("/", 1)
        parameter = by_name[name]
        device = parameter.device if tensor.ndim or fused else tensor.device
        like = torch.empty_like(parameter if tensor.ndim else tensor, dtype=tensor.dtype, device=device)
        optimizer.state[parameter][entry] = like.copy_(tensor)


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], total_limit: int | None
) -> None:
    """Write a checkpoint beside its place, make it durable, move it into place, then drop the oldest beyond the limit.

    Args:
        folder: `.../step_00001000`; a checkpoint that is there already is replaced.
        tensors: a safetensors file for each key.
        state: goes into state.json.
        total_limit: how many checkpoints may stay; None for all.
    """
    unfinished = folder.with_name(UNFINISHED + folder.name)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    for name, group in tensors.items():
        save_file({key: t.detach().cpu().contiguous() for key, t in group.items()}, unfinished / f"{name}.safetensors")
    (unfinished / "state.json").write_text(json.dumps(state))
    for path in [*unfinished.iterdir(), unfinished]:
        flush_to_disk(path)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    flush_to_disk(folder.parent)
    for old in list_checkpoints(folder.parent)[: -total_limit if total_limit else 0]:
        shutil.rmtree(old)


def flush_to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_[0-9]*"), key=lambda path: int(path.name.removeprefix("step_")))


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to resume from: the last one for `latest` (None if there is none yet), else the path itself.

    Raises:
        FileNotFoundError: the path is no checkpoint.
    """
    if resume is None:
        return None
    if resume == LATEST:
        return next(reversed(list_checkpoints(folder)), None)
    if not Path(resume, "state.json").is_file():
        raise FileNotFoundError(f"{resume} is no checkpoint: it has no state.json")
    return Path(resume)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """One of the tensor files of a checkpoint, on the CPU."""
    tensors: dict[str, Tensor] = load_file(checkpoint / f"{name}.safetensors")
    return tensors


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to go on with another run's state.

    Args:
        saved: what identifies the run that wrote the checkpoint.
        current: the same of this run.

    Raises:
        ValueError: they differ; the message names each field with both values.
    """
    saved = json.loads(json.dumps(saved))
    current = json.loads(json.dumps(current))
    differences = [
        f"{key}: {saved.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]
    if differences:
        raise ValueError("the checkpoint belongs to another run; it differs in\n  " + "\n  ".join(differences))
