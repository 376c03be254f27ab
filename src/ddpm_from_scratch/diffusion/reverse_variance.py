"""The variance of p(x_s | x_t) by name, as a table of small functions.

Each function returns log σ². Its arguments are the log-variances of the posterior (small, β̃) and of the step (large,
β), whether the step is the last one (s = -1), and the network's values. At the last step β̃ is 0, and `small` is that
of the next step up the chain; DDPM uses it for fixed_large there too. iDDPM: Nichol, Dhariwal 2021,
https://arxiv.org/abs/2102.09672.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from .tensors import Coefficient, broadcast


def _small(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Coefficient:
    return small


def _large(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Coefficient:
    return np.where(last, small, large)


def _learned(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Tensor:
    return values


def _learned_range(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Tensor:
    """iDDPM eq. 15: v in [-1, 1] spans log β̃ to log β."""
    fraction = (values + 1) / 2
    return fraction * broadcast(large, values) + (1 - fraction) * broadcast(small, values)


REVERSE_LOG_VARIANCES: dict[str, Callable[..., Coefficient | Tensor]] = {
    "fixed_small": _small,
    "fixed_small_log": _small,
    "fixed_large": _large,
    "fixed_large_log": _large,
    "learned": _learned,
    "learned_range": _learned_range,
}
LEARNED_VARIANCES = ("learned", "learned_range")


def check_variance_values(variance_type: str, values: Tensor | None) -> None:
    """Raise ValueError if the variance is learned but the network has no output for it."""
    if variance_type in LEARNED_VARIANCES and values is None:
        raise ValueError(
            f"variance_type={variance_type!r} needs a network with twice the channels of its input, half of them for "
            "the variance. Use such a network, or variance_type='fixed_small' or 'fixed_large'."
        )
