"""docs/likelihood.md says what the results say; the benchmark behind it, made tiny."""

import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data.dataset import TrainingData
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from helpers.networks import TINY_NETWORK, randomised
from helpers.pages import load
from helpers.paths import DOCS, ROOT


def test_the_page_is_what_its_script_writes():
    script = load(DOCS / "make_likelihood.py")
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.fill(page) == page
    # A number of each table, read from the results by hand.
    evaluation = json.loads(script.EVALUATION.read_text())["evaluation"]
    assert f"| {evaluation['samples'][0]['kernel_distance']:.3f} ±" in page
    learned = json.loads(script.LEARNED.read_text())
    assert f"{learned['rows'][-1]['bounds'][0]['bits_per_dim']:.3f} ±" in page


def test_the_results_belong_to_the_claims():
    """A learned variance lowers the bound of both fixed ones at the same steps, and samples are no worse for it."""
    rows = {
        row["variance"]: row for row in json.loads((DOCS / "results" / "learned_variance.json").read_text())["rows"]
    }
    learned = rows["learned_range"]
    for name in ("fixed_small", "fixed_large"):
        for ours, theirs in zip(learned["bounds"], rows[name]["bounds"], strict=True):
            assert ours["steps"] == theirs["steps"] and ours["bits_per_dim"] < theirs["bits_per_dim"]


@pytest.mark.full
def test_the_benchmark_measures_each_variance_on_its_model(tmp_path, monkeypatch, capsys):
    benchmark = load(ROOT / "benchmarks" / "learned_variance.py")
    folders = [tmp_path / "fixed", tmp_path / "learned"]
    for folder, outputs, variance in zip(folders, (1, 2), ("fixed_large", "learned_range"), strict=True):
        unet = randomised(UNet2DModel(**{**TINY_NETWORK, "out_channels": outputs}))
        ScratchDDPMPipeline(unet, ScratchDDPMScheduler(20, variance_type=variance)).save_pretrained(folder)
    images = torch.randint(256, (600, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(benchmark, "load_data", lambda *_: TrainingData(images, 1, (8, 8), "", None))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    arguments = ["--num_images", "20", "--num_bound_images", "3", "--bound_steps", "5", "20", "--sample_steps", "2"]
    places = ["--samples_dir", str(tmp_path / "samples"), "--results", str(tmp_path / "results.json")]
    benchmark.main([*map(str, folders), *arguments, *places, "--precision", "float32"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["variance"] for row in results["rows"]] == ["fixed_small", "fixed_large", "optimal", "learned_range"]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        f"{row['variance']}-2.npz" for row in results["rows"]
    }
    pipeline = ScratchDDPMPipeline.from_pretrained(folders[1])
    scheduler = ScratchDDPMScheduler(20, variance_type="learned_range", timestep_spacing="linspace")
    bits = bits_per_dim(pipeline.unet, scheduler, images[:3], num_inference_steps=5, progress=False)
    found = results["rows"][3]["bounds"][0]
    assert found["bits_per_dim"] == pytest.approx(float(bits.total.mean()), rel=1e-5)
    np.testing.assert_allclose(found["terms"], bits.terms.mean(0), rtol=1e-5)
