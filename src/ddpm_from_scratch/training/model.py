"""The network and the diffusion process that a configuration asks for."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.dataset import TrainingData
from ..data.labels import Labels
from ..data.sizes import as_size
from ..diffusion.guidance import null_label
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.reverse_variance import LEARNED_VARIANCES
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import jumps
from ..diffusion.stock import altered
from ..diffusion.unet import ScratchUNet2DModel
from ..sampling.checkpoints import PROCESS_FLAGS, SCHEDULER_FLAGS, is_checkpoint, load_checkpoint
from .config import TrainingConfig, check_diffusion, check_halvings, check_model_keys, check_objective
from .consistency import ConsistencyObjective
from .network import SIZES, suited_network
from .objectives import BOUND_LOSSES, TIMESTEP_SAMPLERS, LossAwareSampler, Objective, UniformSampler

CLASSES = "class_embedding.weight"
TUNING_KEYS = ("images_seen", "seconds", "device")  # of a run's results, what is said of it where it is an earlier one
CALIBRATED = ("optimal_variance", "timestep_choice")  # keys of a scheduler that its calibration serves

logger = logging.getLogger(__name__)

OBJECTIVE_FLAGS = {
    "loss": "loss",
    "loss_weighting": "weighting",
    "snr_gamma": "snr_gamma",
    "p2_gamma": "p2_gamma",
    "p2_k": "p2_k",
    "vlb_weight": "vlb_weight",
}
CONSISTENCY_FLAGS = {f"consistency_{key}": key for key in ("q", "k", "b", "mean", "std", "sigma_max", "huber_c")}


def build_scheduler(config: TrainingConfig, trained: ScratchDDPMScheduler | None = None) -> ScratchDDPMScheduler:
    """The forward process, the objective and the sampler's variance: those of a model to fine-tune, or of a new one.

    Raises ValueError if the configuration says another process or objective than that of the model.
    """
    said = {key: value for flag, key in SCHEDULER_FLAGS.items() if (value := getattr(config, flag)) is not None}
    if trained is None:
        return ScratchDDPMScheduler(**said)
    check_same_process(config, trained)
    if config.loss == "consistency":
        said = {"eta": math.inf, "timestep_spacing": "trailing"} | said  # jumps begin at T - 1
    elif jumps(trained.config):
        said["eta"] = 1.0  # a network for jumps becomes one for the chain again
    return ScratchDDPMScheduler.from_config(trained.config, **said)


def with_process_of(scheduler: ScratchDDPMScheduler, config: TrainingConfig) -> TrainingConfig:
    """The configuration with everything that was left to the model to fine-tune; ValueError if it does not fit."""
    left = {flag: scheduler.config[key] for flag, key in SCHEDULER_FLAGS.items() if getattr(config, flag) is None}
    config = replace(config, **left)
    check_diffusion(config)
    check_objective(config)
    return config


def build_objective(config: TrainingConfig, scheduler: ScratchDDPMScheduler) -> Objective | ConsistencyObjective:
    """The objective that a configuration asks for."""
    if config.loss == "consistency":
        return ConsistencyObjective(
            scheduler, **{key: getattr(config, flag) for flag, key in CONSISTENCY_FLAGS.items()}
        )
    return Objective(scheduler, **{key: getattr(config, flag) for flag, key in OBJECTIVE_FLAGS.items()})


def build_timestep_sampler(
    config: TrainingConfig, objective: Objective | ConsistencyObjective
) -> UniformSampler | LossAwareSampler:
    """What draws the timesteps: the objective's own, if it has one."""
    if isinstance(objective, ConsistencyObjective):
        return objective.sampler()
    return TIMESTEP_SAMPLERS[config.timestep_sampling](len(objective.scheduler))


def check_levels(config: TrainingConfig, data: TrainingData) -> None:
    """Raise ValueError for a loss with the bound in it, which is that of 8-bit levels, and images of other values."""
    if config.loss in BOUND_LOSSES and data.value_range:
        raise ValueError(
            f"loss {config.loss!r} is the variational bound of the 256 levels of 8-bit images, or holds it, and these "
            "images have other values: take the loss 'simple' with a fixed variance, or 8-bit images without "
            "--value_range"
        )


def network_config(config: TrainingConfig) -> dict[str, Any]:
    """The keys of a new network that are described, by the preset or a JSON file.

    Raises ValueError if a key is unknown, the network is class-conditional and the run is not, or the network changes
    the number of channels.
    """
    if config.model_config_name_or_path is None:
        keys = dict(config.model or {})
    else:
        saved = json.loads(Path(config.model_config_name_or_path).expanduser().read_text(encoding="utf-8"))
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
    scheduler: ScratchDDPMScheduler | None  # None where a network alone is given
    id2label: dict[int, str] | None  # the names of its classes, if it has any


def brings_scheduler(model: str | None) -> bool:
    """Whether the model to fine-tune, if there is one, is more than a network."""
    path = Path(model or "").expanduser()
    is_network = path.is_dir() and not (path / "model_index.json").is_file() and not is_checkpoint(path)
    return model is not None and not model.endswith(".json") and not is_network


