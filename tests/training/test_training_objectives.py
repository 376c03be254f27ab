"""Training objectives: weightings, the bound, the hybrid loss, loss-aware timesteps, and the runs that use them."""

import collections
import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train as script
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMPipeline, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from ddpm_from_scratch.runtime import random_streams as draws
from ddpm_from_scratch.sampling import checkpoints
from ddpm_from_scratch.training import arguments as cli
from ddpm_from_scratch.training import checkpoint, outputs
from ddpm_from_scratch.training import model as networks
from ddpm_from_scratch.training.objectives import HISTORY, LOSS_WEIGHTINGS, UNIFORM_SHARE, LossAwareSampler, Objective
from helpers import oracles
from helpers.oracles import grid_data, randn
from helpers.paths import TRAINING
from helpers.runs import assert_equal, checkpoint_tensors, run_main, run_process, stratified_timesteps

T = 1000
ALL = torch.arange(T)
CHAIN = oracles.Chain(oracles.linear_betas())
SNR = CHAIN.alpha_bar / (1 - CHAIN.alpha_bar)
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
ZERO_SNR_TYPES = ("sample", "v_prediction")

SHORT = 12  # the length of a chain all of whose terms are computed by the oracle
SHORT_BETAS = {"num_train_timesteps": SHORT, "beta_start": 0.005, "beta_end": 0.4}
SHORT_CHAIN = oracles.Chain(oracles.linear_betas(SHORT, 0.005, 0.4))


def objective(loss="simple", weighting="target", *, scheduler=None, **options):
    names = ("snr_gamma", "p2_gamma", "p2_k", "vlb_weight")
    own = {name: options.pop(name) for name in names if name in options}
    return Objective(scheduler or ScratchDDPMScheduler(**options), loss, weighting, **own)


def outputs_for(x_0_hat, x_t, alpha_bar):
    """What networks of each prediction type put out if they believe in x_0_hat."""
    a = torch.as_tensor(alpha_bar).reshape(-1, *(1,) * (x_t.ndim - 1))
    epsilon = (x_t - a.sqrt() * x_0_hat) / (1 - a).sqrt()
    return {
        "epsilon": epsilon,
        "sample": x_0_hat,
        "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * x_0_hat,
    }


def one_of_each_t(seed=0):
    """x_0, noise, x_t and a wrong x̂_0 for each of T timesteps."""
    x_0, noise, x_0_hat = grid_data(T, 2, 3, seed=seed), randn(T, 2, 3, seed=seed + 1), randn(T, 2, 3, seed=seed + 2)
    a = torch.from_numpy(CHAIN.alpha_bar)[:, None, None]
    return x_0, noise, a.sqrt() * x_0 + (1 - a).sqrt() * noise, x_0_hat


# Weightings


@pytest.mark.parametrize("gamma", [5.0, 0.3])
@pytest.mark.parametrize(
    ("prediction_type", "factor"),
    [
        ("epsilon", lambda gamma: np.minimum(SNR, gamma) / SNR),
        ("v_prediction", lambda gamma: np.minimum(SNR, gamma) / (SNR + 1)),
        ("sample", lambda gamma: np.minimum(SNR, gamma)),
    ],
)
def test_min_snr_factors(prediction_type, factor, gamma):
    """Hang et al. 2023, section 3.4 and appendix."""
    weights = objective(weighting="min_snr", prediction_type=prediction_type, snr_gamma=gamma).weights(ALL, randn(T))
    assert weights.shape == (T,) and weights.dtype == torch.float64
    np.testing.assert_allclose(weights.numpy(), factor(gamma), rtol=1e-9)


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_p2_weights_the_noise_error_by_a_power_of_k_plus_snr(gamma, k):
    """Choi et al. 2022, eq. 8: λ_t, which makes L_simple of the bound, divided by (k + SNR)^γ."""
    weights = objective(weighting="p2", p2_gamma=gamma, p2_k=k).weights(ALL, randn(T))
    np.testing.assert_allclose(weights.numpy(), 1 / (k + SNR) ** gamma, rtol=1e-9)


@pytest.mark.parametrize(
    ("weighting", "of_x_0_error"),
    [("epsilon", SNR), ("min_snr", np.minimum(SNR, 5)), ("p2", SNR / (1 + SNR))],
)
def test_a_weighted_loss_is_the_same_whatever_the_network_predicts(weighting, of_x_0_error):
    x_0, noise, x_t, x_0_hat = one_of_each_t()
    expected = of_x_0_error * ((x_0 - x_0_hat) ** 2).mean((1, 2)).numpy()
    for prediction_type, output in outputs_for(x_0_hat, x_t, CHAIN.alpha_bar).items():
        loss = objective(weighting=weighting, prediction_type=prediction_type)(output, x_0, noise, x_t, ALL)
        np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-10, err_msg=prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_is_the_simple_loss_bit_for_bit(prediction_type):
    x_0, noise, x_t, output = (x.float() for x in one_of_each_t())
    scheduler = ScratchDDPMScheduler(prediction_type=prediction_type)
    loss = objective(scheduler=scheduler)(output, x_0, noise, x_t, ALL)
    assert torch.equal(loss, scheduler.simple_loss(output, x_0, noise, ALL))


