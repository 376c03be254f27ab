"""What the tests compare with: the papers' formulas in float64 numpy, written apart from the package.

They are written as the papers have them, for adjacent steps and with betas; a respaced chain is the adjacent chain of
its own betas (iDDPM section 4). Arrays run over the timesteps in ascending order, the paper's t = 1 first.
"""

import itertools
import math

import mpmath
import numpy as np
import torch
from torch import Tensor

# --- schedules -----------------------------------------------------------------------------------------------------


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    return np.array([start + (end - start) * i / max(steps - 1, 1) for i in range(steps)])


def scaled_linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    return linear_betas(steps, math.sqrt(start), math.sqrt(end)) ** 2


def sigmoid_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    return np.array([start + (end - start) * (1 + math.tanh(z / 2)) / 2 for z in linear_betas(steps, -6, 6)])


def cosine_betas(steps: int = 1000) -> np.ndarray:
    """iDDPM eq. 17 and the cap of section 3.2."""

    def f(i: int) -> float:
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - f(i + 1) / f(i), 0.999) for i in range(steps)])


def laplace_log_snr(steps: int = 1000) -> np.ndarray:
    """Hang & Gu, table 1, with μ = 0 and b = 1/2: λ = -b sgn(½ - u) log(1 - 2 |½ - u|), kept finite at u = 1."""
    u = (np.arange(steps) + 1) / steps
    return -0.5 * np.where(u <= 0.5, 1, -1) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)


def laplace_betas(steps: int = 1000) -> np.ndarray:
    alpha_bar = np.append(1.0, 1 / (1 + np.exp(-laplace_log_snr(steps))))
    return np.array([min(1 - b / a, 0.999) for a, b in itertools.pairwise(alpha_bar)])


BETAS = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "sigmoid": sigmoid_betas,
    "squaredcos_cap_v2": cosine_betas,
    "laplace": laplace_betas,
}

# --- the chain -----------------------------------------------------------------------------------------------------


class Chain:
    """The tables of DDPM section 2 for a sequence of betas."""

    def __init__(self, betas: np.ndarray) -> None:
        self.beta = betas
        self.alpha = 1 - betas
        self.alpha_bar = np.array([math.prod(self.alpha[: i + 1]) for i in range(len(betas))])
        self.alpha_bar_prev = np.append(1.0, self.alpha_bar[:-1])
        # Eq. 7.
        self.posterior_variance = (1 - self.alpha_bar_prev) / (1 - self.alpha_bar) * betas
        self.on_x_0 = np.sqrt(self.alpha_bar_prev) * betas / (1 - self.alpha_bar)
        self.on_x_t = np.sqrt(self.alpha) * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        # The first entry, log 0, is replaced by the second, as Ho and Nichol do. A chain of one step takes the step
        # above it to start from pure noise, ᾱ = 0, whose posterior variance is 1 - ᾱ_t.
        above = self.posterior_variance[1] if len(betas) > 1 else 1 - self.alpha_bar[0]
        self.small = np.log(np.append(above, self.posterior_variance[1:]))
        # Ho's fixedlarge: β, and at the first step the posterior variance of the second.
        self.large = np.log(np.append(above, betas[1:]))

    def log_variance(self, kind: str, values: np.ndarray | None = None) -> np.ndarray:
        """[K], or [K, ...] with the network's values, of p(x_{t-1} | x_t)."""
        if kind.startswith("fixed_small"):
            return self.small
        if kind.startswith("fixed_large"):
            return self.large
        if kind == "learned":
            return values
        shape = (-1,) + (1,) * (values.ndim - 1)
        small, beta = self.small.reshape(shape), np.log(self.beta).reshape(shape)
        return (values + 1) / 2 * beta + (1 - values) / 2 * small  # iDDPM eq. 15

    def respaced(self, timesteps: np.ndarray) -> "Chain":
        """iDDPM section 4: the betas that keep ᾱ at the chosen timesteps, ascending."""
        alpha_bar = np.append(1.0, self.alpha_bar[timesteps])
        return Chain(1 - alpha_bar[1:] / alpha_bar[:-1])