def load_trained(config: TrainingConfig) -> Trained | None:
    """The trained model to fine-tune; None if the configuration describes a new one.

    Raises ValueError if it is class-conditional and the run is not; OSError if it has no weights that are read here.
    """
    name = config.model_config_name_or_path
    if name is None or name.endswith(".json"):
        return None
    path = Path(name).expanduser()
    options = {"cache_dir": config.cache_dir, "token": config.hub_token}
    try:
        if is_checkpoint(path):
            trained = trained_parts(load_checkpoint(path))
        elif brings_scheduler(name):
            options["revision"] = config.model_revision
            pipeline = ScratchDDPMPipeline.from_pretrained(str(path) if path.is_dir() else name, **options)
            trained = trained_parts(pipeline)
        else:
            trained = Trained(ScratchUNet2DModel.from_pretrained(str(path), **options), None, None)
    except OSError as error:
        if "use_safetensors=False" not in str(error):
            raise
        kind = ScratchDDPMPipeline.__name__ if brings_scheduler(name) else ScratchUNet2DModel.__name__
        place = path if path.is_dir() else name
        raise OSError(
            f"{name} has pickled weights (.bin), which can run code as they are read, and none in safetensors. If you "
            f'trust them, convert it once: python -c "from ddpm_from_scratch import {kind} as Model; '
            f"Model.from_pretrained('{place}', use_safetensors=False).save_pretrained('converted')\""
        ) from error
    if trained.unet.config.num_class_embeds is not None and not config.class_conditional:
        raise ValueError(f"{name} is class-conditional: fine-tune it with --class_conditional")
    trained.unet.float().train().requires_grad_(True)
    return trained


def trained_parts(pipeline: ScratchDDPMPipeline) -> Trained:
    """A pipeline as a model to fine-tune; without a calibration, which is that of the network as it was."""
    config = dict(pipeline.scheduler.config)
    if config.pop("x_0_mse", None) is not None:
        logger.warning("the model's calibration for few steps is left out: run `ddpm calibrate` on the tuned one")
        config = {key: value for key, value in config.items() if key not in CALIBRATED}
    scheduler = ScratchDDPMScheduler.from_config(config)
    return Trained(pipeline.unet, scheduler, pipeline.config.id2label)


def check_same_process(config: TrainingConfig, trained: ScratchDDPMScheduler) -> None:
    """Refuse to fine-tune a network on a process or target other than its own: it would start from garbage.

    Raises ValueError if the configuration says another one; the message names the flags to leave out.
    """
    differing = {
        flag: trained.config[key]
        for flag, key in PROCESS_FLAGS.items()
        if getattr(config, flag) not in (None, trained.config[key])
    }
    if differing:
        flags = ", ".join(f"--{flag} ({value})" for flag, value in differing.items())
        raise ValueError(
            f"the model was trained on another diffusion process, which it keeps if nothing is said: leave out {flags}"
        )


def with_classes(unet: ScratchUNet2DModel, num_class_embeds: int) -> ScratchUNet2DModel:
    """A network with more class labels, whose embeddings start at zero: it draws what it drew before."""
    conditional = altered(unet, num_class_embeds=num_class_embeds)
    weights = unet.state_dict()
    embeddings = torch.zeros_like(conditional.class_embedding.weight)
    if CLASSES in weights:
        embeddings[: len(weights[CLASSES])] = weights[CLASSES]
    weights[CLASSES] = embeddings
    conditional.load_state_dict(weights)
    return conditional.train()


def trained_unet(trained: Trained, config: TrainingConfig, labels: Labels | None) -> ScratchUNet2DModel:
    """The network to fine-tune, with the classes of the data; ValueError if it was made for others."""
    unet = trained.unet
    check_outputs(str(config.model_config_name_or_path), unet.config.in_channels, unet.config.out_channels, config)
    if labels is None:
        return unet
    if unet.config.num_class_embeds is None:
        return with_classes(unet, labels.num_class_embeds)
    if unet.config.num_class_embeds == len(labels.names) and null_label(len(labels.names), trained.id2label) is None:
        unet = with_classes(unet, labels.num_class_embeds)  # each of its labels is a class: it gets one for none
    check_classes(unet.config.num_class_embeds, trained.id2label, labels)
    return unet


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


def rate_for(width: int) -> float:
    """The learning rate for a network whose first level has so many channels: that of the nearest size."""
    return min(SIZES.values(), key=lambda size: abs(size.width - width)).learning_rate


def sample_size(size: int | Sequence[int]) -> int | list[int]:
    """A size as UNet2DModel's key has it: the side of a square, else [height, width]."""
    height, width = as_size(size)
    return height if height == width else [height, width]


def build_unet(keys: dict[str, Any], config: TrainingConfig, data: TrainingData) -> ScratchUNet2DModel:
    """A new network for the data: as described, or one that suits them, changed by the keys that are described.

    Raises ValueError if its keys contradict each other, the classes or the images' size.
    """
    if "block_out_channels" not in keys:
        keys = {**suited_network(data.size, len(data.images), config.model_size or "small"), **keys}
    check_halvings(keys, data.size)
    if data.labels:
        check_classes(keys.get("num_class_embeds"), None, data.labels)
        keys = {**keys, "num_class_embeds": data.labels.num_class_embeds}
    outputs = outputs_per_channel(config) * data.channels
    form = {"in_channels": data.channels, "out_channels": outputs, "sample_size": sample_size(data.size)}
    return ScratchUNet2DModel(**{**keys, **form})


def teacher_of(config: TrainingConfig) -> dict[str, Any]:
    """What a run that tunes for few steps says of the model it began with; nothing for other runs.

    Under "teacher" the name of the model, and what `ddpm evaluate` found, from a results.json beside it. Of a model
    that was tuned before, these are of its own teacher, and "earlier_tunings" has the runs since then.
    """
    name = config.model_config_name_or_path
    if config.loss != "consistency" or name is None:
        return {}
    path = Path(name, "results.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "teacher" in found:
        last = {key: found[key] for key in TUNING_KEYS}
        return {"teacher": found["teacher"], "earlier_tunings": [*found.get("earlier_tunings", []), last]}
    return {"teacher": {"name": Path(name).name, "samples": found.get("evaluation", {}).get("samples", [])}}
