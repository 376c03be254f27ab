"""Run every cell of docs/tour.ipynb and keep the outputs in it, without what belongs to a machine: `make tour`."""

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

TOUR = Path(__file__).with_name("tour.ipynb")
SECONDS_PER_CELL = 600
COLOURS = 32  # of a figure


def digest(sources: Sequence[str]) -> str:
    """Says which code the outputs are of."""
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def smaller(png: str) -> str:
    """A figure, in base64, with few colours: noise in all of them takes most of the file."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        few = image.convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file := io.BytesIO(), "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def tidy(notebook: dict[str, Any]) -> None:
    """Leave the outputs of an executed notebook, and of its metadata what is the same on every machine.

    A figure's text becomes the description that is "alt" in the metadata of its cell.

    Raises:
        ValueError: a cell wrote to stderr, such as a warning, or has a figure without a description.
    """
    for cell in notebook["cells"]:
        alt = cell["metadata"].get("alt")
        cell["metadata"] = {"alt": alt} if alt else {}
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"cell {cell['id']!r} wrote to stderr: {output['text']}")
            if "image/png" in output.get("data", {}):
                if not alt:
                    raise ValueError(f'cell {cell["id"]!r} has a figure: describe it as "alt" in the cell\'s metadata')
                output["data"] = {"image/png": smaller(output["data"]["image/png"]), "text/plain": alt}
    notebook["metadata"] = {
        "executed_sha256": digest([cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]),
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main() -> None:
    """Replace the notebook, unless a cell fails."""
    import nbformat  # here, since the tests have no need of the extra `docs`
    from nbclient import NotebookClient

    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm asks for ipywidgets; no bar is shown here
    notebook = nbformat.read(TOUR, as_version=4)
    folder = {"metadata": {"path": str(TOUR.parent)}}
    NotebookClient(notebook, timeout=SECONDS_PER_CELL, resources=folder, record_timing=False).execute()
    tidy(notebook)
    nbformat.write(nbformat.from_dict(notebook), TOUR)


if __name__ == "__main__":
    main()