# --- Gaussians -----------------------------------------------------------------------------------------------------


def normal_kl(mean_1: np.ndarray, variance_1: np.ndarray, mean_2: np.ndarray, variance_2: np.ndarray) -> np.ndarray:
    return 0.5 * (np.log(variance_2 / variance_1) + (variance_1 + (mean_1 - mean_2) ** 2) / variance_2 - 1)


def log_bin_mass(x: float, mean: float, log_variance: float) -> float:
    """DDPM eq. 13 for one element, in 60 digits: log of the mass of x's bin on the grid k / 127.5 - 1."""
    with mpmath.workdps(60):
        k = round((x + 1) * 127.5)
        deviation = mpmath.exp(mpmath.mpf(log_variance) / 2)

        def z(edge: float) -> mpmath.mpf:
            return (edge - mpmath.mpf(mean)) / deviation

        lower = -mpmath.inf if k == 0 else z((mpmath.mpf(2 * k) - 1) / 255 - 1)
        upper = mpmath.inf if k == 255 else z((mpmath.mpf(2 * k) + 1) / 255 - 1)
        if lower > 0:  # in the upper tail, differences of erfc keep their digits
            lower, upper = -upper, -lower
        mass = (mpmath.erfc(-upper / mpmath.sqrt(2)) - mpmath.erfc(-lower / mpmath.sqrt(2))) / 2
        return float(mpmath.log(mass))


