"""Write the tables and the plot of docs/questions.md from their results.

    python docs/make_questions.py

`python benchmarks/two_questions.py predictions` and `... jumps MODEL` measure, and draw the images;
`python benchmarks/few_step_tuning.py` does so for a model that was tuned to jump, and
`python benchmarks/few_step_curve.py` for the checkpoints of its last run.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from make_few_steps import kernel

from pages import bullets, in_words, replace_parts, table, versions

DOCS = Path(__file__).parent
PREDICTIONS = DOCS / "results" / "predictions.json"
JUMPS = DOCS / "results" / "jumps.json"
TUNING = DOCS / "results" / "few_step_tuning.json"
CURVE = DOCS / "results" / "few_step_curve.json"
PAGE = DOCS / "questions.md"
FIGURE = DOCS / "figures" / "questions_errors.png"

TITLES = {
    "epsilon": "ε",
    "x_0": "$x_0$",
    "v": "$v$",
    "x_0, weighted as epsilon": "$x_0$, weighted as ε",
}
COLORS = {"epsilon": "#0072b2", "x_0": "#d55e00", "v": "#009e73", "x_0, weighted as epsilon": "#cc79a7"}
DISTANCES = {"from_mean_of_data": "from the mean of the data", "from_their_own_mean": "from their own mean"}
Numbers = dict[str, Any]


def prediction_table(results: Numbers) -> str:
    """Samples, likelihood, and the error at the clean and at the noisy end."""
    timesteps = list(results["alpha_bar"])
    places = {f"t = {t}": timesteps.index(t) for t in ("0", "500", timesteps[-1])}
    rows = [
        (
            TITLES[row["prediction"]],
            kernel(row),
            f"{row['bits_per_dim']:.2f} ± {row['bits_per_dim_error']:.2f}",
            *(f"{row['errors'][place]['error']:.2g}" for place in places.values()),
        )
        for row in results["rows"]
    ]
    return table(("the network predicts", "kernel distance", "bits/dim", *(f"error of x_0, {t}" for t in places)), rows)


def prediction_facts(results: Numbers) -> str:
    """What was measured and with what."""
    model, features = results["rows"][0]["model"], results["features"]
    facts = {
        "Models": f"{model['parameters']:,} parameters, {model['training_steps']:,} steps, {model['images_seen']:,} "
        f"images seen of {model['training_images']:,}, on {model['device']}; one training each",
        "Kernel distance": f"N = {results['num_images']:,} images in {results['num_inference_steps']} steps, floor "
        f"{kernel(results['real'])} (as many other training images); features of {features['network']} at "
        f"{features['size']} pixels",
        "Bits per dimension": f"{results['num_bound_images']} test images, {results['num_terms']} terms drawn for each",
        "Errors": f"{results['num_error_images']} test images, without clipping, pixels in [-1, 1], t counted from 0",
        "Device": f"{results['device']}; {versions(results)}",
    }
    return bullets(facts)


def jump_table(results: Numbers) -> str:
    """By steps; the data the last."""
    rows = [
        (name, f"{row['num_images']:,}", kernel(row), *(f"{row[key]:.1f}" for key in DISTANCES))
        for name, row in [
            *((f"{row['steps']:,}", row) for row in results["rows"]),
            ("the data", results["real"] | {"num_images": results["num_images"]}),
        ]
    ]
    head = ("steps", "N", "kernel distance", *DISTANCES.values())
    return table(head, rows)


def jump_facts(results: Numbers) -> str:
    """What was measured and with what."""
    features = results["features"]
    facts = {
        "Model": f"{results['model']['name']}, {results['model']['parameters']:,} parameters, without a class",
        "Kernel distance": "N images against as many training images; the floor is the row of the data; features of "
        f"{features['network']} at {features['size']} pixels",
        "Distances from means": f"root mean square over pixels and images, in levels of 255; the mean is that of "
        f"{results['training_images']:,} training images",
        "Device": f"{results['device']}; {versions(results)}",
    }
    return bullets(facts)


MODELS = {
    "tuned": "tuned, η = ∞",
    "tuned, by stock classes": "tuned, by diffusers' classes",
    "teacher, noise fresh": "as trained, η = ∞",
    "teacher": "as trained, η = 1",
}


def tuning_table(results: Numbers) -> str:
    """By labels and steps: before and after; then what `ddpm evaluate` has found of both."""
    rows = [
        (MODELS[row["model"]], {"null": "none", "in turn": "in turn"}[row["labels"]], *figures(row))
        for row in sorted(results["rows"].values(), key=row_order)
    ]
    rows += [
        (MODELS[model], "none", *figures(row))
        for model, found in results["evaluated"].items()
        for row in sorted(found, key=lambda row: row["steps"])
        if row["num_images"] >= results["num_images"]
    ]
    head = ("model", "class", "steps", "N", "kernel distance", "precision", "recall", "taken for their class")
    return table(head, rows)


def row_order(row: Numbers) -> tuple[bool, int, int]:
    """Images without a class first; by steps, and by model as in `MODELS`."""
    return row["labels"] != "null", row["steps"], list(MODELS).index(row["model"])


def figures(row: Numbers) -> tuple[str, ...]:
    """Of images in so many steps."""
    accuracy = f"{row['accuracy']:.2f}" if "accuracy" in row else "–"
    near = (f"{row[name]:.2f}" for name in ("precision", "recall"))
    return str(row["steps"]), f"{row['num_images']:,}", kernel(row), *near, accuracy


def tuning_facts(results: Numbers) -> str:
    """What was measured and with what."""
    training, seconds, features = results["training"], results["seconds"], results["features"]
    shares = ", ".join(f"{seconds[str(k)] / seconds['teacher']:.2f} with {in_words(k)}" for k in (1, 2, 4))
    runs = [*training.get("earlier_tunings", []), training]
    facts = {
        "Tuning": ", then ".join(
            f"{run['images_seen']:,} images in {run['seconds'] / 60:.0f} minutes on {run['device']}" for run in runs
        ),
        "Kernel distance": f"floor {kernel(results['floor'])} (N = {results['num_images']:,} held-out images); "
        f"features of {features['network']} at {features['size']} pixels",
        "Time of one image": f"{shares}, where that of {seconds['teacher_steps']} steps of the chain is 1",
        "Device": f"{results['device']}, {results['processor']}; {versions(results)}",
    }
    return bullets(facts)


def curve_table(results: Numbers) -> str:
    """Kernel distances by images seen and steps."""
    found = {(row["images_seen"], row["steps"]): kernel(row) for row in results["rows"].values()}
    seen, steps = (sorted({key[place] for key in found}) for place in (0, 1))
    rows = [(f"{images:,}", *(found[images, count] for count in steps)) for images in seen]
    return table((f"images seen (N = {results['num_images']:,})", *map(in_words, steps)), rows)


PARTS = {
    "predictions": (PREDICTIONS, prediction_table),
    "prediction facts": (PREDICTIONS, prediction_facts),
    "jumps": (JUMPS, jump_table),
    "jump facts": (JUMPS, jump_facts),
    "tuning": (TUNING, tuning_table),
    "tuning facts": (TUNING, tuning_facts),
    "tuning curve": (CURVE, curve_table),
}


def read(path: Path) -> Numbers:
    """Results."""
    found: Numbers = json.loads(path.read_text(encoding="utf-8"))
    return found


def fill(page: str) -> str:
    """The page with what stands between its markers replaced."""
    return replace_parts(page, {name: make(read(path)) for name, (path, make) in PARTS.items()})


def draw(results: Numbers) -> matplotlib.figure.Figure:
    """The error of each network over log SNR, as one of x_0 and, times SNR, as one of ε."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    snr = [value / (1 - value) for value in results["alpha_bar"].values()]
    for row in results["rows"]:
        name = row["prediction"]
        of_x_0 = [error["error"] for error in row["errors"]]
        of_epsilon = [ratio * error for ratio, error in zip(snr, of_x_0, strict=True)]
        dashes = "--" if "," in name else "-"
        for axes, errors in ((left, of_x_0), (right, of_epsilon)):
            axes.plot(np.log(snr), errors, dashes, color=COLORS[name], label=TITLES[name], marker=".", linewidth=1.2)
    for axes, title in ((left, "error of $x_0$"), (right, "error of ε")):
        axes.set(xlabel="log SNR: data at the left, noise at the right", title=title, yscale="log", ylim=(1e-5, 1e2))
        axes.set_xlim(11, -12)  # the last timestep, where almost nothing of x_0 is left, is in the table
        axes.grid(alpha=0.3)
    left.legend(title="the network predicts", fontsize=9)
    return figure


def main() -> None:
    """Write the page and the plot."""
    draw(read(PREDICTIONS)).savefig(FIGURE, dpi=100, metadata={"Software": None})
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
