"""Shared by all tests: one thread each, no network, and small networks to work with."""

import os

# Before anything imports huggingface_hub: tests need no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes share the cores; theirs do too

import pytest
import torch
from diffusers import UNet2DModel

from helpers.networks import TINY_NETWORK, randomised

pytest_plugins = ["helpers.runs"]  # fixtures of training runs


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)  # the networks here are too small for more, and test processes share the cores


@pytest.fixture
def stock_unet():
    return randomised(UNet2DModel(**TINY_NETWORK)).eval()


@pytest.fixture
def conditional_stock_unet():
    return randomised(UNet2DModel(**TINY_NETWORK, num_class_embeds=5)).eval()


@pytest.fixture
def learned_variance_stock_unet():
    return randomised(UNet2DModel(**{**TINY_NETWORK, "out_channels": 2})).eval()
