"""Samplers by name."""

from collections.abc import Callable

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin

from ..diffusion.scheduler import ScratchDDPMScheduler

SAMPLERS: dict[str, Callable[[ScratchDDPMScheduler], SchedulerMixin]] = {
    "ddpm": lambda scheduler: scheduler,
    # Trailing spacing starts at t = T - 1, where x_t is noise; leading spacing starts too low.
    "ddim": lambda scheduler: DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing"),
    "dpmsolver++": lambda scheduler: DPMSolverMultistepScheduler.from_config(
        scheduler.config, timestep_spacing="trailing"
    ),
}
