"""Parts rebuilt from their configurations: no value is lost, however it was passed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.diffusion.stock import altered
from ddpm_from_scratch.evaluation.calibration import calibrate
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from ddpm_from_scratch.sampling.editing import ScratchDDPMInterpolationPipeline
from ddpm_from_scratch.training.objectives import Objective
from helpers import oracles
from helpers.networks import TINY_NETWORK
from helpers.oracles import grid_data, randn

POSITIONS = (12, 0.01, 0.3, "scaled_linear")
NAMES = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
SAME_PROCESS = (ScratchDDPMScheduler(*POSITIONS), ScratchDDPMScheduler(**dict(zip(NAMES, POSITIONS, strict=True))))
ALPHA_BAR = oracles.Chain(oracles.scaled_linear_betas(12, 0.01, 0.3)).alpha_bar


def assert_the_process(scheduler):
    """It is that of POSITIONS."""
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), ALPHA_BAR, rtol=1e-5)
    assert tuple(scheduler.config[name] for name in NAMES) == POSITIONS


def network(x, t):
    return SimpleNamespace(sample=torch.tanh(x))


network.config, network.device, network.dtype = {}, torch.device("cpu"), torch.float64


def test_diffusers_loses_what_was_passed_by_position():
    """If it no longer does, `altered` is `from_config`."""
    assert DDPMScheduler.from_config(DDPMScheduler(12).config).config.num_train_timesteps == 1000


@pytest.mark.parametrize("kind", [ScratchDDPMScheduler, DDPMScheduler, DDIMScheduler])
def test_values_passed_by_position_stay(kind):
    scheduler = ScratchDDPMScheduler(*POSITIONS, variance_type="fixed_large", steps_offset=2)
    other = altered(scheduler, kind, clip_sample=False)
    assert type(other) is kind and other is not scheduler
    assert_the_process(other)
    assert other.config.clip_sample is False and scheduler.config.clip_sample is True
    assert other.config.steps_offset == 2


def test_arrays_passed_by_position_stay():
    betas = oracles.linear_betas(5, 0.1, 0.4)
    scheduler = altered(ScratchDDPMScheduler(5, 0.1, 0.2, "linear", betas), eta=0.5)
    assert scheduler.config.trained_betas is betas and scheduler.config.eta == 0.5
    np.testing.assert_allclose(scheduler.betas, betas, rtol=1e-6)


def test_values_set_after_construction_stay():
    scheduler = ScratchDDPMScheduler()
    scheduler.register_to_config(clip_sample_range=2.0)
    assert altered(scheduler).config.clip_sample_range == 2.0


def test_its_own_class_is_kept():
    class Mine(ScratchDDPMScheduler):
        pass

    assert type(altered(Mine(12))) is Mine


def test_what_was_left_out_stays_left_out():
    """So that each class of diffusers puts its own default in its place, as from the scheduler itself."""
    scheduler = ScratchDDPMScheduler(12, beta_end=0.3)
    for given, spacing in (({}, "linspace"), ({"timestep_spacing": "trailing"}, "trailing")):
        for part in (altered(scheduler, **given), altered(altered(scheduler, **given))):
            solver = altered(part, DPMSolverMultistepScheduler)
            assert solver.config.timestep_spacing == spacing
            assert solver.config.num_train_timesteps == 12 and solver.config.beta_end == 0.3


def test_a_pipeline_keeps_the_process_of_a_stock_scheduler(stock_unet):
    pipeline = ScratchDDPMPipeline(stock_unet, DDPMScheduler(*POSITIONS))
    assert type(pipeline.scheduler) is ScratchDDPMScheduler
    assert_the_process(pipeline.scheduler)


def test_a_pipeline_keeps_the_form_of_a_stock_network():
    form = ("sample_size", "in_channels", "out_channels")
    options = {name: value for name, value in TINY_NETWORK.items() if name not in form}
    stock = UNet2DModel(*(TINY_NETWORK[name] for name in form), **options)
    own = ScratchUNet2DModel.from_stock(stock)
    assert [own.config[name] for name in form] == [8, 1, 1]
    x = randn(2, 1, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(own(x, 3).sample, stock(x, 3).sample)


def test_a_calibrated_scheduler_keeps_its_process():
    scheduler = calibrate(network, ScratchDDPMScheduler(*POSITIONS), grid_data(4, 1, 4, 4), progress=False)
    assert_the_process(scheduler)
    assert [t for t, _ in scheduler.config.x_0_mse] == list(range(12))


def test_likelihood_and_objective_keep_the_process():
    x_0, noise, t = grid_data(12, 1, 4), randn(12, 1, 4, seed=1), torch.arange(12)
    measured = [bits_per_dim(network, scheduler, x_0, progress=False) for scheduler in SAME_PROCESS]
    assert measured[0].timesteps.tolist() == t.tolist()
    assert torch.equal(measured[0].total, measured[1].total)
    x_t = SAME_PROCESS[0].add_noise(x_0, noise, t)
    losses = [Objective(scheduler, "vlb")(0.5 * noise, x_0, noise, x_t, t) for scheduler in SAME_PROCESS]
    assert torch.equal(*losses)


def test_inversion_keeps_the_process(stock_unet):
    image = (grid_data(1, 1, 8, 8).float() + 1) / 2
    noise = [
        ScratchDDPMInterpolationPipeline(stock_unet, scheduler).invert(image, 6, num_iterations=1)
        for scheduler in SAME_PROCESS
    ]
    assert torch.equal(*noise)
