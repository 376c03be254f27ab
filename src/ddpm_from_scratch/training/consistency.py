"""Consistency tuning: a trained network learns to jump from any x_t to the x_0 at the end of its path.

References, cited below by name:

- CM: Song, Dhariwal, Chen, Sutskever 2023, "Consistency Models", https://arxiv.org/abs/2303.01469
- iCT: Song, Dhariwal 2023, "Improved Techniques for Training Consistency Models", https://arxiv.org/abs/2310.14189
- ECT: Geng et al. 2024, "Consistency Models Made Easy", https://arxiv.org/abs/2406.14548

The consistency function f(x_t, t) is the network's x̂_0. At ᾱ = 1 it is x_t, as it must be, with every prediction type.
Noise is measured by σ_t = √((1 - ᾱ_t) / ᾱ_t), as in these papers, whose x is x_t / √ᾱ_t here.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.checks import check_positive, check_range
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import make_alpha_bar
from ..diffusion.stock import altered
from ..diffusion.tensors import as_tensor, broadcast, mean_of_sample, moved
from ..runtime.random_streams import generators_kept
from .objectives import UniformSampler, check_trains_variance

BEYOND = 0.1  # as a share of the limit: more than the network errs about a pixel of which it is sure
BFLOAT16_RATIO = 32  # the largest q at which neighbours differ by more than bfloat16 rounds


@dataclass(frozen=True)
class ConsistencyObjective:
    """‖f(x_t, t) - f(x_r, r)‖ / (σ_t - σ_r), with r < t on the same path and no gradient at r: ECT section 3.

    x_t and x_r have the same x_0 and the same noise. σ_r = σ_t (1 - n(σ_t) / q) with n(σ) = 1 + k sigmoid(-b σ); where
    that is not positive r is the data, and f there is x_0. The larger q, the closer r is to t: f is learned roughly
    from few and long jumps, then exactly.

    Where the sampler clips x̂_0, goals at a limit are put beyond it, by BEYOND √(1 - ᾱ_t). Of a goal at the limit itself
    the network says that, give or take an error, of which clipping keeps what lies inside: a black pixel turns to grey,
    more so at every t, since each learns from the one before.

    Args:
        scheduler: the process, and what the network predicts.
        q: of the first, second, ... part of the run; the parts are equally long.
        k: see n(σ).
        b: see n(σ).
        mean: of log σ_t.
        std: standard deviation of log σ_t, of which t has the distribution.
        sigma_max: σ that is noise and nothing else: where it is larger, t counts as T - 1. 80 in CM and ECT.
        huber_c: c of the pseudo-Huber norm √(‖x‖² / d + c²) - c over the d dimensions of an image: iCT eq. 7.

    Raises:
        ValueError: for a value that is not allowed, or a learned variance, which gets no gradient here.
    """

    scheduler: ScratchDDPMScheduler
    q: Sequence[float] = (4.0, 16.0, 64.0, 256.0)
    k: float = 8.0
    b: float = 1.0
    mean: float = -0.8
    std: float = 1.6
    sigma_max: float = 80.0
    huber_c: float = 0.00054
    ratio: float = field(init=False)  # q of the part of the run; see `at`
    _unlimited: ScratchDDPMScheduler = field(init=False, repr=False, compare=False)  # whose x̂_0 is not clipped
    _limit: float = field(init=False, repr=False, compare=False)  # of x̂_0
    _sigma: np.ndarray = field(init=False, repr=False, compare=False)  # [T], float64

    def __post_init__(self) -> None:
        """Check."""
        if len(self.q) == 0:
            raise ValueError("consistency_q is empty: give one number or more, such as 16 64.")
        for q in self.q:
            check_range("consistency_q", q, 1, math.inf)
        check_range("consistency_k", self.k, 0, math.inf)
        for name in ("b", "std", "sigma_max", "huber_c"):
            check_positive(f"consistency_{name}", getattr(self, name))
        check_range("consistency_mean", self.mean, -math.inf, math.inf)
        check_trains_variance("consistency", self.scheduler.variance_type)
        plain = {"clip_sample": False, "thresholding": False}
        object.__setattr__(self, "_unlimited", altered(self.scheduler, **plain))
        config = self.scheduler.config
        object.__setattr__(self, "_limit", config.clip_sample_range if config.clip_sample else math.inf)
        alpha_bar = make_alpha_bar(config)
        with np.errstate(divide="ignore"):
            sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
        object.__setattr__(self, "_sigma", np.minimum(sigma, self.sigma_max))
        object.__setattr__(self, "ratio", self.q[0])

    def at(self, progress: float) -> "ConsistencyObjective":
        """The objective when so much of the run is over, in [0, 1]."""
        now = copy.copy(self)  # the tables are shared
        object.__setattr__(now, "ratio", self.q[min(int(progress * len(self.q)), len(self.q) - 1)])
        return now

    def sampler(self) -> "LogNormalSampler":
        """What draws t."""
        return LogNormalSampler(self._sigma, self.mean, self.std)

    def earlier(self, t: np.ndarray) -> np.ndarray:
        """r for each t, [B]: the last timestep whose σ is at most σ_r, or -1 for the data."""
        sigma = self._sigma[t]
        wanted = sigma * (1 - (1 + self.k / (1 + np.exp(self.b * sigma))) / self.ratio)
        return np.minimum(np.searchsorted(self._sigma, wanted, side="right") - 1, t - 1)

    @torch.no_grad()
    def goal(self, network: Callable[..., Any], x_0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """f(x_r, r), limited as the sampler limits it, but put beyond a limit that it is at.

        The network drops the same there as in its next call.

        Args:
            network: as it is now; `.sample` of what it returns is the prediction.
            x_0: [B, C, ...] in [-1, 1].
            noise: of x_t.
            t: LongTensor [B] on the CPU.
            y: class labels [B], or None.
        """
        r = torch.from_numpy(self.earlier(t.numpy()))
        at = r.clamp(min=0)
        x_r = self.scheduler.add_noise(x_0, noise, at)
        with generators_kept(x_0.device):
            output = network(x_r, moved(at, x_0.device), class_labels=y).sample
        is_data = moved(r < 0, x_0.device).reshape(-1, *(1,) * (x_0.ndim - 1))
        goal = torch.where(is_data, x_0, self.scheduler.predict(output, x_r, at).x_0)
        sigma = self._sigma[t.numpy()]
        beyond = broadcast(1 + BEYOND * sigma / np.sqrt(1 + sigma**2), goal)  # √(1 - ᾱ_t): the reach of v
        return torch.where(goal.abs() >= self._limit, beyond * goal, goal)

    def __call__(self, model_output: Tensor, goal: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The loss of each image: [B].

        Args:
            model_output: [B, C, ...].
            goal: f(x_r, r), [B, C, ...].
            noise: not used; it has the place that it has in other objectives.
            x_t: √ᾱ_t x_0 + √(1 - ᾱ_t) ε.
            t: LongTensor [B] on the CPU.
        """
        squared = mean_of_sample((self._unlimited.predict(model_output, x_t, t).x_0 - goal) ** 2)
        norm = (squared + self.huber_c**2).sqrt() - self.huber_c
        r = self.earlier(t.numpy())
        distance = self._sigma[t.numpy()] - np.where(r < 0, 0, self._sigma[r])
        return norm * as_tensor(1 / distance, norm)


class LogNormalSampler(UniformSampler):
    """Timesteps whose log σ is normally distributed, kept within the chain: CM's σ, discrete as in iCT eq. 10.

    Args:
        sigma: [T], ascending up to a largest value, which t = T - 1 alone stands for.
        mean: of log σ.
        std: its standard deviation.
    """

    def __init__(self, sigma: np.ndarray, mean: float, std: float) -> None:
        super().__init__(len(sigma))
        below = int(np.searchsorted(sigma, sigma[-1]))  # the first with the largest σ
        log_sigma = np.log([*sigma[:below], sigma[-1]])
        edges = (log_sigma[1:] + log_sigma[:-1]) / 2
        self.timesteps = torch.tensor([*range(below), len(sigma) - 1])
        self.cumulative = torch.special.ndtr(torch.from_numpy((edges - mean) / std))  # the last one has the rest

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps at the quantiles u in [0, 1), float64, and weights, 1: long [B] and float64 [B]."""
        return self.timesteps[torch.searchsorted(self.cumulative, u.double(), right=True)], torch.ones_like(u)
