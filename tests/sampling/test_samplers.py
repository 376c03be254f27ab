"""Samplers by name: each draws with every kind of model, from noise at the last timestep on."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.sampling.samplers import SAMPLERS
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised

T = 40
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_on_every_schedule(name, schedule):
    network = randomised(UNet2DModel(**{**TINY_NETWORK, "out_channels": 2})).eval()  # with a learned variance
    scheduler = ScratchDDPMScheduler(T, beta_schedule=schedule, variance_type="learned_range", x_0_mse=[[0, 0.1]])
    pipeline = ScratchDDPMPipeline(network, scheduler)
    pipeline.scheduler = SAMPLERS[name](pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt").images
    assert images.shape == (1, 1, 8, 8) and images.isfinite().all()
    expected = ScratchDDPMScheduler(T, beta_schedule=schedule).alphas_cumprod
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, expected)
    if name != "ddpm":
        assert int(pipeline.scheduler.timesteps[0]) == T - 1


def test_ddim_is_that_of_diffusers():
    """With a network in closed form, so that no rounding of one hides a step of the other."""
    stock = DDIMScheduler(T, timestep_spacing="trailing", clip_sample=False)
    ours = SAMPLERS["ddim"](DDPMScheduler(T, clip_sample=False))
    x, output = oracles.randn(2, 2, 1, 8, 8)
    chains = []
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
        x_t = x
        for t in scheduler.timesteps:
            x_t = scheduler.step(0.3 * x_t + 0.1 * output, t, x_t).prev_sample
        chains.append(x_t)
    torch.testing.assert_close(chains[1].float(), chains[0].float(), rtol=1e-5, atol=1e-5)
