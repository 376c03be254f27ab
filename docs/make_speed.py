"""Write the tables of docs/speed.md from benchmarks/results/speed_*.json, which `python benchmarks/speed.py` measures.

python docs/make_speed.py
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
CPU = RESULTS / "speed_cpu.json"
PAGE = DOCS / "speed.md"

Numbers = dict[str, Any]


def ratio(of: Numbers, to: Numbers) -> float:
    """How many times as fast `of` is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(of["seconds"], to["seconds"], strict=True))


def best_of_diffusers(rows: Numbers, precision: str) -> Numbers:
    """The faster of diffusers' two memory formats."""
    stock = [row for name, row in rows.items() if name.startswith(f"diffusers {precision}")]
    return min(stock, key=lambda row: statistics.median(row["seconds"]))


def ratios(rows: Numbers) -> dict[str, float]:
    """What is compared, and how many times as fast ours is."""
    found = {
        f"{kind}, against the better memory format of diffusers": ratio(
            rows[f"ours {kind}"], best_of_diffusers(rows, kind)
        )
        for kind in ("fp32", "bf16")
    }
    stock = rows["diffusers fp32, NCHW"]
    for name, title in {"ours, default": "default", "ours, default compiled": "default and compiled"}.items():
        if name in rows:
            found[f"{title}, against diffusers' default"] = ratio(rows[name], stock)
    return found


def speed_table(results: Numbers, kind: str) -> str:
    """Every system on every network, in Markdown."""
    lines = ["| network | system | images/s | of the peak | peak memory |", "|---|---|---|---|---|"]
    for network, found in results["networks"].items():
        for name, row in found.get(kind, {}).items():
            seconds = statistics.median(row["seconds"])
            training = kind == "training"
            images = found["batch"] if training else results["samples"]
            # A backward pass takes twice the operations of a forward pass.
            operations = images * found["flops"] * (3 if training else results["chain"])
            share = operations / seconds / results["peak_flops"][results["systems"][name]["precision"]]
            lines.append(
                f"| {network} | {name} | {images / seconds:.1f} | {share:.0%} | {row['peak_memory'] / 1e9:.2f} GB |"
            )
    return "\n".join(lines)


def ratio_table(results: Numbers) -> str:
    """Ratios of ours to diffusers, in Markdown."""
    lines = ["| what | network | ours is so many times as fast |", "|---|---|---|"]
    for network, found in results["networks"].items():
        for kind in ("training", "sampling"):
            for title, value in ratios(found[kind]).items() if kind in found else ():
                lines.append(f"| {kind}: {title} | {network} | **{value:.2f}** |")
    steps = {name: {"seconds": seconds} for name, seconds in results["scheduler_step"].items()}
    lines.append(f"| a scheduler step | | **{ratio(steps['ours'], steps['diffusers']):.2f}** |")
    return "\n".join(lines)


def facts(results: Numbers) -> str:
    """What was measured and with what."""
    networks = ", ".join(
        f"{name} {found['parameters'] / 1e6:.1f}M parameters, batch {found['batch']}"
        for name, found in results["networks"].items()
    )
    imports = {name: statistics.median(seconds) for name, seconds in results["import"].items()}
    steps = {name: statistics.median(seconds) * 1e6 for name, seconds in results["scheduler_step"].items()}
    peaks = ", ".join(
        f"{peak / 1e9:.0f} GFLOP/s in {'fp32' if name == 'no' else name}"
        for name, peak in results["peak_flops"].items()
    )
    compiled = [
        row["set_up"]
        for found in results["networks"].values()
        for name, row in found["training"].items()
        if "compiled" in name
    ]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    about = {
        "Networks": f"{networks}; samples: {results['samples']} in {results['chain']} steps",
        "Rounds": f"{results['rounds']}, in turns; the median",
        "Scheduler step": f"{steps['ours']:.0f} µs, diffusers {steps['diffusers']:.0f} µs, the noise included",
        "Import": f"`import ddpm_from_scratch` {imports['ours']:.2f} s, "
        f"`from diffusers import UNet2DModel, DDPMScheduler, DDPMPipeline` {imports['diffusers']:.2f} s",
        "Peak": f"{peaks}, by a large matrix product",
        **(
            {"Compilation": f"{', '.join(f'{each:.0f} s' for each in compiled)} until the second step is done"}
            if compiled
            else {}
        ),
        "Device": f"{results['device']}; {versions}",
    }
    return "\n".join(f"- {name}: {fact}." for name, fact in about.items())


PARTS: dict[str, Callable[[Numbers], str]] = {
    "ratios": ratio_table,
    "training": lambda results: speed_table(results, "training"),
    "sampling": lambda results: speed_table(results, "sampling"),
    "facts": facts,
}


def fill(page: str) -> str:
    """The page with what stands between its markers replaced."""
    results = json.loads(CPU.read_text(encoding="utf-8"))
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        page = before + start + make(results) + "\n" + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
