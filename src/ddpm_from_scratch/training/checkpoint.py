"""Checkpoints that are whole or absent, and hold nothing but tensors and JSON."""

import hashlib
import itertools
import json
import logging
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..runtime.atomic_files import begin_folder, finish_folder, remove_folder, tidy, write_file
from ..runtime.privacy import LATEST
from ..sampling.checkpoints import MANIFEST, damage

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """State of a run besides weights and optimiser: all else that a resumed run needs."""

    step: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent in training, without sampling and saving
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss since the entry before)
    evaluations: list[dict[str, float]] = field(default_factory=list)  # of --eval_steps
    unread: list[float] = field(default_factory=list)  # losses of the steps since the last entry, if it stopped there
    bad_images: list[str] = field(default_factory=list)  # that could not be read and were passed over
    skipped_steps: int = 0  # since their gradients were not finite
    skipped_in_a_row: int = 0  # up to here
    total_steps: int | None = None  # that a budget of time has become
    budget: list[float | None] | None = None  # those minutes, and the most steps that were allowed
    gradient_scaler: dict[str, float] = field(default_factory=dict)  # fp16's loss scale and its counters


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimiser's state as a flat mapping `parameter/entry` -> tensor; counts of steps, which may be one, apart."""
    return {
        f"{names[parameter]}/{entry}": tensor if tensor.ndim else tensor.clone()
        for parameter, entries in optimizer.state.items()
        for entry, tensor in entries.items()
    }


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
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    total_limit: int | None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, whole or not at all, then drop the oldest beyond the limit.

    Args:
        folder: `.../step_00001000`; a checkpoint that is there already is replaced.
        tensors: a safetensors file for each key.
        state: goes into state.json.
        total_limit: how many whole checkpoints stay; None for all.
        about: for the manifest, beside the size and the sha256 of each file.

    Raises:
        OSError: it cannot be written, or an old one not be removed; those that are there are whole.
    """
    unfinished, files = begin_folder(folder), {}
    try:
        for name, content in contents(tensors, state):
            write_file(unfinished / name, content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_file(unfinished / MANIFEST, as_json({**(about or {}), "files": files}))
        finish_folder(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # what fills the disk for nothing
        raise
    for old in beyond(list_checkpoints(folder.parent), total_limit, folder):
        remove_folder(old)


def beyond(checkpoints: Sequence[Path], total_limit: int | None, written: Path) -> list[Path]:
    """The checkpoints, given oldest first, that are older than the last `total_limit` whole ones.

    That which was written just now is whole, and not read again.
    """
    if total_limit is None:
        return []
    whole = 0
    for place in range(len(checkpoints) - 1, -1, -1):
        whole += checkpoints[place] == written or damage(checkpoints[place]) is None
        if whole == total_limit:
            return list(checkpoints[:place])
    return []


def contents(tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint, one in memory at a time."""
    for name, group in tensors.items():
        yield f"{name}.safetensors", save({key: t.detach().cpu().contiguous() for key, t in group.items()})
    yield "state.json", as_json(state)


def as_json(values: Mapping[str, Any]) -> bytes:
    """Values as a file."""
    return json.dumps(values).encode()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step_[0-9]*"), key=lambda path: int(path.name.removeprefix("step_")))


def find_checkpoint(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to resume from: the last whole one for `latest` (None if there is none yet), else the path itself.

    Raises FileNotFoundError if the path is no checkpoint; ValueError if it is damaged; for `latest`, all are.
    """
    if resume is None:
        return None
    if resume != LATEST:
        if not Path(resume, "state.json").is_file():
            raise FileNotFoundError(f"{resume} is no checkpoint: it has no state.json")
        if (wrong := damage(Path(resume))) is not None:
            raise ValueError(f"{resume} is damaged ({wrong}): resume from another checkpoint")
        return Path(resume)
    tidy(folder)
    for checkpoint in reversed(found := list_checkpoints(folder)):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint
        logger.warning("%s is damaged (%s): taking the one before", checkpoint, wrong)
    if found:
        raise ValueError(f"all checkpoints in {folder} are damaged: move them away to start anew")
    return None


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], advice: str = "") -> None:
    """Refuse to go on with another run's state.

    Args:
        saved: what identifies the run that wrote the checkpoint.
        current: the same of this run.
        advice: what to do instead, the end of the message.

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
        raise ValueError("\n  ".join(["the checkpoint belongs to another run; it differs in", *differences]) + advice)


def another_way(resume: str | None, output_dir: str) -> str:
    """What to do where a checkpoint is another run's, in lines: start anew, or go on with that run."""
    if resume != LATEST:
        return f"\nTo start anew, or to go on with the run in {output_dir}, leave out --resume_from_checkpoint."
    free = next(name for number in itertools.count(2) if not Path(name := f"{output_dir}-{number}").exists())
    ways = {
        "To start anew, choose another folder": ["--output_dir", free],
        "To go on with that run": ["ddpm", "train", str(Path(output_dir, "training_config.yaml"))],
    }
    return "".join(f"\n{way}: {shlex.join(words)}" for way, words in ways.items())