def test_epsilon_weighting_of_a_network_that_predicts_epsilon_is_target():
    assert objective(weighting="epsilon").weights(ALL, randn(T)).tolist() == [1.0] * T


@pytest.mark.parametrize("weighting", [w for w in LOSS_WEIGHTINGS if w != "target"])
@pytest.mark.parametrize("prediction_type", ZERO_SNR_TYPES)
def test_weights_vanish_at_zero_snr_with_finite_gradients(prediction_type, weighting):
    weighted = objective(weighting=weighting, prediction_type=prediction_type, rescale_betas_zero_snr=True)
    weights = weighted.weights(ALL, randn(T))
    assert torch.isfinite(weights).all() and (weights[:-1] > 0).all() and weights[-1] == 0
    x_0, noise, x_t, output = one_of_each_t()
    weighted(output.requires_grad_(), x_0, noise, x_t, ALL).sum().backward()
    assert torch.isfinite(output.grad).all()


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
@pytest.mark.parametrize("prediction_type", ZERO_SNR_TYPES)
def test_the_bound_is_finite_at_zero_snr(prediction_type, loss):
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True, "variance_type": "learned_range"}
    bound = objective(loss, **options)
    x_0, noise, _, prediction = one_of_each_t()
    output = torch.cat([prediction, torch.zeros_like(prediction)], 1).requires_grad_()
    losses = bound(output, x_0, noise, bound.scheduler.add_noise(x_0, noise, ALL), ALL)
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(output.grad).all()


def test_16_bit_inputs_are_weighted_in_float32():
    x_0, noise, x_t, output = (x.bfloat16() for x in one_of_each_t())
    weighted = objective(weighting="min_snr")
    loss = weighted(output, x_0, noise, x_t, ALL)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, weighted(output.float(), x_0.float(), noise.float(), x_t.float(), ALL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hybird"}, "did you mean 'hybrid'"),
        ({"weighting": "min-snr"}, "did you mean 'min_snr'"),
        ({"weighting": "min_snr", "snr_gamma": 0}, "snr_gamma=0 must be a number, above 0"),
        ({"snr_gamma": math.nan}, "snr_gamma=nan"),
        ({"p2_k": math.inf}, "p2_k=inf"),
        ({"p2_gamma": -1}, "p2_gamma=-1"),
        ({"vlb_weight": 0}, "vlb_weight=0 must be a number, above 0"),
        ({"loss": "hybrid"}, "variance_type is 'fixed_small'"),
        ({"variance_type": "learned"}, "'learned' cannot be trained with the loss 'simple'"),
        ({"loss": "vlb", "weighting": "p2"}, "weighting='p2' is for the simple loss"),
        ({"loss": "vlb", "eta": 0.0}, "infinite at eta=0"),
    ],
)
def test_wrong_objectives(options, message):
    with pytest.raises(ValueError, match=message):
        objective(**options)


def test_objectives_of_the_same_values_are_equal():
    scheduler = ScratchDDPMScheduler()
    assert objective(scheduler=scheduler) == objective(scheduler=scheduler)
    assert objective(scheduler=scheduler) != objective("vlb", scheduler=scheduler)


# The bound


