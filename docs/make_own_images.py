"""Fill docs/your-images.md from docs/results/own_images.json, which `python benchmarks/own_images.py` measures.

python docs/make_own_images.py
"""

import json
from pathlib import Path
from typing import Any

import torch

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.training.network import SIZES, suited_network
from pages import bullets, replace_parts, table, versions

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "own_images.json"
PAGE = DOCS / "your-images.md"
SIDES = (32, 64, 128, 256)
MANY = 10**6  # images, so that there is no dropout

Numbers = dict[str, Any]


def parameters(side: int, word: str) -> int:
    """Weights of the network for square colour images."""
    with torch.device("meta"):
        return ScratchUNet2DModel(sample_size=side, **suited_network((side, side), MANY, word)).num_parameters()


def networks_table() -> str:
    """The networks by word, with their weights by resolution, in Markdown."""
    head = ("`--model_size`", "width", "blocks per level", "learning rate", *(f"weights at {side}" for side in SIDES))
    rows = [
        (
            f"`{word}`",
            str(size.width),
            str(size.layers_per_block),
            f"{size.learning_rate:g}",
            *(f"{parameters(side, word) / 1e6:.1f} M" for side in SIDES),
        )
        for word, size in SIZES.items()
    ]
    return table(head, rows)


def comparison_table(results: Numbers) -> str:
    """What each learned in the same time, with the floor, in Markdown."""
    head = ("", "weights", "steps", "images seen", "kernel distance", "Fréchet distance")
    rows = [
        (
            f"`{row['name']}`" if row["name"].startswith("ddpm") else row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['steps']:,}",
            f"{row['images_seen']:,}",
            f"{row['kernel_distance']:.2f} ± {row['kernel_distance_error']:.2f}",
            f"{row['frechet_distance']:.0f}",
        )
        for row in results["rows"]
    ]
    real = results["real"]
    floor = f"{round(real['kernel_distance'], 3) + 0.0:.3f} ± {real['kernel_distance_error']:.3f}"  # no -0.000
    return table(head, [*rows, ("other real images (floor)", "", "", "", floor, f"{real['frechet_distance']:.0f}")])


def facts(results: Numbers) -> str:
    """What was measured and with what."""
    row = results["rows"][0]
    return bullets(
        {
            "Training": f"{results['minutes']:g} minutes each, ours in {row['mixed_precision']}, "
            f"the example in float32, its default; {results['training_images']:,} images",
            "Samples": f"N = {results['num_images']:,} by {results['sampler']} in {results['num_inference_steps']} "
            "steps for both, against as many training images; features of EfficientNet-Lite0",
            "Device": f"{results['device']}, {results['processor']}; {versions(results)}",
        }
    )


def fill(page: str) -> str:
    """The page with what stands between its markers replaced."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts = {"networks": networks_table(), "comparison": comparison_table(results), "facts": facts(results)}
    return replace_parts(page, parts)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
