"""A folder is one process's, until that ends in whatever way."""

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ddpm_from_scratch.runtime import locks
from ddpm_from_scratch.runtime.locks import InUse, locked
from helpers.paths import python_path

HOLD = """
import sys, time
from pathlib import Path
from ddpm_from_scratch.runtime.locks import InUse, locked
try:
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read(1)
except InUse as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hold():
    """A function that starts a process which holds a folder until a character comes, and says "held"."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            env={**os.environ, "PYTHONPATH": python_path("src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_by_name(hold, tmp_path):
    folder = tmp_path / "model"
    first = hold(folder)
    assert first.stdout.readline() == "held\n"
    second = hold(folder)
    assert second.communicate(timeout=60)[1].startswith(f"{folder} is in use by process {first.pid} on ")
    assert second.returncode == 1
    with pytest.raises(InUse, match=f"process {first.pid}"), locked(folder):
        pass
    with locked(tmp_path / "other"):
        assert (tmp_path / "other").is_dir()
    first.communicate("x", timeout=60)
    with locked(folder):
        assert [path.name for path in folder.iterdir()] == [locks.FILE]
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_lock_of_a_process_that_was_killed_is_free(hold, tmp_path):
    first = hold(tmp_path)
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGKILL)
    first.wait(timeout=60)
    assert (tmp_path / locks.FILE).exists()
    second = hold(tmp_path)
    assert second.stdout.readline() == "held\n"


def test_nothing_is_left_of_it(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "kept"):
        (tmp_path / "kept" / "file").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """The file that was opened is no longer the folder's: another process could hold a new one."""
    opened, locking = [], locks.LOCK

    def late(descriptor):
        if not opened:
            (tmp_path / locks.FILE).unlink()
        opened.append(descriptor)
        locking(descriptor)

    monkeypatch.setattr(locks, "LOCK", late)
    with locked(tmp_path):
        assert len(opened) == 2 and (tmp_path / locks.FILE).exists()
        with pytest.raises(InUse), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "LOCK", unsupported)
    monkeypatch.setattr(locks, "UNLOCK", unsupported)
    with locked(tmp_path / "model"):
        (tmp_path / "model" / "file").touch()
    assert "No locks available" in caplog.text and [path.name for path in tmp_path.rglob("*")] == ["model", "file"]


def test_windows(tmp_path, monkeypatch):
    """Its locks keep others from reading the bytes, so they are not those of the text; an open file stays."""
    held = set()

    def locking(descriptor, mode, count):
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        assert count == 1 and place[1] > 1000
        if mode == "unlock":
            return held.remove(place)
        if place in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        return held.add(place)

    msvcrt = SimpleNamespace(locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock")
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    for name, action in zip(("LOCK", "UNLOCK"), locks.LOCKS[True], strict=True):
        monkeypatch.setattr(locks, name, action)

    def stays(path, missing_ok):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", stays)
    for _ in range(2):
        with locked(tmp_path / "model"):
            assert held
            with pytest.raises(InUse, match=f"process {os.getpid()} on "), locked(tmp_path / "model"):
                pass
        assert not held
