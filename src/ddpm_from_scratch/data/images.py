"""Images as files hold them: surveyed by their headers, decoded to uint8, resized."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..runtime.errors import BadImages
from .config import BACKGROUND
from .folders import read_file
from .sizes import Size, scale_that_covers, size_that_covers, upright_size
from .sources import Rows, Source

GRAYSCALE_MODES = ("1", "L", "LA")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # PIL would clip them to 8 bits, not scale them
PIL_MODE = {1: "L", 3: "RGB"}

# What PIL raises on bytes that are not an image, or only part of one: its plugins, what their parsing runs into.
BROKEN_IMAGE = (Exception,)
REMEDY = "mend it or leave it out, or pass over such images with --skip_bad_images"


def check_bad_images(messages: Sequence[str], most: int) -> None:
    """Raise BadImages if more images than `most` cannot be read."""
    if len(messages) > most:
        raise BadImages(
            f"{len(messages)} images cannot be read, and max_bad_images is {most}; the last: {messages[-1]}"
        )


class Images(Protocol):
    """Decoded images by index: a uint8 tensor [N, C, H, W], a list of [C, H, W], or a decoder behind the same face."""

    def __len__(self) -> int: ...  # noqa: D105

    def __getitem__(self, index: int) -> Tensor: ...  # noqa: D105


@dataclass(frozen=True)
class Survey:
    """Channels, sizes and fingerprint of images, from their headers."""

    channels: int  # 1 if all are grayscale, else 3
    sizes: frozenset[Size]
    transparent: int  # how many may have transparent pixels
    animated: int  # how many have frames, or pages, after the first
    fingerprint: str  # hash of the encoded images

    def own_size(self) -> Size:
        """The images' size, if it is the same for all.

        Raises ValueError if it is not, so the resolution has to be chosen.
        """
        smallest, largest = min(self.sizes), max(self.sizes)
        if smallest != largest:
            raise ValueError(
                f"the images are from {smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]} pixels large (height x "
                f"width), not of one size: choose --resolution"
            )
        return smallest

    def pixels_covering(self, size: Size) -> float:
        """Pixels of the largest image, scaled until it covers a size: that is kept until it is cropped."""
        return max(height * width * scale_that_covers((height, width), size) ** 2 for height, width in self.sizes)


def encoded_image(row: Mapping[str, Any], index: int) -> bytes:
    """The bytes of an image, from the row itself or from the file that it names; ValueError if the row has none."""
    image = row["image"]
    if image is None:
        raise ValueError(f"row {index} of the data set has no image, or a path that is no text")
    encoded = cast(bytes, image["bytes"]) if image["bytes"] is not None else read_file(image["path"])
    if not encoded:
        raise ValueError("it is empty")
    return encoded


def row_at(rows: Rows, index: int) -> Mapping[str, Any]:
    """A row; without its image if the image's path is no text."""
    try:
        return rows[index]
    except UnicodeDecodeError:
        return {"image": None}


def where(row: Mapping[str, Any], index: int) -> str:
    """The place of an image, for error messages."""
    path = row["image"] and row["image"]["path"]
    return f"image {index}" + (f" ({path})" if path else "")


def reason(error: Exception) -> str:
    """The fault of an image in words; PIL names an object in memory."""
    return "it is no image file" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def survey(source: Source, skip_bad_images: bool = False) -> Survey:
    """Read the headers of some images.

    Raises BadImages if an image cannot be read, and such ones are not to be passed over; or none can; ValueError if an
    image has more than 8 bits per channel.
    """
    gray, sizes, transparent, animated = True, set(), 0, 0
    digest = hashlib.blake2b(source.extent.encode(), digest_size=16)
    for index in source.surveyed:
        row = row_at(source.images, index)
        try:
            encoded = encoded_image(row, index)
            digest.update(encoded)
            with Image.open(io.BytesIO(encoded)) as image:
                mode, size = image.mode, upright_size(image)
                gray = gray and is_gray(image)
                transparent += image.has_transparency_data
                animated += getattr(image, "is_animated", False)
        except BROKEN_IMAGE as error:
            if skip_bad_images:
                continue
            raise BadImages(f"{where(row, index)} cannot be read: {reason(error)}; {REMEDY}") from error
        if mode in DEEP_MODES:
            raise ValueError(
                f"{where(row, index)} has more than 8 bits per channel (mode {mode}): convert it to 8 bits"
            )
        sizes.add(size)
    if not sizes:
        raise BadImages(f"none of {len(source.images)} images can be read")
    return Survey(1 if gray else 3, frozenset(sizes), transparent, animated, digest.hexdigest())


def is_gray(image: Image.Image) -> bool:
    """Whether an image is gray by its mode, or all colours of its palette are."""
    if image.mode not in ("P", "PA"):
        return image.mode in GRAYSCALE_MODES
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def flattened(image: Image.Image, background: str) -> Image.Image:
    """An image as one sees it in front of a background; without transparent pixels, as it is."""
    if not image.has_transparency_data:
        return image
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, background), seen)


def decode(row: Mapping[str, Any], index: int, channels: int, size: Size, background: str = BACKGROUND) -> Tensor:
    """An image, resized so that it just covers a size: uint8 [channels, H, W].

    Transparent pixels show the background, a colour as PIL names it.

    Raises BadImages if the image cannot be read, or it has colours where the network takes none.
    """
    try:
        with Image.open(io.BytesIO(encoded_image(row, index))) as opened:
            image = ImageOps.exif_transpose(opened)
            if channels == 1 and not is_gray(image):
                raise ValueError(f"it is of mode {image.mode}, the training is on grayscale images")
            image = flattened(image, background).convert(PIL_MODE[channels])
    except BROKEN_IMAGE as error:
        raise BadImages(f"{where(row, index)} cannot be read: {reason(error)}") from error
    height, width = size_that_covers((image.height, image.width), size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W] or [H, W, C]
    return pixels.reshape(image.height, image.width, channels).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class DecodedOnDemand:
    """Images of a set too large to keep decoded."""

    rows: Rows
    channels: int
    size: Size
    background: str = BACKGROUND

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """Uint8 [C, H, W]."""
        return decode(row_at(self.rows, index), index, self.channels, self.size, self.background)


def decode_all(images: DecodedOnDemand, skip_bad_images: bool = False) -> tuple[Images, list[int], list[str]]:
    """Every image, decoded once: one tensor [N, C, H, W] if all have one size, else a list of [C, H, W].

    Returns:
        The images, their rows, and what is wrong with those that were passed over.

    Raises:
        BadImages: one cannot be read, and such ones are not to be passed over.
    """
    decoded: Tensor | list[Tensor] = []
    rows: list[int] = []
    unreadable: list[str] = []
    for index in range(len(images)):
        try:
            image = images[index]
        except BadImages as error:
            if not skip_bad_images:
                raise BadImages(f"{error}; {REMEDY}") from error
            unreadable.append(str(error))
            continue
        if not rows:  # one tensor that is filled, not parts that are joined: they would be there twice
            decoded = image.new_empty(len(images), *image.shape)
        if isinstance(decoded, Tensor) and image.shape != decoded.shape[1:]:
            decoded = list(decoded[: len(rows)])
        if isinstance(decoded, Tensor):
            decoded[len(rows)] = image
        else:
            decoded.append(image)
        rows.append(index)
    return decoded[: len(rows)], rows, unreadable
