"""Files of results, and the versions of the packages that results depend on."""

import functools
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .atomic_files import replace_file
from .shipped import CHECKOUT

PACKAGES = ("ddpm-from-scratch", "torch", "diffusers", "accelerate", "datasets", "numpy", "pillow")


def version(package: str) -> str:
    """The version of an installed package, or "not installed": the project itself may run from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


@functools.cache
def commit() -> str | None:
    """The commit of this project's checkout, with "-dirty" if files differ from it; None outside of a checkout."""
    if not (CHECKOUT / ".git").exists():  # a wheel may lie within another project's repository
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or no commit yet
        return None
    return done.stdout.strip()


def code_address() -> str | None:
    """The address of this project's code, as the package says; None if it says none."""
    try:
        urls = metadata.metadata(PACKAGES[0]).get_all("Project-URL") or ()
    except metadata.PackageNotFoundError:
        return None
    return dict(url.split(", ", 1) for url in urls).get("Repository")


def as_json(values: dict[str, Any]) -> str:
    """Format values as indented JSON with a final newline."""
    return json.dumps(values, indent=2) + "\n"


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write values as indented JSON."""
    path.write_text(as_json(values), encoding="utf-8")


def read_results(path: Path) -> dict[str, Any]:
    """Read a results file, empty if there is none; ValueError if it is not a JSON object."""
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
    """Set one entry of a results file and keep the others; the file is complete at any time."""
    replace_file(path, as_json({**read_results(path), name: content}).encode())
