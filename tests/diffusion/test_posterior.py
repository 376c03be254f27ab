"""The forward process and its posterior against sympy, Gaussian conditioning and the closed forms of the papers."""

import math

import numpy as np
import pytest
import sympy
import torch
from diffusers import DDPMScheduler

from ddpm_from_scratch.diffusion.scheduler import ScratchDDPMScheduler
from helpers import oracles
from helpers.oracles import randn

T = 1000
ALL = torch.arange(T)
CHAIN = oracles.Chain(oracles.linear_betas())
SPACINGS = ("leading", "linspace", "trailing")


def make(**options):
    return ScratchDDPMScheduler(**{"clip_sample": False, **options})


def posterior_coefficients(scheduler, t, s=None):
    """[B] weights of x_0 and x_t in the posterior's mean, and its variance, read off q_posterior at unit inputs."""
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    on_x_0, on_x_t = scheduler.q_posterior(one, zero, t, s), scheduler.q_posterior(zero, one, t, s)
    variance = on_x_0.log_variance.exp().expand(len(t), 1)
    return tuple(x.squeeze(1).numpy() for x in (on_x_0.mean, on_x_t.mean, variance))


class Derivation:
    """Bayes' rule for q(x_s | x_t, x_0), with s the step below t, solved by completing the square in x_s.

    `second_square` is the coefficient of x_0 in the square of q(x_s | x_0); `on_x_0` replaces, if given, the
    coefficient of 2 x_0 x_s in the expanded exponent. Both are √ᾱ_s (/ (1 - ᾱ_s)) when derived.
    """

    x_s, x_t, x_0 = sympy.symbols("x_s x_t x_0", real=True)
    a_t, a_s = sympy.symbols("a_t a_s", positive=True)  # ᾱ_t and ᾱ_s
    alpha_s = sympy.symbols("alpha_s", positive=True)
    alpha = a_t / a_s
    beta = 1 - alpha

    def __init__(self, second_square=None, on_x_0=None) -> None:
        root_s = sympy.sqrt(self.a_s) if second_square is None else second_square
        squares = (
            (self.x_t - sympy.sqrt(self.alpha) * self.x_s) ** 2 / self.beta
            + (self.x_s - root_s * self.x_0) ** 2 / (1 - self.a_s)
            - (self.x_t - sympy.sqrt(self.a_t) * self.x_0) ** 2 / (1 - self.a_t)
        )
        polynomial = sympy.Poly(sympy.expand(squares), self.x_s)
        quadratic, linear, self.constant = polynomial.all_coeffs()
        if on_x_0 is not None:
            linear = linear - linear.coeff(self.x_0) * self.x_0 - 2 * on_x_0 * self.x_0
        self.variance = 1 / quadratic
        self.mean = -linear / (2 * quadratic)
        self.quadratic = quadratic

    def remainder(self):
        """What is left of the exponent once the square is completed: 0 for a correct one, as q is normalised."""
        return sympy.simplify(self.constant - self.quadratic * self.mean**2)

    def numbers(self, a_t, a_s, alpha_s=None):
        """Weights of x_0 and x_t in the mean, and the variance, as float64."""
        mean = sympy.expand(self.mean)
        parts = [mean.coeff(self.x_0), mean.coeff(self.x_t), self.variance]
        function = sympy.lambdify((self.a_t, self.a_s, self.alpha_s), parts, "numpy")
        return function(a_t, a_s, alpha_s)


# The seed article's first slip: the coefficient of x_0 has t where s belongs. Its second: α_s for ᾱ_s in the square.
FIRST_SLIP = {"on_x_0": sympy.sqrt(Derivation.a_t) / (1 - Derivation.a_t)}
SECOND_SLIP = {"second_square": sympy.sqrt(Derivation.alpha_s)}


def test_posterior_equals_its_symbolic_derivation_at_every_t():
    derived = Derivation()
    assert derived.remainder() == 0
    t = ALL[1:]  # index t = 0 is the paper's t = 1, where s is the data: 1 - ᾱ_s = 0
    expected = derived.numbers(CHAIN.alpha_bar[t], CHAIN.alpha_bar[t - 1])
    for ours, right in zip(posterior_coefficients(make(), t), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-8)  # 1 - ᾱ_t / ᾱ_s cancels at small t


def test_posterior_equals_its_symbolic_derivation_for_any_pair():
    generator = np.random.default_rng(0)
    pairs = np.sort(np.array([generator.choice(T, 2, replace=False) for _ in range(2000)]), axis=1)
    s, t = torch.from_numpy(pairs).unbind(1)
    expected = Derivation().numbers(CHAIN.alpha_bar[t], CHAIN.alpha_bar[s])
    for ours, right in zip(posterior_coefficients(make(), t, s), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9)


