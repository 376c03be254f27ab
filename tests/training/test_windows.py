"""What differs on Windows, simulated: no folder can be opened, and only files that may be written to can be flushed."""

import errno
import fcntl
import os

import pytest
import torch

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.runtime.atomic_files import replace_file, replacing_files
from ddpm_from_scratch.sampling.checkpoints import read_tensors
from ddpm_from_scratch.training.checkpoint import list_checkpoints, save_checkpoint
from helpers.runs import run_main


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    really_open, really_flush = os.open, os.fsync

    def open_file(path, *options, **named):
        if os.path.isdir(path) and "dir_fd" not in named:  # the standard library removes folders so
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, *options, **named)

    def flush(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        really_flush(descriptor)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", flush)


def test_checkpoints(tmp_path):
    for step in (1, 2, 3, 3):
        tensors = {"unet": {"weight": torch.full((2,), float(step))}}
        save_checkpoint(tmp_path / f"step_{step:08d}", tensors, {}, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    assert read_tensors(tmp_path / "step_00000003", "unet")["weight"].tolist() == [3, 3]


def test_files(tmp_path):
    replace_file(tmp_path / "file", b"new")
    with replacing_files(tmp_path) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_bytes(b"new")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "unet" / "weights").read_bytes() == b"new"


def test_a_run(inputs, tmp_path):
    folder = run_main(inputs, tmp_path / "model", "--max_train_steps", "2", "--checkpointing_steps", "1")
    assert len(list_checkpoints(folder / "checkpoints")) == 2
    assert ScratchDDPMPipeline.from_pretrained(folder).unet.num_parameters() > 0
