"""Training images: found, surveyed, decoded, cropped and flipped; uint8 until they reach the device. Their labels."""

import hashlib
import io
import itertools
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import datasets
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from config import EMBEDDED_DATA, TrainingConfig, public_name
from draws import batch_positions, dropped_labels, generator, image_index, noise_rows
from faults import BadImages
from labels import Labels, find_label_column, read_labels

IN_MEMORY_BYTES = 2**30  # sets that decode to less are decoded once
SURVEYED_ROWS = 20_000  # of larger sets, this many rows, evenly spaced, are looked at before the run

GRAYSCALE_MODES = ("1", "L", "LA")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # PIL would clip them to 8 bits, not scale them
PIL_MODE = {1: "L", 3: "RGB"}

# What PIL raises on bytes that are not an image, or only part of one.
BROKEN_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


logger = logging.getLogger(__name__)


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
    """What a look at the headers of the images tells."""

    channels: int  # 1 if all are grayscale, else 3
    sizes: frozenset[tuple[int, int]]  # (width, height)
    fingerprint: str  # hash of the encoded images

    def own_resolution(self) -> int:
        """The images' size, if they are square and of one size.

        Raises:
            ValueError: they are not, so the resolution has to be chosen.
        """
        smallest, largest = min(self.sizes), max(self.sizes)
        if smallest != largest or smallest[0] != smallest[1]:
            raise ValueError(
                f"the images are from {smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]} pixels large, "
                f"not of one square size: choose --resolution"
            )
        return smallest[0]


def open_rows(config: TrainingConfig, split: str = "train") -> datasets.Dataset:
    """A split of the data set with all its columns, undecoded; a single parquet file is the split "train".

    Raises:
        ValueError: it is empty, or there is no such split.
    """
    name = config.dataset_name or (None if config.train_data_dir else str(EMBEDDED_DATA))
    path = Path(name).expanduser() if name else None
    if path is None:
        rows = datasets.load_dataset(
            "imagefolder", data_dir=config.train_data_dir, split=split, cache_dir=config.cache_dir
        )
    elif path.suffix == ".parquet" and path.stat().st_size > IN_MEMORY_BYTES:  # read from the disk row by row
        files = {"train": str(path)}
        rows = datasets.load_dataset("parquet", data_files=files, split=split, cache_dir=config.cache_dir)
    elif path.suffix == ".parquet":
        table = datasets.table.InMemoryTable(pyarrow.parquet.read_table(path))  # no copy in the cache
        rows = pick_split({"train": datasets.Dataset(table)}, split, path)
    elif (path / "state.json").is_file():
        rows = pick_split({"train": datasets.load_from_disk(str(path))}, split, path)
    elif (path / "dataset_dict.json").is_file():
        rows = pick_split(datasets.load_from_disk(str(path)), split, path)
    else:
        rows = datasets.load_dataset(
            str(path) if path.exists() else name,
            config.dataset_config_name,
            split=split,
            cache_dir=config.cache_dir,
            revision=config.dataset_revision,
        )
    if len(rows) == 0:
        raise ValueError(f"{name or config.train_data_dir} holds no images")
    return rows


def pick_split(splits: Mapping[str, datasets.Dataset], split: str, path: Path) -> datasets.Dataset:
    """The split of this name.

    Raises:
        ValueError: there is none.
    """
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def image_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """The undecoded images alone, in one column named `image`.

    Raises:
        ValueError: the data set has no image column.
    """
    column = find_image_column(rows.features)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return rows if column == "image" else rows.rename_column(column, "image")


def find_image_column(features: Mapping[str, Any]) -> str:
    """The first column of images: of `datasets`' Image type, or encoded bytes with or without a path.

    Raises:
        ValueError: there is none.
    """
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return name
    for name, feature in features.items():
        if feature == datasets.Value("binary") or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
            return name
    raise ValueError(f"no column of the data set holds images; its columns: {', '.join(features)}")


def encoded_image(row: Mapping[str, Any], index: int) -> bytes:
    """The bytes of an image file, from the row itself or from the file it names.

    Raises:
        ValueError: the row has no image.
    """
    image = row["image"]
    if image is None:
        raise ValueError(f"row {index} of the data set has no image")
    return cast(bytes, image["bytes"]) if image["bytes"] is not None else Path(image["path"]).read_bytes()


def where(row: Mapping[str, Any], index: int) -> str:
    """The place of an image, for error messages."""
    path = row["image"] and row["image"]["path"]
    return f"image {index}" + (f" ({path})" if path else "")


def reason(error: Exception) -> str:
    """What is wrong with an image; PIL names an object in memory."""
    return "it is no image file" if isinstance(error, UnidentifiedImageError) else str(error)


