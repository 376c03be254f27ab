"""All noise fresh (η = ∞): the consistency sampler, as the far end of one formula with DDIM and DDPM, and in files."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, LCMScheduler

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised
from helpers.oracles import grid_data, randn

SCHEDULES = {
    "linear": oracles.linear_betas(),
    "squaredcos_cap_v2": oracles.cosine_betas(),
    "scaled_linear": oracles.scaled_linear_betas(),
}
ETAS = (0.0, 1.0, math.inf)
COUNTS = (1, 2, 4, 10)
FRESH = {"eta": math.inf, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


def fresh_share(a_t, a_s, eta):
    """The share of x_s's noise that is drawn, by each method's own paper."""
    if eta == 0:
        return 0.0  # DDIM section 4.2
    return 1.0 if eta == math.inf else (1 - a_t / a_s) / (1 - a_t)  # CM algorithm 1; DDPM eq. 7


# --- one formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_ddpm_and_the_consistency_sampler_are_one_function(schedule, eta):
    alpha_bar = np.cumprod(1 - SCHEDULES[schedule])
    scheduler = ScratchDDPMScheduler(beta_schedule=schedule, clip_sample=False, eta=eta)
    scheduler.set_timesteps(timesteps=[999, 700, 350, 20])
    x_0, x_t = randn(2, 3, seed=1, dtype=torch.float64), randn(2, 3, seed=2, dtype=torch.float64)
    for t, s in ((999, 700), (700, 350), (350, 20)):
        a_t, a_s = alpha_bar[t], alpha_bar[s]
        share = fresh_share(a_t, a_s, eta)
        noise = (x_t - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
        mean = math.sqrt(a_s) * x_0 + math.sqrt((1 - share) * (1 - a_s)) * noise
        q = scheduler.q_posterior(x_0, x_t, t, s)
        torch.testing.assert_close(q.mean, mean, rtol=1e-9, atol=1e-12)
        assert math.exp(q.log_variance) == pytest.approx(share * (1 - a_s), rel=1e-9)


def test_the_variance_grows_with_eta_up_to_that_of_the_forward_process():
    scheduler = ScratchDDPMScheduler()
    alpha_bar = np.cumprod(1 - SCHEDULES["linear"])
    x = torch.zeros(1, 1, dtype=torch.float64)
    found = []
    for eta in (0.5, 1.0, 1.1, 2.0, 100.0, math.inf):
        scheduler.set_timesteps(timesteps=[600, 500], eta=eta)
        found.append(math.exp(scheduler.q_posterior(x, x, 600, 500).log_variance))
    assert found == sorted(found) and found[1] < found[2] < found[3]
    assert found[2] == pytest.approx(1.21 * found[1]) and found[-1] == found[-2] == pytest.approx(1 - alpha_bar[500])


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_variance_is_that_of_q_whatever_its_type(variance_type):
    scheduler = ScratchDDPMScheduler(variance_type=variance_type, **FRESH)
    scheduler.set_timesteps(2)
    x, output = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    reverse = scheduler.p_reverse(output, x, 999, 499)
    assert float(reverse.log_variance) == pytest.approx(math.log(1 - float(scheduler.alphas_cumprod[499])), rel=1e-5)
    torch.manual_seed(0)
    expected = reverse.mean + torch.exp(0.5 * torch.as_tensor(reverse.log_variance)) * torch.randn(
        1, 1, 4, 4, dtype=x.dtype
    )
    torch.manual_seed(0)
    torch.testing.assert_close(scheduler.step(output, 999, x).prev_sample, expected)


def test_a_learned_variance_is_not_used():
    scheduler = ScratchDDPMScheduler(variance_type="learned_range", **FRESH)
    scheduler.set_timesteps(2)
    x, mean = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    drawn = []
    for values in (-1.0, 1.0):
        torch.manual_seed(0)
        output = torch.cat([mean, torch.full_like(mean, values)], dim=1)
        drawn.append(scheduler.step(output, 999, x).prev_sample)
    assert torch.equal(*drawn)


def test_an_optimal_variance_is_not_taken_by_itself():
    moments = [(0, 1e-4), (999, 0.3)]
    scheduler = ScratchDDPMScheduler(x_0_mse=moments, **FRESH)
    plain = ScratchDDPMScheduler(**FRESH)
    x, output = randn(1, 1, 4, 4), randn(1, 1, 4, 4, seed=1)
    ends = []
    for one in (scheduler, plain):
        one.set_timesteps(4)
        torch.manual_seed(0)
        ends.append(one.step(output, 999, x).prev_sample)
    assert torch.equal(*ends)


def test_the_bound_is_that_of_independent_steps():
    scheduler = ScratchDDPMScheduler(clip_sample=False, **FRESH)
    scheduler.set_timesteps(2)
    x_0, x_t = grid_data(3, 4, seed=0).double(), randn(3, 4, seed=1, dtype=torch.float64)
    output = randn(3, 4, seed=2, dtype=torch.float64)
    x_0_hat = scheduler.predict(output, x_t, 999).x_0
    a_s = float(np.cumprod(1 - SCHEDULES["linear"])[499])
    expected = (a_s * (x_0 - x_0_hat) ** 2 / (2 * (1 - a_s))).mean(1)
    torch.testing.assert_close(scheduler.vlb_term(output, x_0, x_t, 999, 499), expected, rtol=1e-6, atol=0)


# --- the exact consistency function of Gaussian data ------------------------------------------------------------------


def jump(x_t, alpha_bar, data):
    """Where the probability flow takes x_t at the end: it keeps the place within the marginal's deviations."""
    deviation = math.sqrt(alpha_bar * data.variance + 1 - alpha_bar)
    return data.mean + math.sqrt(data.variance) * (x_t - math.sqrt(alpha_bar) * data.mean) / deviation


