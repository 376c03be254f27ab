"""Denoising diffusion probabilistic models from scratch, compatible with Hugging Face diffusers."""

from .gaussian import Gaussian
from .pipeline import ScratchDDPMPipeline
from .scheduler import Prediction, ScratchDDPMScheduler
from .unet import ScratchUNet2DModel

__all__ = ["Gaussian", "Prediction", "ScratchDDPMPipeline", "ScratchDDPMScheduler", "ScratchUNet2DModel"]
