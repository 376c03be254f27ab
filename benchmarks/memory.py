"""Measure the memory of training on a large data set that is streamed, and of one that is decoded into memory.

    python benchmarks/memory.py [--rows 1000000] [--workers 0 2]

Writes sharded Parquet files of 28x28 PNG (the embedded images, moved up by 0 to 27 pixels and mirrored or not, so that
few are alike), trains on them by `train.py --streaming` with a tiny network, and the same on the embedded set for what
a run needs anyway. Memory is that of all processes of a run: their resident sets with shared pages counted
once, and the resident set of the process that trains, sampled while they run. `python docs/make_training.py` makes a
table in docs/training.md of the results.
"""

import argparse
import gc
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import torch
import yaml
from few_steps import ROOT, replace_json
from PIL import Image
from tqdm import tqdm

from ddpm_from_scratch.data.config import EMBEDDED_DATA
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.training.config import TrainingConfig

MIB = 2**20
INTERVAL = 0.3  # seconds between two looks
BATCH = 500
SIDE = 28
NETWORK = {  # the least that there is: images pass as fast as they are read
    "block_out_channels": [4],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
    "add_attention": False,
}
PRESET = {
    "model": NETWORK,
    "train_batch_size": BATCH,
    "mixed_precision": "no",
    "eval_batch_size": 1,
    "ddpm_num_inference_steps": 1,
    "checkpointing_steps": None,
    "log_steps": 20,
    "logger": "none",
}


# --- the data set --------------------------------------------------------------------------------------------------


def variant(image: np.ndarray, number: int) -> np.ndarray:
    """One of 56 images that are made of one."""
    moved = np.roll(image, -(number % SIDE), axis=0)
    return moved[:, ::-1] if number // SIDE % 2 else moved


def as_png(image: np.ndarray) -> bytes:
    """The bytes of a file."""
    sink = pyarrow.BufferOutputStream()
    Image.fromarray(np.ascontiguousarray(image)).save(sink, "PNG", compress_level=1)
    return bytes(sink.getvalue().to_pybytes())


def write_set(folder: Path, rows: int, rows_of_shard: int) -> int:
    """A data set of so many images, in row groups as pyarrow cuts them; the bytes of its files."""
    embedded = load_data(TrainingConfig(), 1, SIDE).images
    images = [embedded[index][0].numpy() for index in range(len(embedded))]
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    total = 0
    for shard, start in enumerate(tqdm(range(0, rows, rows_of_shard), "writing", unit="file")):
        numbers = range(start, min(rows, start + rows_of_shard))
        encoded = [as_png(variant(images[number % len(images)], number // len(images))) for number in numbers]
        table = pyarrow.Table.from_pydict({"image": [{"bytes": each, "path": None} for each in encoded]}, schema=schema)
        path = folder / f"train-{shard:05d}.parquet"
        pyarrow.parquet.write_table(table, path)
        total += path.stat().st_size
    return total


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass
class Peak:
    """The most that was seen, in bytes."""

    resident: int = 0  # of the first process
    together: int = 0  # of it and its children, shared pages once


@contextmanager
def watching(process: psutil.Process) -> Iterator[Peak]:
    """Look at the memory of a process and its children again and again."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        while not done.wait(INTERVAL):
            try:
                own = process.memory_full_info()
                children = [child.memory_full_info().pss for child in process.children(recursive=True)]
            except psutil.NoSuchProcess:  # a worker that has just ended
                continue
            peak.resident = max(peak.resident, own.rss)
            peak.together = max(peak.together, own.pss + sum(children))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def train(folder: Path, *flags: object) -> dict[str, Any]:
    """Train in a process of its own; what it has seen, and its peaks."""
    preset = folder / "preset.yaml"
    preset.write_text(yaml.safe_dump(PRESET), encoding="utf-8")
    output = folder / "model"
    arguments = [preset, "--output_dir", output, "--cache_dir", folder / "cache", *flags]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with watching(psutil.Process(process.pid)) as peak:
        code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    return {"images": results["images_seen"], "resident": peak.resident, "together": peak.together}


def decode_in_memory(path: Path) -> dict[str, Any]:
    """What the in-memory path takes, in this process: while it reads and once it has."""
    process = psutil.Process()
    load_data(TrainingConfig(), 1, SIDE)  # so that no library is loaded below
    gc.collect()
    before = process.memory_info().rss
    with watching(process) as peak:
        data = load_data(TrainingConfig(dataset_name=str(path)), 1, SIDE)
    if not isinstance(data.images, torch.Tensor):
        raise RuntimeError(f"{path} is too large for the in-memory path")
    gc.collect()
    held = process.memory_info().rss - before
    return {"decoded": data.images.nbytes, "held": held, "while_reading": peak.resident - before}


def in_fresh_process(function: Callable[[Path], dict[str, Any]], argument: Path) -> dict[str, Any]:
    """The function's result, computed where nothing was allocated before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (argument,))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the data set that is streamed")
    parser.add_argument("--rows_of_shard", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=300_000, help="to train on: more than a window holds")
    parser.add_argument("--in_memory_rows", type=int, default=200_000, help="of the data set that is decoded")
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 2), help="loader processes")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "memory.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data sets, measure, write the results."""
    args = parse(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ddpm_memory_") as name:
        folder = Path(name)
        (folder / "images").mkdir()
        size = write_set(folder / "images", args.rows, args.rows_of_shard)
        write_set(folder, args.in_memory_rows, args.in_memory_rows)  # one file
        in_memory = in_fresh_process(decode_in_memory, folder / "train-00000.parquet")
        runs = []
        for workers in args.workers:
            count = ("--dataloader_num_workers", workers)
            alone = train(folder, "--dataset_name", EMBEDDED_DATA, "--num_epochs", 1, *count)
            length = ("--max_train_steps", args.images // BATCH)
            streamed = train(folder, "--dataset_name", folder / "images", "--streaming", *length, *count)
            runs.append({"workers": workers, "model_alone": alone, "streamed": streamed})
    results = {
        "rows": args.rows,
        "file_bytes": size,
        "decoded_bytes": args.rows * SIDE**2,
        "shuffle_window_mb": TrainingConfig().shuffle_window_mb,
        "runs": runs,
        "in_memory": in_memory,
        "device": device_name(torch.device("cpu")),
        "seconds": time.perf_counter() - start,
        "versions": versions(),
    }
    replace_json(args.results, results)
    print(args.results)


if __name__ == "__main__":
    main()