def analytic(kind, doubled):
    """The oracles' network on the short chain: (x_t [B, ...], t [B]) -> output, one image at a time."""

    def network(x, t):
        steps = zip(x.split(1), t.tolist(), strict=True)
        return torch.cat([oracles.analytic_network(x, t, SHORT_CHAIN.alpha_bar, kind, doubled) for x, t in steps])

    return network


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_vlb_is_t_times_the_unclipped_term_in_bits(kind, variance_type):
    """Against the oracle; the scheduler's own clipping, which the network's x_0 needs, has no part in it."""
    network = analytic(kind, variance_type == "learned_range")
    vlb = objective("vlb", prediction_type=kind, variance_type=variance_type, clip_sample=True, **SHORT_BETAS)
    x_0, noise, t = grid_data(2, 2, 3), randn(SHORT, 2, 2, 3, seed=1), torch.arange(SHORT)
    _, terms = oracles.bound(
        SHORT_CHAIN,
        lambda x, k: network(torch.from_numpy(x), torch.tensor([k] * len(x))).numpy(),
        x_0.numpy(),
        noise.numpy(),
        variance_type=variance_type,
        prediction_type=kind,
        clip=None,
    )
    for image, expected in zip((0, 1), SHORT * terms, strict=True):
        same = x_0[image].expand(SHORT, -1, -1)
        x_t = vlb.scheduler.add_noise(same, noise[:, image], t)
        output = network(x_t, t)
        np.testing.assert_allclose(vlb(output, same, noise[:, image], x_t, t).numpy(), expected, rtol=1e-8)
        clipped = SHORT / math.log(2) * vlb.scheduler.vlb_term(output, same, x_t, t)
        assert (np.abs(clipped.numpy() / expected - 1) > 1e-3).any()


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_the_mean_over_t_and_the_prior_are_the_bits_per_dimension(variance_type):
    """With the x_t that `bits_per_dim` drew, which its network has seen."""
    network, seen = analytic("v_prediction", variance_type == "learned_range"), []

    def recording(x, t):
        seen.append((x, t))
        return SimpleNamespace(sample=network(x, t))

    options = {"prediction_type": "v_prediction", "variance_type": variance_type, **SHORT_BETAS}
    vlb, x_0 = objective("vlb", **options), grid_data(3, 2, 4)
    measured = bits_per_dim(recording, vlb.scheduler, x_0, clip_sample=False, progress=False)
    assert len(seen) == SHORT
    losses = torch.stack([vlb(network(x_t, t), x_0, torch.empty(0), x_t, t) for x_t, t in seen], 1)
    order = torch.stack([t for _, t in seen], 1)
    torch.testing.assert_close(losses / SHORT, measured.terms.gather(1, order), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.mean(1) + measured.prior, measured.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_the_bound_is_the_same_whatever_the_network_predicts(loss):
    x_0, noise, x_t, x_0_hat = one_of_each_t()
    values = torch.tanh(randn(T, 2, 3, seed=9))
    weighting = "epsilon" if loss == "hybrid" else "target"
    losses = [
        objective(loss, weighting, prediction_type=kind, variance_type="learned_range")(
            torch.cat([output, values], 1), x_0, noise, x_t, ALL
        )
        for kind, output in outputs_for(x_0_hat, x_t, CHAIN.alpha_bar).items()
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-9, atol=0)


def test_second_moments_of_an_earlier_network_leave_the_bound_alone():
    x_0, noise, x_t, output = one_of_each_t()
    output = torch.cat([output, torch.zeros_like(output)], 1)
    moments = {"x_0_mse": [(0, 1e-3), (T - 1, 0.5)], "optimal_variance": True}
    losses = [
        objective("vlb", variance_type="learned_range", **options)(output, x_0, noise, x_t, ALL)
        for options in ({}, moments)
    ]
    assert torch.equal(*losses)


def test_vlb_trains_the_mean_with_the_weight_of_the_paper():
    """DDPM eq. 12 has KL = β²/(2σ²α(1-ᾱ)) ‖ε - ε̂‖² + const; its gradient is that of the square."""
    x_0, noise, x_t, output = one_of_each_t()
    objective("vlb", variance_type="fixed_large")(output.requires_grad_(), x_0, noise, x_t, ALL).sum().backward()
    beta, alpha, alpha_bar = (x[1:, None, None] for x in (CHAIN.beta, CHAIN.alpha, CHAIN.alpha_bar))
    weight = T / math.log(2) * beta / (2 * alpha * (1 - alpha_bar))  # σ² = β
    expected = weight * 2 * (output.detach() - noise)[1:].numpy() / 6  # the mean over 6 dimensions
    np.testing.assert_allclose(output.grad[1:].numpy(), expected, rtol=1e-6, atol=1e-9)
    assert (output.grad[0] != 0).any()  # the decoder's


def test_vlb_trains_a_learned_variance():
    """KL's derivative by log σ² is (1 - (β̃ + (μ - μ̃)²) / σ²) / 2; that of log σ² by v is (log β - log β̃) / 2."""
    x_0, noise, x_t, prediction = one_of_each_t()
    values = torch.tanh(randn(T, 2, 3, seed=9))
    output = torch.cat([prediction, values], 1).requires_grad_()
    objective("vlb", variance_type="learned_range")(output, x_0, noise, x_t, ALL).sum().backward()
    a = torch.from_numpy(CHAIN.alpha_bar)[:, None, None]
    x_0_hat = (x_t - (1 - a).sqrt() * prediction) / a.sqrt()
    difference = CHAIN.on_x_0[:, None, None] * (x_0_hat - x_0).numpy()
    small, beta = CHAIN.small[:, None, None], np.log(CHAIN.beta)[:, None, None]
    variance = np.exp(CHAIN.log_variance("learned_range", values.numpy()))
    expected = (1 - (np.exp(small) + difference**2) / variance) / 2 * (beta - small) / 2 * T / math.log(2) / 6
    np.testing.assert_allclose(output.grad[1:, 2:].numpy(), expected[1:], rtol=1e-6, atol=1e-12)
    assert (output.grad[0, 2:] != 0).any()
    assert (output.grad[:, :2] != 0).any(dim=(1, 2)).all()  # and the mean, at each t


# The hybrid loss


def test_the_hybrid_loss_is_the_weighted_sum():
    x_0, noise, x_t, prediction = one_of_each_t()
    output = torch.cat([prediction, torch.tanh(randn(T, 2, 3, seed=9))], 1)
    options = {"prediction_type": "v_prediction", "variance_type": "learned_range"}
    hybrid = objective("hybrid", "min_snr", vlb_weight=0.02, **options)
    vlb = objective("vlb", **options)(output, x_0, noise, x_t, ALL)
    simple = objective("simple", "min_snr", prediction_type="v_prediction")(output, x_0, noise, x_t, ALL)
    torch.testing.assert_close(hybrid(output, x_0, noise, x_t, ALL), simple + 0.02 * vlb, rtol=1e-12, atol=0)
    assert objective("hybrid", **options).vlb_weight == 0.001  # of iDDPM


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_bound_trains_nothing_but_the_variance_in_the_hybrid_loss(prediction_type):
    x_0, noise, x_t, prediction = one_of_each_t()
    values = torch.tanh(randn(T, 2, 3, seed=9))
    options = {"prediction_type": prediction_type, "variance_type": "learned_range"}

    def gradient(loss):
        output = torch.cat([prediction, values], 1).requires_grad_()
        loss(output).sum().backward()
        return output.grad.split(2, 1)

    hybrid = objective("hybrid", vlb_weight=0.5, **options)
    mean, variance = gradient(lambda output: hybrid(output, x_0, noise, x_t, ALL))
    simple_mean, nothing = gradient(lambda output: hybrid.scheduler.simple_loss(output, x_0, noise, ALL))
    vlb_mean, vlb_variance = gradient(lambda output: hybrid.vlb(output, x_0, x_t, ALL))
    assert torch.equal(mean, simple_mean)
    torch.testing.assert_close(variance, 0.5 * vlb_variance, rtol=1e-12, atol=0)
    assert (variance != 0).any(dim=(1, 2)).all() and (vlb_mean != 0).any(dim=(1, 2)).all()
    assert (nothing == 0).all()


@pytest.mark.parametrize("loss", ["vlb", "hybrid"])
def test_a_learned_variance_needs_a_network_that_gives_it(loss):
    x_0, noise, x_t, output = one_of_each_t()
    with pytest.raises(ValueError, match="needs a network with twice the channels"):
        objective(loss, variance_type="learned_range")(output, x_0, noise, x_t, ALL)


# Loss-aware timesteps


def filled(losses):
    """A sampler that has seen these losses, [T, n], of each timestep."""
    sampler = LossAwareSampler(len(losses))
    for column in losses.T:
        sampler.update(torch.arange(len(losses)), column)
    return sampler


LOSSES = randn(7, HISTORY, seed=3).abs() * torch.tensor([30.0, 1, 2, 0.5, 0.01, 4, 8])[:, None]


def grid(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_timesteps_are_uniform_until_each_has_ten_losses():
    assert HISTORY == 10  # iDDPM section 3.3
    sampler = LossAwareSampler(5)
    for number in range(9):
        sampler.update(torch.arange(5), torch.full((5,), 10.0**number))
    sampler.update(torch.tensor([0, 0, 1, 2, 4]), torch.tensor([1e3, 1e6, 5.0, 2.0, 1.0]))  # only t = 3 lacks its tenth
    assert sampler.probabilities().tolist() == [0.2] * 5
    u = draws.stratified_uniforms(0, 0, 64)
    t, weights = sampler.draw(u)
    assert torch.equal(t, stratified_timesteps(0, 0, 64, 5))
    torch.testing.assert_close(weights, torch.ones(64, dtype=torch.float64), rtol=1e-15, atol=0)
    sampler.update(torch.tensor([3]), torch.tensor([1.0]))
    assert len(set(sampler.probabilities().tolist())) > 1


def test_probabilities_follow_the_root_mean_square_of_the_losses():
    """iDDPM eq. 18, with a share of uniform draws."""
    root = np.sqrt((LOSSES.numpy() ** 2).mean(1))
    expected = 0.999 * root / root.sum() + 0.001 / 7
    np.testing.assert_allclose(filled(LOSSES).probabilities().numpy(), expected, rtol=1e-12)


def test_draws_follow_the_probabilities():
    sampler, count = filled(LOSSES), 100_000
    t, _ = sampler.draw(grid(count))
    assert t.dtype == torch.long
    # The number of midpoints in an interval differs from its length by less than one.
    assert (torch.bincount(t, minlength=7) - count * sampler.probabilities()).abs().max() < 1


def test_draws_at_the_edges():
    """An edge belongs to the timestep above it; the probabilities' sum may be rounded to less than a quantile."""
    edges, _ = LossAwareSampler(4).draw(torch.tensor([0.0, 0.25, 0.5, 0.75]))
    assert edges.tolist() == [0, 1, 2, 3]
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert [LossAwareSampler(steps).draw(last)[0].item() for steps in range(1, 200)] == list(range(199))


def test_each_row_of_a_stratified_batch_follows_the_probabilities():
    sampler, steps = filled(LOSSES), 2000
    p = sampler.probabilities()
    t = torch.stack([sampler.draw(draws.stratified_uniforms(3, step, 4))[0] for step in range(steps)])
    deviation = (steps * p * (1 - p)).sqrt()
    for row in t.T:
        assert ((torch.bincount(row, minlength=7) - steps * p).abs() < 4 * deviation + 1).all()


def test_weights_make_the_mean_loss_unbiased():
    sampler, losses = filled(LOSSES), randn(7, seed=8).abs()
    t, weights = sampler.draw(grid(1_000_000))
    assert (weights * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-3)
    weight_of = torch.zeros(7, dtype=torch.float64).scatter_(0, t, weights)
    exact = (sampler.probabilities() * weight_of * losses).sum()
    assert exact.item() == pytest.approx(losses.mean().item(), rel=1e-14)
    assert weights.std() > 0.1


def test_a_timestep_without_loss_is_still_drawn_and_its_weight_is_bounded():
    losses = LOSSES.clone()
    losses[2] = 0
    sampler = filled(losses)
    t, weights = sampler.draw(grid(100_000))
    assert (t == 2).sum() == pytest.approx(100_000 * UNIFORM_SHARE / 7, abs=1)
    assert weights.max().item() == pytest.approx(1 / UNIFORM_SHARE)


def test_the_history_drops_the_oldest_loss():
    """Against a deque for each timestep, with repeated timesteps in a batch."""
    sampler = LossAwareSampler(4)
    memory = [collections.deque(maxlen=HISTORY) for _ in range(4)]
    for step in range(30):
        t = torch.randint(4, (6,), generator=torch.Generator().manual_seed(step))
        losses = randn(6, seed=100 + step).abs()
        sampler.update(t, losses.float())
        for at, loss in zip(t.tolist(), losses.float().tolist(), strict=True):
            memory[at].append(loss)
    assert min(sampler.counts) > 2 * HISTORY
    for at in range(4):
        assert sorted(sampler.history[at].tolist()) == sorted(memory[at])
    root = np.sqrt([np.mean(np.square(losses)) for losses in memory])
    np.testing.assert_allclose(sampler.probabilities(), 0.999 * root / root.sum() + 0.001 / 4, rtol=1e-12)


@pytest.mark.parametrize("count", [4, 13])
def test_state_goes_through_a_file(tmp_path, count):
    sampler = filled(randn(7, count, seed=3).abs())
    save_file(sampler.state_dict(), tmp_path / "sampler.safetensors")
    state = load_file(tmp_path / "sampler.safetensors")
    loaded = LossAwareSampler(7)
    loaded.load_state_dict(state)
    for step in range(12):
        t, losses = torch.arange(7), randn(7, seed=step).abs()
        sampler.update(t, losses)
        loaded.update(t, losses)
        assert_equal(loaded.state_dict(), sampler.state_dict())
    assert_equal(state, load_file(tmp_path / "sampler.safetensors"))  # what was loaded from is left alone
    assert torch.equal(loaded.probabilities(), sampler.probabilities())


# Runs: the loss they minimise

LEARNED = ("--ddpm_variance_type", "learned_range")
# A short chain, and batches in which each of its timesteps comes twice: after five steps each has ten losses.
SHORT_RUN = ("--ddpm_num_steps", "4", "--ddpm_beta_start", "0.02", "--ddpm_beta_end", "0.5", "--train_batch_size", "8")
LOSS_AWARE = (*SHORT_RUN, "--loss", "vlb", "--timestep_sampling", "loss_aware")
RUNS = {
    "hybrid": (*SHORT_RUN, "--loss", "hybrid", *LEARNED, "--prediction_type", "v_prediction"),
    "hybrid min_snr": (*SHORT_RUN, "--loss", "hybrid", *LEARNED, "--loss_weighting", "min_snr", "--snr_gamma", "2"),
    "vlb": (*LOSS_AWARE, *LEARNED),
    "vlb fixed": (*LOSS_AWARE, "--ddpm_variance_type", "fixed_small"),
    "min_snr": (*SHORT_RUN, "--loss_weighting", "min_snr", "--snr_gamma", "2", "--prediction_type", "v_prediction"),
    "p2": (*SHORT_RUN, "--loss_weighting", "p2", "--p2_k", "2", "--p2_gamma", "0.5"),
}
RUN_CHAIN = oracles.Chain(oracles.linear_betas(4, 0.02, 0.5))


def first_losses(config):
    """Of a new network, whose last layer is 0: timesteps and losses of the first batch, from the papers' formulas."""
    loaded = data.load_data(config, None, None)
    stream = data.ImageStream(loaded, config.seed, config.center_crop, config.random_flip)
    batch = stream.__getitems__(range(config.train_batch_size))
    x_0, noise = batch.images.double().numpy() / 127.5 - 1, batch.noise.double().numpy()
    t = stratified_timesteps(config.seed, 0, config.train_batch_size, 4).numpy()
    alpha_bar = RUN_CHAIN.alpha_bar[t][:, None, None, None]
    target = noise if config.prediction_type == "epsilon" else np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * x_0
    snr = RUN_CHAIN.alpha_bar[t] / (1 - RUN_CHAIN.alpha_bar[t])
    weights = {
        "target": 1.0,
        "min_snr": np.minimum(snr, config.snr_gamma) / (snr + (config.prediction_type == "v_prediction")),
        "p2": 1 / (config.p2_k + snr) ** config.p2_gamma,
    }
    simple = weights[config.loss_weighting] * (target**2).mean((1, 2, 3))
    if config.loss == "simple":
        return t, simple
    halves = 2 if config.ddpm_variance_type == "learned_range" else 1
    _, terms = oracles.bound(
        RUN_CHAIN,
        lambda x, k: np.zeros((len(x), halves, *x.shape[2:])),
        x_0,
        np.broadcast_to(noise, (4, *noise.shape)),
        variance_type=config.ddpm_variance_type,
        prediction_type=config.prediction_type,
        clip=None,
    )
    vlb = 4 * terms[np.arange(len(t)), t]
    return t, vlb if config.loss == "vlb" else simple + 0.001 * vlb


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_the_first_loss_to_samples(inputs, tmp_path, name):
    flags = (*RUNS[name], "--log_steps", "1", "--max_train_steps", "6", "--checkpointing_steps", "6")
    config, _ = cli.parse([inputs.preset, *flags])
    folder = run_main(inputs, tmp_path / "model", *flags)
    losses = checkpoints.read_state(folder / "checkpoints" / "step_00000006")["progress"]["losses"]
    assert losses[0][1] == pytest.approx(first_losses(config)[1].mean(), rel=1e-5)
    assert all(math.isfinite(loss) for _, loss in losses)

    learned = "learned_range" in RUNS[name]
    ours, stock = ScratchDDPMPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is DDPMPipeline
    assert ours.unet.config.out_channels == (2 if learned else 1) and ours.unet.config.in_channels == 1
    assert ours.scheduler.variance_type == stock.scheduler.config.variance_type == config.ddpm_variance_type
    images = []
    for pipeline in (ours, stock):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(batch_size=3, generator=generator, num_inference_steps=4, output_type="np").images)
    assert images[0].shape == (3, 8, 8, 1) and np.isfinite(images[0]).all() and images[0].std() > 0.05
    np.testing.assert_allclose(*images, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_grids_of_a_network_with_a_learned_variance(inputs, tmp_path, sampler):
    flags = (*RUNS["hybrid"], "--max_train_steps", "1", "--sample_scheduler", sampler)
    assert (run_main(inputs, tmp_path / "model", *flags) / "samples.png").is_file()


def test_the_hybrid_loss_trains_the_variance_in_a_run(inputs, tmp_path):
    folder = run_main(inputs, tmp_path / "model", *RUNS["hybrid"], "--max_train_steps", "4", "--use_ema", "false")
    weight = load_file(folder / "unet/diffusion_pytorch_model.safetensors")["conv_out.weight"]
    assert weight.shape[0] == 2 and (weight.flatten(1) != 0).any(1).all()  # both halves were 0 at the start


def test_a_saved_network_with_a_learned_variance_describes_a_new_one(inputs, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"in_channels": 1, "out_channels": 2, "block_out_channels": [8, 8]}))
    config, _ = cli.parse([inputs.preset, *RUNS["hybrid"], "--model_config_name_or_path", str(path)])
    assert networks.network_config(config)["out_channels"] == 2
    path.write_text(json.dumps({"in_channels": 1, "out_channels": 1, "block_out_channels": [8, 8]}))
    with pytest.raises(ValueError, match="needs 2 outputs"):
        networks.network_config(config)


