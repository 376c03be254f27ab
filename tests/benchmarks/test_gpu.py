"""The GPU benchmark runs whole on a CPU, in small, so that a GPU's minutes go into measuring."""

import json

import numpy as np
import pytest

from helpers.paths import ROOT

FIGURES = {"seconds", "fastest", "slowest", "host_seconds", "images_per_second", "set_up"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import gpu

    return gpu


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of profilers and compilers
def test_every_part_in_small(gpu, tmp_path):
    path = tmp_path / "results.jsonl"
    assert gpu.main(["--smoke", "--results", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {}
    for row in rows:
        found.setdefault(row["part"], {})[row["name"]] = row
    assert list(found) == ["about", "shipped", "cifar10", "right", "sampling", "curve"]
    timed = [row for row in rows if "images_per_second" in row]
    assert len(timed) >= 15 and all(row.keys() >= FIGURES for row in timed)
    assert all(0 < row["fastest"] <= row["seconds"] <= row["slowest"] for row in timed)
    right = found["right"]
    assert not any("failed" in row for row in right.values()), right
    numbers = right["counter-based numbers"]
    assert (numbers["eager"], numbers["compiled"]) == (0, 0) and numbers["of"] > 100_000
    assert (right["resumed"]["again"], right["resumed"]["resumed"]) == (0, 0)
    (curve,) = (row for row in rows if row["part"] == "curve")
    images = np.load(tmp_path / curve["file"])["images"]
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8


def test_a_part_that_fails_does_not_end_the_others(gpu, tmp_path, monkeypatch):
    commands = []

    class Done:
        returncode = 0

    def run(command, **_):
        commands.append(command[-1])
        Done.returncode = int(command[-1] == "shipped")
        return Done

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main(["--results", str(tmp_path / "results.jsonl"), "--parts", "about", "shipped", "right"]) == 1
    assert commands == ["about", "shipped", "right"]
