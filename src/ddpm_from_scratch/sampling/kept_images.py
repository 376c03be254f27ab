"""Keep generated images in files, so that a stopped evaluation can resume."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from ..runtime.array_files import read_arrays, write_arrays
from .generate import Samples, SampleSpec, describe, draw_from, generate
from .models import classes

SAVE_SECONDS = 60.0  # after which images that are being drawn are kept


def generate_once(
    pipeline: DiffusionPipeline, spec: SampleSpec, accelerator: Accelerator, folder: Path | None
) -> np.ndarray:
    """Like `generate`, but reuse the images in the folder, and save new ones there every minute.

    Raises ValueError if an image is not finite, or the file in the folder holds images of another origin.
    """
    if folder is None:
        return generate(pipeline, spec, accelerator)
    path, origin = place(spec, folder), describe_origin(pipeline, spec)
    kept = read_kept(path, origin)
    accelerator.wait_for_everyone()  # nobody reads what another process has begun to replace
    if len(kept) >= spec.num_images:
        return kept[: spec.num_images]
    first = len(kept) // spec.batch_size * spec.batch_size
    parts = [kept[:first]] if first else []
    saved = time.monotonic()
    for part in draw_from(pipeline, spec, accelerator, first):
        parts.append(part)
        complete = sum(map(len, parts)) == spec.num_images
        if accelerator.is_main_process and (complete or time.monotonic() - saved > SAVE_SECONDS):
            keep(path, Samples(np.concatenate(parts), describe(pipeline, spec)), origin)
            saved = time.monotonic()
    return np.concatenate(parts)


def place(spec: SampleSpec, folder: Path) -> Path:
    """The file in the folder that keeps the images of a spec."""
    return folder / f"steps-{spec.num_inference_steps}{'-classes' if spec.balanced_labels else ''}.npz"


def describe_origin(pipeline: DiffusionPipeline, spec: SampleSpec) -> dict[str, Any]:
    """Everything that the images depend on, except their number."""
    return {
        **describe(pipeline, spec),
        "batch_size": spec.batch_size,  # which changes their rounding
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "model": digest(pipeline),
    }


def digest(pipeline: DiffusionPipeline) -> str:
    """A hash of the network, its classes and the scheduler's configuration, independent of path and process."""
    parts: list[Any] = [type(pipeline).__name__, classes(pipeline)]
    for part in (pipeline.unet, pipeline.scheduler):  # what begins with _ says where it is from
        parts.append({name: value for name, value in part.config.items() if not name.startswith("_")})
    hashed = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in pipeline.unet.state_dict().items():
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def keep(path: Path, drawn: Samples, origin: dict[str, Any]) -> None:
    """Write images for `read_kept` and `read_images`; the file is complete at any time.

    Raises OSError if it cannot be written.
    """
    facts, of = (np.array(json.dumps(values)) for values in (drawn.facts, origin))
    write_arrays(path, images=drawn.images, facts=facts, origin=of)


def read_kept(path: Path, origin: dict[str, Any]) -> np.ndarray:
    """Read the images that `keep` wrote, uint8 [N, H, W, C]; N = 0 if there is no file.

    Raises ValueError if they are of another origin, or the file cannot be read.
    """
    if not path.is_file():
        return np.zeros((0, 1, 1, 1), np.uint8)
    arrays = read_arrays(path, "images")
    found = read_facts(path, arrays, "origin")
    differing = [name for name in origin if found.get(name) != origin[name]]
    if differing:
        raise ValueError(
            f"{path} holds other images than are asked for (another {', another '.join(differing)}): name another "
            "folder, or move it away."
        )
    return arrays["images"]


def read_images(path: Path, form: tuple[int, ...], least: int) -> Samples:
    """Read an .npz of images, uint8 [N, H, W, C] or gray [N, H, W], and how they were drawn, if `keep` wrote it.

    Args:
        path: of the file.
        form: the (H, W, C) that they must have.
        least: the number of images that are needed.

    Raises:
        ValueError: they are not such images.
    """
    arrays = read_arrays(path, "images")
    images = arrays["images"]
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.shape[1:] != form or len(images) < least:
        raise ValueError(
            f"{path} holds {images.dtype} {list(images.shape)}; uint8 [N, {', '.join(map(str, form))}] with "
            f"N >= {least} is needed."
        )
    return Samples(images, {"file": path.name, **read_facts(path, arrays, "facts")})


def read_facts(path: Path, arrays: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """Read what `keep` wrote under a name; empty if there is nothing, ValueError if it is not a JSON object."""
    try:
        return dict(json.loads(str(arrays.get(name, "{}"))))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {name}: {error}") from error
