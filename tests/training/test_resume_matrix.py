"""N + M steps equal N, a stop by a signal, and M by the same command: bit for bit, whatever the run is made of."""

import itertools
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data import sources
from ddpm_from_scratch.runtime.errors import Stopped
from ddpm_from_scratch.sampling import checkpoints
from helpers.runs import TINY, assert_equal, encode, picture, run_main, stop_in_step

NUM, BATCH, STEPS, STOP = 22, 4, 7, 3  # 5.5 batches are an epoch, so the stop is in its middle
FEATURES = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["bag", "coat", "shoe"])})

SOURCES = {
    "in memory": (),
    "parquet": (),  # read from the disk and decoded on demand
    "streaming": ("--streaming", "true"),
}
MATRIX = {
    "source": tuple(SOURCES),
    "workers": (0, 2),
    "accumulation": (1, 4),
    "precision": ("no", "bf16"),
    "ema": (True, False),
    "conditional": (True, False),
}
CASES = [dict(zip(MATRIX, case, strict=True)) for case in itertools.product(*MATRIX.values())]


def in_short(case):
    """For each source: all pairs of workers, accumulation and precision with the most state; a run with the least."""
    second = [case["workers"] == 2, case["accumulation"] == 4, case["precision"] == "bf16"]
    if case["ema"] and case["conditional"]:
        return sum(second) % 2 == 0
    return not (case["ema"] or case["conditional"] or any(second))


if not os.environ.get("FULL_TESTS"):
    CASES = [case for case in CASES if in_short(case)]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The tiny preset, with a set of two files of row groups of 4."""
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "images").mkdir()
    for shard, numbers in enumerate((range(13), range(13, NUM))):
        columns = {
            "photo": [{"bytes": encode(picture(seed=number)), "path": None} for number in numbers],
            "kind": [number % 3 for number in numbers],
        }
        table = pyarrow.Table.from_pydict(columns, schema=FEATURES.arrow_schema)
        pyarrow.parquet.write_table(table, folder / "images" / f"train-{shard}.parquet", row_group_size=4)
    values = {
        **TINY,
        "dataset_name": str(folder / "images"),
        "cache_dir": str(folder / "cache"),
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS,
        "log_steps": 2,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_stopped_run_goes_on_bit_for_bit(preset, tmp_path, monkeypatch, case):
    inputs = type("Inputs", (), {"preset": str(preset)})
    monkeypatch.setattr(sources, "MIB", 8)  # windows of two or three blocks
    monkeypatch.setattr(data, "MIB", 8)
    if case["source"] == "parquet":
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    flags = [
        *SOURCES[case["source"]],
        *("--dataloader_num_workers", case["workers"], "--gradient_accumulation_steps", case["accumulation"]),
        *("--mixed_precision", case["precision"], "--use_ema", case["ema"]),
        *("--class_conditional", case["conditional"]),
    ]
    whole = run_main(inputs, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"stopped after step {STOP}"):
        stop_in_step(patch, STOP)
        run_main(inputs, tmp_path / "parts", *flags)
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == [f"step_{STOP:08d}"]
    parts = run_main(inputs, tmp_path / "parts", *flags)

    tensors = [tensors_of(folder, case["ema"]) for folder in (parts, whole)]
    assert len(tensors[0]) > 50 and ("ema/conv_in.weight" in tensors[0]) == case["ema"]
    assert_equal(*tensors)
    progress = [progress_of(folder) for folder in (parts, whole)]
    assert progress[0] == progress[1] and len(progress[0]["losses"]) == 4
    assert (parts / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


def tensors_of(folder, ema):
    names = ("unet", "optimizer", "ema") if ema else ("unet", "optimizer")
    path = folder / "checkpoints" / f"step_{STEPS:08d}"
    return {f"{name}/{key}": tensor for name in names for key, tensor in checkpoints.read_tensors(path, name).items()}


def progress_of(folder):
    progress = checkpoints.read_state(folder / "checkpoints" / f"step_{STEPS:08d}")["progress"]
    return {key: value for key, value in progress.items() if key != "seconds"}
