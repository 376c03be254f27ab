"""Load any model that draws pixels from noise alone: DDPM models with our pipeline, others with diffusers' own."""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.unet_config import sides
from .checkpoints import is_checkpoint, load_checkpoint

OWN_PIPELINES = ("DDPMPipeline", "ScratchDDPMPipeline")  # those that our class loads
ARGUMENTS = {"batch_size", "generator", "num_inference_steps", "output_type"}  # that images are drawn with


def load_pipeline(
    name: str, *, dtype: torch.dtype, stock: bool = False, revision: str | None = None, trust_remote_code: bool = False
) -> DiffusionPipeline:
    """Load a pipeline that draws images from noise alone: ours for DDPM models, or the one that the model names.

    Args:
        name: a folder or Hub name, or the checkpoint of a run.
        dtype: of our pipeline's network. Others are in float32, since they do not keep the chain in more than this.
        stock: take the one that the model names for DDPM models too.
        revision: of the repository.
        trust_remote_code: run code of the repository, if it names a pipeline of its own; ours never does.

    Raises:
        ValueError: it needs more than noise, or gives no pixels.
        FileNotFoundError: there is no such model.
    """
    if is_checkpoint(Path(name)):
        if stock:
            raise ValueError(f"{name} is a checkpoint, which diffusers cannot read: make a folder of it (ddpm export).")
        return load_checkpoint(Path(name), dtype)
    index = read_index(name, revision)
    named = index["_class_name"][-1] if isinstance(index["_class_name"], list) else index["_class_name"]
    check_parts(name, named, index)
    if named in OWN_PIPELINES and not stock:
        return ScratchDDPMPipeline.from_pretrained(name, dtype=dtype, revision=revision)
    pipeline = DiffusionPipeline.from_pretrained(
        name, dtype=torch.float32, revision=revision, trust_remote_code=trust_remote_code, use_safetensors=True
    )
    check_call(name, pipeline)
    return pipeline


def read_index(name: str, revision: str | None) -> dict[str, Any]:
    """Read a model's `model_index.json`; FileNotFoundError if there is no such model, or it is not a pipeline."""
    index = Path(name, DiffusionPipeline.config_name)
    if not Path(name).is_dir():
        try:
            index = Path(hf_hub_download(name, DiffusionPipeline.config_name, revision=revision))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{name} is no folder, nor a pipeline that the Hub gives: {error}") from error
    elif not index.is_file():
        raise FileNotFoundError(f"{name} has no {index.name}: pass the folder of a saved pipeline.")
    content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    return content


def check_parts(name: str, named: str, index: dict[str, Any]) -> None:
    """Refuse a pipeline that has other parts than a network and a scheduler, before any part is downloaded."""
    parts = {key for key, value in index.items() if key[0] != "_" and isinstance(value, list) and value[0] is not None}
    if parts != {"unet", "scheduler"}:
        raise ValueError(
            f"{name} is a {named} of {', '.join(sorted(parts))}: only pipelines that draw pixels from noise alone, "
            "with a unet and a scheduler, can be evaluated."
        )


def check_call(name: str, pipeline: DiffusionPipeline) -> None:
    """Refuse a pipeline whose call needs other arguments, such as an image to inpaint."""
    parameters = inspect.signature(pipeline.__call__).parameters
    kinds = inspect.Parameter
    required = {key for key, of in parameters.items() if of.default is kinds.empty and of.kind != kinds.VAR_KEYWORD}
    if required or not set(parameters) >= ARGUMENTS:
        raise ValueError(
            f"{name} is a {type(pipeline).__name__}, which takes {', '.join(parameters)}: only pipelines that take "
            f"{', '.join(sorted(ARGUMENTS))} and need nothing can be evaluated."
        )


def image_form(pipeline: DiffusionPipeline) -> tuple[int, tuple[int, int]]:
    """Channels and (height, width) of a pipeline's images; ValueError if they are of unknown size."""
    channels, size = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    if size is None:
        raise ValueError("sample_size=None of the network: set it to the side of the images, or [height, width].")
    height, width = sides(size)
    return channels, (height, width)


def classes(pipeline: DiffusionPipeline) -> list[int]:
    """The labels of classes: those with names, or all except our null label; empty for an unconditional network."""
    count, names = pipeline.unet.config.get("num_class_embeds"), pipeline.config.get("id2label")
    if count is None:
        return []
    return sorted(map(int, names)) if names else list(range(count - isinstance(pipeline, ScratchDDPMPipeline)))


def class_names(pipeline: DiffusionPipeline) -> list[str]:
    """The names of `classes`, or their numbers where they have no names."""
    names = {int(label): name for label, name in (pipeline.config.get("id2label") or {}).items()}
    return [names.get(label, str(label)) for label in classes(pipeline)]


def has_null_label(pipeline: DiffusionPipeline) -> bool:
    """Whether a class-conditional network's last label stands for no class."""
    return pipeline.unet.config["num_class_embeds"] - 1 not in classes(pipeline)
