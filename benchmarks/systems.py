"""What `speed.py` compares: networks, and ways to train them and to sample from them."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from few_steps import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.runtime.devices import MEMORY_FORMAT, compile_mode, keep_freed_memory, resolve_precision
from ddpm_from_scratch.training.config import PRESETS

__all__ = ["DTYPES", "KINDS", "NETWORKS", "ROOT", "System", "network_config", "network_form", "systems"]

# Nearly the quick preset's, but with attention in every block at 7x7.
SMALL = {
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
# Others of the same kind: wider, for larger images, in other batches.
WIDE = {**SMALL, "block_out_channels": [64, 128, 256]}
MODELS = {"small": SMALL, "small, twice as wide": WIDE, "small at 56x56": SMALL}
MODELS |= {f"small, batches of {batch}": SMALL for batch in (8, 256)}
PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
NETWORKS = (*MODELS, *PRESET_NAMES)
FORMS = {"cifar10": (32, 3), "small at 56x56": (56, 1)}  # size and channels of the images, 28x28 gray otherwise
# Of a training step; 64 otherwise.
BATCHES = {"cifar10": 16, "small at 56x56": 16, "small, batches of 8": 8, "small, batches of 256": 256}
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}  # by accelerate's names
SAMPLES, CHAIN = 16, 50

# The package of that name, with the network of its own that has nearly as many weights as SMALL and attends at 7x7 too.
PEER = "denoising-diffusion-pytorch"
PEER_NETWORKS = {"small": {"dim": 32, "dim_mults": (1, 2, 4), "channels": 1, "full_attn": (False, False, True)}}
UNUSED = ("torchvision", "pytorch_fid")  # it imports them to read image files and to compute distances


@dataclass(frozen=True)
class System:
    """A way to train or to sample."""

    project: str  # "ours", "diffusers" or PEER
    precision: str  # "no" or "bf16": by autocast, but in sampling by ours the weights'
    channels_last: bool = False
    default: bool = False  # as the project's own training script has it
    compiled: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this package's."""
        return self.project == "ours"


def systems(device: torch.device) -> dict[str, System]:
    """The systems by name; those of diffusers begin with its name."""
    ours_last = MEMORY_FORMAT.get(device.type) == torch.channels_last
    found: dict[str, System] = {}
    for precision in DTYPES:
        kind = "fp32" if precision == "no" else precision
        found |= {
            f"diffusers {kind}, NCHW": System("diffusers", precision),
            f"diffusers {kind}, channels last": System("diffusers", precision, channels_last=True),
            f"ours {kind}": System("ours", precision, ours_last),
        }
    auto = resolve_precision("auto", device)
    found |= {
        "ours, default": System("ours", auto, ours_last, default=True),
        "ours, default compiled": System("ours", auto, ours_last, default=True, compiled=True),
    }
    if importlib.util.find_spec(PEER.replace("-", "_")):
        found[PEER] = System(PEER, "no", default=True)
    return found


def network_form(network: str) -> tuple[int, int, int]:
    """Batch, size and channels of the images that a network is trained on."""
    return (BATCHES.get(network, 64), *FORMS.get(network, (28, 1)))


def network_config(name: str) -> dict[str, Any]:
    """The keys of a network, with the form of its images, without dropout."""
    model = MODELS.get(name) or yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))["model"]
    _, size, channels = network_form(name)
    return {**model, "dropout": 0.0, "sample_size": size, "in_channels": channels, "out_channels": channels}


def build_network(system: System, network: str, device: torch.device) -> UNet2DModel:
    """The network of a system."""
    torch.manual_seed(0)
    unet = (ScratchUNet2DModel if system.ours else UNet2DModel)(**network_config(network)).to(device)
    unet = unet.to(memory_format=torch.channels_last) if system.channels_last else unet
    if system.compiled:
        unet.compile(mode=compile_mode(device))
    return unet


def training_step(system: System, network: str, device: torch.device) -> Callable[[], None]:
    """A function that does one optimiser step on images that are on the device."""
    if system.ours and system.default and device.type == "cpu":
        keep_freed_memory()
    batch, size, channels = network_form(network)
    torch.manual_seed(0)
    x_0 = torch.rand(batch, channels, size, size, device=device) * 2 - 1
    loss_of: Callable[[], Tensor]
    if system.project == PEER:
        unet: nn.Module = peer_diffusion(network, size).to(device).train()

        def loss_of() -> Tensor:
            return unet(x_0)
    else:
        unet = build_network(system, network, device).train()
        scheduler = (ScratchDDPMScheduler if system.ours else DDPMScheduler)()

        def loss_of() -> Tensor:
            noise, t = torch.randn_like(x_0), torch.randint(0, 1000, (batch,))
            on_device = t.to(device)
            x_t = scheduler.add_noise(x_0, noise, t if system.ours else on_device)
            with torch.autocast(device.type, torch.bfloat16, enabled=system.precision == "bf16"):
                output = unet(x_t, on_device).sample
            return F.mse_loss(output.float(), noise)

    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=(system.ours and system.default) or None)

    def step() -> None:
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_chain(system: System, network: str, device: torch.device) -> Callable[[], None]:
    """A function that draws a batch of images."""
    if system.project == PEER:
        diffusion = peer_diffusion(network, network_form(network)[1], sampling_timesteps=CHAIN).to(device).eval()
        return lambda: diffusion.sample(batch_size=SAMPLES)
    unet = build_network(system, network, device).eval()
    if system.precision == "bf16" and system.ours:
        unet.to(torch.bfloat16)
    kinds = (ScratchDDPMPipeline, ScratchDDPMScheduler) if system.ours else (DDPMPipeline, DDPMScheduler)
    pipeline = kinds[0](unet=unet, scheduler=kinds[1]())
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> None:
        generator = torch.Generator(device).manual_seed(0)  # on a GPU, else stock noise comes from the host
        # Stock's pipeline cannot turn bfloat16 into numpy, so that only its network computes in it.
        with torch.autocast(device.type, torch.bfloat16, enabled=system.precision == "bf16" and not system.ours):
            pipeline(SAMPLES, generator, num_inference_steps=CHAIN, output_type="np")

    return sample


def peer_diffusion(network: str, size: int, **options: Any) -> Any:  # noqa: ANN401
    """The peer's network and process, whose forward pass is a training loss."""
    for name in UNUSED:
        if importlib.util.find_spec(name) is None:
            for module in (name, *(f"{name}.{part}" for part in ("transforms", "utils", "fid_score", "inception"))):
                sys.modules.setdefault(module, MagicMock())
    from denoising_diffusion_pytorch import denoising_diffusion_pytorch as peer

    torch.manual_seed(0)
    diffusion = peer.GaussianDiffusion(peer.Unet(**PEER_NETWORKS[network]), image_size=size, **options)
    if options:  # its chain has a progress bar
        peer.tqdm = lambda steps, **_: steps
    return diffusion


KINDS = {"training": training_step, "sampling": sampling_chain}
