"""Time `ddpm train` with one process of all threads and with a process for each core, alone and beside a busy process.

    python benchmarks/cores.py      # five minutes on 2 cores, with nothing else running

Each measurement is a run of the default preset of some steps; what is told is the speed of its later steps. Results go
to docs/results/cores.json, of which `python docs/make_speed.py` makes the table of docs/speed.md.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from few_steps import ROOT, replace_json
from own_images import processor

from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import versions

RESULTS = ROOT / "docs" / "results" / "cores.json"
WAYS = {"one process": ["--num_processes=1"], "a process for each core": ["--num_processes=auto"]}
BUSY = "while True: pass"
SAID = re.compile(r"(\d+) images/s \((\d+) to (\d+)\)")


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that only compute."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def images_per_second(flags: Sequence[str]) -> float:
    """What a short run says of its speed in its plan."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ddpm_from_scratch.cli", "train", "fashion_mnist_quick", *flags]
        few = ["--max_train_steps=13", "--eval_batch_size=1", "--ddpm_num_inference_steps=1", "--logger=none"]
        done = subprocess.run(
            [*command, *few, f"--output_dir={folder}/model"], stderr=subprocess.PIPE, text=True, check=True
        )
    found = SAID.search(done.stderr)
    assert found is not None, done.stderr
    return float(found[1])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rates: dict[str, dict[str, list[float]]] = {way: {"alone": [], "beside": []} for way in WAYS}
    for _ in range(args.rounds):
        for way, flags in WAYS.items():
            for processes, place in enumerate(("alone", "beside")):
                with busy(processes):
                    rates[way][place].append(images_per_second(flags))
                    print(way, place, rates[way][place][-1], flush=True)
    result: dict[str, Any] = {
        "images_per_second": {
            way: {place: statistics.median(values) for place, values in found.items()} for way, found in rates.items()
        },
        "rounds": rates,
        "device": device_name(torch.device("cpu")),
        "processor": processor(),
        "versions": versions(),
    }
    replace_json(args.results, result)
    print(json.dumps(result["images_per_second"], indent=2))


if __name__ == "__main__":
    main()
