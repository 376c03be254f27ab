"""Folders as google/ddpm-cifar10-32 is on the Hub: network and scheduler lie side by side, without subfolders."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.sampling import sample
from ddpm_from_scratch.sampling.models import load_pipeline
from helpers.networks import rewrite_weights, with_old_attention_names
from helpers.runs import run_main

INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.1.1",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


@pytest.fixture
def flat(stock_unet, tmp_path):
    """With the names that attention had then, in weights and files."""
    folder = tmp_path / "flat"
    stock_unet.save_pretrained(folder)
    DDPMScheduler(variance_type="fixed_large").save_pretrained(folder)
    rewrite_weights(folder, with_old_attention_names)
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "diffusion_pytorch_model.safetensors", "model_index.json", "scheduler_config.json")
    }
    return folder


def test_it_is_loaded_and_drawn_from(flat, stock_unet, tmp_path):
    options = {"num_inference_steps": 5, "output_type": "np", "batch_size": 2}
    stock = DDPMPipeline(stock_unet, DDPMScheduler(variance_type="fixed_large"))
    loaded = load_pipeline(str(flat), dtype=torch.float32)
    assert type(loaded) is ScratchDDPMPipeline
    for pipeline in (stock, loaded):
        pipeline.set_progress_bar_config(disable=True)
    expected, found = (
        pipeline(generator=torch.Generator().manual_seed(0), **options).images for pipeline in (stock, loaded)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    grid = tmp_path / "grid.png"
    sample.main([str(flat), "--num_images", "4", "--num_inference_steps", "2", "--out", str(grid)])
    with Image.open(grid) as opened:
        assert opened.size >= (16, 16)


def test_it_is_fine_tuned_and_becomes_a_folder_as_any_other(inputs, flat, stock_unet, tmp_path):
    still = ("--learning_rate", "1e-30", "--max_train_steps", "1")
    tuned = run_main(inputs, tmp_path / "tuned", "--model_config_name_or_path", flat, *still)
    assert (tuned / "unet" / "config.json").is_file() and (tuned / "scheduler" / "scheduler_config.json").is_file()
    pipeline = DDPMPipeline.from_pretrained(tuned)
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    for name, weight in pipeline.unet.state_dict().items():
        torch.testing.assert_close(weight, stock_unet.state_dict()[name], rtol=0, atol=1e-6)
