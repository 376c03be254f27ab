"""The losses and the terms of the bound against the papers' formulas in numpy, term by term."""

import math

import numpy as np
import pytest
import torch

from ddpm_from_scratch.diffusion.scheduler import ScratchDDPMScheduler
from helpers import oracles
from helpers.oracles import grid_data, randn

T = 1000
ALL = torch.arange(T)
CHAIN = oracles.Chain(oracles.linear_betas())
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def make(**options):
    return ScratchDDPMScheduler(**{"clip_sample": False, **options})


def test_prior_kl_of_unit_data_is_2_9e_minus_5_bits_per_dimension():
    x_0 = torch.ones(2, 3, 4, 4)
    x_0[:, :, ::2] = -1
    for dtype in (torch.float32, torch.float64):
        bits = make().prior_kl(x_0.to(dtype)) / math.log(2)
        assert bits.shape == (2,)
        assert bits.tolist() == pytest.approx([2.91e-5] * 2, rel=2e-3)
    a = CHAIN.alpha_bar[-1]
    zero = make().prior_kl(torch.zeros(1, 3, dtype=torch.float64))
    assert zero.item() == pytest.approx(oracles.normal_kl(0, 1 - a, 0, 1), rel=1e-6)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_vlb_terms_equal_the_oracle_at_every_t(prediction_type, variance_type):
    """All T terms and the prior of one x_0, term by term and summed, in float64."""
    x_0 = grid_data(1, 3, 2)
    noise, error = randn(T, 3, 2), 0.3 * randn(T, 3, 2, seed=1)
    values = torch.tanh(randn(T, 3, 2, seed=2))
    column = (-1, 1, 1)
    signal, sigma = (np.sqrt(a).reshape(column) for a in (CHAIN.alpha_bar, 1 - CHAIN.alpha_bar))
    x_t = torch.from_numpy(signal * x_0.numpy() + sigma * noise.numpy())
    epsilon = (noise + error).numpy()
    predicted = (x_t.numpy() - sigma * epsilon) / signal
    output = {"epsilon": epsilon, "sample": predicted, "v_prediction": signal * epsilon - sigma * predicted}
    if variance_type == "learned":
        values = values + torch.from_numpy(np.log(CHAIN.beta)).reshape(column)

    on_x_0, on_x_t = CHAIN.on_x_0.reshape(column), CHAIN.on_x_t.reshape(column)
    log_variance = np.asarray(CHAIN.log_variance(variance_type, values.numpy()))
    log_variance = np.broadcast_to(
        log_variance.reshape(-1, 1, 1) if log_variance.ndim == 1 else log_variance, x_t.shape
    )
    mean = on_x_0 * predicted + on_x_t * x_t.numpy()
    true_mean = on_x_0 * x_0.numpy() + on_x_t * x_t.numpy()
    # β̃ of the first step is 0, where the term is the decoder's; the 1 only keeps the unused KL defined.
    true_variance = np.append(1.0, CHAIN.posterior_variance[1:]).reshape(column)
    expected = oracles.normal_kl(true_mean, true_variance, mean, np.exp(log_variance)).mean((1, 2))
    pairs = zip(x_0.flatten(), mean[0].flat, log_variance[0].flat, strict=True)
    expected[0] = np.mean([-oracles.log_bin_mass(float(x), m, v) for x, m, v in pairs])

    scheduler = make(prediction_type=prediction_type, variance_type=variance_type)
    model_output = torch.from_numpy(output[prediction_type])
    if "learned" in variance_type:
        model_output = torch.cat([model_output, values], dim=1)
    terms = scheduler.vlb_term(model_output, x_0.expand(T, -1, -1), x_t, ALL)
    np.testing.assert_allclose(terms.numpy(), expected, rtol=1e-7, atol=1e-12)
    assert scheduler.vlb_term(model_output[:1], x_0, x_t[:1], 0).item() == pytest.approx(expected[0], rel=1e-9)

    a = CHAIN.alpha_bar[-1]
    prior = oracles.normal_kl(math.sqrt(a) * x_0.numpy(), 1 - a, 0.0, 1.0).mean()
    total = terms.sum() + scheduler.prior_kl(x_0).sum()
    assert total.item() == pytest.approx(expected.sum() + prior, rel=1e-8)


