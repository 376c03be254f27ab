"""Signals that stop a run, and steps whose gradients are not finite."""

import os
import signal
import time
from types import FrameType

import torch
from torch import Tensor

ONE_SIGNAL = 1.0  # seconds in which the same one may come from a terminal, and from the process that passes it on


class StopSignals:
    """Listens for SIGTERM and SIGINT inside its `with` block; another one a second later ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0

    def __enter__(self) -> "StopSignals":
        """Start listening."""
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = number, now
        elif now - self._when > ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


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
