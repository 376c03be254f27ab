"""Noise schedules: the betas of a chain, as a table of small functions in float64.

References: iDDPM (Nichol, Dhariwal 2021, https://arxiv.org/abs/2102.09672); Lin et al. 2023, "Common Diffusion Noise
Schedules and Sample Steps are Flawed" (https://arxiv.org/abs/2305.08891); Hang, Gu 2024, "Improved Noise Schedule for
Diffusion Training" (https://arxiv.org/abs/2407.03297).
"""

from collections.abc import Callable

import numpy as np


def _linear(start: float, end: float, steps: int) -> np.ndarray:
    return np.linspace(start, end, steps)


def _scaled_linear(start: float, end: float, steps: int) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def _sigmoid(start: float, end: float, steps: int) -> np.ndarray:
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))


def _cosine(start: float, end: float, steps: int) -> np.ndarray:
    """iDDPM eq. 17: ᾱ = f(u) / f(0), f(u) = cos²((u + 0.008) / 1.008 · π/2)."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return _betas_of(alpha_bar)


def _laplace(start: float, end: float, steps: int) -> np.ndarray:
    """log SNR = -½ sgn(½ - u) log(1 - 2 |½ - u|), kept finite at u = 1; ᾱ = SNR / (1 + SNR). Hang & Gu, table 1."""
    u = np.arange(1, steps + 1) / steps
    log_snr = -0.5 * np.copysign(1, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    return _betas_of(np.concatenate([[1.0], 1 / (1 + np.exp(-log_snr))]))


def _betas_of(alpha_bar: np.ndarray) -> np.ndarray:
    """Betas [T] from T + 1 values of ᾱ, of which the first is the data's; at most 0.999 (iDDPM section 3.2)."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETA_SCHEDULES: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
    "laplace": _laplace,
}


def rescale_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Lin et al., algorithm 1: shift and scale √ᾱ so that its last value is 0 and its first one stays."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 1 - (root / np.concatenate([[1.0], root[:-1]])) ** 2
