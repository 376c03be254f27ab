"""Checkpoints on the disk: whole or absent, verified, pruned late; what is damaged is passed over."""

import errno
import json
import os
import stat

import pytest
import torch
import yaml

from ddpm_from_scratch.runtime import atomic_files as durable
from ddpm_from_scratch.sampling import checkpoints
from ddpm_from_scratch.training import checkpoint
from ddpm_from_scratch.training.config import PRESETS


def tensors(value=1.0):
    return {"unet": {"weight": torch.full((2, 3), value)}, "optimizer": {"weight/step": torch.tensor(value)}}


def save(folder, step, total_limit=None, value=None):
    path = folder / f"step_{step:08d}"
    state = {"progress": {"step": step}}
    checkpoint.save_checkpoint(path, tensors(value or float(step)), state, total_limit, {"step": step, "versions": {}})
    return path


def names(folder):
    return sorted(os.listdir(folder))


def weight(path):
    return checkpoints.read_tensors(path, "unet")["weight"][0, 0].item()


def test_a_checkpoint_says_what_is_in_it(tmp_path):
    path = save(tmp_path, 3)
    assert names(path) == ["manifest.json", "optimizer.safetensors", "state.json", "unet.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == set(names(path)) - {"manifest.json"}
    assert manifest["files"]["state.json"]["bytes"] == (path / "state.json").stat().st_size
    assert checkpoint.damage(path) is None and checkpoints.read_state(path) == {"progress": {"step": 3}}
    assert weight(path) == 3


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((path / name).stat().st_mode) for name in names(path)} == {0o640}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit in the weights": lambda path: flip_a_bit(path / "unet.safetensors"),
    "flipped bit in the state": lambda path: flip_a_bit(path / "state.json"),
    "flipped bit in the manifest": lambda path: flip_a_bit(path / "manifest.json"),
    "cut short": lambda path: os.truncate(path / "optimizer.safetensors", 20),
    "empty": lambda path: os.truncate(path / "unet.safetensors", 0),
    "missing": lambda path: (path / "unet.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "an empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
    "a manifest of another kind": lambda path: (path / "manifest.json").write_text("[1]"),
    "nothing there": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, kind, caplog):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGES[kind](new)
    assert checkpoint.damage(new) is not None
    assert checkpoint.find_checkpoint("latest", tmp_path) == old
    assert "step_00000002 is damaged" in caplog.text and "taking the one before" in caplog.text
    with pytest.raises((ValueError, FileNotFoundError), match=r"step_00000002 is (damaged|no checkpoint)"):
        checkpoint.find_checkpoint(str(new), tmp_path)
    DAMAGES[kind](old)
    with pytest.raises(ValueError, match="are damaged: move them away"):
        checkpoint.find_checkpoint("latest", tmp_path)


def test_without_checkpoints_there_is_none_to_resume_from(tmp_path):
    assert checkpoint.find_checkpoint("latest", tmp_path / "none") is None
    assert checkpoint.find_checkpoint(None, tmp_path) is None


def test_a_full_disk_leaves_the_one_before_and_room(tmp_path, monkeypatch):
    save(tmp_path, 1, total_limit=1)

    def full(path, content):
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        durable.write_file(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoint, "write_file", full)
        save(tmp_path, 2, total_limit=1)
    assert names(tmp_path) == ["step_00000001"]
    assert checkpoint.find_checkpoint("latest", tmp_path) == tmp_path / "step_00000001"
    save(tmp_path, 2, total_limit=1)
    assert names(tmp_path) == ["step_00000002"]


def test_old_checkpoints_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    seen = []

    def remove(folder):
        seen.append((folder.name, [checkpoint.damage(path) for path in checkpoint.list_checkpoints(tmp_path)]))
        durable.remove_folder(folder)

    monkeypatch.setattr(checkpoint, "remove_folder", remove)
    for step in range(1, 5):
        save(tmp_path, step, total_limit=2)
    assert seen == [("step_00000001", [None] * 3), ("step_00000002", [None] * 3)]
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_damaged_checkpoints_do_not_count(tmp_path):
    for step in range(1, 4):
        save(tmp_path, step, total_limit=2)
    os.truncate(tmp_path / "step_00000003" / "optimizer.safetensors", 20)
    save(tmp_path, 4, total_limit=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    save(tmp_path, 5, total_limit=2)
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_keep_a_second_checkpoint(preset):
    """A damaged one must not be the only one."""
    assert yaml.safe_load(preset.read_text())["checkpoints_total_limit"] >= 2


def test_a_checkpoint_that_is_there_stays_until_the_new_one_stands(tmp_path, monkeypatch):
    path = save(tmp_path, 1, value=5.0)
    rename = type(path).rename
    moves = []

    def killed_at(count):
        def moved(self, target):
            moves.append(self.name)
            if len(moves) == count:
                raise KeyboardInterrupt
            return rename(self, target)

        return moved

    for count, expected in ((1, 5.0), (2, 5.0), (3, 7.0)):
        moves.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "rename", killed_at(count))
            try:
                save(tmp_path, 1, value=7.0)
            except KeyboardInterrupt:
                assert count < 3
        assert checkpoint.find_checkpoint("latest", tmp_path) == path and checkpoint.damage(path) is None
        assert weight(path) == expected and names(tmp_path) == ["step_00000001"]


def test_leftovers_of_a_killed_process_are_cleared_up(tmp_path):
    save(tmp_path, 1)
    for prefix in (durable.UNFINISHED, durable.REMOVED, durable.REPLACED):
        (tmp_path / f"{prefix}step_00000001").mkdir()
        (tmp_path / f"{prefix}step_00000001" / "unet.safetensors").write_bytes(b"half")
    (tmp_path / ".unfinished-results.json").write_text("of somebody else")
    assert checkpoint.find_checkpoint("latest", tmp_path) == tmp_path / "step_00000001"
    assert names(tmp_path) == [".unfinished-results.json", "step_00000001"]


def test_every_file_reaches_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Each file is flushed, then the folder, before it is renamed; and the folder above after that."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    path = save(tmp_path, 1)
    assert rename is os.rename
    unfinished = tmp_path / ".unfinished-step_00000001"
    files = [str(unfinished / name) for name in ("unet.safetensors", "optimizer.safetensors", "state.json")]
    assert events == [*files, str(unfinished / "manifest.json"), str(unfinished), str(tmp_path)]
    assert path.exists()


# Single files


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    durable.replace_file(path, b"old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        patch.setattr(durable.os, "fsync", full)
        durable.replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    durable.replace_file(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cause", ["the writer", "the disk"])
def test_files_stay_until_all_new_ones_are_written(tmp_path, monkeypatch, cause):
    def write(content):
        with durable.replacing_files(tmp_path) as folder:
            (folder / "unet").mkdir()
            (folder / "unet" / "weights").write_bytes(content)
            if content == b"bad":
                raise ValueError("half written")
            (folder / "about").write_bytes(content)

    (tmp_path / "other").write_bytes(b"stays")
    write(b"old")
    with monkeypatch.context() as patch, pytest.raises((ValueError, OSError)):
        if cause == "the disk":
            patch.setattr(durable.os, "fsync", full)
        write(b"bad" if cause == "the writer" else b"new")
    there = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == {"other": b"stays", "unet/weights": b"old", "about": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about", "other", "unet"]
    write(b"new")
    assert (tmp_path / "unet" / "weights").read_bytes() == (tmp_path / "about").read_bytes() == b"new"
