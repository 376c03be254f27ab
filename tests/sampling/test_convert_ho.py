"""Ho et al.'s weights in files of pesser/pytorch_diffusion, converted, against their network written a second time."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.sampling import convert, ho
from ddpm_from_scratch.sampling.openai import unet_config
from helpers import ho_network

TINY = {"ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attention": (False, True, False)}
CIFAR10 = {"ch": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 2, "attention": (False, True, False, False)}
LSUN = {**CIFAR10, "ch_mult": (1, 1, 2, 2, 4, 4), "attention": (False,) * 4 + (True, False)}
FLAGS = ("--image_size", "16", "--noise_schedule", "linear")


@pytest.fixture
def weights():
    """Random ones, large enough that every layer matters for the output."""
    numbers = np.random.RandomState(0)
    made = {}
    for name, shape in ho_network.shapes(**TINY).items():
        noise = numbers.standard_normal(shape)
        scaled = noise / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.3 * noise + name.endswith("weight")
        made[name] = torch.from_numpy(scaled).float()
    return made


def converted(folder, weights, *flags):
    torch.save(weights, folder / "model.ckpt")
    convert.main([str(folder / "model.ckpt"), str(folder / "model"), *FLAGS, *flags])
    return folder / "model"


def test_outputs_and_steps_are_the_papers(tmp_path, weights):
    folder = converted(tmp_path, weights, "--sigma_small", "True")
    x, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 300, 999])
    expected = ho_network.output({name: weight.double() for name, weight in weights.items()}, x.double(), t, **TINY)
    ours, stock = ScratchDDPMPipeline.from_pretrained(folder), DDPMPipeline.from_pretrained(folder)
    for pipeline in (ours, stock):
        with torch.no_grad():
            output = pipeline.unet(x, t).sample
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    # Equations 6, 7 and 15 with the linear schedule; the smaller of the two variances.
    beta = np.linspace(0.0001, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    x = x.double()
    step = ours.scheduler.p_reverse(expected, x, 300)
    below, at = alpha_bar[299], alpha_bar[300]
    x_0 = ((x - np.sqrt(1 - at) * expected) / np.sqrt(at)).clamp(-1, 1)
    mean = np.sqrt(below) * beta[300] / (1 - at) * x_0 + np.sqrt(1 - beta[300]) * (1 - below) / (1 - at) * x
    torch.testing.assert_close(step.mean, mean, rtol=1e-9, atol=1e-9)
    assert float(step.log_variance.exp()) == pytest.approx((1 - below) / (1 - at) * beta[300], rel=1e-9)


@pytest.mark.parametrize(
    ("network", "size", "channels", "kinds", "millions"),
    [
        (CIFAR10, 32, (128, 256, 256, 256), "DADD", 35.7),
        (LSUN, 256, (128, 128, 256, 256, 512, 512), "DDDDAD", 113.7),
    ],
)
def test_the_papers_networks_are_recognised(network, size, channels, kinds, millions):
    """As google/ddpm-cifar10-32 and google/ddpm-church-256 are configured; sizes as in the paper's appendix B."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in ho_network.shapes(**network).items()}
    assert round(sum(weight.numel() for weight in weights.values()) / 1e6, 1) == millions
    form = ho.recognise(weights)
    config = {**unet_config(form, size, None, 0.0), **ho.CONSTANTS}
    names = {"D": "DownBlock2D", "A": "AttnDownBlock2D"}
    expected = {
        "sample_size": size,
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": tuple(names[kind] for kind in kinds),
        "up_block_types": tuple(names[kind].replace("Down", "Up") for kind in reversed(kinds)),
        "attention_head_dim": None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
    }
    assert {key: config[key] for key in expected} == expected
    convert.check_told(
        convert.parse(["f", "g", *FLAGS[:1], str(size), *FLAGS[2:], "--attention_resolutions", "16"]), form
    )


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({}, ("--num_heads", "4"), "--num_heads: for OpenAI's networks"),
        (
            {},
            ("--diffusion_steps", "500", "--rescale_timesteps", "True"),
            "--rescale_timesteps, --diffusion_steps: for",
        ),
        ({}, ("--num_res_blocks", "2"), "--num_res_blocks 2: .* it is 1"),
        ({}, ("--learn_sigma", "True"), "--learn_sigma True: .* it is False"),
        ({"mid.attn_1.q.weight": None}, (), "not a network of pesser/pytorch_diffusion, which has mid.attn_1.q.weight"),
        ({"up.1.attn.0.k.bias": None}, (), "up_blocks.1.attentions.0.to_k.bias has the shape None"),
        ({"down.1.downsample.conv.weight": None}, (), "down_blocks.1.downsamplers.0.conv.weight has the shape None"),
        ({"surplus.weight": torch.zeros(1)}, (), "surplus.weight is no weight of"),
        ({"conv_in.weight": torch.zeros(32, 6, 3, 3)}, (), "3 channels of 6"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, weights, change, flags, message):
    changed = {name: weight for name, weight in {**weights, **change}.items() if weight is not None}
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, changed, *flags)
    assert not (tmp_path / "model").exists()
