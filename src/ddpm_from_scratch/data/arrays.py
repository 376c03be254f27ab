"""Images as arrays at the full depth of their files: .npy, TIFF of several bands, pictures of more than 8 bits."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from .sizes import Size, size_that_covers

NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SAMPLES_PER_PIXEL, BITS_PER_SAMPLE = 277, 258  # tags of TIFF
# PIL's modes of more than 8 bits, by the type whose range is meant: "I" holds 16 bits of PGM, PNG and TIFF in 32.
DEEP_MODES = {
    **dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "I;16N"), "uint16"),
    "F": "float32",
}
LAST_AXIS, FIRST_AXIS = ("YXS", "YXC"), ("SYX", "CYX")  # where the bands of a TIFF are, as tifffile names axes

ValueRange = tuple[float, float]  # the values that become -1 and 1


class Kind(NamedTuple):
    """What the images of a set have in common."""

    dtype: str  # of their values, as numpy names it
    channels: int | None  # None: 8-bit pictures, of which gray or coloured ones can be made

    def __str__(self) -> str:
        """In words."""
        return "an 8-bit picture" if self.channels is None else f"{self.dtype} of {self.channels} channels"


PICTURE = Kind("uint8", None)


def read_array(encoded: bytes) -> np.ndarray | None:
    """An .npy file, or a TIFF that PIL does not read whole, as [H, W, C]; None for other files.

    Raises ValueError if it cannot be read, or holds no numbers of such a shape.
    """
    if encoded.startswith(NPY):
        try:
            array = np.load(io.BytesIO(encoded), allow_pickle=False)
        except MemoryError as error:
            raise ValueError("its header names a size that no memory holds") from error
    elif encoded.startswith(TIFF) and is_beyond_pil(encoded):
        array = read_tiff(encoded)
    else:
        return None
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "uif":
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}: numbers [H, W] or [H, W, C] are needed")
    return array[..., None] if array.ndim == 2 else array


def is_beyond_pil(encoded: bytes) -> bool:
    """Whether PIL does not open a TIFF, or would give one of its deep bands or pages alone."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            bands = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 1)
            return image.mode in DEEP_MODES and (bands > 1 or getattr(image, "n_frames", 1) > 1)
    except UnidentifiedImageError:
        return True


def read_tiff(encoded: bytes) -> np.ndarray:
    """A TIFF as [H, W] or [H, W, C], by tifffile; ValueError if that is not installed, or cannot read it."""
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            'it is no TIFF that PIL reads; one of several bands needs tifffile: pip install "ddpm-from-scratch[train]"'
        ) from error
    try:
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            series = file.series[0]
            axes, array = series.axes, series.asarray()
    except Exception as error:  # it raises whatever a damaged file makes it stumble over
        raise ValueError(f"tifffile cannot read it: {error}") from error
    if axes in FIRST_AXIS:
        return np.moveaxis(array, 0, -1)
    if axes == "YX" or axes in LAST_AXIS:
        return np.asarray(array)
    raise ValueError(
        f"its axes are {axes} {list(array.shape)}: it must be one page, with its bands as samples (tifffile writes it "
        "with photometric='minisblack', planarconfig='contig' or 'separate')"
    )


def kind_of_array(array: np.ndarray) -> Kind:
    """The kind of an array [H, W, C]."""
    return Kind(array.dtype.name, array.shape[2])


def kind_of_picture(image: Image.Image) -> Kind:
    """The kind of what PIL has opened."""
    if image.mode not in DEEP_MODES:
        return PICTURE
    signed = image.mode == "I" and getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) == (16,)
    return Kind("int16" if signed else DEEP_MODES[image.mode], 1)


def range_of(kind: Kind, wanted: Sequence[float] | None) -> ValueRange | None:
    """The values that become -1 and 1: those wanted, or the type's own, 0 and 1 of floats.

    None for 8-bit values in their own range, which stay as they are. ValueError for a type of more than 16 bits, whose
    own range no image fills.
    """
    dtype = np.dtype(kind.dtype)
    if wanted is not None:
        chosen = (float(wanted[0]), float(wanted[1]))
    elif dtype.kind == "f":
        chosen = (0.0, 1.0)
    elif dtype.itemsize <= 2:
        chosen = (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))
    else:
        raise ValueError(f"the images are {kind}: say with --value_range LOW HIGH which values become -1 and 1")
    return None if kind.dtype == "uint8" and chosen == (0.0, 255.0) else chosen


def to_tensor(array: np.ndarray, value_range: ValueRange | None, size: Size) -> Tensor:
    """An array [H, W, C] as [C, H, W], resized so that it just covers a size.

    Returns:
        float32 in [-1, 1]; uint8 as it is, where there is no range.

    Raises:
        ValueError: values lie outside of the range, or are not finite.
    """
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
    least, most = float(array.min()), float(array.max())
    if not (low <= least and most <= high):  # NaN is not
        raise ValueError(
            f"its values are from {least:g} to {most:g}, and {low:g} to {high:g} are taken: say with --value_range "
            "LOW HIGH which values become -1 and 1"
        )
    return ((array.astype(np.float64) - low) * (2 / (high - low)) - 1).clip(-1, 1).astype(np.float32)


def to_8_bits(image: Tensor) -> Tensor:
    """An image as pictures and features need it: uint8, to which floats in [-1, 1] are rounded."""
    return ((image + 1) * 127.5).round().to(torch.uint8) if image.is_floating_point() else image
