"""The optimisers by name, their learning rate, and the moving average of the weights."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .muon import Muon

if TYPE_CHECKING:
    from .config import TrainingConfig

# Rate after the warm-up, relative to the peak, at a progress from 0 to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
}
NO_WARMUP = ("constant",)  # as in diffusers
LONGEST_WARMUP = 0.1  # of a run whose number of steps follows from a budget of time

# What a configuration counts in steps.
STEP_FIELDS = (
    "max_train_steps",
    "lr_warmup_steps",
    "log_steps",
    "sample_steps",
    "eval_steps",
    "checkpointing_steps",
)


FUSED_ADAM_DEVICES = ("cpu", "cuda", "xpu")  # whose kernels leave out a step that is not finite


def in_optimizer_steps(config: "TrainingConfig", global_batch_size: int) -> "TrainingConfig":
    """The configuration with every number of steps, each of `step_images` images, as optimiser steps of this run.

    So the warm-up, the end, the intervals and the horizon of the average come after as many images on one GPU as on
    eight. The decay of the average after n steps is near 1 - (n / inv_gamma) ** -power; with r times as many images in
    a step it must fall r times as far short of 1 after n / r of them, which inv_gamma * r ** (1 / power - 1) does.
    """
    if config.step_images is None:
        return config
    ratio = global_batch_size / config.step_images
    steps = {name: max(1, round(count / ratio)) for name in STEP_FIELDS if (count := getattr(config, name))}
    return replace(
        config,
        **steps,
        ema_inv_gamma=config.ema_inv_gamma * ratio ** (1 / config.ema_power - 1),
        ema_max_decay=config.ema_max_decay**ratio,
        step_images=None,
    )


def learning_rate(step: int, config: "TrainingConfig", total_steps: int) -> float:
    """The rate at which optimiser step number `step` (0, 1, ...) is taken; at `total_steps` a decay has reached 0.

    A function of the optimiser steps alone, so accumulation and the number of processes do not stretch it.
    """
    warmup = 0 if config.lr_scheduler in NO_WARMUP else config.lr_warmup_steps
    if config.max_train_minutes is not None:
        warmup = min(warmup, math.ceil(LONGEST_WARMUP * total_steps))
    if step < warmup:
        return peak_rate(config) * (step + 1) / warmup  # from 1, since a step at rate 0 is wasted
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak_rate(config) * DECAYS[config.lr_scheduler](progress)


def peak_rate(config: "TrainingConfig") -> float:
    """The peak learning rate; ValueError if it is still to be chosen by the network, which `build` does."""
    if config.learning_rate is None:
        raise ValueError("learning_rate is null, which stands for one that suits the network: a run chooses it")
    return config.learning_rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take the next step at this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(weights: list[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`; their norm before, on the device.

    `torch.nn.utils.clip_grad_norm_` in fewer calls, with the same numbers.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def forget_gradients(weights: list[Tensor]) -> None:
    """Let the next backward pass begin anew."""
    for weight in weights:
        weight.grad = None


class ListedAdamW(torch.optim.AdamW):
    """AdamW of a network that lists its tensors once, and counts its steps once.

    Going through all parameters and their state takes the host longer than it takes to start the fused kernel, and
    AdamW counts the steps of each parameter in a tensor of its own.
    """

    def __init__(self, network: nn.Module, **options: Any) -> None:  # noqa: ANN401
        super().__init__(network.parameters(), **options)
        self._lists: list[list[Tensor]] = []  # both moments and the count of steps, in the order of the weights

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step, as AdamW does."""
        (group,) = self.param_groups
        if not group["fused"]:
            return super().step()
        gradients = [weight.grad for weight in group["params"] if weight.grad is not None]
        if not (self._is_listed(group["params"]) and len(gradients) == len(group["params"])):
            return self._step_and_list(group["params"])
        means, squares, steps = self._lists
        beta1, beta2 = group["betas"]
        found_inf = getattr(self, "found_inf", None)
        steps[0].add_(1)
        # What torch.optim.AdamW calls at the end (test_gpu_path.py compares), without its walks through the lists.
        torch._fused_adamw_(
            group["params"],
            gradients,
            means,
            squares,
            [],
            steps,
            amsgrad=group["amsgrad"],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
        )
        if found_inf is not None:
            steps[0].sub_(found_inf)
        return None

    def _step_and_list(self, weights: list[Tensor]) -> None:
        """Take a step as AdamW itself does, and list what it has left, if all weights have taken as many steps."""
        for state in filter(None, self.state.values()):
            state["step"] = state["step"].clone()  # AdamW counts up each
        super().step()
        states = [state for weight in weights if (state := self.state[weight])]
        self._lists = []
        if len(states) == len(weights) and len({float(state["step"]) for state in states}) == 1:
            for state in states:
                state["step"] = states[0]["step"]
            self._lists = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")]

    def _is_listed(self, weights: list[Tensor]) -> bool:
        """Whether the state is still the one that was listed: that of a checkpoint may have taken its place."""
        return bool(self._lists) and self._lists[0][0] is self.state[weights[0]]["exp_avg"]


OPTIMIZERS: dict[str, Callable[..., torch.optim.AdamW]] = {
    "adamw": ListedAdamW,
    "muon": Muon,
}


def build_optimizer(network: nn.Module, config: "TrainingConfig", device: torch.device) -> torch.optim.AdamW:
    """The optimiser of a network; AdamW as one fused kernel where the device has it."""
    return OPTIMIZERS[config.optimizer](
        network,
        lr=peak_rate(config),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=device.type in FUSED_ADAM_DEVICES,
    )


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
        self._averages: list[Tensor] = list(self.network.parameters())
        self.inv_gamma, self.power, self.max_decay = inv_gamma, power, max_decay

    @torch.no_grad()
    def update(self, weights: list[Tensor], step: int) -> None:
        """Move the average towards the weights that optimiser step `step` (1, 2, ...) has left in the network."""
        decay = ema_decay(step, self.inv_gamma, self.power, self.max_decay)
        torch._foreach_lerp_(self._averages, weights, 1 - decay)