def survey(rows: datasets.Dataset, skip_bad_images: bool = False) -> Survey:
    """Read the headers of up to SURVEYED_ROWS images.

    Raises:
        BadImages: an image cannot be read, and such ones are not to be passed over; or none can.
        ValueError: an image has more than 8 bits per channel.
    """
    modes, sizes = set(), set()
    digest = hashlib.blake2b(str(len(rows)).encode(), digest_size=16)
    for index in np.linspace(0, len(rows) - 1, min(len(rows), SURVEYED_ROWS)).round().astype(int).tolist():
        row = rows[index]
        try:
            encoded = encoded_image(row, index)
            digest.update(encoded)
            with Image.open(io.BytesIO(encoded)) as image:
                mode, size = image.mode, image.size
        except BROKEN_IMAGE as error:
            if skip_bad_images:
                continue
            raise BadImages(f"{where(row, index)} cannot be read: {reason(error)}") from error
        if mode in DEEP_MODES:
            raise ValueError(
                f"{where(row, index)} has more than 8 bits per channel (mode {mode}): convert it to 8 bits"
            )
        modes.add(mode)
        sizes.add(size)
    if not sizes:
        raise BadImages(f"none of {len(rows)} images can be read")
    return Survey(1 if modes <= set(GRAYSCALE_MODES) else 3, frozenset(sizes), digest.hexdigest())