def test_derived_formulas_are_those_of_the_paper():
    d = Derivation()
    assert sympy.simplify(d.variance - (1 - d.a_s) / (1 - d.a_t) * d.beta) == 0
    mean = sympy.sqrt(d.a_s) * d.beta / (1 - d.a_t) * d.x_0 + sympy.sqrt(d.alpha) * (1 - d.a_s) / (1 - d.a_t) * d.x_t
    assert sympy.simplify(d.mean - mean) == 0


@pytest.mark.parametrize(("t", "error"), [(1, 0.297), (10, 0.0186), (500, 6.43e-5)])
def test_seed_article_first_slip_changes_the_posterior_mean(t, error):
    """Error of the mean at x_0 = 1 and x_t = √ᾱ_t, relative to the right one, √ᾱ_s; t is the index, the paper's t - 1.

    It shrinks with t: a test at one t in mid-schedule passes the slip.
    """
    a_t, a_s = CHAIN.alpha_bar[t], CHAIN.alpha_bar[t - 1]
    on_x_0, on_x_t, variance = Derivation(**FIRST_SLIP).numbers(a_t, a_s)
    wrong = on_x_0 + on_x_t * math.sqrt(a_t)
    assert 1 - wrong / math.sqrt(a_s) == pytest.approx(error, rel=5e-3)
    ours = [float(x[0]) for x in posterior_coefficients(make(), torch.tensor([t]))]
    assert ours[0] + ours[1] * math.sqrt(a_t) == pytest.approx(math.sqrt(a_s), rel=1e-12)
    assert ours[1:] == pytest.approx([on_x_t, variance])  # the slip is in the weight of x_0 alone


def test_seed_article_second_slip_does_not_normalise_and_changes_the_mean():
    slipped = Derivation(**SECOND_SLIP)
    assert slipped.remainder() != 0
    # At t = 1, α_s is ᾱ_s and the slip is hidden; from t = 2 on it grows.
    t = np.arange(1, T)
    a_t, a_s = CHAIN.alpha_bar[t], CHAIN.alpha_bar[t - 1]
    wrong, right = slipped.numbers(a_t, a_s, CHAIN.alpha[t - 1])[0], Derivation().numbers(a_t, a_s)[0]
    assert wrong[0] == pytest.approx(right[0])
    np.testing.assert_allclose(wrong / right, np.sqrt(CHAIN.alpha[t - 1] / a_s))
    assert wrong[500] / right[500] > 3


def random_pairs(number, seed=0):
    generator = np.random.default_rng(seed)
    t = generator.integers(0, T, number)
    return torch.from_numpy(generator.integers(-1, t)), torch.from_numpy(t)


def test_q_transition_is_one_step_from_s_to_t():
    alpha_bar = np.append(CHAIN.alpha_bar, 1.0)
    for s, t in ((ALL - 1, ALL), random_pairs(3000)):
        q = make().q_transition(torch.ones(len(t), 1, dtype=torch.float64), t, s)
        alpha = alpha_bar[t] / alpha_bar[s]
        np.testing.assert_allclose(q.mean.squeeze(1), np.sqrt(alpha), rtol=1e-11)
        np.testing.assert_allclose(q.log_variance.exp().flatten(), 1 - alpha, rtol=1e-8)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_posterior_carries_the_marginal_of_t_to_that_of_s(schedule):
    # If x_t ~ q(x_t | x_0), a draw from q(x_s | x_t, x_0) is one from q(x_s | x_0).
    chain = oracles.Chain(oracles.BETAS[schedule]())
    for s, t in ((ALL - 1, ALL), random_pairs(3000)):
        a_t, a_s = chain.alpha_bar[t], np.append(chain.alpha_bar, 1.0)[s]
        on_x_0, on_x_t, variance = posterior_coefficients(make(beta_schedule=schedule), t, s)
        np.testing.assert_allclose(on_x_0 + on_x_t * np.sqrt(a_t), np.sqrt(a_s), rtol=1e-10)
        inner = s.numpy() >= 0  # at s = -1 the variance is 0; see the tests of the log-variance
        np.testing.assert_allclose((on_x_t**2 * (1 - a_t) + variance)[inner], (1 - a_s)[inner], rtol=1e-9)
        np.testing.assert_allclose(on_x_t[~inner], 0, atol=1e-12)
        np.testing.assert_allclose(on_x_0[~inner], 1, rtol=1e-12)