# Runs: resuming, processes


@pytest.fixture(scope="module")
def loss_aware_run(inputs, tmp_path_factory):
    """An uninterrupted run of 9 steps, the last four of them with timesteps that are not uniform."""
    folder = tmp_path_factory.mktemp("loss_aware") / "model"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    flags = (*LOSS_AWARE, *LEARNED, "--max_train_steps", "9", "--checkpointing_steps", "1")
    return script.main([inputs.preset, "--output_dir", str(folder), *flags])


def sampler_of(folder, step):
    sampler = LossAwareSampler(4)
    sampler.load_state_dict(load_file(folder / "checkpoints" / f"step_{step:08d}" / "sampler.safetensors"))
    return sampler


def test_a_run_fills_the_history_and_leaves_uniform_timesteps(loss_aware_run):
    assert [sampler_of(loss_aware_run, step).counts.tolist() for step in (1, 5)] == [[2] * 4, [10] * 4]
    assert sampler_of(loss_aware_run, 4).probabilities().tolist() == [0.25] * 4
    fifth, sixth = sampler_of(loss_aware_run, 5), sampler_of(loss_aware_run, 6)
    p = fifth.probabilities()
    assert p.max() - p.min() > 0.05
    t, _ = fifth.draw(draws.stratified_uniforms(0, 5, 8))
    assert torch.equal(sixth.counts - fifth.counts, torch.bincount(t, minlength=4))
    assert (sixth.counts - fifth.counts).tolist() != [2] * 4


