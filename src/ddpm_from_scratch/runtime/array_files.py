"""Arrays in `.npz` files that are whole or absent, without pickle; the one cache of images and features."""

import io
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .atomic_files import UNFINISHED, flush_folder, write_file

# What numpy raises on a file that is not a whole archive of its own.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an `.npz` file; several processes may write the same one at once. OSError if it cannot be written."""
    archive = io.BytesIO()
    np.savez_compressed(archive, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as folder:
        write_file(unfinished := Path(folder, path.name), archive.getvalue())
        unfinished.replace(path)
    flush_folder(path.parent)


def read_arrays(path: Path, *needed: str) -> dict[str, np.ndarray]:
    """Read all arrays of an `.npz` file; ValueError if it cannot be read or lacks one of the needed arrays."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is not an archive")
            arrays = dict(archive)
        if missing := [name for name in needed if name not in arrays]:
            raise ValueError(f"{missing[0]} is not a file in the archive")
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return arrays
