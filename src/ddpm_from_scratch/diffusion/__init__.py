"""The mathematics of DDPM, the network, and the pipeline: all that travels inside a saved model's pipeline.py."""

from .gaussian import Gaussian
from .pipeline import ScratchDDPMPipeline
from .scheduler import Prediction, ScratchDDPMScheduler
from .unet import ScratchUNet2DModel

__all__ = ["Gaussian", "Prediction", "ScratchDDPMPipeline", "ScratchDDPMScheduler", "ScratchUNet2DModel"]