def test_a_run_remembers_the_loss_of_each_timestep(inputs, loss_aware_run):
    config, _ = cli.parse([inputs.preset, *LOSS_AWARE, *LEARNED])
    t, losses = first_losses(config)
    expected = np.stack([losses[t == step] for step in range(4)])  # two of each
    np.testing.assert_allclose(sampler_of(loss_aware_run, 1).history[:, :2], expected, rtol=1e-5)


@pytest.mark.parametrize("step", [5, 7])
def test_a_run_weights_the_losses_of_timesteps_that_are_not_uniform(loss_aware_run, step):
    before, after = sampler_of(loss_aware_run, step), sampler_of(loss_aware_run, step + 1)
    weights = 1 / (4 * before.probabilities())
    total = 0.0
    for t, (first, end) in enumerate(zip(before.counts.tolist(), after.counts.tolist(), strict=True)):
        total += weights[t] * sum(after.history[t, place % HISTORY] for place in range(first, end))
    state = checkpoints.read_state(loss_aware_run / "checkpoints" / f"step_{step + 1:08d}")
    assert dict(state["progress"]["losses"])[step + 1] == pytest.approx(float(total) / 8, rel=1e-5)


@pytest.mark.parametrize("step", [3, 5, 8])
def test_a_resumed_loss_aware_run_equals_the_whole_one(inputs, loss_aware_run, tmp_path, step):
    start = loss_aware_run / "checkpoints" / f"step_{step:08d}"
    flags = ("--max_train_steps", "9", "--checkpointing_steps", "9", "--resume_from_checkpoint", start)
    resumed = run_main(inputs, tmp_path / "model", *LOSS_AWARE, *LEARNED, *flags)
    assert_equal(checkpoint_tensors(resumed, 9), checkpoint_tensors(loss_aware_run, 9))
    assert_equal(sampler_of(resumed, 9).state_dict(), sampler_of(loss_aware_run, 9).state_dict())


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--loss", "hybrid", "--timestep_sampling", "uniform"), "loss: 'vlb' in the checkpoint, 'hybrid' now"),
        (("--timestep_sampling", "uniform"), "timestep_sampling: 'loss_aware' in the checkpoint, 'uniform' now"),
        (("--ddpm_variance_type", "learned"), "ddpm_variance_type: 'learned_range' in the checkpoint, 'learned' now"),
        (("--vlb_weight", "0.1"), "vlb_weight: 0.001 in the checkpoint, 0.1 now"),
    ],
)
def test_resume_refuses_another_objective(inputs, loss_aware_run, tmp_path, flags, difference):
    start = loss_aware_run / "checkpoints" / "step_00000003"
    with pytest.raises(ValueError, match=difference):
        run_main(inputs, tmp_path / "model", *LOSS_AWARE, *LEARNED, "--resume_from_checkpoint", start, *flags)
    assert not (tmp_path / "model").exists()


