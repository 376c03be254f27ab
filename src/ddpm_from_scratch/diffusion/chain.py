"""A sampling chain: the timesteps it visits, the pairs t -> s that they make, and the coefficients of each pair.

All of it lives on the host, timesteps as whole numbers and coefficients in float64.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tensors import Coefficient, is_entry
from .timesteps import TIMESTEP_CHOICES, TIMESTEP_SPACINGS

Timestep = int | Tensor
Index = np.ndarray  # timesteps as whole numbers: a scalar, or [B]


class Transition(NamedTuple):
    """A step t -> s of a chain. u is the timestep before t in the chain, or T if t is its first."""

    t: Index
    s: Index
    u: Index
    eta: float
    optimal: bool  # whether the reverse variance is the optimal one


class StepPlan(NamedTuple):
    """Coefficients of a step t -> s. They do not depend on the samples, so they are computed once."""

    transition: Transition
    signal: float  # √ᾱ_t
    sigma: float  # √(1 - ᾱ_t)
    on_x_0: float  # coefficients of the mean, see `posterior_coefficients`
    on_x_t: float
    noise: float | None  # standard deviation of p(x_s | x_t); 0 where none is drawn, None where the network gives it


def posterior_coefficients(
    a_t: Coefficient, a_s: Coefficient, eta: float
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """q(x_s | x_t, x_0) = N(on_x_0 x_0 + on_x_t x_t, variance I) between ᾱ_t and ᾱ_s: DDIM eqs. 7 and 16.

    The variance is η²β̃, but at most 1 - ᾱ_s, that of q(x_s | x_0): for η = ∞, x_s does not depend on x_t. The part of
    x_s's noise that is not newly drawn is the noise of x_t, scaled.
    """
    fresh = np.minimum(eta**2 * (1 - a_t / a_s) / (1 - a_t), 1)
    on_x_t = np.sqrt((1 - fresh) * (1 - a_s) / (1 - a_t))
    return np.sqrt(a_s) - on_x_t * np.sqrt(a_t), on_x_t, fresh * (1 - a_s)


def log_square(x: float) -> float:
    """log x², which is -∞ at 0."""
    return 2 * math.log(x) if x > 0 else -math.inf


def posterior_log_variance(alpha_bar: np.ndarray, step: Transition, eta: float = 1.0) -> Coefficient:
    """log of the variance of q(x_s | x_t, x_0), β̃ at η = 1.

    At s = -1, where β̃ is 0: that of u -> t, one step up the chain, as in DDPM and iDDPM.
    """
    last = step.s < 0
    a_t = alpha_bar[np.where(last, step.u, step.t)]
    a_s = alpha_bar[np.where(last, step.t, step.s)]
    # α is 0 where ᾱ_s is: pure noise (zero terminal SNR) stays pure noise.
    alpha = np.divide(a_t, a_s, out=np.zeros_like(a_t), where=a_s > 0)
    beta_tilde = np.log((1 - a_s) / (1 - a_t) * (1 - alpha))
    return np.minimum(beta_tilde + log_square(eta), np.log(1 - a_s))


class Chain:
    """The timesteps of a chain in descending order, with the next (s) and the previous one (u) of each t.

    Args:
        timesteps: [K], strictly descending within T-1..0.
        num_train_timesteps: T.
        eta: how much of the posterior's noise a step draws, at least 0; see `posterior_coefficients`.
        optimal: whether the reverse variance is the optimal one.
        device: where `timesteps` are kept for others to read.
    """

    def __init__(
        self,
        timesteps: np.ndarray,
        num_train_timesteps: int,
        eta: float,
        optimal: bool,
        device: str | torch.device | None = None,
    ) -> None:
        self.eta, self.optimal = float(eta), optimal
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)
        self._on_host = timesteps
        self._next = dict(itertools.pairwise([*timesteps.tolist(), -1]))
        self._above = np.full(num_train_timesteps, num_train_timesteps)
        self._above[timesteps[1:]] = timesteps[:-1]

    def transition(self, t: Index, s: Index) -> Transition:
        """The step t -> s, with the timestep before t in this chain and the chain's eta."""
        return Transition(t, s, self._above[t], self.eta, self.optimal)

    def previous(self, timestep: Timestep) -> tuple[int, int]:
        """(t, s) for a timestep t of the chain; s = -1 for its last one. Never waits for a device to read the value.

        Raises:
            ValueError: it is not one of them, or more than one.
        """
        t = self._one(timestep)
        if t not in self._next:
            raise ValueError(
                f"timestep {t} is not one of the {len(self._next)} in `timesteps`. Pass one of them, or choose others "
                "with set_timesteps."
            )
        return t, self._next[t]

    def _one(self, t: Timestep) -> int:
        if isinstance(t, Tensor) and t.device.type != "cpu" and is_entry(t, self.timesteps):
            # Its place is known without its value, for which the host would wait.
            return int(self._on_host[t.storage_offset()])
        if isinstance(t, Tensor) and t.device.type == "cpu" and t.ndim == 0:
            t = t.numpy().item()
        if type(t) is int and t in self._next:
            return t
        index = to_index(t, len(self._above))
        if np.ndim(index):
            raise ValueError(f"step takes one timestep for the whole batch, not {len(index)}.")
        return int(index)


