"""The code of docs/faster.md runs, one block after the other."""

import re

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from helpers.networks import TINY_NETWORK, randomised
from helpers.paths import DOCS

PAGE = (DOCS / "faster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a reader who has trained a model, and owns another in pickled files."""
    monkeypatch.chdir(tmp_path)
    pipeline = DDPMPipeline(randomised(UNet2DModel(**TINY_NETWORK)), DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "outputs/ddpm-fashion-mnist-quick")
    pipeline.save_pretrained(tmp_path / "outputs/old-checkpoint", safe_serialization=False)
    return tmp_path


def on_this_machine(block):
    """The block with fewer images and steps, in types that its CPU has."""
    block = block.replace('.to("cuda")', "").replace("torch.float16", "torch.bfloat16")
    return re.sub(r"batch_size=\d+, num_inference_steps=\d+", "batch_size=2, num_inference_steps=3", block)


@pytest.mark.filterwarnings("ignore")  # what diffusers says of its own pickled files
def test_the_code_runs(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))  # would take a minute
    namespace = {}
    for block in BLOCKS:
        exec(on_this_machine(block), namespace)
        assert len(namespace.get("images", [0, 0])) == 2
    assert len(BLOCKS) >= 6 and compiled == [namespace["pipeline"].unet]
    assert namespace["pipeline"].unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert list((folder / "outputs/converted/unet").glob("*.safetensors"))