def test_the_sampler_may_change_its_fixed_variance_where_the_loss_has_none(inputs, tmp_path):
    flags = ("--max_train_steps", "1", "--checkpointing_steps", "1")
    start = run_main(inputs, tmp_path / "start", *flags) / "checkpoints" / "step_00000001"
    again = ("--max_train_steps", "2", "--ddpm_variance_type", "fixed_small", "--resume_from_checkpoint", start)
    assert (run_main(inputs, tmp_path / "model", *again) / "model_index.json").exists()


def test_resume_takes_a_checkpoint_from_before_there_were_objectives(inputs, tmp_path):
    common = ("--checkpointing_steps", "2", "--lr_scheduler", "constant_with_warmup")
    folder = run_main(inputs, tmp_path / "run", *common, "--max_train_steps", "2")
    state = folder / "checkpoints" / "step_00000002" / "state.json"
    manifest = state.with_name("manifest.json")
    content = {**json.loads(state.read_text()), "config": json.loads(manifest.read_text())["config"]}
    manifest.unlink()  # version 0.1.0 had none
    for name in (*networks.OBJECTIVE_FLAGS, "timestep_sampling"):
        del content["identity"][name]
    state.write_text(json.dumps(content))
    run_main(inputs, folder, *common, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="loss_weighting: 'target' in the checkpoint, 'min_snr' now"):
        run_main(inputs, folder, *common, "--loss_weighting", "min_snr", "--resume_from_checkpoint", str(state.parent))


