"""Images as files hold them: surveyed by their headers, decoded, resized."""

import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import BadImages
from .arrays import (
    PICTURE,
    Kind,
    ValueRange,
    as_array,
    check_values,
    extremes,
    has_more_series,
    kind_of_array,
    kind_of_picture,
    loses_bands,
    parsing,
    read_array,
    read_picture,
    reason,
    stacked,
    to_tensor,
)
from .config import BACKGROUND
from .folders import read_file
from .sizes import Size, as_size, check_covering, scale_that_covers, size_that_covers, upright_size
from .sources import Rows, Source

GRAYSCALE_MODES = ("1", "L", "LA")
PIL_MODE = {1: "L", 3: "RGB", 4: "RGBA"}

# What to do about an image that cannot be read: where there is no flag to pass over it, and where there is one.
MEND = "mend it or leave it out"
REMEDY = f"{MEND}, or pass over such images with --skip_bad_images"


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Errors in here are those of the image at this place; BadImages that names it if there was one."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise BadImages(f"{place} cannot be read: {reason(error)}") from error


@contextmanager
def advising(remedy: str) -> Iterator[None]:
    """BadImages that are raised in here end in what to do about it."""
    try:
        yield
    except BadImages as error:
        raise BadImages(f"{error}; {remedy}") from error


def check_bad_images(messages: Sequence[str], most: int) -> None:
    """Raise BadImages if more images than `most` cannot be read."""
    if len(messages) > most:
        raise BadImages(
            f"{len(messages)} images cannot be read, and max_bad_images is {most}; the last: {messages[-1]}"
        )


class Images(Protocol):
    """Decoded images by index: a tensor [N, C, H, W], a list of [C, H, W], or an object that decodes one at a time.

    They are uint8, or float32 in [-1, 1] if their values are scaled from a range of their own.
    """

    def __len__(self) -> int: ...  # noqa: D105

    def __getitem__(self, index: int) -> Tensor: ...  # noqa: D105


class Values(NamedTuple):
    """The lowest and the highest value of an array, and its place in the set."""

    least: float
    most: float
    place: str


@dataclass(frozen=True)
class Survey:
    """Channels, sizes and fingerprint of images, from their headers."""

    kind: Kind
    channels: int  # of 8-bit pictures, 1 if all are grayscale, else 3
    sizes: frozenset[Size]
    transparent: int  # how many may have transparent pixels
    animated: int  # how many have frames, or pages, after the first
    losing_bands: int  # how many have more bands than PIL gives
    fingerprint: str  # hash of the encoded images
    extremes: tuple[Values, ...] = ()  # of the arrays with the lowest and with the highest value

    def channels_for(self, wanted: int | None) -> int:
        """The channels that the images are to have: those wanted, or their own.

        Raises ValueError if no such images can be made of these.
        """
        if self.kind != PICTURE and wanted not in (None, self.channels):
            raise ValueError(
                f"the network takes {wanted} channels, and the images are {self.kind}: write the images with as many, "
                "or train a new network, which takes the images' channels if its in_channels are left out"
            )
        if wanted not in (None, *PIL_MODE) and self.kind == PICTURE:
            raise ValueError(
                f"the network takes {wanted} channels, pictures have 1 or 3, or 4 with their transparency: take a "
                "network of so many, or write the images as .npy files"
            )
        if wanted == 1 and self.channels == 3:
            raise ValueError(
                "the network takes 1 channel (grayscale), the images have colours: convert them to gray, or take a "
                "network of 3 channels"
            )
        return wanted or self.channels

    def check(self, form: "Form") -> None:
        """Check what is known of the images before any of them is decoded.

        Raises ValueError if one would be too large in this form; BadImages, with its place, if one has values beyond
        the range.
        """
        for size in sorted(self.sizes):
            check_covering(size, form.size)
        for least, most, place in self.extremes if form.value_range else ():
            with naming(place):
                check_values(least, most, cast(ValueRange, form.value_range))

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
    if isinstance(image, list):  # of several columns
        return stacked([encoded_image({"image": part}, index) for part in image])
    if image is None:
        raise ValueError(f"row {index} of the data set has no image, or a path that is no text")
    encoded = cast(bytes | None, image["bytes"])
    if encoded is None:
        with parsing():
            encoded = read_file(image["path"])
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
    path = row["image"]["path"] if isinstance(row["image"], dict) else None
    return f"image {index}" + (f" ({path})" if path else "")


def survey(source: Source, skip_bad_images: bool = False, remedy: str = REMEDY) -> Survey:
    """Read the headers of some images.

    Args:
        source: the images.
        skip_bad_images: leave images out that cannot be read.
        remedy: what to do about such an image, for the error.

    Raises:
        BadImages: an image cannot be read and is not to be left out; or none can be read.
        ValueError: the images are of several kinds.
    """
    kinds: dict[Kind, str] = {}
    headers: list[Header] = []
    values: list[Values] = []
    fault = ""
    digest = hashlib.blake2b(source.extent.encode(), digest_size=16)
    for index in source.surveyed:
        row = row_at(source.images, index)
        place = where(row, index)
        try:
            with naming(place):
                encoded = encoded_image(row, index)
                digest.update(encoded)
                header = read_header(encoded)
        except BadImages as error:
            if not skip_bad_images:
                raise BadImages(f"{error}; {remedy}") from error
            fault = str(error)
            continue
        kinds.setdefault(header.kind, place)
        check_kinds(kinds)
        headers.append(header)
        values += [Values(*header.values, place)] if header.values else []
    if not headers:
        raise BadImages(f"none of {len(source.images)} images can be read; the last: {fault}")
    return summary(headers, values, digest.hexdigest())