def as_output(x_0, x_t, alpha_bar, prediction_type):
    epsilon = (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
    velocity = math.sqrt(alpha_bar) * epsilon - math.sqrt(1 - alpha_bar) * x_0
    return {"epsilon": epsilon, "sample": x_0, "v_prediction": velocity}[prediction_type]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_gaussian_data_get_their_mean_and_variance_at_any_number_of_steps(schedule, count, prediction_type):
    data = oracles.GaussianData(mean=0.3, variance=0.25)
    alpha_bar = np.cumprod(1 - SCHEDULES[schedule])
    settings = FRESH | {"prediction_type": prediction_type}
    scheduler = ScratchDDPMScheduler(beta_schedule=schedule, clip_sample=False, **settings)
    scheduler.set_timesteps(count)
    mean, variance = 0.0, 1.0  # of x_T
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in scheduler.timesteps.tolist():
        s = int(scheduler.previous_timestep(t))
        output = as_output(jump(points, alpha_bar[t], data), points, alpha_bar[t], prediction_type)
        reverse = scheduler.p_reverse(output, points, t, s)
        shift, other = reverse.mean.flatten().tolist()
        mean = shift + (other - shift) * mean
        variance = (other - shift) ** 2 * variance + (s >= 0) * math.exp(reverse.log_variance)
    # One jump inherits what x_T ~ N(0, 1) differs from q(x_T) by; ᾱ_T of the linear schedule is 4e-5.
    assert mean == pytest.approx(data.mean, rel=0.02 if count == 1 else 1e-3)
    assert variance == pytest.approx(data.variance, rel=1e-3)


def test_a_posterior_mean_in_its_place_has_too_little_variance():
    """What a network trained for single steps answers: the same sampler shrinks its data."""
    data, alpha_bar = oracles.GaussianData(mean=0.3, variance=0.25), np.cumprod(1 - SCHEDULES["linear"])
    scheduler = ScratchDDPMScheduler(clip_sample=False, **FRESH | {"prediction_type": "epsilon"})
    scheduler.set_timesteps(1)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    end = scheduler.p_reverse(data.epsilon(x, alpha_bar[999])[:, None], x[:, None], 999, -1).mean.flatten()
    assert float(end[1] - end[0]) ** 2 < 1e-3 * data.variance


# --- files, and diffusers --------------------------------------------------------------------------------------------


def few_step_model(prediction_type="v_prediction", schedule="squaredcos_cap_v2", steps=4, **network):
    unet = randomised(ScratchUNet2DModel(**TINY_NETWORK, **network))
    scheduler = ScratchDDPMScheduler(beta_schedule=schedule, **FRESH | {"prediction_type": prediction_type})
    return ScratchDDPMPipeline(unet, scheduler, num_inference_steps=steps)


def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), output_type="np", **options).images


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
def test_stock_diffusers_draws_the_same_from_the_folder(schedule, prediction_type, tmp_path):
    pipeline = few_step_model(prediction_type, schedule)
    pipeline.save_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    assert type(stock.scheduler) is LCMScheduler
    for steps in (1, 2, 4):
        expected = draw(pipeline, num_inference_steps=steps)
        # Where ᾱ_T is small, x̂_0 of an ε is a large number divided by it: stock's float32 coefficients round there.
        np.testing.assert_allclose(draw(stock, num_inference_steps=steps), expected, atol=1e-4)


