"""Training objectives: L_simple and its weightings, the bound itself, and both together for learned variances.

References, cited below by name:

- DDPM: Ho, Jain, Abbeel 2020, https://arxiv.org/abs/2006.11239
- iDDPM: Nichol, Dhariwal 2021, https://arxiv.org/abs/2102.09672
- P2: Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", https://arxiv.org/abs/2204.00227
- min-SNR: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting", https://arxiv.org/abs/2303.09556

A weighting is a function of SNR = ᾱ / (1 - ᾱ), by which ‖x_0 - x̂_0‖² is multiplied. So it means the same whatever the
network predicts: ‖ε - ε̂‖² = SNR ‖x_0 - x̂_0‖², ‖v - v̂‖² = (SNR + 1) ‖x_0 - x̂_0‖².
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.checks import check_choice, check_positive, check_range
from ..diffusion.reverse_variance import LEARNED_VARIANCES
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import make_alpha_bar
from ..diffusion.stock import altered
from ..diffusion.tensors import as_tensor

LOSSES = ("simple", "vlb", "hybrid", "consistency")  # the last is `consistency.py`
BOUND_LOSSES = ("vlb", "hybrid")

# ‖target error‖² / ‖x_0 - x̂_0‖², by what the network predicts.
PER_X_0_ERROR: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "epsilon": lambda snr: snr,
    "sample": np.ones_like,
    "v_prediction": lambda snr: snr + 1,
}

# Weights of ‖x_0 - x̂_0‖². "target" is not here: it leaves the error of what the network predicts as it is.
WEIGHTINGS: dict[str, Callable[[np.ndarray, "Objective"], np.ndarray]] = {
    "epsilon": lambda snr, o: snr,  # L_simple, DDPM eq. 14
    "min_snr": lambda snr, o: np.minimum(snr, o.snr_gamma),  # min-SNR section 3.4
    "p2": lambda snr, o: snr / (o.p2_k + snr) ** o.p2_gamma,  # P2 eq. 8
}
LOSS_WEIGHTINGS = ("target", *WEIGHTINGS)

HISTORY = 10  # losses of each timestep that importance sampling remembers: iDDPM section 3.3
UNIFORM_SHARE = 0.001  # of the draws, so that no weight is unbounded; as in the code of iDDPM


@dataclass(frozen=True)
class Objective:
    """The training loss of each image of a batch.

    - "simple": the squared error of the training target, weighted by `weighting` ("target": not at all, which for
      epsilon is L_simple, DDPM eq. 14).
    - "vlb": L_vlb, iDDPM eq. 4, in bits per dimension: T times the term at t, so that its mean over a uniform t is the
      bound without its constant L_T.
    - "hybrid": L_simple + vlb_weight L_vlb, iDDPM eq. 16, where the second term trains the variance alone: the mean is
      detached in it. Needs a learned variance.

    The bound is that of the network as it is: x̂_0 is not clipped here, since a clipped value has no gradient, and the
    variance is that of `variance_type`, since second moments are those of the network as it was.

    Args:
        scheduler: the process, the prediction type and the variance.
        loss: one of LOSSES, but not "consistency".
        weighting: one of LOSS_WEIGHTINGS, of the simple loss.
        snr_gamma: γ of min-SNR.
        p2_gamma: γ of P2.
        p2_k: k of P2.
        vlb_weight: λ of the hybrid loss.

    Raises:
        ValueError: for a value that is not allowed, a loss that cannot train the scheduler's variance, or the bound at
            eta = 0, where it is infinite.
    """

    scheduler: ScratchDDPMScheduler
    loss: str = "simple"
    weighting: str = "target"
    snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    vlb_weight: float = 0.001
    _plain: ScratchDDPMScheduler = field(init=False, repr=False, compare=False)  # for the bound
    _snr: np.ndarray = field(init=False, repr=False, compare=False)  # [T], float64

    def __post_init__(self) -> None:
        """Check."""
        check_choice("loss", self.loss, ("simple", *BOUND_LOSSES))
        check_choice("weighting", self.weighting, LOSS_WEIGHTINGS)
        for name in ("snr_gamma", "p2_k", "vlb_weight"):
            check_positive(name, getattr(self, name))
        check_range("p2_gamma", self.p2_gamma, 0, math.inf)
        check_trains_variance(self.loss, self.scheduler.variance_type)
        if self.loss == "vlb" and self.weighting != "target":
            raise ValueError(f"weighting={self.weighting!r} is for the simple loss; the bound has weights of its own.")
        if self.loss != "simple" and self.scheduler.config["eta"] == 0:
            raise ValueError(f"loss={self.loss!r} is infinite at eta=0: pass a scheduler with eta=1.0.")
        plain = {"clip_sample": False, "thresholding": False, "optimal_variance": False}
        object.__setattr__(self, "_plain", altered(self.scheduler, **plain))
        alpha_bar = make_alpha_bar(self.scheduler.config)
        object.__setattr__(self, "_snr", alpha_bar / (1 - alpha_bar))

    def at(self, progress: float) -> "Objective":
        """The objective when so much of the run is over: always the same."""
        return self

    def goal(self, network: Callable[..., Any], x_0: Tensor, noise: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """What the network's x̂_0 is compared with: the data."""
        return x_0

    def __call__(self, model_output: Tensor, x_0: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The loss of each image: [B].

        Args:
            model_output: [B, C, ...], or [B, 2 C, ...] with a learned variance.
            x_0: [B, C, ...] in [-1, 1]; on the grid k / 127.5 - 1 where the bound is part of the loss.
            noise: the ε in x_t.
            x_t: √ᾱ_t x_0 + √(1 - ᾱ_t) ε.
            t: LongTensor [B] on the CPU.
        """
        if self.loss == "vlb":
            return self.vlb(model_output, x_0, x_t, t)
        simple = self.scheduler.simple_loss(model_output, x_0, noise, t)
        simple = self.weights(t, simple) * simple
        if self.loss == "simple":
            return simple
        channels = x_0.shape[1]
        frozen = torch.cat([model_output[:, :channels].detach(), model_output[:, channels:]], dim=1)
        return simple + self.vlb_weight * self.vlb(frozen, x_0, x_t, t)

    def vlb(self, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """T L_t in bits per dimension: [B]."""
        return self._plain.vlb_term(model_output, x_0, x_t, t) * (len(self.scheduler) / math.log(2))

    def weights(self, t: Tensor, like: Tensor) -> Tensor | float:
        """The factor of the target's squared error, in the form of `like` [B], or 1; finite at zero SNR too."""
        if self.weighting == "target":
            return 1.0
        snr = self._snr[t.numpy()]
        per_x_0_error = PER_X_0_ERROR[self.scheduler.config["prediction_type"]](snr)
        return as_tensor(WEIGHTINGS[self.weighting](snr, self) / per_x_0_error, like)


def check_trains_variance(loss: str, variance_type: str) -> None:
    """Refuse a loss that gives the variance no gradient, or that has nothing but the variance to train in a part.

    Raises ValueError if they do not fit.
    """
    learned = variance_type in LEARNED_VARIANCES
    if learned and loss not in BOUND_LOSSES:
        raise ValueError(
            f"variance_type {variance_type!r} cannot be trained with the loss {loss!r}, which gives it no gradient: "
            "choose the loss 'hybrid' or 'vlb', or a fixed variance."
        )
    if not learned and loss == "hybrid":
        raise ValueError(
            f"the loss 'hybrid' adds a term that trains a learned variance, and variance_type is {variance_type!r}: "
            "choose variance_type 'learned_range', or the loss 'simple'."
        )


class UniformSampler:
    """Timesteps drawn uniformly over the chain.

    Args:
        num_train_timesteps: T.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps at the quantiles u in [0, 1), float64, and their weights, 1: long [B] and float64 [B]."""
        # The largest double below 1 times T may round up to T, hence the clamp.
        t = (u * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        return t, torch.ones_like(u)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: it remembers nothing."""
        return {}


class LossAwareSampler:
    """Timesteps drawn in proportion to √E[L_t²], which lowers the variance of L_vlb: iDDPM eq. 18.

    The expectation is that of the last HISTORY losses of each timestep; until every timestep has that many, draws are
    uniform.

    Args:
        num_train_timesteps: T.
    """

    def __init__(self, num_train_timesteps: int) -> None:
        self.history = torch.zeros(num_train_timesteps, HISTORY, dtype=torch.float64)
        self.counts = torch.zeros(num_train_timesteps, dtype=torch.long)

    def probabilities(self) -> Tensor:
        """p_t: [T], float64, sum 1."""
        steps = len(self.counts)
        uniform = torch.full((steps,), 1 / steps, dtype=torch.float64)
        if bool((self.counts < HISTORY).any()):
            return uniform
        root = self.history.square().mean(1).sqrt()
        return (1 - UNIFORM_SHARE) * root / root.sum() + UNIFORM_SHARE * uniform

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps at the quantiles u in [0, 1), and the weights 1 / (T p_t) that make their losses unbiased.

        Returns:
            Long [B] and float64 [B].
        """
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(max=len(p) - 1)
        return t, 1 / (len(p) * p[t])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses, not weighted, of a batch: both [B], on the CPU, in the order of the batch."""
        for step, loss in zip(t.tolist(), losses.double().tolist(), strict=True):
            self.history[step, self.counts[step] % HISTORY] = loss
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """All that it remembers."""
        return {"history": self.history, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.history, self.counts = state["history"].clone(), state["counts"].clone()


TIMESTEP_SAMPLERS: dict[str, type[UniformSampler] | type[LossAwareSampler]] = {
    "uniform": UniformSampler,
    "loss_aware": LossAwareSampler,
}
