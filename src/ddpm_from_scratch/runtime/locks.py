"""One process at a time in a folder, by a lock that the system releases when its process ends, however it ends."""

import importlib
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FILE = ".lock"  # in the folder, while it is held
PLACE = 1 << 20  # of the byte that Windows locks: behind the text, since nobody could read that then

logger = logging.getLogger(__name__)


class InUse(OSError):
    """Another process holds the folder."""


def lock_posix(descriptor: int) -> None:
    """Lock a file of which this process has a descriptor; BlockingIOError if another process has."""
    fcntl = importlib.import_module("fcntl")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock_posix(descriptor: int) -> None:
    """Release it, for child processes too, which have inherited the descriptor."""
    fcntl = importlib.import_module("fcntl")
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def lock_windows(descriptor: int) -> None:
    """As `lock_posix`, but PermissionError if another process has."""
    msvcrt = importlib.import_module("msvcrt")
    os.lseek(descriptor, PLACE, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)


def unlock_windows(descriptor: int) -> None:
    """As `unlock_posix`."""
    msvcrt = importlib.import_module("msvcrt")
    os.lseek(descriptor, PLACE, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)


Action = Callable[[int], None]
LOCKS: dict[bool, tuple[Action, Action]] = {
    False: (lock_posix, unlock_posix),
    True: (lock_windows, unlock_windows),
}
LOCK, UNLOCK = LOCKS[sys.platform == "win32"]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for the length of the block; it is created, and removed again if nothing comes into it.

    A file system without locks is used without one, with a warning.

    Raises InUse if another process holds it; OSError if the folder cannot be written to.
    """
    created = not folder.exists()
    descriptor = take(folder)
    try:
        yield
    finally:
        # Removed while it is held, so that whoever opened it meanwhile finds that it is no longer there.
        with suppress(PermissionError):  # Windows keeps an open file
            (folder / FILE).unlink(missing_ok=True)
        if created:
            with suppress(OSError):  # not empty
                folder.rmdir()
        with suppress(OSError):  # a file system without locks
            UNLOCK(descriptor)
        os.close(descriptor)


def take(folder: Path) -> int:
    """The descriptor of the folder's lock, which is held; see `locked`."""
    path = folder / FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was removed by the process that held it
            continue
        try:
            LOCK(descriptor)
        except (BlockingIOError, PermissionError) as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            raise InUse(f"{folder} is in use by {holder or 'another process'}") from error
        except OSError as error:
            logger.warning("%s: its file system has no locks (%s): nothing keeps a second run away", folder, error)
        if is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder ended meanwhile, and removed it
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
    return descriptor


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
