"""The Gaussian type against torch.distributions, 60-digit arithmetic and its own sums."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_from_scratch.diffusion.gaussian import Gaussian
from helpers import oracles

GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def gaussian(mean, log_variance, dtype=torch.float64) -> Gaussian:
    return Gaussian(torch.as_tensor(mean, dtype=dtype), torch.as_tensor(log_variance, dtype=dtype))


def test_kl_equals_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean_1, mean_2, log_1, log_2 = (3 * torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(4))
    expected = kl_divergence(Normal(mean_1, torch.exp(log_1 / 2)), Normal(mean_2, torch.exp(log_2 / 2)))
    ours = Gaussian(mean_1, log_1).kl(Gaussian(mean_2, log_2))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert torch.all(Gaussian(mean_1, log_1).kl(Gaussian(mean_1, log_1)) == 0)


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 1e-4, -1e-4])
def test_kl_of_close_gaussians_keeps_its_digits_in_float32(difference):
    # exp(d) - 1 - d is about d²/2, below float32's resolution of exp(d).
    low = gaussian(0.0, -2.0 + difference, torch.float32).kl(gaussian(0.0, -2.0, torch.float32))
    d = float(np.float32(-2.0 + difference) - np.float32(-2.0))
    assert float(low) == pytest.approx((math.expm1(d) - d) / 2, abs=1e-11, rel=1e-3)


def test_kl_broadcasts_the_variance_and_is_per_element():
    p = Gaussian(torch.zeros(4, 3, 2, 2), torch.zeros(4, 1, 1, 1))
    q = Gaussian(torch.ones(4, 3, 2, 2), torch.tensor(0.0))
    torch.testing.assert_close(p.kl(q), torch.full((4, 3, 2, 2), 0.5))


@pytest.mark.parametrize("log_variance", [-12.0, -9.0, -5.0, 0.0, 3.0])
@pytest.mark.parametrize("mean", [-1.7, -1.0, -0.9921, -0.3, 0.0, 0.5, 0.998, 1.0, 4.0])
def test_the_256_bins_sum_to_one(mean, log_variance):
    log_prob = gaussian(mean, log_variance).discretized_log_prob(GRID)
    assert float(torch.logsumexp(log_prob, 0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("log_variance", [-14.0, -9.2, -4.0, 0.0, 2.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.5, 1e-3, 0.7, 1.0, 2.5])
def test_bin_mass_equals_60_digit_arithmetic(mean, log_variance):
    # Reaches about 2700 standard deviations: log-probabilities of minus millions.
    xs = GRID[[0, 1, 64, 127, 128, 200, 254, 255]]
    expected = [oracles.log_bin_mass(float(x), mean, log_variance) for x in xs]
    ours = gaussian(mean, log_variance).discretized_log_prob(xs)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)
    float32 = gaussian(mean, log_variance, torch.float32).discretized_log_prob(xs.float())
    np.testing.assert_allclose(float32.numpy(), expected, rtol=2e-3, atol=2e-4)


def test_the_exact_distribution_function_is_used():
    # The usual tanh approximation of the normal distribution function is off by up to 1.8e-4.
    def approximate(z: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    x = GRID[1:-1].numpy()
    deviation = 0.5
    tanh_mass = approximate((x + 1 / 255) / deviation) - approximate((x - 1 / 255) / deviation)
    mass = gaussian(0.0, 2 * math.log(deviation)).discretized_log_prob(GRID[1:-1]).exp().numpy()
    exact = np.array([math.exp(oracles.log_bin_mass(float(v), 0.0, 2 * math.log(deviation))) for v in x])
    assert np.abs(mass - exact).max() < 1e-15
    assert np.abs(np.cumsum(tanh_mass) - np.cumsum(exact)).max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_everywhere(dtype):
    means = torch.linspace(-30, 30, 61, dtype=dtype)[:, None, None].expand(61, 5, 256)
    log_variances = torch.tensor([-20.0, -12.0, -6.0, 0.0, 4.0], dtype=dtype)[:, None].expand(61, 5, 256)
    means, log_variances = (x.clone().requires_grad_() for x in (means, log_variances))
    log_prob = Gaussian(means, log_variances).discretized_log_prob(GRID.to(dtype))
    assert torch.isfinite(log_prob).all()
    log_prob.sum().backward()
    assert torch.isfinite(means.grad).all()
    assert torch.isfinite(log_variances.grad).all()


@pytest.mark.parametrize("deviations", [10.0, 300.0, 1e3, 1e4, 1e5])
def test_gradient_keeps_its_digits_in_the_far_tail(deviations):
    # log Φ(z) falls as -z²/2, so the gradient in the mean is the distance of the nearer edge over the variance.
    # float32 autograd of torch.special.log_ndtr is 4 % off at 1e3 deviations and 0 at 1e6.
    mean = torch.tensor(-0.5 - 1 / 255, requires_grad=True)
    deviation = 0.5 / deviations
    x = torch.tensor(127 / 127.5 - 1)  # its nearer edge is at about 0 - 2/255
    Gaussian(mean, torch.tensor(2 * math.log(deviation))).discretized_log_prob(x).backward()
    distance = float(x) - 1 / 255 - float(mean.detach())
    assert float(mean.grad) == pytest.approx(distance / deviation**2, rel=0.02 if deviations == 10 else 1e-3)


def test_gradients_equal_finite_differences():
    mean = torch.tensor([-0.9, 0.0, 0.31, 0.999], dtype=torch.float64, requires_grad=True)
    log_variance = torch.tensor([-6.0, -2.0, -8.0, -7.0], dtype=torch.float64, requires_grad=True)
    x = GRID[[0, 100, 170, 255]]
    assert torch.autograd.gradcheck(lambda m, v: Gaussian(m, v).discretized_log_prob(x), (mean, log_variance))


def test_sample_has_its_mean_and_standard_deviation():
    generator = torch.Generator().manual_seed(0)
    draws = gaussian(torch.full((100_000,), 3.0), -2.0).sample(generator)
    deviation = math.exp(-1)
    assert draws.mean() == pytest.approx(3, abs=5 * deviation / math.sqrt(1e5))
    assert draws.std() == pytest.approx(deviation, rel=5 / math.sqrt(2e5))


def test_sample_draws_the_noise_in_the_dtype_asked_for():
    p = Gaussian(torch.zeros(4, 5), torch.tensor(0.0))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=dtype)
        drawn = p.sample(torch.Generator().manual_seed(3), dtype=dtype)
        torch.testing.assert_close(drawn, noise.to(drawn.dtype), rtol=0, atol=0)
