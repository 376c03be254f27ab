"""A run's checkpoint, read as the model that it holds; `training/checkpoint.py` writes it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.unet import ScratchUNet2DModel

MANIFEST = "manifest.json"

# The flags of a run for the keys of its scheduler: the process that the network learns, and how samplers use it.
PROCESS_FLAGS = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "ddpm_beta_start": "beta_start",
    "ddpm_beta_end": "beta_end",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    "prediction_type": "prediction_type",
}
SCHEDULER_FLAGS = {
    **PROCESS_FLAGS,
    "ddpm_variance_type": "variance_type",
    "ddpm_clip_sample": "clip_sample",
    "ddpm_timestep_spacing": "timestep_spacing",
}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is the checkpoint of a run."""
    return (folder / MANIFEST).is_file() and (folder / "state.json").is_file()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: the step, the configuration, the scheduler and the hashes of its files."""
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_bytes())
    return manifest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_bytes())
    return state


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """One of the tensor files of a checkpoint, on the CPU."""
    tensors: dict[str, Tensor] = load_file(checkpoint / f"{name}.safetensors")
    return tensors


def damage(checkpoint: Path) -> str | None:
    """The first fault of a checkpoint; None if it is whole, every byte of it."""
    try:
        if not (checkpoint / MANIFEST).exists():  # of version 0.1.0, which kept the configuration elsewhere
            return None if "config" in read_state(checkpoint) else f"it has no {MANIFEST}"
        for name, known in read_manifest(checkpoint)["files"].items():
            with open(checkpoint / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                    return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_checkpoint(checkpoint: Path, dtype: torch.dtype = torch.float32) -> ScratchDDPMPipeline:
    """The model that a checkpoint holds: the average of its weights, if there is one, and its scheduler.

    Raises FileNotFoundError if there is no such checkpoint; ValueError if it is damaged.
    """
    if not is_checkpoint(checkpoint):
        raise FileNotFoundError(f"{checkpoint} is no checkpoint: it has no {MANIFEST}. They lie in RUN/checkpoints.")
    if (wrong := damage(checkpoint)) is not None:
        raise ValueError(f"{checkpoint} is damaged ({wrong}): take another one.")
    manifest, identity = read_manifest(checkpoint), read_state(checkpoint)["identity"]
    config = manifest["config"]
    # Checkpoints that were written before schedulers were kept in them have one that flags can describe.
    described = {key: config[flag] for flag, key in SCHEDULER_FLAGS.items()}
    scheduler = ScratchDDPMScheduler.from_config(manifest.get("scheduler", described))
    unet = ScratchUNet2DModel(**{k.removeprefix("model."): v for k, v in identity.items() if k.startswith("model.")})
    unet.load_state_dict(read_tensors(checkpoint, "ema" if config["use_ema"] else "unet"))
    names = dict(enumerate(identity["class_names"])) if config["class_conditional"] else None
    steps = config["ddpm_num_inference_steps"] if config.get("loss") == "consistency" else None
    return ScratchDDPMPipeline(unet.to(dtype).eval(), scheduler, names, steps)
