"""Spacings and choices of timesteps: which K of its T timesteps a shorter chain visits.

References: DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502); Watson et al. 2021, "Learning to Efficiently
Sample from Diffusion Probabilistic Models" (https://arxiv.org/abs/2106.03802); Analytic-DPM (Bao et al. 2022,
https://arxiv.org/abs/2201.06503).
"""

from collections.abc import Callable, Sequence

import numpy as np


def _leading(steps: int, count: int) -> np.ndarray:
    return np.ceil(np.arange(count) * steps / count)


def _linspace(steps: int, count: int) -> np.ndarray:
    return np.linspace(0, steps - 1, count).round() if count > 1 else np.array([steps - 1])


def _trailing(steps: int, count: int) -> np.ndarray:
    # Rounding errors can make arange one longer than count.
    return np.round(np.arange(steps, 0, -steps / count)[:count])[::-1] - 1


TIMESTEP_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
}

FLAT = -6.0  # log SNR below which the variance of x_0 given x_t hardly changes any more


def log_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """log(ᾱ / (1 - ᾱ)), kept finite where nothing of the data is left."""
    return np.log(np.maximum(alpha_bar, 1e-12)) - np.log(1 - alpha_bar)


def interpolate_moments(moments: Sequence[tuple[int, float]], alpha_bar: np.ndarray) -> np.ndarray:
    """Interpolate pairs [t, value] to all T timesteps: linearly in log value over log SNR, constant outside the pairs.

    Raises:
        ValueError: values that are not positive, or timesteps that do not ascend within 0..T-1.
    """
    try:
        pairs = np.asarray(moments, dtype=np.float64)
    except (TypeError, ValueError):  # not numbers, or not in pairs
        pairs = np.empty(0)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.all(np.isfinite(pairs)) or np.any(pairs[:, 1] <= 0):
        raise ValueError(f"x_0_mse={moments!r} must be pairs [t, value] with positive values.")
    t = pairs[:, 0]
    if np.any(t != t.round()) or np.any(np.diff(t) <= 0) or t[0] < 0 or t[-1] >= len(alpha_bar):
        raise ValueError(f"x_0_mse: the timesteps {t.tolist()} must ascend within 0..{len(alpha_bar) - 1}.")
    noise = -log_snr(alpha_bar)
    return np.exp(np.interp(noise, noise[t.astype(int)], np.log(pairs[:, 1])))


def nearest_distinct(positions: np.ndarray, steps: int) -> np.ndarray:
    """Round ascending positions to strictly ascending whole numbers within 0..steps-1."""
    i = np.arange(len(positions))
    ascending = np.maximum.accumulate(positions.round() - i) + i
    return np.minimum(ascending, steps - len(positions) + i).astype(np.int64)


def _quadratic(alpha_bar: np.ndarray, variance: np.ndarray | None, count: int) -> np.ndarray:
    """t ∝ i²: DDIM, appendix D.2, stretched to reach T - 1."""
    last = len(alpha_bar) - 1
    return nearest_distinct(np.linspace(0, last**0.5, count) ** 2 if count > 1 else np.array([last]), last + 1)


def evenly_in_log_snr(alpha_bar: np.ndarray, variance: np.ndarray | None, count: int) -> np.ndarray:
    """Timesteps evenly spaced in log SNR, as far as x_t still tells something about x_0; and T - 1."""
    last = len(alpha_bar) - 1
    noise = -log_snr(alpha_bar)
    targets = np.linspace(noise[0], min(noise[-1], -FLAT), count - 1)
    return nearest_distinct(np.append(np.interp(targets, noise, np.arange(last + 1)), last), last + 1)


def bound_costs(alpha_bar: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats per dimension at [s, t] of [T, T]; infinite unless s < t.

    p has the variance σ² that is optimal for E‖x_0 - x̂_0‖² / d = variance, so that the divergence is ½ log(σ²/β̃)
    (Analytic-DPM theorem 3).
    """
    a_s, a_t = alpha_bar[:, None], alpha_bar[None, :]
    below = np.tri(len(alpha_bar), k=-1, dtype=bool).T
    one_minus_alpha = 1 - np.divide(a_t, a_s, out=np.zeros(below.shape), where=below)
    small = (1 - a_s) / (1 - a_t) * one_minus_alpha
    from_x_0 = a_s * (one_minus_alpha / (1 - a_t)) ** 2 * variance[None, :]
    return np.where(below, 0.5 * np.log1p(from_x_0 / small), np.inf)


def _likelihood(alpha_bar: np.ndarray, variance: np.ndarray | None, count: int) -> np.ndarray:
    """The chain of K timesteps from T - 1 to 0 with the least sum of costs, by dynamic programming (Watson et al.)."""
    assert variance is not None  # checked by the scheduler
    last = len(alpha_bar) - 1
    if count == 1:
        return np.array([last])
    costs = bound_costs(alpha_bar, variance)
    best = np.where(np.arange(last + 1) == 0, 0.0, np.inf)  # least cost of a chain of n timesteps from 0 up to t
    came_from = []
    for _ in range(count - 1):
        sums = best[:, None] + costs
        came_from.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    chain = [last]
    for origin in reversed(came_from):
        chain.append(int(origin[chain[-1]]))
    return np.array(chain[::-1])


TIMESTEP_CHOICES: dict[str, Callable[[np.ndarray, np.ndarray | None, int], np.ndarray]] = {
    "quadratic": _quadratic,
    "log_snr": evenly_in_log_snr,
    "likelihood": _likelihood,
}