def test_neither_class_says_anything_on_loading(tmp_path, caplog, capfd):
    few_step_model().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        DDPMPipeline.from_pretrained(tmp_path)
        ScratchDDPMPipeline.from_pretrained(tmp_path)
        DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert not caplog.records and "expected" not in capfd.readouterr().err


@pytest.mark.parametrize("classes", [None, 3])
def test_the_folder_keeps_everything(classes, tmp_path):
    pipeline = few_step_model(num_class_embeds=classes)
    pipeline.save_pretrained(tmp_path / "model")
    remote = {"custom_pipeline": str(tmp_path / "model"), "trust_remote_code": True}
    for loaded in (
        ScratchDDPMPipeline.from_pretrained(tmp_path / "model"),
        DiffusionPipeline.from_pretrained(tmp_path / "model", **remote),
    ):
        assert type(loaded.scheduler).__name__ == "ScratchDDPMScheduler" and loaded.scheduler.config.eta == math.inf
        np.testing.assert_array_equal(draw(loaded), draw(pipeline, num_inference_steps=4))  # the model's own number
        loaded.save_pretrained(tmp_path / "again")
        for name in ("model_index.json", "scheduler/scheduler_config.json"):
            assert (tmp_path / "again" / name).read_text() == (tmp_path / "model" / name).read_text()


def test_files_are_plain_json(tmp_path):
    few_step_model().save_pretrained(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)


def test_a_schedule_that_lcm_does_not_know_is_saved_as_ddpm(tmp_path):
    scheduler = ScratchDDPMScheduler(beta_schedule="sigmoid", **FRESH)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
    assert ScratchDDPMScheduler.from_pretrained(tmp_path).config.eta == math.inf
    assert type(DDPMScheduler.from_pretrained(tmp_path)) is DDPMScheduler


def test_an_lcm_scheduler_that_is_not_ours_stays_as_it_is():
    pipeline = ScratchDDPMPipeline(ScratchUNet2DModel(**TINY_NETWORK), LCMScheduler())
    assert type(pipeline.scheduler) is LCMScheduler


# --- calls -----------------------------------------------------------------------------------------------------------


def test_a_call_may_choose_all_noise_fresh_or_another_chain():
    pipeline = few_step_model()
    own = draw(pipeline)
    np.testing.assert_array_equal(draw(pipeline, eta=math.inf, num_inference_steps=4), own)
    for eta in (0.0, 1.0):
        assert np.abs(draw(pipeline, eta=eta) - own).max() > 1e-3
    assert len(pipeline(num_inference_steps=1000 // 50, return_trajectory=20, output_type="np").trajectory) == 20


@pytest.mark.parametrize("eta", [-0.1, math.nan, "inf", None, True])
def test_wrong_eta(eta):
    with pytest.raises(
        ValueError, match=r"eta=.* must be a number and be at least 0; math\.inf draws all noise afresh"
    ):
        ScratchDDPMScheduler(eta=eta)


def test_ddim_of_diffusers_has_no_more_than_ddpms_noise():
    pipeline = ScratchDDPMPipeline(ScratchUNet2DModel(**TINY_NETWORK), DDIMScheduler())
    with pytest.raises(ValueError, match=r"eta=inf must be a number and lie in \[0, 1\]"):
        draw(pipeline, eta=math.inf)


@pytest.mark.parametrize("steps", [0, 1001, 2.5, "4"])
def test_wrong_numbers_of_steps_of_a_model(steps):
    with pytest.raises(ValueError, match=r"num_inference_steps=.* must be a whole number from 1 to 1000"):
        few_step_model(steps=steps)
