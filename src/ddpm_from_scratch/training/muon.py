"""Muon (Jordan et al. 2024): steps in which every direction of a weight matrix counts alike.

Its step is the mean gradient U S V^T with S near the identity. After as many steps the loss is lower than with AdamW,
which counts most in short runs (docs/training.md has the figures).
"""

from functools import cache, reduce

import torch
from torch import Tensor, distributed, nn

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
        weights = [weight for weight in group["params"] if weight.grad is not None]
        means = [self.mean_gradient(weight) for weight in weights]
        directions = [weight.grad.lerp(mean, MOMENTUM).flatten(1) for weight, mean in zip(weights, means, strict=True)]
        found_inf = getattr(self, "found_inf", None)
        for weight, mean, direction in zip(weights, means, orthogonalised_together(directions), strict=True):
            length = group["lr"] * STEP_RMS * max(direction.shape) ** 0.5
            stepped = weight * (1 - group["lr"] * group["weight_decay"]) - length * direction.view_as(weight)
            self.keep(weight, stepped, found_inf)
            self.keep(self.state[weight]["momentum"], mean, found_inf)
            weight.grad = None  # so that AdamW passes over it
        super().step()

    def mean_gradient(self, weight: Tensor) -> Tensor:
        """The moving average of a weight's gradients, with the present one."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        assert weight.grad is not None
        mean: Tensor = state["momentum"].lerp(weight.grad, 1 - MOMENTUM)
        return mean

    @staticmethod
    def keep(tensor: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
        """Give a tensor a value, but where `found_inf` is 1; the host does not wait for it."""
        tensor.copy_(value if found_inf is None else torch.where(found_inf > 0, tensor, value))


def orthogonalised_together(matrices: list[Tensor]) -> list[Tensor]:
    """What `orthogonalised` makes of each matrix, [rows, columns]; of several processes each does a share.

    All of them must give the same matrices.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return orthogonalised_by_shape(matrices)
    shares = deal(tuple(cost(matrix) for matrix in matrices), distributed.get_world_size())
    longest = max(sum(matrices[number].numel() for number in share) for share in shares)
    own = orthogonalised_by_shape([matrices[number] for number in shares[distributed.get_rank()]])
    sent = torch.cat([matrix.flatten() for matrix in (*own, matrices[0].new_zeros(longest))])[:longest]
    received = [torch.empty_like(sent) for _ in shares]
    distributed.all_gather(received, sent)
    found: dict[int, Tensor] = {}
    for share, values in zip(shares, received, strict=True):
        sizes = [matrices[number].numel() for number in share]
        for number, part in zip(share, values[: sum(sizes)].split(sizes), strict=True):
            found[number] = part.view_as(matrices[number])
    return [found[number] for number in range(len(matrices))]


def cost(matrix: Tensor) -> int:
    """Operations of `orthogonalised`, nearly."""
    rows, columns = sorted(matrix.shape)
    return rows * rows * (2 * columns + 4 * ITERATIONS * rows)


@cache  # the same at every step
def deal(costs: tuple[int, ...], count: int) -> list[list[int]]:
    """Numbers of things for each of `count` processes, so that none has much more to do than another."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        min(shares, key=lambda share: sum(costs[each] for each in share)).append(number)
    return shares


def orthogonalised_by_shape(matrices: list[Tensor]) -> list[Tensor]:
    """What `orthogonalised` makes of each matrix; those of one shape are multiplied together."""
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(matrix.shape for matrix in matrices):
        numbers = [number for number, matrix in enumerate(matrices) if matrix.shape == shape]
        found.update(zip(numbers, orthogonalised(torch.stack([matrices[number] for number in numbers])), strict=True))
    return [found[number] for number in range(len(matrices))]


def orthogonalised(matrices: Tensor) -> Tensor:
    """U S V^T with all singular values S between about 0.7 and 1.2, for each U S V^T: float [K, rows, columns].

    The quintic of X is a polynomial of X X^T, times X: so the iteration goes on with the smaller X X^T, and X is
    multiplied once, at its end.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    factors = []
    for number in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        factor.diagonal(dim1=1, dim2=2).add_(A)
        factors.append(factor)
        if number + 1 < ITERATIONS:
            gram = factors[-1] @ gram @ factors[-1]
    return reduce(torch.matmul, reversed(factors)) @ x
