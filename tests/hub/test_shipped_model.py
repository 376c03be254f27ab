"""models/: small, whole, loadable without trust, and measured."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from ddpm_from_scratch import ScratchDDPMPipeline
from helpers.paths import ROOT

MODEL = ROOT / "models" / "ddpm-fashion-mnist"
FEW_STEPS = ROOT / "models" / "ddpm-fashion-mnist-few-steps"
each_model = pytest.mark.parametrize("folder", [MODEL, FEW_STEPS], ids=lambda folder: folder.name)
RESULTS = json.loads((MODEL / "results.json").read_text())
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@each_model
def test_it_is_small_and_in_half_precision(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert path.stat().st_size < 8e6
    with safe_open(path, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


@pytest.fixture(scope="module")
def pipeline():
    pipeline = ScratchDDPMPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_draws_what_it_is_asked_for(pipeline):
    """Trousers are bright in the middle column and dark beside it; the background is black."""
    options = {"num_inference_steps": 10, "output_type": "np", "guidance_scale": 2.0}
    generator = torch.Generator().manual_seed(0)
    trousers, sneaker = pipeline(class_labels=["Trouser", "Sneaker"], generator=generator, **options).images[..., 0]
    assert trousers[4:24, 8:20].mean() > 0.25 and trousers[:, [0, 1, 26, 27]].mean() < 0.1
    assert sneaker[14:22, 4:24].mean() > 0.2 and sneaker[:6].mean() < 0.1


def test_the_model_for_few_steps_draws_in_two():
    pipeline = ScratchDDPMPipeline.from_pretrained(FEW_STEPS)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    generator = torch.Generator().manual_seed(0)
    trousers, sneaker = pipeline(class_labels=["Trouser", "Sneaker"], generator=generator, output_type="np").images[
        ..., 0
    ]
    assert len(calls) == 2
    assert trousers[4:24, 8:20].mean() > 0.25 and trousers[:, [0, 1, 26, 27]].mean() < 0.1
    assert sneaker[14:22, 4:24].mean() > 0.2 and sneaker[:6].mean() < 0.1


STOCK = """
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
UNet2DModel.from_pretrained(MODEL, subfolder="unet")
scheduler = DDPMScheduler.from_pretrained(MODEL, subfolder="scheduler")
DDIMScheduler.from_config(scheduler.config)
"""
STOCK_LCM = """
from diffusers import LCMScheduler, UNet2DModel
UNet2DModel.from_pretrained(MODEL, subfolder="unet")
LCMScheduler.from_pretrained(MODEL, subfolder="scheduler")
"""
REMOTE = """
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
disable_progress_bar()
DiffusionPipeline.from_pretrained(MODEL, trust_remote_code=True)
"""
OURS = """
from diffusers.utils.logging import disable_progress_bar
from ddpm_from_scratch import ScratchDDPMPipeline
disable_progress_bar()
ScratchDDPMPipeline.from_pretrained(MODEL)
"""


@pytest.mark.parametrize(
    ("folder", "program"),
    [(MODEL, STOCK), (MODEL, REMOTE), (MODEL, OURS), (FEW_STEPS, STOCK_LCM), (FEW_STEPS, REMOTE), (FEW_STEPS, OURS)],
    ids=[f"{name}{of}" for of in ("", ", few steps") for name in ("stock", "remote code", "ours")],
)
def test_loading_it_prints_nothing(folder, program, tmp_path):
    """The network has classes, which the stock pipeline cannot draw: stock is its parts, or the folder's own code."""
    done = subprocess.run(
        [sys.executable, "-c", f"MODEL = {str(folder)!r}\n{program}"],
        env={**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_results_are_of_this_model(pipeline):
    assert RESULTS["num_parameters"] == pipeline.unet.num_parameters()
    evaluation = RESULTS["evaluation"]
    samples = {(sample["num_inference_steps"], sample["size"]): sample for sample in evaluation["samples"]}
    assert set(samples) == {(steps, size) for steps in (10, 20, 50, 1000) for size in (112, 224)}
    for (steps, _), sample in samples.items():
        assert sample["num_generated"] == sample["num_reference"] >= (5000 if steps < 1000 else 100)
        assert sample["labels"] == "null" and sample["floor_of"] == "held-out images"
        assert abs(sample["floor"]["kernel_distance"]) < 4 * sample["floor"]["kernel_distance_error"]
    assert samples[50, 112]["kernel_distance"] < 0.02
    assert (
        samples[10, 112]["kernel_distance"] > samples[20, 112]["kernel_distance"] > samples[50, 112]["kernel_distance"]
    )
    assert evaluation["classes"]["accuracy"] > 0.9 and set(evaluation["classes"]["by_class"]) == set(CLASSES)


def test_the_bound_is_that_of_the_whole_test_set():
    """Every term was measured; their sum is another estimate of the whole than the mean over images."""
    bound = RESULTS["evaluation"]["bound"]
    assert bound["num_images"] == 10000 and len(bound["terms"]) == 1000 and None not in bound["terms"]
    assert bound["bits_per_dim"] < 3.3
    assert sum(bound["terms"]) + bound["prior"] == pytest.approx(bound["bits_per_dim"], abs=4 * bound["error"])


@each_model
def test_no_local_path_is_in_the_folder(folder):
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".yaml"):
            text = path.read_text()
            assert "/tmp" not in text and "/home" not in text and "/root" not in text, path
