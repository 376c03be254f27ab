"""Images as arrays at the full depth of their files: .npy, TIFF of several bands, pictures of more than 8 bits."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from .sizes import Size, check_covering, size_that_covers

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, SAMPLE_FORMAT = 258, 277, 339  # tags of TIFF
# PIL's modes of more than 8 bits, and the type of the values in the file: in "I" PIL keeps the 16 bits of PNG and PGM
# in 32-bit integers. A TIFF says its type itself.
DEEP_MODES = {
    **dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "I;16N"), "uint16"),
    "F": "float32",
}
TIFF_TYPES = {  # by the bits of a sample and its format: 1 stands for unsigned integers, 2 for signed ones
    (12, 1): "uint12",
    (16, 1): "uint16",
    (16, 2): "int16",
    (32, 1): "uint32",
    (32, 2): "int32",
}
OWN_RANGES = {  # of a type's values; integers of more than 16 bits have none that images fill
    "uint8": (0.0, 255.0),
    "int8": (-128.0, 127.0),
    "uint12": (0.0, 4095.0),
    "uint16": (0.0, 65535.0),
    "int16": (-32768.0, 32767.0),
    **dict.fromkeys(("float16", "float32", "float64", "float128"), (0.0, 1.0)),
}
LAST_AXIS, FIRST_AXIS = ("YXS", "YXC"), ("SYX", "CYX")  # where the bands of a TIFF are, as tifffile names axes

ValueRange = tuple[float, float]  # the values that become -1 and 1


class Kind(NamedTuple):
    """What the images of a set have in common."""

    dtype: str  # of their values, as numpy names it; or uint12, which numpy does not have
    channels: int | None  # None: 8-bit pictures, of which gray or coloured ones can be made

    def __str__(self) -> str:
        """In words."""
        return "an 8-bit picture" if self.channels is None else f"{self.dtype} of {self.channels} channels"


PICTURE = Kind("uint8", None)


@contextmanager
def parsing() -> Iterator[None]:
    """Errors in here are those of a damaged file, of whichever type PIL, numpy or tifffile raise; ValueError if any."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(reason(error)) from error


def reason(error: Exception) -> str:
    """The fault of a file in words; with the error's type where its words alone may say little."""
    if isinstance(error, UnidentifiedImageError):  # whose words are the name of a buffer in memory
        return "it is no image file"
    plain = isinstance(error, OSError | ValueError | SyntaxError)
    return ": ".join(part for part in ("" if plain and str(error) else type(error).__name__, str(error)) if part)


def read_array(encoded: bytes) -> np.ndarray | None:
    """An .npy file, or a TIFF that PIL does not read whole, as [H, W, C]; None for other files.

    Raises ValueError if it cannot be read, or holds no numbers of such a shape.
    """
    if encoded.startswith(NPY):
        try:
            with parsing():
                array = np.load(io.BytesIO(encoded), allow_pickle=False)
        except MemoryError as error:
            raise ValueError("its header names a size that no memory holds") from error
    elif encoded.startswith(TIFF) and is_beyond_pil(encoded):
        array = read_tiff(encoded)
    else:
        return None
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "uif":
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}: numbers [H, W] or [H, W, C] are needed")
    if encoded.startswith(NPY):
        check_channels_last(array)
    return array[..., None] if array.ndim == 2 else array


# What 8-bit pictures of these modes become where their values are taken one by one; others become RGB.
PLAIN_MODES = {"L": "L", "RGB": "RGB", "1": "L", "LA": "L"}


def stacked(parts: Sequence[bytes]) -> bytes:
    """Several pictures or arrays of one size as one .npy file, with the channels of one after those of the other.

    Raises ValueError if one cannot be read, or their sizes or types differ.
    """
    bands = [values_of(part) for part in parts]
    if len({(band.shape[:2], band.dtype) for band in bands}) > 1:
        said = ", ".join(f"{band.dtype} {band.shape[0]}x{band.shape[1]}" for band in bands)
        raise ValueError(f"its columns differ in type or size: {said}")
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(bands, axis=2))
    return buffer.getvalue()


def values_of(encoded: bytes) -> np.ndarray:
    """The values of a picture or an array: [H, W, C]."""
    if (array := read_array(encoded)) is not None:
        return array
    kind, image = read_picture(encoded)
    return as_array(image.convert(PLAIN_MODES.get(image.mode, "RGB")) if kind == PICTURE else image, kind)


def read_picture(encoded: bytes) -> tuple[Kind, Image.Image]:
    """A picture, loaded and turned upright, and its kind; ValueError if it cannot be read."""
    with parsing(), Image.open(io.BytesIO(encoded)) as opened:
        kind, image = kind_of_picture(opened), ImageOps.exif_transpose(opened)
    return kind, image


def as_array(image: Image.Image, kind: Kind = PICTURE) -> np.ndarray:
    """The values of a picture, [H, W, C]."""
    values = np.array(image).reshape(image.height, image.width, -1)
    return values.view(np.uint32) if kind.dtype == "uint32" else values  # PIL has them in signed integers


def check_channels_last(array: np.ndarray) -> None:
    """Raise ValueError for an array that looks like [C, H, W]."""
    height, width, channels = (*array.shape, 1)[:3]
    if height < min(width, channels):
        raise ValueError(
            f"its shape {list(array.shape)} has fewer rows than columns and channels, as if the channels stood first: "
            "write arrays as [H, W, C], for instance by numpy.moveaxis(array, 0, -1)"
        )


