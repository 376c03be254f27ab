"""Images that a model draws, and the files in which they are kept."""

import hashlib
import io
import json
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm import tqdm

from draws import generator
from durable import replace_file
from models import classes, image_form

SAVE_SECONDS = 60.0  # after which images that are being drawn are kept


@dataclass(frozen=True)
class Drawing:
    """Images to be drawn: image i follows from the seed and i."""

    num_inference_steps: int
    num_images: int
    balanced_labels: bool = False  # classes in turn instead of the null label
    batch_size: int = 64
    seed: int = 0


class Drawn(NamedTuple):
    """Images, uint8 [N, H, W, C], and how they came about."""

    images: np.ndarray
    facts: dict[str, Any]


def describe(pipeline: DiffusionPipeline, drawing: Drawing) -> dict[str, Any]:
    """How a pipeline draws."""
    return {
        "num_inference_steps": drawing.num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        **({"labels": "balanced" if drawing.balanced_labels else "null"} if classes(pipeline) else {}),
        "seed": drawing.seed,
    }


def generate(
    pipeline: DiffusionPipeline, drawing: Drawing, accelerator: Accelerator, progress: bool = True
) -> np.ndarray:
    """Images that a pipeline draws: uint8 [N, H, W, C], on every process.

    Raises:
        ValueError: an image is not finite.
    """
    return np.concatenate(list(draw_from(pipeline, drawing, accelerator, 0, progress)))


def draw_from(
    pipeline: DiffusionPipeline, drawing: Drawing, accelerator: Accelerator, first: int, progress: bool = True
) -> Iterator[np.ndarray]:
    """The images from number `first` on, which begins a batch; in parts, to each of which every process adds a batch.

    Batches are always whole and dealt out to the processes as they are, so that neither their number nor N changes an
    image.

    Raises:
        ValueError: an image is not finite.
    """
    rank, world_size, size = accelerator.process_index, accelerator.num_processes, drawing.batch_size
    channels, side = image_form(pipeline)
    starts = range(first, drawing.num_images, world_size * size)
    title = f"{drawing.num_inference_steps} steps"
    for start in tqdm(starts, desc=title, unit="batch", disable=rank > 0 or not progress):
        own = start + rank * size
        # What no batch fills stays in its place: every process has to gather as many.
        batch = torch.zeros(size, side, side, channels, dtype=torch.uint8)
        if own < drawing.num_images:
            batch = draw_batch(pipeline, drawing, range(own, own + size))
        together = accelerator.gather(batch.to(accelerator.device)).cpu()
        yield together[: drawing.num_images - start].numpy()


def draw_batch(pipeline: DiffusionPipeline, drawing: Drawing, numbers: range) -> torch.Tensor:
    """The images of these numbers: uint8 [B, H, W, C].

    Raises:
        ValueError: one is not finite.
    """
    of = classes(pipeline) if drawing.balanced_labels else []
    images = np.asarray(
        pipeline(
            batch_size=len(numbers),
            generator=[generator(drawing.seed, "evaluation", number) for number in numbers],
            num_inference_steps=drawing.num_inference_steps,
            output_type="np",
            **({"class_labels": labels_of(of, numbers)} if of else {}),
        ).images
    )
    if not np.isfinite(images).all():
        raise ValueError(f"the model gives images that are not finite, in {drawing.num_inference_steps} steps.")
    return torch.from_numpy((images * 255).round().astype(np.uint8))


def labels_of(of: list[int], numbers: range) -> list[int]:
    """The classes in turn."""
    return [of[number % len(of)] for number in numbers]


