"""Pictures of a chain: the frames that `pipeline(..., return_trajectory=N)` keeps, as a strip or an animated GIF."""

import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..diffusion.checks import check_choice, check_whole
from ..diffusion.pipeline import PICTURE_CHANNELS, Frame

FRAME_PARTS = ("sample", "pred_original_sample")
TINY = 64  # pixels; smaller images are enlarged so that a grid can be looked at


def image_grid(images: Sequence[Image.Image], columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Arrange images of one size in a grid, enlarged without smoothing.

    Args:
        images: at least one.
        columns: of the grid; left out, as many as make the picture nearly square.
        scale: whole factor by which pixels are enlarged; left out, 2 for tiny images.
    """
    first = images[0]
    columns = columns or min(len(images), math.ceil(math.sqrt(len(images) * first.height / first.width)))
    rows, scale = math.ceil(len(images) / columns), scale or (2 if max(first.size) < TINY else 1)
    grid = Image.new(first.mode, (columns * first.width, rows * first.height))  # diffusers' own has no transparency
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * first.width, number // columns * first.height))
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Convert images, uint8 [N, H, W, C], to pictures: gray, RGB or RGBA; other channels all side by side in gray."""
    if images.shape[3] not in PICTURE_CHANNELS:
        return [Image.fromarray(np.concatenate(np.moveaxis(image, -1, 0), axis=1)) for image in images]
    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images]


def _pictures(frame: Frame, part: str) -> list[Image.Image]:
    """Convert the images of a frame, in any output type, to PIL images."""
    images = getattr(frame, part)
    if images is None:
        raise ValueError(f"part={part!r}: the scheduler of this chain does not tell it. Take 'sample'.")
    if isinstance(images, list):
        return images
    array = images if isinstance(images, np.ndarray) else images.cpu().permute(0, 2, 3, 1).float().numpy()
    return to_pil((array * 255).round().astype(np.uint8))


def _checked(trajectory: Sequence[Frame] | None, part: str, scale: int) -> Sequence[Frame]:
    check_choice("part", part, FRAME_PARTS)
    check_whole("scale", scale)
    if not trajectory:
        raise ValueError("There are no frames: ask the pipeline for some with return_trajectory=N.")
    return trajectory


def strip(trajectory: Sequence[Frame], part: str = "sample", scale: int = 1) -> Image.Image:
    """A picture with a row for each image of the batch and a column for each frame.

    Args:
        trajectory: the frames.
        part: "sample" (x_t) or "pred_original_sample" (the x_0 predicted from it).
        scale: whole factor by which pixels are enlarged.

    Raises:
        ValueError: no frames, or an argument that is not allowed.
    """
    frames = [_pictures(frame, part) for frame in _checked(trajectory, part, scale)]
    return image_grid([image for row in zip(*frames, strict=True) for image in row], len(frames), scale)


def write_gif(
    trajectory: Sequence[Frame],
    path: str | os.PathLike[str],
    part: str = "sample",
    scale: int = 1,
    milliseconds: int = 80,
) -> None:
    """Write the frames as an animated GIF, with the images of the batch side by side; the last frame stays longer.

    Args:
        trajectory: the frames.
        path: of the file, ending in .gif.
        part: see `strip`.
        scale: see `strip`.
        milliseconds: per frame.

    Raises:
        ValueError: no frames, or an argument that is not allowed; nothing is written.
    """
    check_whole("milliseconds", milliseconds)
    if not str(path).lower().endswith(".gif"):
        raise ValueError(f"path={str(path)!r} must end in .gif.")
    first, *rest = [
        image_grid(images := _pictures(frame, part), len(images), scale) for frame in _checked(trajectory, part, scale)
    ]
    durations = [milliseconds] * len(rest) + [10 * milliseconds]
    # A frame with transparent pixels would otherwise show the one before through them.
    disposal = 2 if first.mode == "RGBA" else 0
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, disposal=disposal)