class GaussianData:
    """x_0 ~ N(mean, variance): the marginal of every x_t and the exact noise predictor are known."""

    def __init__(self, mean: float, variance: float) -> None:
        self.mean, self.variance = mean, variance

    def marginal(self, alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of q(x_t)."""
        return np.sqrt(alpha_bar) * self.mean, alpha_bar * self.variance + 1 - alpha_bar

    def x_0_variance(self, alpha_bar: np.ndarray) -> np.ndarray:
        """Var(x_0 | x_t): x_0 and x_t are jointly Gaussian with covariance √ᾱ s²."""
        return self.variance * (1 - alpha_bar) / self.marginal(alpha_bar)[1]

    def epsilon(self, x_t: Tensor, alpha_bar: float | Tensor) -> Tensor:
        """E[ε | x_t]: ε and x_t are jointly Gaussian with covariance √(1 - ᾱ)."""
        variance = alpha_bar * self.variance + 1 - alpha_bar
        return (1 - alpha_bar) ** 0.5 * (x_t - alpha_bar**0.5 * self.mean) / variance


class MixtureData:
    """x_0 from a mixture of Gaussians: everything about x_t is again a mixture."""

    def __init__(self, weights: tuple, means: tuple, deviations: tuple) -> None:
        self.weights, self.means = np.array(weights), np.array(means)
        self.variances = np.array(deviations) ** 2
        self.mean = float(self.weights @ self.means)
        self.variance = float(self.weights @ (self.variances + self.means**2) - self.mean**2)

    def x_0_moments(self, x_t: np.ndarray, alpha_bar: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Density of x_t, and mean and variance of x_0 given it."""
        x = x_t[..., None]
        marginal = alpha_bar * self.variances + 1 - alpha_bar
        log_joint = np.log(self.weights / np.sqrt(marginal)) - (x - alpha_bar**0.5 * self.means) ** 2 / (2 * marginal)
        density = np.exp(log_joint).sum(-1)
        share = np.exp(log_joint - log_joint.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        gain = alpha_bar**0.5 * self.variances / marginal
        mean = self.means + gain * (x - alpha_bar**0.5 * self.means)
        variance = self.variances * (1 - alpha_bar) / marginal
        total = (share * mean).sum(-1)
        return density, total, (share * (variance + mean**2)).sum(-1) - total**2

    def epsilon(self, x_t: Tensor, alpha_bar: float) -> Tensor:
        """E[ε | x_t]."""
        x_0 = torch.from_numpy(self.x_0_moments(x_t.numpy(), alpha_bar)[1])
        return (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5

    def x_0_variance(self, alpha_bar: np.ndarray) -> np.ndarray:
        """E[Var(x_0 | x_t)], by quadrature over x_t."""
        grid = np.linspace(-6, 6, 4001)
        moments = [self.x_0_moments(grid, a) for a in np.asarray(alpha_bar)]
        return np.array([(density * variance).sum() / density.sum() for density, _, variance in moments])


# --- a network without weights --------------------------------------------------------------------------------------


def analytic_network(x: Tensor, t: int, alpha_bar: np.ndarray, prediction_type: str, doubled: bool = False) -> Tensor:
    """A smooth stand-in for a trained network; its x_0 leaves [-1, 1] often enough for clipping to matter.

    doubled appends v of a learned range as a second half of channels.
    """
    x_0 = 1.2 * torch.tanh(1.3 * x + 0.1 * t / 1000)
    signal, sigma = math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t])
    epsilon = (x - signal * x_0) / sigma
    output = {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - sigma * x_0}[prediction_type]
    return torch.cat([output, torch.sin(3 * x)], dim=1) if doubled else output


# --- seeded inputs ---------------------------------------------------------------------------------------------------


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid_data(*shape, seed=0):
    """8-bit images as floats in [-1, 1]."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).double() / 127.5 - 1


# --- the bound ------------------------------------------------------------------------------------------------------


def bound(
    chain: Chain,
    network,
    x_0: np.ndarray,
    noise: np.ndarray,
    *,
    variance_type: str,
    prediction_type: str,
    clip: float | None,
    x_0_variance: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """DDPM eq. 5 for images [B, C, ...] and one noise for each step, [K, B, C, ...]: L_T [B] and L_0.. [B, K].

    In bits per dimension. network(x_t, k) is the output at the chain's place k; clip is the range of x_0. With
    E (x_0 - x̂_0)² at each step, x_0_variance, the variance is that of Analytic-DPM.
    """
    axes = tuple(range(1, x_0.ndim))
    bits = 1 / math.log(2)
    top = chain.alpha_bar[-1]
    prior = normal_kl(np.sqrt(top) * x_0, 1 - top, np.zeros_like(x_0), 1.0).mean(axes) * bits
    terms = np.empty((len(x_0), len(noise)))
    for k, epsilon in enumerate(noise):
        signal, sigma = np.sqrt(chain.alpha_bar[k]), np.sqrt(1 - chain.alpha_bar[k])
        x_t = signal * x_0 + sigma * epsilon  # eq. 4
        output = network(x_t, k)
        output, values = output[:, : x_0.shape[1]], output[:, x_0.shape[1] :]
        if prediction_type == "epsilon":
            predicted = (x_t - sigma * output) / signal  # eq. 15
        elif prediction_type == "sample":
            predicted = output
        else:
            predicted = signal * x_t - sigma * output
        if clip is not None:
            predicted = np.clip(predicted, -clip, clip)
        if x_0_variance is not None:
            log_variance = np.log(analytic_variance(chain, k, x_0_variance[k]))
        else:
            log_variance = chain.log_variance(variance_type, np.broadcast_to(values, (len(noise), *values.shape)))[k]
        mean = chain.on_x_0[k] * predicted + chain.on_x_t[k] * x_t  # eq. 7
        if k == 0:
            mass = np.vectorize(log_bin_mass)(x_0, mean, log_variance)  # eq. 13
            terms[:, k] = -mass.mean(axes) * bits
        else:
            right = chain.on_x_0[k] * x_0 + chain.on_x_t[k] * x_t
            kl = normal_kl(right, chain.posterior_variance[k], mean, np.exp(log_variance))
            terms[:, k] = kl.mean(axes) * bits
    return prior, terms


def analytic_variance(chain: Chain, k: int, x_0_variance: float) -> float:
    """Analytic-DPM eq. 11, with E‖ε̂‖² / d of an exact network, which is 1 - x_0_variance ᾱ / (1 - ᾱ)."""
    a_t, a_s, lam = chain.alpha_bar[k], chain.alpha_bar_prev[k], chain.posterior_variance[k]
    root = math.sqrt((1 - a_t) / chain.alpha[k]) - math.sqrt(max(1 - a_s - lam, 0))
    return lam + root**2 * x_0_variance * a_t / (1 - a_t)
