"""A Space on the Hub with the demo of a model: the app, this package, and their requirements."""

import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

import ddpm_from_scratch

from ..runtime.shipped import shipped
from .repository import open_repository, push

DEMO = shipped("demo")
PACKAGE = Path(ddpm_from_scratch.__file__).parent
SPACE_FILES = ("README.md", "app.py", "drawing.py", "model_id.txt", "requirements.txt", "ddpm_from_scratch/*")


def publish_space(name: str, model: str, *, private: bool = False, token: str | None = None) -> str:
    """Push the demo of a model to a Space; return the URL of the commit.

    Args:
        name: of the Space, `owner/name`.
        model: its model, `owner/name`.
        private: nobody else may see it.
        token: for the Hub; that of the login if left out.

    Raises:
        PermissionError, ValueError, ConnectionError: as `open_repository` and `push`.
    """
    space = open_repository(name, private=private, token=token, kind="space", sdk="gradio")
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), model)
        message = f"A demo of {model}"
        return push(
            Path(folder), space, message=message, token=token, kind="space", files=SPACE_FILES, replaced=SPACE_FILES
        )


def write_space(folder: Path, model: str) -> None:
    """Write all files of the Space into a folder."""
    for source in DEMO.glob("*.py"):
        shutil.copyfile(source, folder / source.name)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "model_id.txt").write_text(f"{model}\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
    data = SpaceCardData(
        title=f"{model.rpartition('/')[2]} demo",
        sdk="gradio",
        sdk_version=gradio_version(),
        app_file="app.py",
        models=[model],
    )
    text = f"Samples of [{model}](https://huggingface.co/{model}), its chain step by step, and the forward process."
    SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def requirements() -> list[str]:
    """The requirements of the package and its demo, without gradio, which Spaces provide."""
    needed = metadata.requires("ddpm-from-scratch") or []
    plain = [line for line in needed if ";" not in line]
    demo = [line.partition(";")[0].strip() for line in needed if re.search(r"extra == .demo.$", line)]
    return [*plain, *(line for line in demo if not line.startswith("gradio"))]


def gradio_version() -> str:
    """The installed version of gradio, or the oldest that the demo works with."""
    try:
        return metadata.version("gradio")
    except metadata.PackageNotFoundError:
        needed = " ".join(metadata.requires("ddpm-from-scratch") or [])
        oldest = re.search(r"gradio>=([\d.]+)", needed)
        return f"{oldest[1]}.0" if oldest else ""