def to_index(t: Timestep, steps: int, least: int = 0) -> Index:
    """Timesteps as a numpy array on the host; ValueError for values outside least..steps-1."""
    index = np.asarray(t.cpu() if isinstance(t, Tensor) else t)
    whole = np.issubdtype(index.dtype, np.integer)
    if not whole or index.size == 0 or index.min() < least or index.max() >= steps:
        raise ValueError(f"timestep {t!r} is not allowed: whole numbers from {least} to {steps - 1} are.")
    return index.reshape(()) if index.size == 1 else index.reshape(-1)


def spaced_timesteps(
    config: Mapping[str, Any], alpha_bar: np.ndarray, x_0_variance: np.ndarray | None, count: int
) -> np.ndarray:
    """The K timesteps of a chain, in descending order, by the configuration's `timestep_choice` or `timestep_spacing`.

    Args:
        config: of the scheduler.
        alpha_bar: [T].
        x_0_variance: [T] E‖x_0 - x̂_0‖² / d, for the choice "likelihood".
        count: K, from 1 to T.

    Raises:
        ValueError: an offset pushes the first timestep out of the range.
    """
    steps, offset, spacing = len(alpha_bar), config["steps_offset"], config["timestep_spacing"]
    if config["timestep_choice"] is not None:
        return TIMESTEP_CHOICES[config["timestep_choice"]](alpha_bar, x_0_variance, count)[::-1]
    chain = TIMESTEP_SPACINGS[spacing](steps, count) + (offset if spacing == "leading" else 0)
    if chain[-1] >= steps:
        raise ValueError(
            f"steps_offset={offset} with num_inference_steps={count} starts at timestep {int(chain[-1])}; the last "
            f"one is {steps - 1}. Take fewer steps, steps_offset=0 or timestep_spacing='trailing'."
        )
    return chain[::-1].astype(np.int64)


def listed_timesteps(timesteps: list[int], steps: int) -> np.ndarray:
    """The given timesteps as an array [K]; ValueError unless they descend strictly within steps-1..0."""
    chain = np.asarray(timesteps)
    if chain.ndim != 1 or len(chain) == 0 or not np.issubdtype(chain.dtype, np.integer):
        raise ValueError(f"timesteps={timesteps!r} must be a non-empty list of whole numbers.")
    if np.any(np.diff(chain) >= 0) or chain[0] >= steps or chain[-1] < 0:
        raise ValueError(f"timesteps={timesteps!r} must descend strictly within {steps - 1}..0.")
    return chain.astype(np.int64)
