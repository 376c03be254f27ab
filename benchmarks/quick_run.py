"""`make train` in a fresh clone, as a newcomer runs it: how long it takes, and how good its samples are.

    python benchmarks/quick_run.py       # a quarter of an hour, with nothing else running

The clone is of the last commit. Its virtual environment is made anew, by what pip is set to. Results are added to
docs/results/quick_runs.json under the processor's name, of which `python docs/make_training.py` makes the sentences of
the README; the model is kept in outputs/quick_run.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would hold up whatever else runs

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from few_steps import ROOT, replace_json
from own_images import SAMPLER, measure, processor
from recipes import NUM_IMAGES, STEPS, real_features

from ddpm_from_scratch.data.config import EMBEDDED_DATA, EMBEDDED_TEST_SET
from ddpm_from_scratch.evaluation.metrics import kernel_distance_with_error
from ddpm_from_scratch.runtime.devices import keep_freed_memory
from ddpm_from_scratch.sampling.generate import SampleSpec

RESULTS = ROOT / "docs" / "results" / "quick_runs.json"
MODEL = ROOT / "outputs" / "quick_run"
NAME = "ddpm-fashion-mnist-quick"


def run_as_a_newcomer(pip_flags: str) -> float:
    """Clone, install and train; keep the model; the seconds of the two commands."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "ddpm_from_scratch"
        start = time.perf_counter()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run(["make", "train", f"PIP_FLAGS={pip_flags}"], cwd=clone, check=True)
        seconds = time.perf_counter() - start
        shutil.rmtree(MODEL, ignore_errors=True)
        shutil.copytree(clone / "outputs" / NAME, MODEL, ignore=shutil.ignore_patterns("checkpoints"))
    return seconds


def main() -> None:
    """Run, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pip_flags", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    keep_freed_memory()
    seconds = run_as_a_newcomer(args.pip_flags)
    print(f"{seconds:.0f} seconds with installation", flush=True)
    reference = real_features(EMBEDDED_DATA, NUM_IMAGES)
    floor = kernel_distance_with_error(real_features(EMBEDDED_TEST_SET, NUM_IMAGES), reference)
    found = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else {}
    found[processor()] = {
        "seconds_with_installation": seconds,
        "num_images": NUM_IMAGES,
        "sampler": SAMPLER,
        "num_inference_steps": STEPS,
        **measure(MODEL, reference, SampleSpec(STEPS, NUM_IMAGES))[0],
        "floor": {"kernel_distance": floor.value, "kernel_distance_error": floor.error},
        "training": json.loads((MODEL / "results.json").read_text(encoding="utf-8")),
    }
    replace_json(args.results, found)
    print(json.dumps(found[processor()], indent=2))


if __name__ == "__main__":
    main()
