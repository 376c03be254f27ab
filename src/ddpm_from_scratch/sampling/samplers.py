"""Samplers by name: functions that make the scheduler to sample with from a model's scheduler."""

import math
from collections.abc import Callable
from functools import partial

from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import KNOWN_TO_OTHERS, OWN_KEYS
from ..diffusion.stock import altered


def ddim(scheduler: SchedulerMixin) -> SchedulerMixin:
    """DDIM (Song et al. 2021): the chain with eta = 0, which draws no noise."""
    return altered(scheduler, ScratchDDPMScheduler, eta=0.0, timestep_spacing="trailing")


def consistency(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Jumps to x̂_0, all noise fresh (Song et al. 2023, algorithm 1), for a network that was tuned for them."""
    return altered(scheduler, ScratchDDPMScheduler, eta=math.inf, timestep_spacing="trailing")


def solver(kind: type[SchedulerMixin], scheduler: SchedulerMixin) -> SchedulerMixin:
    """A solver of diffusers for the diffusion process of a scheduler."""
    # Without diffusers' note of which values were left out, which would drop those that were passed by position.
    config = {key: value for key, value in scheduler.config.items() if key not in (*OWN_KEYS, "_use_default_values")}
    if config["beta_schedule"] not in KNOWN_TO_OTHERS:
        config["trained_betas"] = scheduler.betas.tolist()
    return kind.from_config(config, timestep_spacing="trailing")


# All but the model's own start at t = T - 1, where x_t is noise (trailing spacing).
SAMPLERS: dict[str, Callable[[SchedulerMixin], SchedulerMixin]] = {
    "ddpm": lambda scheduler: scheduler,
    "ddim": ddim,
    "consistency": consistency,
    "dpmsolver++": partial(solver, DPMSolverMultistepScheduler),
    "unipc": partial(solver, UniPCMultistepScheduler),
}
