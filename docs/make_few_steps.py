"""Write the tables and the figure of docs/few_steps.md from docs/results/few_steps.json.

    python docs/make_few_steps.py

`python benchmarks/few_steps.py MODEL` measures and writes the results; a cell that it has not written is a dash.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.ticker

from pages import bullets, replace_parts, table, versions

DOCS = Path(__file__).parent
JSON = DOCS / "results" / "few_steps.json"
PAGE = DOCS / "few_steps.md"
FIGURE = DOCS / "figures" / "few_steps.png"

METHODS = {
    "fixed_small": "DDPM, `fixed_small`",
    "fixed_small_linspace": "DDPM, `fixed_small`, `linspace`",
    "fixed_large": "DDPM, `fixed_large`",
    "optimal": "DDPM, optimal variance",
    "ddim": "DDIM",
    "analytic_ddim": "DDIM, optimal variance",
    "dpmsolver++": "DPM-Solver++",
    "unipc": "UniPC",
}
STEPS = (5, 10, 20, 50, 100, 1000)
BOUNDS = {
    "fixed_small": "`fixed_small`",
    "fixed_large": "`fixed_large`",
    "optimal": "optimal variance",
    "optimal_chosen": 'optimal variance, `timestep_choice="likelihood"`',
}
BOUND_STEPS = (5, 10, 20, 50, 100)
MISSING = "–"
LINEAR_BELOW = 0.02  # kernel distance; above it the figure's axis is logarithmic
Numbers = dict[str, Any]


def kernel(numbers: Numbers) -> str:
    """The kernel distance with its standard error."""
    return f"{numbers['kernel_distance']:z.3f} ± {numbers['kernel_distance_error']:.3f}"


def frechet(numbers: Numbers) -> str:
    """The Fréchet distance."""
    return f"{numbers['frechet_distance']:.1f}"


def cells(results: Numbers) -> dict[tuple[str, int], Numbers]:
    """The rows of the results by method and steps."""
    return {(row["method"], row["steps"]): row for row in results["rows"]}


def distance_table(results: Numbers, show: Callable[[Numbers], str]) -> str:
    """Methods by steps, in Markdown."""
    found = cells(results)
    rows = [
        [name, *(show(found[method, steps]) if (method, steps) in found else MISSING for steps in STEPS)]
        for method, name in METHODS.items()
    ]
    return table(["steps", *map(str, STEPS)], rows)


def kernel_table(results: Numbers) -> str:
    """The first table of the page."""
    return distance_table(results, kernel)


def frechet_table(results: Numbers) -> str:
    """The second table of the page."""
    return distance_table(results, frechet)


def bound_table(results: Numbers) -> str:
    """Bits per dimension, chains by steps, in Markdown."""
    found = {(row["chain"], row["steps"]): row for row in results.get("bounds", [])}
    rows = []
    for chain, name in BOUNDS.items():
        bounds = [found.get((chain, steps)) for steps in BOUND_STEPS]
        rows.append([name, *(f"{b['bits_per_dim']:.2f} ± {b['error']:.2f}" if b else MISSING for b in bounds)])
    return table(["steps", *map(str, BOUND_STEPS)], rows)


def environment(results: Numbers) -> str:
    """What was measured, and with what; the distances between real images."""
    n, model, features, floor = (results[key] for key in ("num_images", "model", "features", "floor"))
    trained = f", {model['training_steps']:,} training steps" if model["training_steps"] else ""
    lines = {
        "Images": f"N = {n:,} of each method, against the first {n:,} of the embedded Fashion-MNIST",
        "Floor": f"kernel distance {kernel(floor)}, Fréchet distance {frechet(floor)}: the next {n:,} against the same",
        "Features": f"{features['network']}, which sees the images at {features['size']}x{features['size']} pixels",
        "Model": f"{model['name']}, {model['parameters']:,} parameters{trained}, computed in {results['precision']}",
        "Device": f"{results['device']}; {versions(results)}",
    }
    return bullets(lines)


def fill(page: str, results: Numbers) -> str:
    """The page with what stands between its markers replaced."""
    parts = {
        "environment": environment,
        "kernel distance": kernel_table,
        "fréchet distance": frechet_table,
        "bound": bound_table,
    }
    return replace_parts(page, {name: make(results) for name, make in parts.items()})


def draw(results: Numbers, path: Path) -> None:
    """Kernel distance against steps, one line for each method."""
    found = cells(results)
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")  # draws without a display
    axes = figure.subplots()
    for method, name in METHODS.items():
        steps = [count for count in STEPS if (method, count) in found]
        distances = [found[method, count]["kernel_distance"] for count in steps]
        errors = [found[method, count]["kernel_distance_error"] for count in steps]
        if steps:
            axes.errorbar(steps, distances, errors, marker="o", markersize=4, capsize=2, label=name.replace("`", ""))
    lines = {"real images (floor)": results["floor"], "fixed_small, 1000 steps": found.get(("fixed_small", 1000))}
    for (name, numbers), style in zip(lines.items(), ("-", "--"), strict=True):
        if numbers is not None:
            axes.axhline(numbers["kernel_distance"], color="black", linewidth=1, linestyle=style, label=name)
    axes.set(xlabel="steps", ylabel="kernel distance", xscale="log", xticks=STEPS)
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)  # unbiased distances lie around 0, and may be below
    axes.set_ylim(bottom=-LINEAR_BELOW / 4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Fill the page and draw the figure."""
    results = json.loads(JSON.read_text(encoding="utf-8"))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    draw(results, FIGURE)


if __name__ == "__main__":
    main()