class Header(NamedTuple):
    """What a file says of its image."""

    kind: Kind
    size: Size
    gray: bool = False
    transparent: bool = False
    animated: bool = False
    loses_bands: bool = False
    values: tuple[float, float] | None = None  # the lowest and the highest one, of an array


def read_header(encoded: bytes) -> Header:
    """The header of a picture; an array is read whole. ValueError if it cannot be read."""
    if (array := read_array(encoded)) is not None:
        size, animated = (array.shape[0], array.shape[1]), has_more_series(encoded)
        return Header(kind_of_array(array), size, animated=animated, values=extremes(array))
    with parsing(), Image.open(io.BytesIO(encoded)) as image:
        animated, cut = getattr(image, "is_animated", False), loses_bands(image)
        kind, transparent = kind_of_picture(image), image.has_transparency_data
        header = Header(kind, upright_size(image), is_gray(image), transparent, animated, cut)
    return header


def summary(headers: Sequence[Header], values: Sequence[Values], fingerprint: str) -> Survey:
    """What the headers of images of one kind say together."""
    kind = headers[0].kind
    outermost = (min(values, key=lowest), max(values, key=highest)) if values else ()
    return Survey(
        kind,
        kind.channels or (1 if all(header.gray for header in headers) else 3),
        frozenset(header.size for header in headers),
        sum(header.transparent for header in headers),
        sum(header.animated for header in headers),
        sum(header.loses_bands for header in headers),
        fingerprint,
        outermost,
    )


def lowest(values: Values) -> float:
    """The lowest value; -infinity for NaN, so that it is found."""
    return -math.inf if math.isnan(values.least) else values.least


def highest(values: Values) -> float:
    """The highest value; infinity for NaN, so that it is found."""
    return math.inf if math.isnan(values.most) else values.most


def check_kinds(kinds: Mapping[Kind, str]) -> None:
    """Raise ValueError for images of several kinds, given with the place of the first one of each."""
    if len(kinds) > 1:
        said = (f"{place} is {kind}" for kind, place in kinds.items())
        raise ValueError(
            f"{', and '.join(said)}: all images of a set must be of one kind; convert some, or move them to another set"
        )


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


@dataclass(frozen=True)
class Form:
    """The form in which the images of a set come out."""

    channels: int
    size: Size  # that they just cover
    background: str = BACKGROUND  # behind transparent pixels, as PIL names colours
    kind: Kind = PICTURE  # of the files
    value_range: ValueRange | None = None  # None: uint8 as they are

    def refuse_others(self, kind: Kind) -> None:
        """Raise ValueError for a file of another kind than those that were surveyed."""
        if kind != self.kind:
            raise ValueError(
                f"it is {kind}, and the images before are {self.kind}: convert it, or move it to another set"
            )


def decode(
    row: Mapping[str, Any],
    index: int,
    channels: int,
    size: int | Size,
    background: str = BACKGROUND,
    kind: Kind = PICTURE,
    value_range: ValueRange | None = None,
) -> Tensor:
    """An image, resized so that it just covers a size: [channels, H, W], uint8 or, with a range, float32 in [-1, 1].

    The arguments after the place of the image are those of its `Form`.

    Raises BadImages if the image cannot be read, has colours where the network takes none, values beyond the range, or
    would be too large.
    """
    form = Form(channels, as_size(size), background, kind, value_range)
    with naming(where(row, index)):
        encoded = encoded_image(row, index)
        array = read_array(encoded)
        if array is not None:
            form.refuse_others(kind_of_array(array))
            return to_tensor(array, form.value_range, form.size)
        own_kind, image = read_picture(encoded)
        form.refuse_others(own_kind)
        if form.kind == PICTURE:
            image = in_channels(image, form)
        if form.value_range is not None:
            return to_tensor(as_array(image, own_kind), form.value_range, form.size)
        check_covering((image.height, image.width), form.size)
    height, width = size_that_covers((image.height, image.width), form.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(as_array(image)).permute(2, 0, 1).contiguous()


def in_channels(image: Image.Image, form: Form) -> Image.Image:
    """An 8-bit picture as gray, RGB or RGBA; only the last keeps its transparency.

    Raises ValueError if it has colours, and is to be gray.
    """
    if form.channels == 1 and not is_gray(image):
        raise ValueError(f"it is of mode {image.mode}, the training is on grayscale images: convert it to gray")
    seen = image if form.channels == 4 else flattened(image, form.background)
    return seen.convert(PIL_MODE[form.channels])


@dataclass(frozen=True)
class DecodedOnDemand:
    """Images of a set too large to keep decoded."""

    rows: Rows
    form: Form

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """[C, H, W], as `decode` gives it."""
        return decode(row_at(self.rows, index), index, **vars(self.form))


def decode_all(
    images: DecodedOnDemand, skip_bad_images: bool = False, remedy: str = REMEDY
) -> tuple[Images, list[int], list[str]]:
    """Every image, decoded once: one tensor [N, C, H, W] if all have one size, else a list of [C, H, W].

    Args:
        images: decoded on demand.
        skip_bad_images: leave images out that cannot be read.
        remedy: what to do about such an image, for the error.

    Returns:
        The images, their rows, and what is wrong with those that were left out.

    Raises:
        BadImages: an image cannot be read and is not to be left out; or none can be read.
    """
    decoded: Tensor | list[Tensor] = []
    rows: list[int] = []
    unreadable: list[str] = []
    for index in range(len(images)):
        try:
            image = images[index]
        except BadImages as error:
            if not skip_bad_images:
                raise BadImages(f"{error}; {remedy}") from error
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
    if not rows:
        raise BadImages(f"none of {len(images)} images can be read; the last: {unreadable[-1]}")
    return decoded[: len(rows)], rows, unreadable