def is_beyond_pil(encoded: bytes) -> bool:
    """Whether PIL cannot open a TIFF, or would give only the first of several deep bands or pages."""
    with parsing():
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                several = samples_per_pixel(image) > 1 or getattr(image, "n_frames", 1) > 1
                beyond = image.mode in DEEP_MODES and several
        except UnidentifiedImageError:
            beyond = True
    return beyond


def samples_per_pixel(image: Image.Image) -> int:
    """How many bands a TIFF has in its file; 1 of other files."""
    return int(getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 1))


def loses_bands(image: Image.Image) -> bool:
    """Whether a file has more bands than PIL gives, such as a TIFF of red, green, blue and near infrared."""
    return samples_per_pixel(image) > len(image.getbands())


def read_tiff(encoded: bytes) -> np.ndarray:
    """A TIFF as [H, W] or [H, W, C], by tifffile; ValueError if that is not installed, or cannot read it."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            'it is no TIFF that PIL reads; one of several bands needs tifffile: pip install "ddpm-from-scratch[train]"'
        ) from error
    try:
        with parsing(), tifffile.TiffFile(io.BytesIO(encoded)) as file:
            series = file.series[0]
            axes, array = series.axes, series.asarray()
    except ValueError as error:
        raise ValueError(f"tifffile cannot read it: {error}") from error
    if axes in FIRST_AXIS:
        return np.moveaxis(array, 0, -1)
    if axes == "YX" or axes in LAST_AXIS:
        return np.asarray(array)
    raise ValueError(
        f"its axes are {axes} {list(array.shape)}: it must be one page, with its bands as samples (tifffile writes it "
        "with photometric='minisblack', planarconfig='contig' or 'separate')"
    )


def has_more_series(encoded: bytes) -> bool:
    """Whether a file is a TIFF that has pages of other shapes than those that `read_tiff` gives."""
    if not encoded.startswith(TIFF):
        return False
    import tifffile

    with parsing(), tifffile.TiffFile(io.BytesIO(encoded)) as file:
        count = len(file.series)
    return count > 1


def kind_of_array(array: np.ndarray) -> Kind:
    """The kind of an array [H, W, C]."""
    return Kind(array.dtype.name, array.shape[2])


def kind_of_picture(image: Image.Image) -> Kind:
    """The kind of what PIL has opened."""
    if image.mode not in DEEP_MODES:
        return PICTURE
    tags: Any = getattr(image, "tag_v2", {})
    written = (tags.get(BITS_PER_SAMPLE, (0,))[0], tags.get(SAMPLE_FORMAT, (1,))[0])
    return Kind(TIFF_TYPES.get(written, DEEP_MODES[image.mode]), 1)


def range_of(kind: Kind, wanted: Sequence[float] | None) -> ValueRange | None:
    """The values that become -1 and 1: those wanted, or those of the type, which for floats are 0 and 1.

    Returns:
        The range; None for 8-bit values in their own range, which stay as they are.

    Raises:
        ValueError: no range is wanted, and the type has none of its own.
    """
    own = OWN_RANGES.get(kind.dtype)
    chosen = own if wanted is None else (float(wanted[0]), float(wanted[1]))
    if chosen is None:
        raise ValueError(f"the images are {kind}: say with --value_range LOW HIGH which values become -1 and 1")
    return None if kind.dtype == "uint8" and chosen == own else chosen


def to_tensor(array: np.ndarray, value_range: ValueRange | None, size: Size) -> Tensor:
    """An array [H, W, C] as [C, H, W], resized so that it just covers a size.

    Returns:
        float32 in [-1, 1]; uint8 as it is, where there is no range.

    Raises:
        ValueError: values lie outside of the range, or are not finite; or the image would be too large.
    """
    check_covering(array.shape[:2], size)
    values = array if value_range is None else in_unit_range(array, value_range)
    image = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
    height, width = size_that_covers(array.shape[:2], size)
    if (height, width) == array.shape[:2]:
        return image
    resized = F.interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    return resized.clamp(-1, 1) if value_range else resized.round().clamp(0, 255).to(torch.uint8)


def in_unit_range(array: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Values of a range as float32 in [-1, 1]; ValueError if some lie outside of it, or are not finite."""
    low, high = value_range
    check_values(*extremes(array), value_range)
    return ((array.astype(np.float64) - low) * (2 / (high - low)) - 1).clip(-1, 1).astype(np.float32)


def extremes(array: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest value of an array; both NaN if it holds NaN."""
    return float(array.min()), float(array.max())


def check_values(least: float, most: float, value_range: ValueRange) -> None:
    """Raise ValueError unless these lowest and highest values of an image are finite and in the range."""
    low, high = value_range
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("some of its values are NaN or infinite: put numbers in their place")
    if least < low or high < most:
        raise ValueError(
            f"its values are from {least:g} to {most:g}, and {low:g} to {high:g} are taken: say with --value_range "
            "LOW HIGH which values become -1 and 1"
        )


def to_8_bits(image: Tensor) -> Tensor:
    """An image as pictures and features need it: uint8, to which floats in [-1, 1] are rounded."""
    return ((image + 1) * 127.5).round().to(torch.uint8) if image.is_floating_point() else image


def to_unit_range(pixels: Tensor) -> Tensor:
    """Images as the network sees them: float32 in [-1, 1], from uint8 0 .. 255; floats are in [-1, 1] already."""
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1
