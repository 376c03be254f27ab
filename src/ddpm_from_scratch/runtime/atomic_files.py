"""Write files and folders atomically: they are complete or absent, whatever happens while they are written.

A folder is written beside its place and then renamed. Names with one of the prefixes below belong to folders that are
being written or removed; `tidy` clears up what a killed process left of them.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished-"  # being written: of no use to anybody
REPLACED = ".replaced-"  # the folder that was there before, until the new one stands in its place
REMOVED = ".removed-"  # on its way out


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk. Its mode follows the umask."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file; an existing one stays until the new one is complete.

    Raises OSError if it cannot be written; the error names it.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        unfinished.unlink(missing_ok=True)
        write_file(unfinished, content)
        unfinished.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where a folder can be opened for that; Windows opens none."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new(folder: Path) -> None:
    """Raise ValueError if a folder that is to be made exists already."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder.")


def begin_folder(folder: Path) -> Path:
    """Create an empty folder beside the final place; `finish_folder` moves it there."""
    unfinished = folder.with_name(UNFINISHED + folder.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tidy(folder.parent)
    unfinished.mkdir()
    return unfinished


def finish_folder(folder: Path) -> None:
    """Move the folder of `begin_folder` into place; an existing folder stays until then."""
    unfinished, replaced = (folder.with_name(prefix + folder.name) for prefix in (UNFINISHED, REPLACED))
    flush_folder(unfinished)
    if folder.exists():
        folder.rename(replaced)
    try:
        unfinished.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    flush_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; its files move into `folder` once all are written.

    Files of the same name stay until then, and stay for good if anything fails.
    """
    unfinished = begin_folder(folder / "files")
    try:
        yield unfinished
        files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
        for file in files:
            with open(unfinished / file, "r+b") as opened:  # Windows flushes only what may be written to
                os.fsync(opened.fileno())
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / file).replace(folder / file)
        for parent in {(folder / file).parent for file in files}:
            flush_folder(parent)
    finally:
        shutil.rmtree(unfinished)


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that nobody sees it half removed."""
    removed = folder.with_name(REMOVED + folder.name)
    folder.rename(removed)
    flush_folder(folder.parent)
    shutil.rmtree(removed)


def tidy(parent: Path) -> None:
    """Clear up what killed processes have left in the folder `parent`."""
    for replaced in parent.glob(f"{REPLACED}*"):
        folder = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if folder.exists():
            flush_folder(parent)
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)
    for prefix in (UNFINISHED, REMOVED):
        for leftover in parent.glob(f"{prefix}*/"):
            shutil.rmtree(leftover)
