"""Every way of loading, in processes of their own: without the package, with it, and from the built wheel."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline
from helpers.networks import TINY_NETWORK, randomised
from helpers.paths import ROOT
from helpers.processes import in_a_process


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four model folders: ours, ours and class-conditional, stock, and one of ours whose code must not run."""
    root = tmp_path_factory.mktemp("folders")
    unconditional = randomised(UNet2DModel(**TINY_NETWORK))
    conditional = randomised(UNet2DModel(**TINY_NETWORK, num_class_embeds=5))
    ScratchDDPMPipeline(unconditional, DDPMScheduler()).save_pretrained(root / "own")
    for name in ("conditional", "poisoned"):
        ScratchDDPMPipeline(conditional, DDPMScheduler()).save_pretrained(root / name)
    DDPMPipeline(unconditional, DDPMScheduler()).save_pretrained(root / "stock")
    (root / "poisoned" / "pipeline.py").write_text("raise SystemExit('code of the folder was executed')")
    return root


@pytest.fixture(scope="module")
def expected(folders):
    def images(name, **call):
        pipeline = ScratchDDPMPipeline.from_pretrained(folders / name)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        return pipeline(generator=generator, num_inference_steps=10, output_type="np", **call).images

    return {"own": images("own", batch_size=2), "conditional": images("conditional", class_labels=[1, 3])}


@pytest.mark.full
def test_without_the_package(folders, expected, tmp_path):
    own, conditional, stock = (str(folders / name) for name in ("own", "conditional", "stock"))
    trusted = {"trust_remote_code": True}
    labels = {"class_labels": [1, 3]}
    jobs = {
        "no_trust": {"folder": own},
        "our_pipeline": {
            "folder": own,
            "load": {"custom_pipeline": "pipeline", **trusted},
            "save": str(tmp_path / "again"),
        },
        "on_a_stock_checkpoint": {"folder": stock, "load": {"custom_pipeline": own, **trusted}},
        "untrusted": {"folder": own, "load": {"custom_pipeline": "pipeline"}},
        "conditional": {"folder": conditional, "load": trusted, "call": labels, "save": str(tmp_path / "conditional")},
        "conditional_untrusted": {"folder": conditional, "call": labels},
    }
    report, images = in_a_process(tmp_path, jobs, package=False)
    assert report["no_trust"]["parts"] == ["UNet2DModel", "DDPMScheduler"]
    assert report["no_trust"]["pipeline"] == "DDPMPipeline"
    for name in ("our_pipeline", "on_a_stock_checkpoint", "conditional"):
        assert report[name]["pipeline"] == "ScratchDDPMPipeline"
        assert report[name]["module"].startswith("diffusers_modules")
        assert report[name]["parts"] == ["ScratchUNet2DModel", "ScratchDDPMScheduler"]
    for name in ("untrusted", "conditional_untrusted"):
        assert "trust_remote_code=True" in report[name]["error"]
    for name in ("no_trust", "our_pipeline", "on_a_stock_checkpoint"):
        np.testing.assert_allclose(images[name], expected["own"], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(images["conditional"], expected["conditional"], atol=1e-5)
    assert contents(tmp_path / "again") == contents(own)
    assert contents(tmp_path / "conditional") == contents(conditional)


@pytest.mark.full
def test_with_the_package_no_code_of_the_folder_runs(folders, expected, tmp_path):
    jobs = {
        "own": {"folder": str(folders / "own"), "own": True, "save": str(tmp_path / "again")},
        "stock": {"folder": str(folders / "stock"), "own": True},
        "poisoned": {"folder": str(folders / "poisoned"), "own": True, "call": {"class_labels": [1, 3]}},
    }
    report, images = in_a_process(tmp_path, jobs, package=True, pythonpath=str(ROOT / "src"))
    for name in jobs:
        assert report[name]["module"] == "ddpm_from_scratch.diffusion.pipeline"
    assert report["loaded"] == []
    np.testing.assert_allclose(images["own"], expected["own"], atol=1e-5)
    np.testing.assert_allclose(images["stock"], expected["own"], atol=1e-5)
    np.testing.assert_allclose(images["poisoned"], expected["conditional"], atol=1e-5)
    assert contents(tmp_path / "again") == contents(folders / "own")


@pytest.mark.full
def test_the_built_wheel_outside_the_repository(folders, expected, tmp_path):
    """Builds the source distribution, the wheel from it, and loads and samples with what the wheel holds."""
    quiet = {"check": True, "capture_output": True}
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT], **quiet)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (source,) = (tmp_path / "dist").glob("*.tar.gz")
    assert source.stat().st_size < 1_000_000
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, **quiet)
    assert (site / "ddpm_from_scratch" / "py.typed").exists()
    jobs = {"own": {"folder": str(folders / "own"), "own": True, "save": str(tmp_path / "again")}}
    report, images = in_a_process(tmp_path, jobs, package=True, pythonpath=str(site))
    assert Path(report["file"]).is_relative_to(site)
    np.testing.assert_allclose(images["own"], expected["own"], atol=1e-5)
    assert contents(tmp_path / "again") == contents(folders / "own")
