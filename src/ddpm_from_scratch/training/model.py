"""The network and the diffusion process that a configuration asks for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.labels import Labels
from ..data.sizes import as_size
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.reverse_variance import LEARNED_VARIANCES
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.unet import ScratchUNet2DModel
from .config import TrainingConfig, check_model_keys
from .objectives import Objective

# The default schedule's parameters, for the message that tells how to continue a trained model.
PROCESS_FLAGS = {
    "ddpm_num_steps": "num_train_timesteps",
    "ddpm_beta_schedule": "beta_schedule",
    "ddpm_beta_start": "beta_start",
    "ddpm_beta_end": "beta_end",
    "rescale_betas_zero_snr": "rescale_betas_zero_snr",
    "prediction_type": "prediction_type",
}
SAMPLER_FLAGS = {
    "ddpm_variance_type": "variance_type",
    "ddpm_clip_sample": "clip_sample",
    "ddpm_timestep_spacing": "timestep_spacing",
}

OBJECTIVE_FLAGS = {
    "loss": "loss",
    "loss_weighting": "weighting",
    "snr_gamma": "snr_gamma",
    "p2_gamma": "p2_gamma",
    "p2_k": "p2_k",
    "vlb_weight": "vlb_weight",
}


def build_scheduler(config: TrainingConfig) -> ScratchDDPMScheduler:
    """The forward process, the objective and the sampler's variance."""
    keys = {**PROCESS_FLAGS, **SAMPLER_FLAGS}
    return ScratchDDPMScheduler(**{key: getattr(config, flag) for flag, key in keys.items()})


def build_objective(config: TrainingConfig, scheduler: ScratchDDPMScheduler) -> Objective:
    """The objective that a configuration asks for."""
    return Objective(scheduler, **{key: getattr(config, flag) for flag, key in OBJECTIVE_FLAGS.items()})


def network_config(config: TrainingConfig) -> dict[str, Any]:
    """The keys of a new network, from the preset or a JSON file.

    Raises ValueError if a key is unknown, the network is class-conditional and the run is not, or the network changes
    the number of channels.
    """
    if config.model_config_name_or_path is None:
        keys = dict(config.model or {})
    else:
        saved = json.loads(Path(config.model_config_name_or_path).expanduser().read_text())
        keys = {key: value for key, value in saved.items() if not key.startswith("_")}
        check_model_keys(keys, config.class_conditional)
    if "out_channels" in keys:
        factor = outputs_per_channel(config)
        channels = keys.setdefault("in_channels", keys["out_channels"] // factor)
        check_outputs("the network", channels, keys["out_channels"], config)
    return keys


def outputs_per_channel(config: TrainingConfig) -> int:
    """Channels of the network's output for each of its input: a learned variance takes a second one."""
    return 2 if config.ddpm_variance_type in LEARNED_VARIANCES else 1


def check_outputs(name: str, in_channels: int, out_channels: int, config: TrainingConfig) -> None:
    """Refuse a network whose outputs are not those that the variance needs; ValueError if they are not."""
    if out_channels != outputs_per_channel(config) * in_channels:
        raise ValueError(
            f"{name} has in_channels {in_channels} and out_channels {out_channels}; ddpm_variance_type "
            f"{config.ddpm_variance_type!r} needs {outputs_per_channel(config) * in_channels} outputs: a learned "
            f"variance takes twice the channels, a fixed one as many as there are"
        )


class Trained(NamedTuple):
    """A model to fine-tune."""

    unet: ScratchUNet2DModel
    id2label: dict[int, str] | None  # the names of its classes, if it has any


def load_trained(config: TrainingConfig, scheduler: ScratchDDPMScheduler) -> Trained | None:
    """The network of the trained model to fine-tune; None if the configuration describes a new one.

    Raises ValueError if the model was trained on another process or objective, or it cannot be trained here.
    """
    name = config.model_config_name_or_path
    if name is None or name.endswith(".json"):
        return None
    path = Path(name).expanduser()
    options = {"cache_dir": config.cache_dir, "token": config.hub_token}
    id2label = None
    if path.is_dir() and not (path / "model_index.json").is_file():  # the folder of a network alone
        unet = ScratchUNet2DModel.from_pretrained(str(path), **options)
    else:
        options["revision"] = config.model_revision
        pipeline = ScratchDDPMPipeline.from_pretrained(str(path) if path.is_dir() else name, **options)
        check_same_process(ScratchDDPMScheduler.from_config(pipeline.scheduler.config), scheduler)
        unet, id2label = pipeline.unet, pipeline.config.id2label
    if unet.config.num_class_embeds is not None and not config.class_conditional:
        raise ValueError(f"{name} is class-conditional: fine-tune it with --class_conditional")
    if unet.config.num_class_embeds is None and config.class_conditional:
        raise ValueError(f"{name} is not class-conditional: leave out --class_conditional, or train a new network")
    check_outputs(name, unet.config.in_channels, unet.config.out_channels, config)
    return Trained(unet.float().train().requires_grad_(True), id2label)


def check_same_process(trained: ScratchDDPMScheduler, scheduler: ScratchDDPMScheduler) -> None:
    """Refuse to fine-tune a network on a process or target other than its own: it would start from garbage.

    Raises ValueError if they differ; the message names the flags that make them equal.
    """
    same_betas = trained.alphas_cumprod.shape == scheduler.alphas_cumprod.shape and torch.allclose(
        trained.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-6
    )
    if same_betas and trained.config.prediction_type == scheduler.config.prediction_type:
        return
    flags = [
        f"--{flag} {str(trained.config[key]).lower()}"
        for flag, key in PROCESS_FLAGS.items()
        if trained.config[key] != scheduler.config[key]
    ]
    raise ValueError(f"the model was trained on another diffusion process; to fine-tune it add {' '.join(flags)}")


def check_classes(num_class_embeds: int | None, id2label: dict[int, str] | None, labels: Labels) -> None:
    """Refuse a network that was made for other classes than those of the data.

    Args:
        num_class_embeds: of the network; None if it is new and takes what the data need.
        id2label: names of its classes; None if they are not known.
        labels: of the training images.

    Raises:
        ValueError: their numbers or names differ.
    """
    if num_class_embeds not in (None, labels.num_class_embeds):
        raise ValueError(
            f"the network has num_class_embeds {num_class_embeds}, but the {len(labels.names)} classes in column "
            f"{labels.column!r} and the null label need {labels.num_class_embeds}: leave the key out of a new network; "
            f"a trained one needs other data"
        )
    known, found = id2label or labels.id2label, labels.id2label
    differing = sorted(label for label in {*known, *found} if known.get(label) != found.get(label))
    if differing:
        label = differing[0]
        raise ValueError(
            f"the model was trained on other classes: {label} is {known.get(label)!r} in the model and "
            f"{found.get(label)!r} in column {labels.column!r}; choose another column, data or model"
        )


def sample_size(size: int | Sequence[int]) -> int | list[int]:
    """A size as UNet2DModel's key has it: the side of a square, else [height, width]."""
    height, width = as_size(size)
    return height if height == width else [height, width]


def build_unet(
    keys: dict[str, Any], config: TrainingConfig, channels: int, size: int | Sequence[int]
) -> ScratchUNet2DModel:
    """A new network for images of this form, with the outputs that the variance needs.

    Raises ValueError if its keys contradict each other.
    """
    outputs = outputs_per_channel(config) * channels
    form = {"in_channels": channels, "out_channels": outputs, "sample_size": sample_size(size)}
    return ScratchUNet2DModel(**{**keys, **form})
