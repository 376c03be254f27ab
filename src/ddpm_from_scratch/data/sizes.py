"""Sizes of images, (height, width) in pixels everywhere; and crops of one size."""

import re
from collections.abc import Collection, Sequence

from PIL import Image
from torch import Tensor

from ..diffusion.checks import is_whole

Size = tuple[int, int]  # (height, width)

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values for images that lie on a side


def as_size(resolution: int | str | Sequence[int]) -> Size:
    """A resolution as (height, width): 64, "64x128", (64, 128) or [64, 128]; ValueError for anything else."""
    sides: Sequence[object] = ()
    if isinstance(resolution, str):
        sides = [int(side) for side in resolution.split("x")] if re.fullmatch(r"\d+(x\d+)?", resolution) else ()
    elif isinstance(resolution, Sequence):
        sides = resolution
    else:
        sides = (resolution,)
    numbers = [int(side) for side in sides if is_whole(side) and side >= 1]
    if len(numbers) != len(sides) or len(sides) not in (1, 2):
        raise ValueError(f"a size is a side such as 64, or height x width such as 64x128, got {resolution!r}")
    return numbers[0], numbers[-1]


def is_size(resolution: object) -> bool:
    """Whether `as_size` takes it."""
    try:
        as_size(resolution)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def resolution_of(size: Size) -> int | str:
    """A size as configurations and results have it: the side of a square, else "HxW"."""
    height, width = size
    return height if height == width else f"{height}x{width}"


def size_that_covers(image: Size, target: Size) -> Size:
    """The size of an image, scaled until it just covers the target on both sides."""
    scale = scale_that_covers(image, target)
    height, width = (max(wanted, round(side * scale)) for side, wanted in zip(image, target, strict=True))
    return height, width


def scale_that_covers(image: Size, target: Size) -> float:
    """The factor by which `size_that_covers` scales."""
    return max(wanted / side for side, wanted in zip(image, target, strict=True))


def describe_fit(found: Collection[Size], target: Size) -> str | None:
    """What becomes of images of these sizes, in words; None if all have the target's size."""
    if set(found) == {target}:
        return None
    least, most = (resolution_of(size) for size in (min(found), max(found)))
    words = [f"resized to cover {target[0]}x{target[1]}"]
    covering = [size_that_covers(size, target) for size in found]
    cut = 1 - target[0] * target[1] / max(height * width for height, width in covering)
    if cut > 0:
        words.append(f"cropped: of the longest, {cut:.0%} is cut off")
    enlarged = sum(scale_that_covers(size, target) > 1 for size in found)
    if enlarged:
        words.append(f"enlarged where they are smaller: {enlarged} of {len(found)} sizes met")
    between = f"from {least} to {most}" if least != most else f"{most}"
    return f"the images are {between} pixels large (height x width); they are {', '.join(words)}"


def upright_size(image: Image.Image) -> Size:
    """The size of an image once it is turned as its EXIF data say, from its header; PIL turns TIFF's by itself."""
    turned = "exif" in image.info and image.format != "TIFF" and image.getexif().get(ORIENTATION) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def center_crop(image: Tensor, size: Size) -> Tensor:
    """The part of this size at the centre of an image [C, H, W]."""
    top, left = ((side - wanted) // 2 for side, wanted in zip(image.shape[1:], size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]
