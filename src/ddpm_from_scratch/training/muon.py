"""Muon (Jordan et al. 2024): steps in which every direction of a weight matrix counts alike.

Its step is the mean gradient U S V^T with S near the identity. After as many steps the loss is lower than with AdamW,
which counts most in short runs (docs/training.md has the figures).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Jordan et al.'s quintic a x + b x³ + c x⁵, which five times in a row takes singular values to 0.7 to 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
# Liu et al. 2025, section 2.2: the root mean square of AdamW's steps, so that its learning rates serve here too.
STEP_RMS = 0.2
FEWEST_CHANNELS = 16  # in and out: layers that read or write images are AdamW's


def matrix_weights(network: nn.Module) -> list[Tensor]:
    """The weights that are stepped as matrices: those of linear layers and convolutions between hidden channels."""
    return [
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and min(module.weight.shape[:2]) >= FEWEST_CHANNELS
    ]


class Muon(torch.optim.AdamW):
    """Muon for the matrices of a network, AdamW for its other parameters.

    Args:
        network: whose parameters are trained.
        options: of AdamW; learning rate and weight decay are those of the matrices too.
    """

    def __init__(self, network: nn.Module, **options: object) -> None:
        matrices = matrix_weights(network)
        chosen = {id(weight) for weight in matrices}
        others = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
        super().__init__([{"params": matrices}, {"params": others}], **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; where `found_inf` is 1, as a gradient scaler sets it, weights and state stay as they are."""
        group = self.param_groups[0]
        found_inf = getattr(self, "found_inf", None)
        for weights in by_shape(group["params"]):
            gradients = torch.stack([weight.grad.flatten(1) for weight in weights])  # type: ignore[union-attr]
            buffers = [self.momentum_of(weight) for weight in weights]
            before = torch.stack([buffer.flatten(1) for buffer in buffers])
            momentum = before.lerp(gradients, 1 - MOMENTUM)
            steps = orthogonalised(gradients.lerp(momentum, MOMENTUM))  # Nesterov's
            scale = group["lr"] * STEP_RMS * max(steps.shape[1:]) ** 0.5
            for number, (weight, buffer) in enumerate(zip(weights, buffers, strict=True)):
                stepped = weight * (1 - group["lr"] * group["weight_decay"]) - scale * steps[number].view_as(weight)
                kept = momentum[number].view_as(buffer)
                if found_inf is not None:  # no reading of its value, for which the host would wait
                    stepped = torch.where(found_inf > 0, weight, stepped)
                    kept = torch.where(found_inf > 0, buffer, kept)
                weight.copy_(stepped)
                buffer.copy_(kept)
                weight.grad = None  # so that AdamW passes over it
        super().step()

    def momentum_of(self, weight: Tensor) -> Tensor:
        """The mean gradient of a weight so far."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum"]
        return buffer


def by_shape(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Weights that have gradients, those of one shape together: their products are batched."""
    with_gradient = [weight for weight in weights if weight.grad is not None]
    for shape in dict.fromkeys(weight.shape for weight in with_gradient):
        yield [weight for weight in with_gradient if weight.shape == shape]


def orthogonalised(matrices: Tensor) -> Tensor:
    """U S V^T with all singular values S between about 0.7 and 1.2, for each U S V^T: float [K, rows, columns].

    The quintic of X is a polynomial of X X^T, times X: so the iteration goes on with the smaller X X^T, and X is
    multiplied once, at its end.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    identity = torch.eye(gram.shape[1], device=x.device, dtype=x.dtype)
    product = identity.expand_as(gram)
    for _ in range(ITERATIONS):
        factor = A * identity + B * gram + C * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x
