"""docs/tour.ipynb runs from top to bottom, and what is committed of it is one clean run of its own code."""

import base64
import io
import json
import re

import make_tour
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers.utils import logging
from PIL import Image

from helpers.paths import ROOT

pytestmark = pytest.mark.full

TOUR = ROOT / "docs" / "tour.ipynb"
TEXT = TOUR.read_text(encoding="utf-8")
NOTEBOOK = json.loads(TEXT)
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


@pytest.fixture
def _nothing_remains():
    """Figures go nowhere; settings and random numbers are those of before."""
    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with mpl.rc_context(), torch.random.fork_rng(devices=[]):
        mpl.use("agg")
        yield
        plt.close("all")
    logging.set_verbosity(verbosity)
    if progress_bar:
        logging.enable_progress_bar()


def source(cell):
    return "".join(cell["source"])


def run(cell, namespace, steps):
    code = re.sub(r"^STEPS = \d+", f"STEPS = {steps}", source(cell), flags=re.MULTILINE)
    exec(compile(code, f"tour.ipynb, cell {cell['id']}", "exec"), namespace)
    plt.close("all")


@pytest.mark.usefixtures("_nothing_remains")
def test_every_cell_runs(monkeypatch):
    """With its assertions, on a training of a few steps, in the folder that Jupyter starts in."""
    monkeypatch.chdir(TOUR.parent)
    namespace = {}
    for cell in CODE:
        run(cell, namespace, steps=20)
    assert len(namespace["losses"]) == 20


@pytest.mark.usefixtures("_nothing_remains")
def test_the_root_is_found_from_the_root_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}
    run(CODE[0], namespace, steps=1)
    assert namespace["ROOT"] == ROOT and namespace["STEPS"] == 1


def test_the_outputs_are_those_of_one_run_of_this_code():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert NOTEBOOK["metadata"]["executed_sha256"] == make_tour.digest([*map(source, CODE)]), "changed since: make tour"


def test_no_cell_failed_or_warned():
    assert {output["output_type"] for output in OUTPUTS} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in OUTPUTS if output["output_type"] == "stream"} == {"stdout"}


def test_every_figure_is_there_and_described():
    for cell in CODE:
        draws = "plt.subplots(figsize" in source(cell) or re.search(r"^show\(", source(cell), re.MULTILINE)
        figures = [output["data"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(figures) == bool(draws), cell["id"]
        assert all("".join(figure["text/plain"]) == cell["metadata"]["alt"] for figure in figures)


def test_it_is_small_and_knows_no_machine():
    assert len(TEXT) < 600_000
    assert set(NOTEBOOK["metadata"]) == {"executed_sha256", "kernelspec", "language_info"}
    for cell in NOTEBOOK["cells"]:
        assert cell["metadata"].keys() <= {"alt"} and re.fullmatch(r"[a-z-]+", cell["id"])
    words = re.sub(r'"image/png": "[^"]*"', "", TEXT)
    assert not re.search(r"/home|/root|/tmp|/work|/Users|[A-Z]:\\", words)


def notebook(output, **metadata):
    timing = {"execution": {"iopub.execute_input": "2026-01-01T00:00:00"}}
    code = {"cell_type": "code", "id": "one", "metadata": timing | metadata, "outputs": [output], "source": "print(1)"}
    text = {"cell_type": "markdown", "id": "two", "metadata": {}, "source": "words"}
    return {"cells": [code, text], "metadata": {"language_info": {"version": "3.11.7"}}}


def test_an_executed_notebook_is_tidied():
    noise = np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB").save(file := io.BytesIO(), "PNG")
    png = base64.b64encode(file.getvalue()).decode()
    figure = {"output_type": "display_data", "data": {"image/png": png, "text/plain": "<Figure size 1x1>"}}
    tidied = notebook(figure, alt="a line")
    make_tour.tidy(tidied)
    assert tidied["cells"][0]["metadata"] == {"alt": "a line"}
    data = tidied["cells"][0]["outputs"][0]["data"]
    assert data["text/plain"] == "a line" and len(data["image/png"]) < len(png) / 2
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as image:
        difference = np.asarray(image.convert("L"), float) - np.asarray(Image.open(file).convert("L"), float)
    assert abs(difference).max() < 32 and abs(difference).mean() < 5
    assert tidied["metadata"]["language_info"] == {"name": "python"}
    assert tidied["metadata"]["executed_sha256"] == make_tour.digest(["print(1)"]) != make_tour.digest(["print(2)"])
    with pytest.raises(ValueError, match="'one' has a figure: describe it"):
        make_tour.tidy(notebook(figure))


def test_a_notebook_that_warns_is_refused():
    with pytest.raises(ValueError, match="'one' wrote to stderr: careful"):
        make_tour.tidy(notebook({"output_type": "stream", "name": "stderr", "text": "careful"}))
