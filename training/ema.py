"""Exponential moving average of a network's weights."""

import copy

import torch
from torch import Tensor, nn


def ema_decay(step: int, inv_gamma: float, power: float, max_decay: float) -> float:
    """The decay of the update after optimiser step `step` (1, 2, ...); diffusers' formula.

    It starts at 0, so the first update copies the weights, and the horizon 1 / (1 - decay) grows with the run: the
    average fits a run of any length. Range [0, max_decay].
    """
    return min(max_decay, 1 - (1 + (step - 1) / inv_gamma) ** -power)


class EMA:
    """A float32 copy of a network that follows its weights; `network` is ready to sample from and to save."""

    def __init__(self, network: nn.Module, inv_gamma: float, power: float, max_decay: float) -> None:
        """Start at the network's present weights."""
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
        self.inv_gamma, self.power, self.max_decay = inv_gamma, power, max_decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards the weights that optimiser step `step` (1, 2, ...) has left in `network`."""
        decay = ema_decay(step, self.inv_gamma, self.power, self.max_decay)
        averages: list[Tensor] = [average.data for average in self.network.parameters()]
        weights: list[Tensor] = [weight.data for weight in network.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
