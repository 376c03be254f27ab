"""Signals that stop a run, and steps whose gradients are not finite."""

import signal
from types import FrameType

import torch
from torch import Tensor


class StopSignals:
    """Listens for SIGTERM and SIGINT inside its `with` block; a second one has its usual effect, at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        """Start listening."""
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)


class FiniteGuard:
    """Makes the optimiser skip a step whose gradients are not finite, and counts; on CPU and GPU nobody waits for it.

    Args:
        optimizer: of PyTorch. Its fused kernels leave weights and state as they are where `found_inf` is 1, which
            gradient scalers set too. None where one does: this only counts then.
        device: of the weights.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
        self._optimizer = optimizer
        self._skipped = torch.zeros((), device=device)
        self._in_a_row = torch.zeros((), device=device)

    def go_on(self, skipped: int, in_a_row: int) -> None:
        """Count on from what `counts` told."""
        self._skipped.fill_(skipped)
        self._in_a_row.fill_(in_a_row)

    def check(self, gradient_norm: Tensor) -> None:
        """Before an optimiser step, with the norm of all its gradients, which is the same on all processes."""
        found = (~gradient_norm.isfinite()).float()
        self._skipped = self._skipped + found
        self._in_a_row = (self._in_a_row + 1) * found
        if self._optimizer is None:
            return
        if self._optimizer.defaults["fused"]:
            self._optimizer.found_inf = found  # type: ignore[attr-defined]
        elif found:
            self._optimizer.zero_grad()  # a weight without a gradient stays

    def counts(self) -> tuple[int, int]:
        """Steps skipped, and how many of them just now in a row; reading them waits for the device."""
        return int(self._skipped), int(self._in_a_row)