def to_unit_range(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, C] as float [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- files ---------------------------------------------------------------------------------------------------------


def generate_once(
    pipeline: DiffusionPipeline, drawing: Drawing, accelerator: Accelerator, folder: Path | None
) -> np.ndarray:
    """As `generate`; images that the folder holds are not drawn again, and new ones are kept there every minute.

    Raises:
        ValueError: an image is not finite, or the folder holds images of something else under their name.
    """
    if folder is None:
        return generate(pipeline, drawing, accelerator)
    path, origin = place(drawing, folder), describe_origin(pipeline, drawing)
    kept = read_kept(path, origin)
    accelerator.wait_for_everyone()  # nobody reads what another process has begun to replace
    if len(kept) >= drawing.num_images:
        return kept[: drawing.num_images]
    first = len(kept) // drawing.batch_size * drawing.batch_size
    parts = [kept[:first]] if first else []
    saved = time.monotonic()
    for part in draw_from(pipeline, drawing, accelerator, first):
        parts.append(part)
        complete = sum(map(len, parts)) == drawing.num_images
        if accelerator.is_main_process and (complete or time.monotonic() - saved > SAVE_SECONDS):
            keep(path, Drawn(np.concatenate(parts), describe(pipeline, drawing)), origin)
            saved = time.monotonic()
    return np.concatenate(parts)


def place(drawing: Drawing, folder: Path) -> Path:
    """The file of its images in a folder."""
    return folder / f"steps-{drawing.num_inference_steps}{'-classes' if drawing.balanced_labels else ''}.npz"


def describe_origin(pipeline: DiffusionPipeline, drawing: Drawing) -> dict[str, Any]:
    """All that images depend on, but for their number."""
    return {
        **describe(pipeline, drawing),
        "batch_size": drawing.batch_size,  # which changes their rounding
        "precision": str(pipeline.unet.dtype).removeprefix("torch."),
        "model": digest(pipeline),
    }


def digest(pipeline: DiffusionPipeline) -> str:
    """Of the network, its classes and the scheduler's configuration; the same in every place and process."""
    parts: list[Any] = [type(pipeline).__name__, classes(pipeline)]
    for part in (pipeline.unet, pipeline.scheduler):  # what begins with _ says where it is from
        parts.append({name: value for name, value in part.config.items() if not name.startswith("_")})
    hashed = hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in pipeline.unet.state_dict().items():
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def keep(path: Path, drawn: Drawn, origin: dict[str, Any]) -> None:
    """Write images for `read_kept` and `read_images`; the file is whole at any time.

    Raises:
        OSError: it cannot be written.
    """
    facts, of = (np.array(json.dumps(values)) for values in (drawn.facts, origin))
    archive = io.BytesIO()
    np.savez_compressed(archive, images=drawn.images, facts=facts, origin=of)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, archive.getvalue())


def read_kept(path: Path, origin: dict[str, Any]) -> np.ndarray:
    """The images that `keep` wrote: uint8 [N, H, W, C]; none if there is no file.

    Raises:
        ValueError: they are of another origin, or the file cannot be read.
    """
    if not path.is_file():
        return np.zeros((0, 1, 1, 1), np.uint8)
    arrays = read_arrays(path)
    found = read_facts(path, arrays, "origin")
    differing = [name for name in origin if found.get(name) != origin[name]]
    if differing:
        raise ValueError(
            f"{path} holds other images than are asked for (another {', another '.join(differing)}): name another "
            "folder, or move it away."
        )
    return arrays["images"]


def read_images(path: Path, form: tuple[int, ...], least: int) -> Drawn:
    """The images of an .npz, uint8 [N, H, W, C] or gray [N, H, W]; and how they came about, if `keep` wrote it.

    Args:
        path: of the file.
        form: (H, W, C) that they are to have.
        least: number of images that are needed.

    Raises:
        ValueError: they are not such images.
    """
    arrays = read_arrays(path)
    images = arrays["images"]
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.shape[1:] != form or len(images) < least:
        raise ValueError(
            f"{path} holds {images.dtype} {list(images.shape)}; uint8 [N, {', '.join(map(str, form))}] with "
            f"N >= {least} is needed."
        )
    return Drawn(images, {"file": path.name, **read_facts(path, arrays, "facts")})


def read_facts(path: Path, arrays: dict[str, np.ndarray], name: str) -> dict[str, Any]:
    """What `keep` wrote under a name; nothing if there is none.

    Raises:
        ValueError: it is something else.
    """
    try:
        return dict(json.loads(str(arrays.get(name, "{}"))))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {name}: {error}") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, `images` among them.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        if "images" not in arrays:
            raise KeyError("images is not a file in the archive")
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return arrays
