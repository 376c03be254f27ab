"""The whole sampler without training: for Gaussian data the exact noise predictor is known in closed form.

Errors of spacing, variance and coefficients all show in the mean and variance of what the chain makes. Both are carried
through the affine maps of `p_reverse` in float64, without sampling; one seeded run checks that `step` draws from them.
"""

import math

import numpy as np
import pytest
import torch

from ddpm_from_scratch.diffusion.scheduler import ScratchDDPMScheduler
from helpers import oracles

CHAIN = oracles.Chain(oracles.linear_betas())
DATA = oracles.GaussianData(mean=0.3, variance=0.25)
SPACINGS = ("leading", "linspace", "trailing")
COUNTS = (2, 5, 10, 50, 1000)


def network(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor, kind: str, prediction_type: str) -> torch.Tensor:
    """The exact prediction at x_t [B, 1]; under "learned", with the optimal log-variance beside it."""
    alpha_bar = torch.from_numpy(CHAIN.alpha_bar[t])[:, None]
    epsilon = DATA.epsilon(x, alpha_bar)
    x_0 = (x - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
    v = alpha_bar**0.5 * epsilon - (1 - alpha_bar) ** 0.5 * x_0
    output = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[prediction_type]
    if kind != "learned":
        return output
    # Var(x_s | x_t) = Var(x_s | x_t, x_0) + Var(E[x_s | x_t, x_0] | x_t), the law of total variance.
    a_t, a_s = CHAIN.alpha_bar[t], np.append(CHAIN.alpha_bar, 1.0)[s]
    on_x_0 = np.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)
    optimal = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s) + on_x_0**2 * DATA.x_0_variance(a_t)
    return torch.cat([output, torch.from_numpy(np.log(optimal))[:, None].expand_as(output)], dim=1)


def make(kind: str, spacing: str, count: int, prediction_type: str = "epsilon") -> ScratchDDPMScheduler:
    scheduler = ScratchDDPMScheduler(
        variance_type=kind, timestep_spacing=spacing, prediction_type=prediction_type, clip_sample=False
    )
    scheduler.set_timesteps(count)
    return scheduler