def decode(row: Mapping[str, Any], index: int, channels: int, resolution: int) -> Tensor:
    """An image, resized so that its shorter side is the resolution: uint8 [channels, H, W].

    Raises:
        BadImages: the image cannot be read, or it has colours where the network takes none.
    """
    try:
        with Image.open(io.BytesIO(encoded_image(row, index))) as opened:
            image = ImageOps.exif_transpose(opened)
            if channels == 1 and image.mode not in GRAYSCALE_MODES:
                raise ValueError(f"it is of mode {image.mode}, the training is on grayscale images")
            image = image.convert(PIL_MODE[channels])
    except BROKEN_IMAGE as error:
        raise BadImages(f"{where(row, index)} cannot be read: {reason(error)}") from error
    if min(image.size) != resolution:
        scale = resolution / min(image.size)
        width, height = (max(resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W] or [H, W, C]
    return pixels.reshape(image.height, image.width, channels).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class DecodedOnDemand:
    """Images of a set too large to keep decoded."""

    rows: datasets.Dataset
    channels: int
    resolution: int

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        """Uint8 [C, H, W]."""
        return decode(self.rows[index], index, self.channels, self.resolution)


def decode_all(images: DecodedOnDemand, skip_bad_images: bool = False) -> tuple[Images, list[int], list[str]]:
    """Every image, decoded once: one tensor [N, C, H, W] if all have one size, else a list of [C, H, W].

    Returns:
        The images, their rows, and what is wrong with those that were passed over.

    Raises:
        BadImages: one cannot be read, and such ones are not to be passed over.
    """
    decoded, rows, unreadable = [], [], []
    for index in range(len(images)):
        try:
            decoded.append(images[index])
            rows.append(index)
        except BadImages as error:
            if not skip_bad_images:
                raise
            unreadable.append(str(error))
    one_size = len({image.shape for image in decoded}) == 1
    return torch.stack(decoded) if one_size else decoded, rows, unreadable


@dataclass(frozen=True)
class TrainingData:
    """The images of a run and what is known of them."""

    images: Images
    channels: int
    resolution: int
    fingerprint: str  # of the images, and of the labels if there are any
    labels: Labels | None  # None for unconditional training
    unreadable: tuple[str, ...] = ()  # what is wrong with images that were left out

    def describe(self, config: TrainingConfig) -> dict[str, Any]:
        """For results and logs."""
        name = config.dataset_name or config.train_data_dir or "embedded Fashion-MNIST (10,000 images)"
        return {
            "name": public_name(name),
            "num_images": len(self.images),
            "channels": self.channels,
            "resolution": self.resolution,
            "fingerprint": self.fingerprint,
            **self.describe_labels(config),
        }

    def describe_labels(self, config: TrainingConfig) -> dict[str, Any]:
        """For results, logs and the identity of the run; nothing for unconditional training."""
        if self.labels is None:
            return {}
        return {
            "class_conditional": True,
            "label_column": self.labels.column,
            "label_dropout": config.label_dropout,
            "num_classes": len(self.labels.names),
            "class_names": list(self.labels.names),
        }


def load_data(
    config: TrainingConfig, channels: int | None, resolution: int | None, split: str = "train"
) -> TrainingData:
    """Open, survey and, if small, decode the training images; read their labels for class-conditional training.

    Args:
        config: says where the images are.
        channels: what the network takes (1 or 3); the images' own if None.
        resolution: what the network takes; the images' own if None.
        split: of the data set.

    Raises:
        ValueError: the images or labels cannot be read, or not in this form.
    """
    every_column = open_rows(config, split)
    rows = image_rows(every_column)
    labels = None
    if config.class_conditional:
        labels = read_labels(every_column, find_label_column(every_column.features, config.label_column))
    seen = survey(rows, config.skip_bad_images)
    if channels not in (None, *PIL_MODE):
        raise ValueError(f"the network takes {channels} channels, images have 1 or 3")
    if channels == 1 and seen.channels == 3:
        raise ValueError("the network takes 1 channel (grayscale), the images have colours")
    channels, resolution = channels or seen.channels, resolution or seen.own_resolution()
    images = DecodedOnDemand(rows, channels, resolution)
    # Images that are not square keep their longer side until they are cropped.
    elongation = max(max(size) / min(size) for size in seen.sizes)
    small = len(rows) * channels * resolution**2 * elongation <= IN_MEMORY_BYTES
    fingerprint = labels.extended(seen.fingerprint) if labels else seen.fingerprint
    if not small:
        return TrainingData(images, channels, resolution, fingerprint, labels)
    decoded, kept, unreadable = decode_all(images, config.skip_bad_images)
    for message in unreadable:
        logger.warning("left out: %s", message)
    check_bad_images(unreadable, config.max_bad_images)
    if labels and unreadable:
        labels = replace(labels, of_images=labels.of_images[kept])
    return TrainingData(decoded, channels, resolution, fingerprint, labels, tuple(unreadable))


class Batch(NamedTuple):
    """What one backward pass of one process trains on."""

    images: Tensor  # uint8 [B, C, resolution, resolution]
    labels: Tensor | None  # int64 [B], some of them the null label; None for unconditional training
    noise: Tensor  # float32, of the images' shape
    unreadable: tuple[str, ...] = ()  # what is wrong with images that were passed over


@dataclass(frozen=True)
class ImageStream(torch.utils.data.Dataset[Tensor]):
    """The images in the order of training: item p is a function of the seed and the position p alone."""

    data: TrainingData
    seed: int
    center_crop: bool
    random_flip: bool
    label_dropout: float = 0.0
    skip_bad_images: bool = False

    def __getitem__(self, position: int) -> Tensor:
        """The image at a position of the stream: uint8 [C, resolution, resolution]."""
        return self.load(position)[0]

    def load(self, position: int) -> tuple[Tensor, int, list[str]]:
        """The image at a position, its place in the data set, and what is wrong with those that were passed over.

        An image that cannot be read gives way to the next one in the data set.

        Raises:
            BadImages: it cannot be read, and is not to be passed over; or none can.
        """
        total = len(self.data.images)
        unreadable: list[str] = []
        first = image_index(self.seed, position, total)
        for index in (*range(first, total), *range(first)) if self.skip_bad_images else (first,):
            try:
                return self.augmented(self.data.images[index], position), index, unreadable
            except BadImages as error:
                if not self.skip_bad_images:
                    raise
                unreadable.append(str(error))
        raise BadImages(f"none of {total} images can be read")

    def augmented(self, image: Tensor, position: int) -> Tensor:
        """The image cropped, and flipped or not, as the position says."""
        size = self.data.resolution
        if image.shape[1:] == (size, size) and not self.random_flip:
            return image
        top, left, flip = torch.rand(3, generator=generator(self.seed, "augment", position)).tolist()
        if self.center_crop:
            top = left = 0.5
        top, left = (int(u * (side - size + 1)) for u, side in zip((top, left), image.shape[1:], strict=True))
        image = image[:, top : top + size, left : left + size]
        return image.flip(2) if self.random_flip and flip < 0.5 else image

    def labels_at(self, positions: Sequence[int], indices: Sequence[int]) -> Tensor | None:
        """The labels of the images at these positions, or the null label in their place: int64 [len(positions)]."""
        labels = self.data.labels
        if labels is None:
            return None
        dropped = dropped_labels(self.seed, positions, self.label_dropout)
        return labels.of_images[list(indices)].masked_fill(dropped, labels.null)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The images at these positions with their labels and their noise."""
        images, indices, unreadable = zip(*map(self.load, positions), strict=True)
        batch = torch.stack(images)
        noise = noise_rows(self.seed, positions, batch.shape[1:])
        return Batch(batch, self.labels_at(positions, indices), noise, tuple(itertools.chain(*unreadable)))


@dataclass(frozen=True)
class StreamBatches:
    """The positions of each backward pass of one process, from a step on to the end of the run."""

    micro_steps: range
    rank: int
    world_size: int
    batch_size: int

    def __iter__(self) -> Iterator[range]:
        """One batch of positions after another."""
        for micro_step in self.micro_steps:
            yield batch_positions(micro_step, self.rank, self.world_size, self.batch_size)

    def __len__(self) -> int:
        """Number of backward passes."""
        return len(self.micro_steps)


def as_it_is(batch: Any) -> Any:  # noqa: ANN401
    """Collate nothing: the stream gives whole batches."""
    return batch


def leave_signals_to_the_run(_: int) -> None:
    """In a worker: a signal to the whole process group is for the run, which needs its workers to finish the step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    stream: ImageStream, batches: StreamBatches, num_workers: int, pin_memory: bool
) -> torch.utils.data.DataLoader[Any]:
    """Batches of uint8 images and their labels, in the order that `batches` says, whatever the number of workers."""
    return torch.utils.data.DataLoader(
        stream,
        batch_sampler=cast(Any, batches),  # DataLoader only iterates over it
        num_workers=num_workers,
        collate_fn=as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_run,
    )
