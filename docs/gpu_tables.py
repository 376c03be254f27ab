"""The tables of docs/speed.md that a GPU fills: `benchmarks/gpu.py` measures, docs/results/gpu.jsonl holds its rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages import bullets, table, versions

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
NOT_MEASURED = "not measured"
Rows = dict[tuple[str, str, int | None], dict[str, Any]]

SYSTEMS = ("compiled", "eager", "stock, eager", "stock, compiled")
# What is trained: the part of the benchmark, and how the page calls it.
TRAINED = {"shipped": "3.8M network, 28x28, batch 256", "cifar10": "the paper's CIFAR-10 network, 35.7M, batch 128"}
SAMPLED = (16, 256)  # images at once
CHECKED = {
    "counter-based numbers": "words that differ between GPU and CPU, eager and compiled",
    "no waiting": "waits of the host in a training step",
    "accumulation, compiled": "largest difference of weights, two compiled passes a step against eager ones",
    "resumed": "weights that differ after a run again, and after stop and resume",
    "CUDA graphs": "largest difference of weights, compiled steps in CUDA graphs against eager ones",
    "float16": "loss at the start and at the end of 100 steps in float16, and steps skipped",
}


def read(path: Path = RESULTS) -> Rows:
    """The rows by part, name and batch; none before anything was measured."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = map(json.loads, lines)
    return {(row["part"], row["name"], row.get("batch") if row["part"] == "sampling" else None): row for row in rows}


def rate(row: dict[str, Any] | None) -> str:
    """Images a second, with the range of the blocks."""
    if row is None:
        return NOT_MEASURED
    images = row["images_per_second"] * row["seconds"]
    median, least, most = (f"{images / row[name]:,.0f}" for name in ("seconds", "slowest", "fastest"))
    return f"{median} ({least} to {most})"


def speed_table(rows: Rows) -> str:
    """Training and sampling: ours and stock's."""
    lines = [
        (f"Training, {title}", *(rate(rows.get((part, name, None))) for name in SYSTEMS))
        for part, title in TRAINED.items()
    ]
    names = ("ours, compiled", "ours, eager", "stock, eager", "stock, compiled")
    lines += [
        (f"Sampling, 50 steps, batch {batch}, 3.8M", *(rate(rows.get(("sampling", name, batch))) for name in names))
        for batch in SAMPLED
    ]
    return table(("images/s", *names), lines)


def shown(entry: tuple[str, Any]) -> str:
    """A value with its name, numbers in few digits."""
    name, value = entry
    return f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}"


def check_table(rows: Rows) -> str:
    """What a CPU cannot show."""
    lines = []
    for name, title in CHECKED.items():
        row = rows.get(("right", name, None))
        found = {} if row is None else {k: v for k, v in row.items() if k not in ("part", "name", "at", "seconds")}
        lines.append((title, ", ".join(map(shown, found.items())) or NOT_MEASURED))
    return table(("on a GPU", "found"), lines)


def facts(rows: Rows) -> str:
    """The device and the versions."""
    row = rows.get(("about", "versions", None))
    device = NOT_MEASURED if row is None else f"{row['device']}; {versions(row)}"
    found = {"Figures": "medians of 5 blocks of half a second (lowest to highest)", "Device": device}
    if eager := rows.get(("shipped", "eager", None)):
        busy, whole = eager["host_seconds"] * 1e3, eager["seconds"] * 1e3
        found["Host"] = f"busy for {busy:.0f} ms of an eager training step of {whole:.0f} ms, which it limits"
    step, profile = (rows.get(("shipped", name, None)) for name in ("compiled", "compiled, profile"))
    if step and profile:
        host, busy, whole = (1e3 * seconds for seconds in (step["host_seconds"], profile["busy"], step["seconds"]))
        found["Compiled"] = f"the host is busy for {host:.0f} ms of a step, the GPU for {busy:.0f} of {whole:.0f}"
    if loader := rows.get(("shipped", "compiled, by the loader", None)):
        found["Without graphs"] = f"compiled, with images from a loader: {rate(loader)} images/s"
    return bullets(found)


PARTS: dict[str, Callable[[Rows], str]] = {
    "gpu speed": speed_table,
    "gpu checks": check_table,
    "gpu facts": facts,
}


def parts(path: Path = RESULTS) -> dict[str, str]:
    """Everything that stands between markers."""
    rows = read(path)
    return {name: make(rows) for name, make in PARTS.items()}
