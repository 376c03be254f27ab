"""What a run shows: sample grids, the loss curve, results and the environment."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ddpm-from-scratch", "torch", "diffusers", "accelerate", "datasets", "numpy", "pillow")


def version(package: str) -> str:
    """Of an installed package; the project itself may also run from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def write_json(values: dict[str, Any], path: Path) -> None:
    """Readable, with a final newline."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """What is in a results file; nothing if there is none.

    Raises:
        ValueError: it is not such a file.
    """
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): mend it or move it away.") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path} does not hold results by name: move it away.")
    return results


def merge_results(path: Path, name: str, content: dict[str, Any]) -> None:
    """Put something into a results file, which is whole at any time, beside what else is in it."""
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        write_json({**read_results(path), name: content}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