def test_fine_tuning_refuses_a_network_without_a_variance(inputs, tmp_path):
    trained = run_main(inputs, tmp_path / "trained", *SHORT_RUN, "--max_train_steps", "1")
    flags = (*SHORT_RUN, "--loss", "hybrid", *LEARNED, "--model_config_name_or_path", trained)
    with pytest.raises(ValueError, match="'learned_range' needs 2 outputs"):
        run_main(inputs, tmp_path / "model", *flags)
    assert not (tmp_path / "model").exists()


@pytest.mark.full
def test_processes_and_passes_tell_the_losses_in_the_order_of_one_batch(inputs, tmp_path):
    """Two processes with two passes each against one process with one pass."""
    common = (*LOSS_AWARE, *LEARNED, "--model.dropout", "0.0", "--max_train_steps", "7", "--checkpointing_steps", "7")
    cut = ("--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(TRAINING / "train.py")]
    done = run_process([*launch, inputs.preset, "--output_dir", str(tmp_path / "two"), *common, *cut])
    assert done.returncode == 0, done.stderr[-3000:]
    one = run_main(inputs, tmp_path / "one", *common)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["num_processes"] == 2
    expected, found = sampler_of(one, 7), sampler_of(tmp_path / "two", 7)
    assert torch.equal(found.counts, expected.counts) and expected.counts.tolist() != [14] * 4
    torch.testing.assert_close(found.history, expected.history, rtol=1e-4, atol=0)
    swapped = expected.history[:, [1, 0, *range(2, HISTORY)]]  # an exchange of two losses would be seen
    assert ((swapped - expected.history).abs() > 2e-3 * expected.history).any(1).all()
    weights = checkpoint_tensors(one, 7)
    for name, tensor in checkpoint_tensors(tmp_path / "two", 7).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5, msg=name)


