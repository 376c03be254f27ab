"""Gaussian distributions with a mean and a log-variance: the type of every distribution in this package.

Reference: DDPM (Ho, Jain, Abbeel 2020, https://arxiv.org/abs/2006.11239).
"""

from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .tensors import moved

Generators = torch.Generator | list[torch.Generator] | None

WITHOUT_SPECIAL_FUNCTIONS = ("mps",)  # devices that have neither erfcx nor log_ndtr


class Gaussian(NamedTuple):
    """The distribution N(mean, exp(log_variance) I). log_variance broadcasts over mean."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a sample, shaped like mean. The noise is drawn in `dtype`, by default that of the mean."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise_like(self.mean, generator, dtype)

    def kl(self, other: "Gaussian") -> Tensor:
        """KL(self || other) in nats, per element, shaped like the means."""
        difference = self.log_variance - other.log_variance
        distance = (self.mean - other.mean) ** 2 * torch.exp(-other.log_variance)
        return 0.5 * (torch.expm1(difference) - difference + distance)

    def discretized_log_prob(self, x: Tensor) -> Tensor:
        """Log-probability in nats, per element, of the 8-bit bin that holds x (DDPM eq. 13).

        x lies on the grid k / 127.5 - 1, k = 0..255. A bin reaches 1/255 to each side; the first and the last reach to
        infinity, so the 256 bins sum to 1. Exact normal distribution function, accurate far in the tails.
        """
        edge = 1e10  # stands for infinity: no mass is left there, and gradients stay finite
        precision = torch.exp(-0.5 * self.log_variance)
        lower = torch.where(x < -0.999, -edge, (x - 1 / 255 - self.mean) * precision)
        upper = torch.where(x > 0.999, edge, (x + 1 / 255 - self.mean) * precision)
        # Mirror bins right of the mean: differences of the distribution function cancel there, not on the left.
        right = lower + upper > 0
        lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
        log_lower, log_upper = _log_ndtr(lower), _log_ndtr(upper)
        mass = -torch.expm1(log_lower - log_upper)
        return log_upper + torch.log(mass.clamp(min=torch.finfo(mass.dtype).tiny))


def noise_like(x: Tensor, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise with the shape and device of x, in `dtype`, by default that of x.

    Raises:
        ValueError: for a list of generators that is not as long as the batch.
    """
    if isinstance(generator, list) and len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for a batch of {len(x)}: pass one, or one per sample.")
    one = generator[0] if isinstance(generator, list) else generator
    # Numbers of a generator on the host reach a GPU without a wait.
    device = one.device if one is not None and one.device.type == "cpu" else x.device
    return moved(randn_tensor(x.shape, generator=generator, device=device, dtype=dtype or x.dtype), x.device)


def _log_ndtr(z: Tensor) -> Tensor:
    """log Φ(z), with an exact gradient in the far left tail, where that of `torch.special.log_ndtr` decays to 0."""
    if z.device.type in WITHOUT_SPECIAL_FUNCTIONS:
        return _log_ndtr(z.cpu()).to(z.device)
    left = z.clamp(max=0)
    tail = torch.log(torch.special.erfcx(-left * 0.5**0.5) / 2) - left**2 / 2
    return torch.where(z < 0, tail, torch.special.log_ndtr(z.clamp(min=0)))
