"""Measure the checkpoints of a tuning for few steps: distances in 1, 2 and 4 steps over the images seen.

    ddpm train fashion_mnist_few_steps --model_config_name_or_path MODEL --checkpoints_total_limit 100
    python benchmarks/few_step_curve.py outputs/ddpm-fashion-mnist-few-steps

Images without a class, from the average of the weights, with noise of its own for each number of steps. Rows are
written as they are measured, and not measured again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from few_step_tuning import STEPS, Numbers, conditions, drawn, load, measure
from few_steps import ROOT, replace_json
from recipes import real_features
from safetensors.torch import load_file

from ddpm_from_scratch.data.config import EMBEDDED_DATA
from ddpm_from_scratch.runtime.devices import keep_freed_memory
from ddpm_from_scratch.sampling.generate import SampleSpec

RESULTS = ROOT / "docs" / "results" / "few_step_curve.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    keep_freed_memory()
    pipeline = load(args.run)
    training = json.loads((args.run / "results.json").read_text(encoding="utf-8"))
    batch = training["images_seen"] // training["steps"]
    reference = real_features(EMBEDDED_DATA, args.num_images)
    about = conditions(training, reference)
    before = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else {}
    same = all(before.get(key) == about[key] for key in ("num_images", "training"))
    rows: dict[str, Numbers] = before["rows"] if same else {}
    for checkpoint in sorted((args.run / "checkpoints").glob("step_*")):
        pipeline.unet.load_state_dict(load_file(checkpoint / "ema.safetensors"))
        images_seen = int(checkpoint.name.removeprefix("step_")) * batch
        for steps in STEPS:
            name = f"{images_seen} images, {steps} steps"
            if name not in rows:
                figures = measure(drawn(pipeline, SampleSpec(steps, args.num_images)), reference)
                rows[name] = {"images_seen": images_seen, "steps": steps, **figures}
                print(name, rows[name], flush=True)
            replace_json(args.results, about | {"rows": rows})


if __name__ == "__main__":
    main()