WRONG_CALLS = [
    ((*LEARNED,), "cannot be trained with the loss 'simple'"),
    ((*LEARNED, "--loss_weighting", "min_snr"), "cannot be trained with the loss 'simple'"),
    (("--loss", "hybrid"), "the loss 'hybrid' adds a term that trains a learned variance"),
    (("--loss", "hybird"), "did you mean 'hybrid'"),
    (("--timestep_sampling", "loss_aware"), "timestep_sampling 'loss_aware' is for the loss vlb, got 'simple'"),
    (("--loss", "hybrid", *LEARNED, "--timestep_sampling", "loss_aware"), "is for the loss vlb, got 'hybrid'"),
    (("--timestep_sampling", "loss-aware"), "did you mean 'loss_aware'"),
    (("--loss", "vlb", "--loss_weighting", "min_snr"), "loss_weighting 'min_snr' is for the losses simple and hybrid"),
    (("--loss_weighting", "minsnr"), "did you mean 'min_snr'"),
    (("--loss_weighting", "min_snr", "--snr_gamma", "0"), "snr_gamma must be above 0 and finite, got 0"),
    (("--snr_gamma", ".nan"), "snr_gamma must be above 0 and finite, got nan"),
    (("--p2_k", ".inf"), "p2_k must be above 0 and finite, got inf"),
    (("--p2_gamma", "-1"), "p2_gamma must be above 0"),
    (("--vlb_weight", ".nan"), "vlb_weight must be above 0 and finite, got nan"),
    ((*LEARNED, "--loss", "hybrid", "--model.out_channels", "1", "--model.in_channels", "1"), "needs 2 outputs"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG_CALLS, ids=[" ".join(flags) for flags, _ in WRONG_CALLS])
def test_wrong_calls_write_nothing(inputs, tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as raised:
        run_main(inputs, "model", *flags)
    explanation = capfd.readouterr().err if raised.type is SystemExit else str(raised.value)
    assert message in explanation
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
def test_the_curve_bears_the_name_of_its_loss(inputs, tmp_path, monkeypatch, loss):
    labels = []
    monkeypatch.setattr(outputs, "plot_losses", lambda losses, label, path: labels.append(label))
    variance = () if loss == "simple" else LEARNED
    run_main(inputs, tmp_path / "model", *SHORT_RUN, "--loss", loss, *variance, "--max_train_steps", "1")
    assert len(labels) == 1 and loss in labels[0]


# Compiling


@pytest.mark.full
def test_a_compiled_run_equals_a_plain_one(inputs, tmp_path, monkeypatch):
    """By a backend that runs each graph as it is: everything but the making of kernels, which takes a minute."""
    compile_in_place, modes, graphs = nn.Module.compile, [], []

    def as_it_is(graph, _):
        graphs.append(graph)
        return graph.forward

    def compile_quickly(self, mode=None):
        modes.append(mode)
        compile_in_place(self, backend=as_it_is)

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    flags = ("--max_train_steps", "3", "--checkpointing_steps", "3", "--model.dropout", "0.0")
    for ema in ("true", "false"):
        plain = run_main(inputs, tmp_path / f"plain_{ema}", *flags, "--use_ema", ema)
        compiled = run_main(inputs, tmp_path / f"compiled_{ema}", *flags, "--use_ema", ema, "--compile", "true")
        for file in ("checkpoints/step_00000003/unet.safetensors", "unet/diffusion_pytorch_model.safetensors"):
            expected, found = load_file(plain / file), load_file(compiled / file)
            assert expected.keys() == found.keys()
            assert all("_orig_mod" not in name for name in found)
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
        assert ScratchDDPMPipeline.from_pretrained(compiled).unet.config.sample_size == 8
    assert modes == [None] * 2 and graphs


# The optimiser's state, where it belongs


SAVED = {"weight/step": torch.tensor(3.0), "weight/exp_avg": randn(4, 2, 3, 3, dtype=torch.float32)}


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_state_goes_to_the_device_of_its_parameter(fused):
    """Fused kernels want the count of steps there too, the others on the host; `meta` is a device in every build."""
    parameter = nn.Parameter(torch.empty(4, 2, 3, 3, device="meta").to(memory_format=torch.channels_last))
    optimizer = SimpleNamespace(state=collections.defaultdict(dict), defaults={"fused": fused})  # there is none for it
    checkpoint.load_optimizer_tensors(optimizer, {parameter: "weight"}, SAVED)
    state = optimizer.state[parameter]
    assert state["exp_avg"].device == parameter.device and state["exp_avg"].stride() == parameter.stride()
    assert state["step"].device.type == ("meta" if fused else "cpu") and state["step"].shape == ()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)
def test_a_fused_optimizer_goes_on_from_its_saved_state(device):
    def trained(steps, state=None, weights=None):
        conv = nn.Conv2d(2, 4, 3).to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            for index, parameter in enumerate(conv.parameters()):
                parameter.copy_(weights[index] if weights else randn(*parameter.shape, seed=index))
        optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
        names = {parameter: name for name, parameter in conv.named_parameters()}
        if state:
            checkpoint.load_optimizer_tensors(optimizer, names, state)
        for step in steps:
            optimizer.zero_grad()
            conv(randn(1, 2, 5, 5, seed=step, dtype=torch.float32).to(device)).square().sum().backward()
            optimizer.step()
        saved = {k: t.detach().cpu().clone() for k, t in checkpoint.optimizer_tensors(optimizer, names).items()}
        return saved, [parameter.detach().cpu().clone() for parameter in conv.parameters()]

    whole, whole_weights = trained(range(5))
    resumed, resumed_weights = trained(range(2, 5), *trained(range(2)))
    assert_equal(resumed, whole)
    assert all(map(torch.equal, resumed_weights, whole_weights))