def test_posterior_equals_conditioning_the_joint_gaussian():
    """Schur complement of the joint covariance of (x_s, x_t) given x_0, built by running the chain step by step."""
    steps = 60
    betas = oracles.linear_betas(steps, 1e-3, 0.2)
    scheduler = make(num_train_timesteps=steps, trained_betas=betas)
    # x_i = transfer[i] x_0 + loadings[i] @ (noise of step 0, noise of step 1, ...)
    transfer, loadings = np.zeros(steps), np.zeros((steps, steps))
    for i in range(steps):
        if i:
            transfer[i], loadings[i] = transfer[i - 1], loadings[i - 1]
        else:
            transfer[i] = 1
        transfer[i] *= math.sqrt(1 - betas[i])
        loadings[i] *= math.sqrt(1 - betas[i])
        loadings[i, i] = math.sqrt(betas[i])
    covariance = loadings @ loadings.T
    pairs = np.array([(s, t) for t in range(steps) for s in range(t)])
    s, t = pairs.T
    gain = covariance[s, t] / covariance[t, t]
    expected = transfer[s] - gain * transfer[t], gain, covariance[s, s] - gain * covariance[s, t]
    ours = posterior_coefficients(scheduler, torch.from_numpy(t), torch.from_numpy(s))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_q_marginal_equals_the_chain_of_single_steps():
    mean, variance = 1.0, 0.0
    scheduler = make()
    for t, beta in enumerate(oracles.linear_betas()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        q = scheduler.q_marginal(torch.tensor([[1.0]], dtype=torch.float64), t)
        assert q.mean.item() == pytest.approx(mean, rel=1e-11)
        assert q.log_variance.exp().item() == pytest.approx(variance, rel=1e-11)


def test_respaced_alphas_multiply_to_alpha_bar_of_the_first():
    for spacing in SPACINGS:
        scheduler = make(timestep_spacing=spacing)
        for count in (2, 3, 10, 61, 600, T):
            scheduler.set_timesteps(count)
            t, s = scheduler.timesteps[:-1], scheduler.timesteps[1:]
            _, on_x_t, _ = posterior_coefficients(scheduler, t, s)
            alpha = (on_x_t * (1 - CHAIN.alpha_bar[t]) / (1 - CHAIN.alpha_bar[s])) ** 2
            total = np.prod(alpha) * CHAIN.alpha_bar[int(s[-1])]
            assert total == pytest.approx(CHAIN.alpha_bar[int(t[0])], rel=1e-9)


# --- forward process -----------------------------------------------------------------------------------------------


def test_add_noise_and_velocity_equal_their_definitions_and_stock():
    x_0, noise = randn(T, 2, 3), randn(T, 2, 3, seed=1)
    signal, sigma = (np.sqrt(a).reshape(-1, 1, 1) for a in (CHAIN.alpha_bar, 1 - CHAIN.alpha_bar))
    ours, stock = ScratchDDPMScheduler(), DDPMScheduler()
    for name, expected in (
        ("add_noise", signal * x_0.numpy() + sigma * noise.numpy()),
        ("get_velocity", signal * noise.numpy() - sigma * x_0.numpy()),
    ):
        result = getattr(ours, name)(x_0, noise, ALL)
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result, getattr(stock, name)(x_0, noise, ALL), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_add_noise_has_the_right_noise_at_every_t(dtype):
    noise = randn(T, 2048, dtype=torch.float32)

    def deviations(scheduler, noise):
        """[T] the share of the noise in its output at x_0 = 0, by projection: roundings average out."""
        noisy = scheduler.add_noise(torch.zeros_like(noise, dtype=dtype), noise, ALL).double()
        return ((noisy * noise.double()).sum(1) / (noise.double() ** 2).sum(1)).numpy()

    exact = np.sqrt(1 - CHAIN.alpha_bar)
    ours = deviations(ScratchDDPMScheduler(), noise)
    assert (ours > 0).all()
    assert np.abs(ours / exact - 1).max() < 1e-3
    # Noise that is rounded already is rounded back when it shrinks by less than half a unit in the last place.
    ours = deviations(ScratchDDPMScheduler(), noise.to(dtype))
    assert np.abs(ours / exact - 1).max() < torch.finfo(dtype).eps / 4 + 1e-4
    stock = deviations(DDPMScheduler(), noise.to(dtype))
    assert (stock == 0).sum() == {torch.float16: 2, torch.bfloat16: 10}[dtype]
    if dtype == torch.bfloat16:
        assert (np.abs(stock / exact - 1) > 0.1).sum() == 19
