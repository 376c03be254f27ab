"""Write the tables of docs/guidance.md and docs/editing.md from docs/results/guidance.json and editing.json.

    python docs/make_sampling_pages.py

`python benchmarks/guidance.py MODEL` and `python benchmarks/editing.py MODEL` measure, and write the results and the
figures; what they have not written is a dash.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from make_few_steps import MISSING, kernel

from pages import bullets, replace_parts, table, versions

DOCS = Path(__file__).parent
Numbers = dict[str, Any]
Part = Callable[[Numbers], str]

# What is measured of guidance: scale, rescale and interval by name; None for the null label.
GUIDANCES = {
    "no labels": None,
    "scale 1: the labels alone": (1.0, 0.0, (0.0, 1.0)),
    "scale 1.5": (1.5, 0.0, (0.0, 1.0)),
    "scale 2": (2.0, 0.0, (0.0, 1.0)),
    "scale 4": (4.0, 0.0, (0.0, 1.0)),
    "scale 8": (8.0, 0.0, (0.0, 1.0)),
    "scale 4, rescale 0.7": (4.0, 0.7, (0.0, 1.0)),
    "scale 4, interval (0.2, 0.8)": (4.0, 0.0, (0.2, 0.8)),
}
INVERSION_STEPS = (10, 20, 50, 100)
NUM_ITERATIONS = (1, 2, 3, 5)
JUMP_N_SAMPLES = (1, 5)
STRENGTHS = (0.2, 0.4, 0.6, 0.8)


def model_lines(results: Numbers) -> dict[str, str]:
    """What was measured on."""
    model = results["model"]
    trained = f", {model['training_steps']:,} training steps" if model["training_steps"] else ""
    return {
        "Model": f"{model['name']}, {model['parameters']:,} parameters{trained}, computed in {results['precision']}",
        "Device": f"{results['device']}; {versions(results)}",
    }


def picture(text: str, path: str) -> Part:
    """A figure, which is there when the results are."""
    return lambda results: f"![{text}]({path})" if results else MISSING


# --- guidance ------------------------------------------------------------------------------------------------------


def guidance_of(row: Numbers) -> tuple[float, float, tuple[float, ...]] | None:
    """That of a row of the results, as in GUIDANCES."""
    found = row["guidance"]
    return found and (found["scale"], found["rescale"], tuple(found["interval"]))


def share(numbers: Numbers) -> str:
    """Of the labels that the classifier finds."""
    if "accuracy" not in numbers:
        return MISSING
    return f"{100 * numbers['accuracy']:.1f} ± {100 * numbers['accuracy_error']:.1f} %"


def guidance_table(results: Numbers) -> str:
    """What the images of each kind of guidance are like, and the real ones."""
    found = {guidance_of(row): row for row in results.get("rows", [])}
    rows = []
    for name, guidance in GUIDANCES.items():
        row = found.get(guidance)
        if row is None:
            rows.append([name, *[MISSING] * 4])
            continue
        spread = f"{row['spread']:.3f}" if "spread" in row else MISSING
        rows.append([name, share(row), kernel(row), spread, f"{1000 * row['seconds'] / results['num_images']:.0f}"])
    real = [MISSING] * 3
    if results:
        real = [share(results["real"]), kernel(results["real"]), f"{results['real']['spread']:.3f}"]
    head = ["", "labels found", "kernel distance", "spread", "ms per image"]
    return table(head, [*rows, ["real images", *real, MISSING]])


def guidance_environment(results: Numbers) -> str:
    """What was measured, and with what."""
    if not results:
        return MISSING
    count, real, features = results["images_per_class"], results["real"], results["features"]
    lines = {
        "Images": f"N = {results['num_images']:,} of each kind, {count} of each class, in {results['steps']} steps",
        "Reference": f"the first {count} embedded training images of each class; real images are the next {count}",
        "Features": f"{features['network']}, which sees the images at {features['size']}x{features['size']} pixels",
        "Classifier": f"trained on the {real['train_images']:,} embedded training images; it finds {share(real)} of "
        f"the labels of the {real['test_images']:,} test images",
    }
    return bullets(lines | model_lines(results))


# --- editing -------------------------------------------------------------------------------------------------------


def inversion_table(results: Numbers) -> str:
    """Steps by iterations."""
    found = {(row["steps"], row["num_iterations"]): row for row in results.get("inversion", [])}
    rows = [
        [
            str(steps),
            *(
                f"{found[steps, count]['psnr']:.1f} ({found[steps, count]['worst']:.1f})"
                if (steps, count) in found
                else MISSING
                for count in NUM_ITERATIONS
            ),
        ]
        for steps in INVERSION_STEPS
    ]
    return table(["steps \\ iterations", *map(str, NUM_ITERATIONS)], rows)


def interpolation_line(results: Numbers) -> str:
    """How exact the ends are."""
    found = results.get("interpolation")
    if found is None:
        return MISSING
    return (
        f"Of {found['pairs']} interpolations in {found['steps']} steps the first and last frames, as PIL images, "
        f"differ from the two images by at most {found['largest_difference']} of 255 levels."
    )


def inpainting_table(results: Numbers) -> str:
    """By how often each stretch of the chain is run through."""
    found = results.get("inpainting", {"rows": []})
    of_times = {row["jump_n_sample"]: row for row in found["rows"]}

    def error(row: Numbers) -> str:
        return f"{row['squared_error']:.3f} ± {row['squared_error_error']:.3f}"

    rows = []
    for times in JUMP_N_SAMPLES:
        row = of_times.get(times)
        shown = [MISSING] * 2 if row is None else [str(row["changed_pixels"]), error(row)]
        rows.append([f"`jump_n_sample={times}`", *shown])
    other = error(found["other_image"]) if "other_image" in found else MISSING
    rows.append(["the half of another image", MISSING, other])
    return table(["", "given pixels that changed", "squared error of the painted half"], rows)


def img2img_table(results: Numbers) -> str:
    """By strength."""
    found = {row["strength"]: row for row in results.get("img2img", {"rows": []})["rows"]}
    shown = [f"{found[s]['psnr']:.1f} ± {found[s]['psnr_error']:.1f}" if s in found else MISSING for s in STRENGTHS]
    return table(["strength", *map(str, STRENGTHS)], [["PSNR to the image, dB", *shown]])


def editing_environment(results: Numbers) -> str:
    """What was measured, and with what."""
    if not results:
        return MISSING
    lines = {"Images": f"N = {results['num_images']:,}, the first of the embedded test images"}
    if "inpainting" in results and "img2img" in results:
        count, steps, jump = (results["inpainting"][key] for key in ("num_images", "steps", "jump_length"))
        lines["Inpainting"] = f"{count} of them, in {steps} steps, `jump_length={jump}`"
        lines["Img2img"] = f"in {results['img2img']['steps']} steps"
    return bullets(lines | model_lines(results))


# --- the pages -----------------------------------------------------------------------------------------------------

# By page, and name of its results: what stands between its markers.
PAGES: dict[str, dict[str, Part]] = {
    "guidance": {
        "environment": guidance_environment,
        "figure": picture("One image of every class at every guidance scale", "figures/guidance.png"),
        "guidance": guidance_table,
    },
    "editing": {
        "environment": editing_environment,
        "figure": picture("An interpolation, fillings of a lower half, variations of an image", "figures/editing.png"),
        "inversion": inversion_table,
        "interpolation": interpolation_line,
        "inpainting": inpainting_table,
        "img2img": img2img_table,
        "chain": picture("Four images emerging from noise", "figures/chain.gif"),
    },
}


def results_of(name: str) -> Numbers:
    """What was measured; empty if nothing was."""
    path = DOCS / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fill(page: str, parts: dict[str, Part], results: Numbers) -> str:
    """The page with what stands between its markers replaced."""
    return replace_parts(page, {name: make(results) for name, make in parts.items()})


def main() -> None:
    """Fill both pages."""
    for name, parts in PAGES.items():
        path = DOCS / f"{name}.md"
        path.write_text(fill(path.read_text(encoding="utf-8"), parts, results_of(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