def propagate(scheduler: ScratchDDPMScheduler, prediction_type: str = "epsilon", prior: bool = False) -> np.ndarray:
    """[K + 1, 2]: mean and variance of x at the first timestep, ..., of x_0.

    They start from the marginal q(x_t) at the first timestep, or, if `prior`, from the N(0, 1) of sampling.
    """
    t = scheduler.timesteps
    s = torch.cat([t[1:], torch.tensor([-1])])
    zeros = torch.zeros(len(t), 1, dtype=torch.float64)
    kind = scheduler.config.variance_type
    at_0, at_1 = (scheduler.p_reverse(network(x, t, s, kind, prediction_type), x, t, s) for x in (zeros, zeros + 1))
    shift, slope = at_0.mean.flatten(), (at_1.mean - at_0.mean).flatten()
    noise = at_0.log_variance.expand_as(zeros).flatten().exp()
    noise[-1] = 0  # `step` adds none at s = -1
    mean, variance = (0.0, 1.0) if prior else DATA.marginal(CHAIN.alpha_bar[int(t[0])])
    moments = [(mean, variance)]
    for a, b, c in zip(shift.tolist(), slope.tolist(), noise.tolist(), strict=True):
        mean, variance = a + b * mean, b * b * variance + c
        moments.append((mean, variance))
    return np.array(moments)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_optimal_variance_gives_every_marginal_at_any_number_of_steps(prediction_type, count, spacing):
    scheduler = make("learned", spacing, count, prediction_type)
    moments = propagate(scheduler, prediction_type)
    alpha_bar = CHAIN.alpha_bar[scheduler.timesteps]
    np.testing.assert_allclose(moments[:-1], np.stack(DATA.marginal(alpha_bar), 1), rtol=1e-9)
    # The last step goes to E[x_0 | x_t]; what it lacks of the data's variance is Var(x_0 | x_t).
    mean, variance = moments[-1]
    assert mean == pytest.approx(DATA.mean, rel=1e-9)
    assert variance == pytest.approx(DATA.variance - DATA.x_0_variance(alpha_bar[-1]), rel=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_the_mean_is_right_under_any_variance(kind, count, spacing):
    scheduler = make(kind, spacing, count)
    expected = np.append(np.sqrt(CHAIN.alpha_bar[scheduler.timesteps]), 1.0) * DATA.mean
    np.testing.assert_allclose(propagate(scheduler)[:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_small_and_large_variance_miss_the_data_in_opposite_directions_and_converge(spacing):
    """β̃ is right for data that is a point, β for N(0, 1) (DDPM section 3.2); a variance of 1/4 lies between."""
    misses = {}
    for kind in ("fixed_small", "fixed_large"):
        for count in COUNTS:
            scheduler = make(kind, spacing, count)
            # At the last timestep of the chain, before the step that adds no noise.
            right = DATA.marginal(CHAIN.alpha_bar[int(scheduler.timesteps[-1])])[1]
            misses[kind, count] = propagate(scheduler)[-2, 1] / right - 1
    small, large = (np.array([misses[kind, count] for count in COUNTS]) for kind in ("fixed_small", "fixed_large"))
    assert (small < 0).all()
    assert (large > 0).all()
    # With more steps both come closer; few trailing ones also move the last timestep, so those are not compared.
    start = COUNTS.index(10) if spacing == "trailing" else 0
    assert (np.diff(np.abs(small[start:])) < 0).all()
    assert (np.diff(large[start:]) < 0).all()
    assert abs(small[-1]) < 0.02
    assert large[-1] < 0.02


@pytest.mark.parametrize("data_variance", [1e-12, 1.0])
def test_small_is_exact_for_a_point_and_large_for_unit_data(data_variance, monkeypatch):
    monkeypatch.setitem(globals(), "DATA", oracles.GaussianData(0.3 if data_variance < 1 else 0.0, data_variance))
    kind = "fixed_small" if data_variance < 1 else "fixed_large"
    for spacing in SPACINGS:
        scheduler = make(kind, spacing, 10)
        expected = DATA.marginal(CHAIN.alpha_bar[scheduler.timesteps])[1]
        np.testing.assert_allclose(propagate(scheduler)[:-1, 1], expected, rtol=1e-8)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned"])
def test_the_full_chain_makes_the_data_from_pure_noise(kind):
    mean, variance = propagate(make(kind, "leading", 1000), prior=True)[-1]
    assert mean == pytest.approx(DATA.mean, rel=3e-3)  # √ᾱ_T is 6e-3: the prior's small error of the mean
    assert variance == pytest.approx(DATA.variance, rel=2e-2)  # what β̃ and β still miss at 1000 steps
    # Stock's stride for 600 steps would start from pure noise at t = 599, where √ᾱ is 0.16.
    assert propagate(make(kind, "leading", 600), prior=True)[-1][0] == pytest.approx(DATA.mean, rel=3e-3)


@pytest.mark.parametrize(
    ("kind", "spacing"), [("fixed_small", "leading"), ("fixed_large", "linspace"), ("learned", "trailing")]
)
def test_step_draws_what_was_propagated(kind, spacing):
    """A Monte-Carlo run of the real loop against the moments above, within 5 standard errors."""
    number = 40_000
    scheduler = make(kind, spacing, 10)
    expected = propagate(scheduler, prior=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 1, generator=generator, dtype=torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        mean, variance = expected[i]
        assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / number))
        assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / number))
        s = scheduler.previous_timestep(t).expand(number)
        output = network(x, t.expand(number), s, kind, "epsilon")
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    mean, variance = expected[-1]
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / number))
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / number))


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned"])
def test_the_bound_equals_its_closed_form(kind):
    """The expected terms for Gaussian data, E over x_0 and x_t of eq. 5, by Gauss-Hermite quadrature and by algebra."""
    x_0, weight_0 = np.polynomial.hermite_e.hermegauss(6)
    grid = np.array(np.meshgrid(x_0, x_0)).reshape(2, -1)
    weight = np.outer(weight_0, weight_0).flatten() / (2 * math.pi)
    data, noise = (torch.from_numpy(g)[:, None] for g in (DATA.mean + math.sqrt(DATA.variance) * grid[0], grid[1]))
    scheduler = make(kind, "leading", 1000)
    for t in (1, 10, 300, 700, 999):
        at = torch.full((len(data),), t)
        x_t = scheduler.add_noise(data, noise, at)
        term = scheduler.vlb_term(network(x_t, at, at - 1, kind, "epsilon"), data, x_t, at)
        # E (x_0 - x̂_0)² = Var(x_0 | x_t): the KL's quadratic part in closed form.
        spread = CHAIN.on_x_0[t] ** 2 * DATA.x_0_variance(CHAIN.alpha_bar[t])
        small = CHAIN.posterior_variance[t]
        sigma_2 = {"fixed_small": small, "fixed_large": CHAIN.beta[t], "learned": small + spread}[kind]
        closed = 0.5 * (math.log(sigma_2 / small) + (small + spread) / sigma_2 - 1)
        assert float((torch.from_numpy(weight) * term).sum()) == pytest.approx(closed, rel=1e-7)
