"""Write the tables of docs/training.md and the README's sentences on `make train` from what was measured.

    python docs/make_training.py

`python benchmarks/memory.py`, `recipes.py` and `quick_run.py` measure.
"""

from pathlib import Path
from typing import Any

from pages import bullets, made_from, replace_parts, table, versions

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "memory.json"
RECIPES = DOCS / "results" / "recipes.json"
QUICK_RUNS = DOCS / "results" / "quick_runs.json"
PAGE, README = DOCS / "training.md", DOCS.parent / "README.md"
GB = 1e9
COLUMNS = ("without the set", "streaming it", "beyond")

Numbers = dict[str, Any]


def memory_table(results: Numbers) -> str:
    """Peaks with and without the large set, by number of loader processes, in Markdown."""
    titles = ("loader processes", *(f"{who}, {what}" for who in ("training process", "all") for what in COLUMNS))
    rows = []
    for run in results["runs"]:
        cells = [str(run["workers"])]
        for kind in ("resident", "together"):
            alone, streamed = (run[name][kind] / GB for name in ("model_alone", "streamed"))
            cells += [f"{alone:.2f} GB", f"{streamed:.2f} GB", f"**{streamed - alone:.2f} GB**"]
        rows.append(cells)
    return table(titles, rows)


def memory_facts(results: Numbers) -> str:
    """What was measured and with what."""
    held = results["in_memory"]
    ratio, peak = held["held"] / held["decoded"], held["while_reading"] / held["decoded"]
    facts = {
        "Set": f"{results['rows']:,} images of 28x28 in Parquet, {results['file_bytes'] / GB:.2f} GB; "
        f"{results['runs'][0]['streamed']['images']:,} images trained on, in windows of "
        f"{results['shuffle_window_mb']} MiB. Without the set: the same network on the embedded images",
        "Peaks": "resident set of the process that trains; of all processes together, shared pages counted once",
        "In memory": f"of {held['decoded'] / GB:.2f} GB of decoded images, {ratio:.2f} times as much is held once they "
        f"are read, and up to {peak:.2f} times while the file is read",
        "Device": f"{results['device']}; {versions(results)}",
    }
    return bullets(facts)


def recipe_table(results: Numbers) -> str:
    """The kernel distance of each recipe, by images seen, in Markdown."""
    groups = sorted((name for name in results if name.endswith(" images")), key=lambda name: int(name.split()[0]))
    rows = []
    for row in dict.fromkeys(name for group in groups for name in results[group]):
        cells = [distance(results[group][row]) if row in results[group] else "" for group in groups]
        rows.append([row, *cells])
    return table(["recipe", *(f"{int(name.split()[0]):,} images seen" for name in groups)], rows)


def distance(found: Numbers) -> str:
    """A kernel distance with its standard error."""
    return f"{found['kernel_distance']:.3f} ± {found['kernel_distance_error']:.3f}"


def recipe_facts(results: Numbers) -> str:
    """What was measured and with what."""
    about = results["about"]
    facts = {
        "Rows": "the quick preset with what the row says; the first one has all that the others do not name",
        "Samples": f"N = {about['num_images']:,} by {about['sampler']} in {about['steps']} steps, against as many "
        "training images; features of EfficientNet-Lite0. One training each, from the same seed",
        "Floor": f"as many test images in the place of samples: {distance(about['floor'])}",
        "Device": f"{about['processor']}; {versions(about)}",
    }
    return bullets(facts)


def quick_run_facts(results: Numbers) -> str:
    """What `make train` gave on each kind of machine, in Markdown."""
    facts = {}
    for processor, found in results.items():
        run = found["training"]
        facts[f"{processor}, {run['num_processes']} processes on as many cores"] = (
            f"{found['seconds_with_installation'] / 60:.1f} minutes with the installation; {run['images_seen']:,} "
            f"images seen, {run['images_per_second']:.0f} a second; kernel distance {distance(found)} (N = "
            f"{found['num_images']:,}, {found['num_inference_steps']} steps of {found['sampler']}; real images: "
            f"{distance(found['floor'])})"
        )
    return bullets(facts)


# The parts of each page, and what is measured for each.
PARTS = {
    PAGE: {
        "memory": (RESULTS, memory_table),
        "memory facts": (RESULTS, memory_facts),
        "recipes": (RECIPES, recipe_table),
        "recipe facts": (RECIPES, recipe_facts),
    },
    README: {"quick runs": (QUICK_RUNS, quick_run_facts)},
}


def fill(path: Path, page: str) -> str:
    """A page with what stands between its markers replaced."""
    return replace_parts(page, made_from(PARTS[path]))


if __name__ == "__main__":
    for path in PARTS:
        path.write_text(fill(path, path.read_text(encoding="utf-8")), encoding="utf-8")
