"""docs/differences.md says what docs/results/differences.json says, and that agrees with what other tests measure."""

import importlib.util
import json

import diffusers
import pytest

from helpers.paths import DOCS


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_differences", DOCS / "make_differences.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results():
    return json.loads((DOCS / "results" / "differences.json").read_text(encoding="utf-8"))


def test_the_page_holds_the_tables_of_the_results(script, results):
    page = (DOCS / "differences.md").read_text(encoding="utf-8")
    assert script.fill(page, results) == page


def test_filling_replaces_what_stands_between_the_markers(script, results):
    page = (DOCS / "differences.md").read_text(encoding="utf-8")
    altered = json.loads(json.dumps(results))
    altered["differences"]["trailing"]["stock_counts"] = 12345
    altered["equalities"]["spacings"]["leading"] = 54321
    filled = script.fill(page, altered)
    assert "12345" in filled
    assert "54321" in filled
    assert script.fill(filled, results) == page


def test_the_results_are_those_of_the_script_and_of_this_diffusers(script, results):
    assert results["differences"].keys() == script.DIFFERENCES.keys()
    assert results["equalities"].keys() == script.EQUALITIES.keys()
    measured, installed = results["versions"]["diffusers"], diffusers.__version__
    assert measured.split(".")[:2] == installed.split(".")[:2]  # a new minor version is a reason to measure again


@pytest.mark.parametrize(
    "name",
    [
        "linspace",
        "trailing",
        "nan_variances",
        "laplace",
        "zero_terminal_snr",
        "offset_beyond_the_chain",
        "unknown_options",
        "wrong_calls",
    ],
)
def test_quick_measurements_still_give_the_results(script, results, name):
    measured = json.loads(json.dumps(script.DIFFERENCES[name]()))
    assert measured == {key: pytest.approx(value) for key, value in results["differences"][name].items()}


def test_the_page_gives_every_difference_its_note(script):
    page = (DOCS / "differences.md").read_text(encoding="utf-8")
    numbers = {int(row[0].split(".")[0]) for row in script.ROWS}
    notes = {int(line.split(".")[0]) for line in page.splitlines() if line[:1].isdigit()}
    assert numbers == notes == set(range(1, max(numbers) + 1))
