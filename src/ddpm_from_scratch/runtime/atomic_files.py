"""Files and folders that are whole or absent on the disk, whatever happens while they are written.

A folder is written beside its place and renamed. Names that begin with one of the prefixes below are of folders on
their way in or out; `tidy` clears up what a killed process left of them.
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
    """Write a new file; return once it has reached the disk. Its mode follows the umask."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file; one that was there stays until the new one is whole.

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
    """Return once a folder's list of names has reached the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_folder(folder: Path) -> Path:
    """An empty folder beside the place of the one that is to be written, for `finish_folder`."""
    unfinished = folder.with_name(UNFINISHED + folder.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tidy(folder.parent)
    unfinished.mkdir()
    return unfinished


def finish_folder(folder: Path) -> None:
    """Move what was written since `begin_folder` into place; a folder that was there stays until then."""
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
    """An empty folder, whose files, when all are written, take their places in another one.

    A file of the same name stays there until then; so do all if anything fails.
    """
    unfinished = begin_folder(folder / "files")
    try:
        yield unfinished
        files = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
        for file in files:
            with open(unfinished / file, "rb") as opened:
                os.fsync(opened.fileno())
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / file).replace(folder / file)
        for parent in {(folder / file).parent for file in files}:
            flush_folder(parent)
    finally:
        shutil.rmtree(unfinished)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that nobody ever sees half of it."""
    removed = folder.with_name(REMOVED + folder.name)
    folder.rename(removed)
    flush_folder(folder.parent)
    shutil.rmtree(removed)


def tidy(parent: Path) -> None:
    """Finish what a killed process has left in a folder of folders."""
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
