"""Sizes of images, (height, width) in pixels everywhere; and crops of one size."""

import re
from collections.abc import Collection, Sequence
from typing import cast

from PIL import Image
from torch import Tensor

from ..diffusion.checks import is_whole

Size = tuple[int, int]  # (height, width)
WORDS = r"\d+(x\d+)?|\[\d+, ?\d+\]"  # a size on the command line, also as UNet2DModel's sample_size has it

MOST_PIXELS = 2 * cast(int, Image.MAX_IMAGE_PIXELS)  # of an image, as PIL has it for those that it opens

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values for images that lie on a side
# Where PIL finds an orientation, in the `info` of an image.
ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}


def as_size(resolution: int | str | Sequence[int]) -> Size:
    """A resolution as (height, width): 64, "64x128", "[64, 128]", (64, 128); ValueError for anything else."""
    sides: Sequence[object] = ()
    if isinstance(resolution, str):
        sides = [int(side) for side in re.findall(r"\d+", resolution)] if re.fullmatch(WORDS, resolution) else ()
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


def check_covering(image: Size, target: Size) -> None:
    """Raise ValueError for an image that would be too large once it covers the target, as very long ones are."""
    height, width = size_that_covers(image, target)
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"an image of {image[0]}x{image[1]} pixels (height x width) that is to cover {target[0]}x{target[1]} "
            f"becomes {height}x{width}, more than {MOST_PIXELS:,} pixels: crop it, or choose another --resolution"
        )


def scale_that_covers(image: Size, target: Size) -> float:
    """The factor by which `size_that_covers` scales."""
    return max(wanted / side for side, wanted in zip(image, target, strict=True))


def describe_fit(found: Collection[Size], target: Size) -> str | None:
    """What becomes of images of these sizes, in words; None if all have the target's size."""
    if set(found) == {target}:
        return None
    least, most = (resolution_of(size) for size in (min(found), max(found)))
    between = f"from {least} to {most}" if least != most else f"{most}"
    parts = [
        f"the images are {between} pixels large (height x width)",
        f"they are resized until they just cover {target[0]}x{target[1]}",
    ]
    covering = [size_that_covers(size, target) for size in found]
    cut = 1 - target[0] * target[1] / max(height * width for height, width in covering)
    if cut > 0:
        parts.append(f"what lies beyond it, up to {cut:.0%} of an image, is cropped")
    enlarged = sum(scale_that_covers(size, target) > 1 for size in found)
    if enlarged:
        parts.append(f"images of {enlarged} of the {len(found)} sizes are smaller than that and are enlarged")
    return "; ".join(parts)


def upright_size(image: Image.Image) -> Size:
    """The size of an image, from its header, once it is turned as its EXIF data or XMP say."""
    # PIL opens a TIFF in the upright size if the orientation is a tag of the file.
    upright = not ORIENTED & image.info.keys() or ORIENTATION in getattr(image, "tag_v2", {})
    turned = not upright and image.getexif().get(ORIENTATION) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def center_crop(image: Tensor, size: Size) -> Tensor:
    """The part of this size at the centre of an image [C, H, W]."""
    top, left = ((side - wanted) // 2 for side, wanted in zip(image.shape[1:], size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]