def test_respaced_vlb_terms_equal_the_oracle():
    scheduler = make(variance_type="learned_range")
    scheduler.set_timesteps(20)
    t = scheduler.timesteps
    s = torch.cat([t[1:], torch.tensor([-1])])
    chain = CHAIN.respaced(t.numpy()[::-1])
    x_0, x_t, values = randn(20, 3), randn(20, 3, seed=1), torch.tanh(randn(20, 3, seed=2))
    epsilon = randn(20, 3, seed=3)
    a = chain.alpha_bar[::-1][:, None]
    predicted = (x_t.numpy() - np.sqrt(1 - a) * epsilon.numpy()) / np.sqrt(a)
    variance = np.exp(chain.log_variance("learned_range", values.numpy()[::-1])[::-1])
    difference = chain.on_x_0[::-1][:, None] * (predicted - x_0.numpy())
    expected = oracles.normal_kl(difference[:-1], chain.posterior_variance[::-1][:-1, None], 0.0, variance[:-1]).mean(1)
    ours = scheduler.vlb_term(torch.cat([epsilon, values], 1), x_0, x_t, t, s)
    np.testing.assert_allclose(ours.numpy()[:-1], expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("variance_type", "sigma_2"), [("fixed_small", CHAIN.posterior_variance), ("fixed_large", CHAIN.beta)]
)
def test_vlb_term_is_the_weighted_noise_error_plus_the_variance_mismatch(variance_type, sigma_2):
    """DDPM eq. 12: β²/(2σ²α(1-ᾱ)) ‖ε - ε̂‖², and ½(r - 1 - log r), r = β̃/σ²."""
    x_0, noise, epsilon = randn(T, 5), randn(T, 5, seed=1), randn(T, 5, seed=2)
    scheduler = make(variance_type=variance_type)
    terms = scheduler.vlb_term(epsilon, x_0, scheduler.add_noise(x_0, noise, ALL), ALL)[1:].numpy()
    sigma_2, beta, alpha, alpha_bar = (x[1:] for x in (sigma_2, CHAIN.beta, CHAIN.alpha, CHAIN.alpha_bar))
    weight = beta**2 / (2 * sigma_2 * alpha * (1 - alpha_bar))
    ratio = CHAIN.posterior_variance[1:] / sigma_2
    mismatch = 0.5 * (ratio - 1 - np.log(ratio))
    error = ((noise - epsilon) ** 2).mean(1).numpy()[1:]
    np.testing.assert_allclose(terms, weight * error + mismatch, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vlb_gradient_is_finite_at_every_t_even_for_a_bad_network(dtype):
    scheduler = ScratchDDPMScheduler(variance_type="learned_range")
    x_0 = grid_data(T, 2, 2).to(dtype)
    output = (50 * randn(T, 4, 2, seed=1)).to(dtype).clamp(-30, 30)
    output[:, 2:] = output[:, 2:].clamp(-3, 3)  # v may leave [-1, 1] in training
    output.requires_grad_()
    scheduler.vlb_term(output, x_0, scheduler.add_noise(x_0, randn(T, 2, 2, seed=2), ALL), ALL).sum().backward()
    assert torch.isfinite(output.grad).all()
    assert (output.grad[:, 2:] != 0).any()


def test_vlb_terms_in_float32_keep_their_digits():
    x_0, noise = grid_data(T, 16), randn(T, 16)
    output = torch.cat([noise + 0.1 * randn(T, 16, seed=1), torch.tanh(randn(T, 16, seed=2))], 1)
    scheduler = make(variance_type="learned_range")
    x_t = scheduler.add_noise(x_0, noise, ALL)
    exact = scheduler.vlb_term(output, x_0, x_t, ALL)
    rounded = scheduler.vlb_term(output.float(), x_0.float(), x_t.float(), ALL)
    torch.testing.assert_close(rounded.double(), exact, rtol=2e-2, atol=2e-6)
    assert rounded.sum().item() == pytest.approx(exact.sum().item(), rel=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_simple_loss_is_the_error_of_its_target(prediction_type):
    x_0, noise, output = (randn(T, 2, 3, seed=i) for i in range(3))
    signal, sigma = (np.sqrt(a).reshape(-1, 1, 1) for a in (CHAIN.alpha_bar, 1 - CHAIN.alpha_bar))
    target = {
        "epsilon": noise.numpy(),
        "sample": x_0.numpy(),
        "v_prediction": signal * noise.numpy() - sigma * x_0.numpy(),  # Salimans & Ho, section 4
    }[prediction_type]
    scheduler = make(prediction_type=prediction_type)
    np.testing.assert_allclose(scheduler.training_target(x_0, noise, ALL).numpy(), target, rtol=1e-10, atol=1e-12)
    loss = scheduler.simple_loss(output, x_0, noise, ALL)
    assert loss.shape == (T,)
    np.testing.assert_allclose(loss.numpy(), ((output.numpy() - target) ** 2).mean((1, 2)), rtol=1e-9)
    # A second half of channels, for the variance, takes no part.
    doubled = scheduler.simple_loss(torch.cat([output, output], 1), x_0, noise, ALL)
    torch.testing.assert_close(doubled, loss, rtol=0, atol=0)


def test_simple_losses_of_one_network_agree_in_x_0_space():
    """The error in x_0 is that of epsilon over the SNR, and that of v over SNR + 1 (Salimans & Ho, section 4)."""
    x_0, noise, predicted = (randn(T, 4, seed=i) for i in range(3))
    signal, sigma = (torch.from_numpy(np.sqrt(a))[:, None] for a in (CHAIN.alpha_bar, 1 - CHAIN.alpha_bar))
    x_t = signal * x_0 + sigma * noise
    epsilon = (x_t - signal * predicted) / sigma
    outputs = {"epsilon": epsilon, "sample": predicted, "v_prediction": signal * epsilon - sigma * predicted}
    snr = torch.from_numpy(CHAIN.alpha_bar / (1 - CHAIN.alpha_bar))
    losses = {kind: make(prediction_type=kind).simple_loss(outputs[kind], x_0, noise, ALL) for kind in outputs}
    torch.testing.assert_close(losses["epsilon"] / snr, losses["sample"], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses["v_prediction"] / (snr + 1), losses["sample"], rtol=1e-8, atol=0)
