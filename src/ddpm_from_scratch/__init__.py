"""Denoising diffusion probabilistic models from scratch, compatible with Hugging Face diffusers."""

from .diffusion.gaussian import Gaussian
from .diffusion.pipeline import ScratchDDPMPipeline
from .diffusion.scheduler import Prediction, ScratchDDPMScheduler
from .diffusion.unet import ScratchUNet2DModel

__all__ = ["Gaussian", "Prediction", "ScratchDDPMPipeline", "ScratchDDPMScheduler", "ScratchUNet2DModel"]
