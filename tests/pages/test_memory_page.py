"""docs/training.md and the README say what the results say; the benchmark of memory behind them, made tiny."""

import json
import subprocess
import sys

import psutil
import pyarrow.parquet
import pytest

from helpers.pages import load
from helpers.paths import DOCS, ROOT


@pytest.fixture
def benchmark():
    return load(ROOT / "benchmarks" / "memory.py")


def test_the_page_is_what_its_script_writes():
    script = load(DOCS / "make_training.py")
    for path in script.PARTS:
        page = path.read_text(encoding="utf-8")
        assert script.fill(path, page) == page
    page = script.PAGE.read_text(encoding="utf-8")
    run = json.loads(script.RESULTS.read_text())["runs"][-1]
    assert f"| {run['streamed']['together'] / 1e9:.2f} GB |" in page


def test_the_results_keep_the_promise():
    """Less than 2 GB beyond the model's, and at most 1.1 times the decoded images."""
    results = json.loads((DOCS / "results" / "memory.json").read_text())
    assert results["rows"] == 1_000_000
    for run in results["runs"]:
        assert all(run["streamed"][kind] - run["model_alone"][kind] < 2e9 for kind in ("resident", "together"))
        assert (
            run["streamed"]["images"] * results["file_bytes"] / results["rows"] > results["shuffle_window_mb"] * 2**20
        )
    assert results["in_memory"]["held"] <= 1.1 * results["in_memory"]["decoded"]


@pytest.mark.full
def test_a_peak_is_that_of_all_processes(benchmark):
    grow = "x = bytearray(60_000_000); x[::4096] = b'x' * len(x[::4096])"
    parent = f"import subprocess, sys, time; {grow}; subprocess.run([sys.executable, '-c', sys.argv[1]]); time.sleep(1)"
    child = f"import time; {grow}; time.sleep(1.5)"
    process = subprocess.Popen([sys.executable, "-c", parent, child])
    with benchmark.watching(psutil.Process(process.pid)) as peak:
        assert process.wait() == 0
    assert 60e6 < peak.resident < 110e6 and peak.together > peak.resident + 50e6


@pytest.mark.full
def test_the_set_and_the_runs(benchmark, tmp_path, monkeypatch):
    asked = []

    def train(folder, *flags):
        files = sorted((folder / "images").iterdir())
        asked.append((flags, [pyarrow.parquet.read_metadata(file).num_rows for file in files]))
        return {"images": 1, "resident": 10, "together": 20}

    monkeypatch.setattr(benchmark, "train", train)
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda function, path: function(path))
    flags = ("--rows", "60", "--rows_of_shard", "25", "--in_memory_rows", "40", "--workers", "1", "--images", "1000")
    benchmark.main([*flags, "--results", str(tmp_path / "memory.json")])
    results = json.loads((tmp_path / "memory.json").read_text())
    assert results["rows"] == 60 and results["in_memory"]["decoded"] == 40 * 28 * 28
    assert [rows for _, rows in asked] == [[25, 25, 10]] * 2
    assert "--streaming" not in asked[0][0] and {"--streaming", "--max_train_steps", 2} <= set(asked[1][0])
    assert results["runs"][0]["streamed"]["together"] == 20


@pytest.mark.full
def test_variants_differ(benchmark):
    image = benchmark.load_data(benchmark.TrainingConfig(), 1, 28).images[0][0].numpy()
    assert len({benchmark.variant(image, number).tobytes() for number in range(56)}) > 40
