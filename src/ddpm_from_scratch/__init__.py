"""Denoising diffusion probabilistic models from scratch, compatible with Hugging Face diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .diffusion import Gaussian, Prediction, ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel

__all__ = ["Gaussian", "Prediction", "ScratchDDPMPipeline", "ScratchDDPMScheduler", "ScratchUNet2DModel"]


def __getattr__(name: str) -> object:
    """Import a public name on its first use: torch takes seconds to import, and `ddpm --help` does without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.diffusion"), name)


def __dir__() -> list[str]:
    """The module's names, with those that are not imported yet."""
    return sorted({*globals(), *__all__})
