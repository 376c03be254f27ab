"""Pictures of every kind: how a file is written from a seed, and how it looks."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

SIZE = 8
RANGE = r"say with --value_range LOW HIGH which values become -1 and 1"

# --- how a picture looks, by PIL's plain conversions and numpy -------------------------------------------------------

TURNS = {  # EXIF orientations
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


def as_seen(content):
    """float [H, W, 3]: upright, on white."""
    with Image.open(io.BytesIO(content)) as image:
        turn = TURNS[image.getexif().get(0x0112, 1)]
        rgba = np.asarray(image.convert("RGBA"), dtype=float)
    alpha = rgba[..., 3:] / 255
    return turn(rgba[..., :3] * alpha + 255 * (1 - alpha))


def as_array(content):
    """float [H, W, 3] of an .npy of uint8."""
    array = np.load(io.BytesIO(content)).astype(float)
    return array if array.ndim == 3 else np.stack([array] * 3, -1)


def in_eight_bits(highest, content):
    """float [H, W, 3] of a deep gray image, whose white is `highest`."""
    with Image.open(io.BytesIO(content)) as image:
        return np.stack([np.asarray(image, dtype=float) * (255 / highest)] * 3, -1)


# --- kinds of pictures -----------------------------------------------------------------------------------------------


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def of_mode(mode, seed, size=(SIZE, SIZE)):
    return Image.fromarray(noise(seed, size[1], size[0], 4), "RGBA").convert(mode)


def saved(form, mode, seed, size=(SIZE, SIZE), **options):
    buffer = io.BytesIO()
    of_mode(mode, seed, size).save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation, seed):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved("JPEG", "RGB", seed, exif=exif)


def animated(form, seed, **options):
    frames = [of_mode("RGB", seed + 100 * number) for number in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
    return buffer.getvalue()


def gray_palette(seed):
    image = of_mode("L", seed).convert("P")
    image.putpalette([value for gray in range(256) for value in (gray, gray, gray)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def deep(form, seed):
    array = np.random.default_rng(seed).integers(0, 2**16, (SIZE, SIZE), dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def of_numbers(mode, seed):
    """A TIFF of 0 .. 255 as 32-bit integers or floats."""
    buffer = io.BytesIO()
    of_mode("L", seed).convert(mode).save(buffer, "TIFF")
    return buffer.getvalue()


def npy(seed, *shape):
    buffer = io.BytesIO()
    np.save(buffer, noise(seed, *shape))
    return buffer.getvalue()


def icon(seed):
    buffer = io.BytesIO()
    of_mode("RGBA", seed, (16, 16)).save(buffer, "ICO", sizes=[(16, 16)])
    return buffer.getvalue()


@dataclass(frozen=True)
class Picture:
    """A kind of file: how it is written from a seed, and how it looks."""

    suffix: str
    write: Callable[[int], bytes]
    channels: int = 3
    seen: Callable[[bytes], np.ndarray] = as_seen
    refused: str | None = None
    options: dict[str, object] = field(default_factory=dict)  # of the configuration


EIGHT_BITS = {"value_range": [0.0, 255.0]}

PICTURES = {
    **{f"PNG {mode}": Picture(".png", partial(saved, "PNG", mode), 1) for mode in ("1", "L", "LA")},
    **{f"PNG {mode}": Picture(".png", partial(saved, "PNG", mode)) for mode in ("P", "RGB", "RGBA")},
    "PNG P with a transparent colour": Picture(".png", partial(saved, "PNG", "P", transparency=0)),
    "PNG P with transparent colours": Picture(".png", partial(saved, "PNG", "P", transparency=bytes(range(256)))),
    "PNG L with a transparent gray": Picture(".png", partial(saved, "PNG", "L", transparency=9), 1),
    "PNG P of grays": Picture(".png", gray_palette, 1),
    "PNG of frames": Picture(".png", partial(animated, "PNG")),
    "PNG I;16": Picture(".png", partial(deep, "PNG"), 1, partial(in_eight_bits, 65535)),
    "JPEG L": Picture(".jpg", partial(saved, "JPEG", "L"), 1),
    "JPEG RGB": Picture(".jpeg", partial(saved, "JPEG", "RGB")),
    "JPEG YCbCr": Picture(".JPG", partial(saved, "JPEG", "YCbCr")),
    "JPEG CMYK": Picture(".jpg", partial(saved, "JPEG", "CMYK")),
    "JPEG RGB without subsampling": Picture(".jpg", partial(saved, "JPEG", "RGB", keep_rgb=True)),
    "JPEG progressive": Picture(".jpg", partial(saved, "JPEG", "RGB", progressive=True)),
    "JPEG CMYK progressive": Picture(".jpg", partial(saved, "JPEG", "CMYK", progressive=True)),
    **{f"JPEG of EXIF orientation {turn}": Picture(".jpg", partial(turned, turn)) for turn in range(2, 9)},
    "MPO of two": Picture(".mpo", partial(animated, "MPO")),
    "WebP": Picture(".webp", partial(saved, "WEBP", "RGB")),
    "WebP lossless RGBA": Picture(".webp", partial(saved, "WEBP", "RGBA", lossless=True)),
    "WebP animated": Picture(".webp", partial(animated, "WEBP", lossless=True)),
    "AVIF": Picture(".avif", partial(saved, "AVIF", "RGB")),
    "AVIF RGBA": Picture(".avif", partial(saved, "AVIF", "RGBA")),
    **{f"TIFF {mode}": Picture(".tiff", partial(saved, "TIFF", mode), 1) for mode in ("1", "L", "LA")},
    **{f"TIFF {mode}": Picture(".TIF", partial(saved, "TIFF", mode)) for mode in ("P", "RGB", "RGBA", "CMYK")},
    "TIFF compressed": Picture(".tif", partial(saved, "TIFF", "RGB", compression="tiff_lzw")),
    "TIFF of YCbCr by JPEG": Picture(".tif", partial(saved, "TIFF", "RGB", compression="jpeg")),
    "TIFF of pages": Picture(".tif", partial(animated, "TIFF")),
    "TIFF I;16": Picture(".tif", partial(deep, "TIFF"), 1, partial(in_eight_bits, 65535)),
    "TIFF I": Picture(".tif", partial(of_numbers, "I"), 1, partial(in_eight_bits, 255), options=EIGHT_BITS),
    "TIFF F": Picture(".tif", partial(of_numbers, "F"), 1, partial(in_eight_bits, 255), options=EIGHT_BITS),
    "TIFF F beyond its range": Picture(".tif", partial(of_numbers, "F"), refused=RANGE),
    "GIF": Picture(".gif", partial(saved, "GIF", "P")),
    "GIF animated": Picture(".gif", partial(animated, "GIF")),
    "GIF with a transparent colour": Picture(".gif", partial(saved, "GIF", "P", transparency=3)),
    **{f"BMP {mode}": Picture(".bmp", partial(saved, "BMP", mode), 1) for mode in ("1", "L")},
    **{f"BMP {mode}": Picture(".BMP", partial(saved, "BMP", mode)) for mode in ("P", "RGB", "RGBA")},
    "PBM": Picture(".pbm", partial(saved, "PPM", "1"), 1),
    "PGM": Picture(".pgm", partial(saved, "PPM", "L"), 1),
    "PPM": Picture(".ppm", partial(saved, "PPM", "RGB")),
    "TGA": Picture(".tga", partial(saved, "TGA", "RGBA")),
    "ICO": Picture(".ico", icon),
    "JPEG 2000": Picture(".jp2", partial(saved, "JPEG2000", "RGB", irreversible=False)),
    "PCX": Picture(".pcx", partial(saved, "PCX", "RGB")),
    "NPY gray": Picture(".npy", lambda seed: npy(seed, SIZE, SIZE), 1, as_array),
    "NPY colours": Picture(".npy", lambda seed: npy(seed, SIZE, SIZE, 3), 3, as_array),
}
NEEDS = {".avif": "avif", ".jp2": "jpg_2000"}  # what PIL may come without
