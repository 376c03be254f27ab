"""docs/your-images.md says what its results say, and the networks are those of the code."""

import json

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.training.network import suited_network
from helpers.pages import load
from helpers.paths import DOCS


def test_the_page_is_what_its_script_writes():
    script = load(DOCS / "make_own_images.py")
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.fill(page) == page
    ours, example = json.loads(script.RESULTS.read_text())["rows"]
    assert f"| {ours['images_seen']:,} |" in page and f"| {example['images_seen']:,} |" in page


def test_the_weights_in_the_table_are_those_of_real_networks():
    page = (DOCS / "your-images.md").read_text(encoding="utf-8")
    unet = ScratchUNet2DModel(sample_size=32, **suited_network((32, 32), 10**6, "small"))
    count = sum(weight.numel() for weight in unet.parameters())
    row = next(line for line in page.splitlines() if line.startswith("| `small`"))
    assert row.split(" | ")[4] == f"{count / 1e6:.1f} M"


def test_ours_is_nearer_to_the_images_after_the_same_time():
    results = json.loads((DOCS / "results" / "own_images.json").read_text())
    ours, example = results["rows"]
    assert abs(ours["seconds"] - example["seconds"]) < 0.15 * example["seconds"]
    assert ours["kernel_distance"] < example["kernel_distance"]
    assert results["real"]["kernel_distance"] < ours["kernel_distance"]
