"""Batches of a run: images in the order of training, cropped and flipped, with their labels and their noise."""

import itertools
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import pyarrow
import torch
from torch import Tensor

from ..runtime.errors import BadImages
from ..runtime.privacy import public_name
from ..runtime.random_streams import DRAWS, Draws, WindowedOrder, batch_positions, dropped_labels, image_index
from .arrays import OWN_RANGES, PICTURE, ValueRange, range_of
from .config import EMBEDDED_DATA, DataConfig
from .images import REMEDY, DecodedOnDemand, Form, Images, Survey, advising, check_bad_images, decode_all, survey
from .labels import Labels, labels_of
from .sizes import Size, as_size, describe_fit, resolution_of
from .sources import MIB, StreamedRows, evenly, open_source

IN_MEMORY_BYTES = 2**30  # sets that decode to less are decoded once
CENTRE = HALF = 2**31  # of the range of a random word

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """The images of a run and what is known of them."""

    images: Images
    channels: int
    size: Size
    fingerprint: str  # of the images, and of the labels if there are any
    labels: Labels | None  # None for unconditional training
    unreadable: tuple[str, ...] = ()  # what is wrong with images that were left out
    order: WindowedOrder | None = None  # of a streamed set; any other is shuffled as a whole
    value_range: ValueRange | None = None  # the values that became -1 and 1; None: the images are uint8

    @property
    def resolution(self) -> int | str:
        """The size as configurations and results have it: the side of a square, else "HxW"."""
        return resolution_of(self.size)

    def index_at(self, seed: int, position: int) -> int:
        """Which image stands at a position of the training."""
        if self.order:
            return self.order.index_at(seed, position)
        return image_index(seed, position, len(self.images))

    def evenly(self, count: int) -> list[int]:
        """At most `count` images, spread over the set, that are quick to read."""
        if isinstance(self.images, DecodedOnDemand) and isinstance(self.images.rows, StreamedRows):
            return self.images.rows.evenly(count)
        return evenly(count, len(self.images)).tolist()

    def describe(self, config: DataConfig) -> dict[str, Any]:
        """For results and logs."""
        embedded = config.trains_on_embedded_data and EMBEDDED_DATA.is_file()
        return {
            "name": "embedded Fashion-MNIST (10,000 images)" if embedded else public_name(config.source),
            "num_images": len(self.images),
            "channels": self.channels,
            "resolution": self.resolution,
            "fingerprint": self.fingerprint,
            **({"value_range": list(self.value_range)} if self.value_range else {}),
            **({"streaming": True} if self.order else {}),
            **({"split": config.split} if config.split else {}),
            **self.describe_labels(config),
        }

    def describe_labels(self, config: DataConfig) -> dict[str, Any]:
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
    config: DataConfig,
    channels: int | None,
    size: int | str | Sequence[int] | None,
    split: str | None = None,
    remedy: str = REMEDY,
) -> TrainingData:
    """Open and survey the training images, decode a small set that is not streamed, and read labels if they are used.

    Args:
        config: says where the images are.
        channels: what the network takes; the images' own if None.
        size: what the network takes, as `as_size` reads it; the images' own if None.
        split: of the data set; that of the configuration if None.
        remedy: what to do about an image that cannot be read, for the error.

    Raises:
        ValueError: the images or labels cannot be read, or not in this form.
    """
    if config.trains_on_embedded_data and not EMBEDDED_DATA.is_file():
        logger.info("no images are named, and none came with the package: taking %s from the Hub", config.source)
    source = open_source(config, split)
    logger.info("%s", source.about or f"{len(source.images)} images in {public_name(config.source)}")
    labels = labels_of(source.features, config.label_column, source.values) if config.class_conditional else None
    seen = survey(source, config.skip_bad_images, remedy)
    form = choose_form(config, seen, channels, size)
    log_remarks(seen, len(source.surveyed), form)
    images = DecodedOnDemand(source.images, form)
    num_bytes = len(images) * form.channels * seen.pixels_covering(form.size) * (4 if form.value_range else 1)
    known_of = partial(
        TrainingData,
        channels=form.channels,
        size=form.size,
        fingerprint=labels.extended(seen.fingerprint) if labels else seen.fingerprint,
        order=WindowedOrder(source.blocks, config.shuffle_window_mb * MIB) if source.blocks else None,
        value_range=form.value_range,
    )
    if not config.skip_bad_images:  # so that what does not fit is told before any work
        with advising(remedy):
            seen.check(form)
            if form.value_range:  # of deep pictures the headers do not tell the values
                images[source.surveyed[0]]
    if source.blocks or num_bytes > IN_MEMORY_BYTES:
        return known_of(images, labels=labels)
    decoded, kept, unreadable = decode_all(images, config.skip_bad_images, remedy)
    del source, images
    pyarrow.default_memory_pool().release_unused()  # twice the decoded images would be kept for later use
    for message in unreadable:
        logger.warning("left out: %s", message)
    check_bad_images(unreadable, config.max_bad_images)
    if labels and unreadable:
        labels = replace(labels, of_images=labels.of_images[kept])
    return known_of(decoded, labels=labels, unreadable=tuple(unreadable))


def choose_form(config: DataConfig, seen: Survey, channels: int | None, size: int | str | Sequence[int] | None) -> Form:
    """The form of the images that a configuration and a network ask for; ValueError if these have no such form."""
    return Form(
        seen.channels_for(channels),
        seen.own_size() if size is None else as_size(size),
        config.background,
        seen.kind,
        range_of(seen.kind, config.value_range),
    )


def log_remarks(seen: Survey, looked_at: int, form: Form) -> None:
    """Log how the images are resized, and warn of parts of their files that are not trained on."""
    if (fit := describe_fit(seen.sizes, form.size)) is not None:
        logger.info("%s", fit)
    if seen.transparent and form.kind == PICTURE and form.channels != 4:
        logger.info(
            "%d of %d images looked at have transparent parts, which become %s (--background)",
            seen.transparent,
            looked_at,
            form.background,
        )
    if seen.animated:
        logger.warning(
            "%d of %d images looked at have several frames or pages, of which the first is taken",
            seen.animated,
            looked_at,
        )
    if seen.losing_bands:
        logger.warning(
            "%d of %d images looked at have more bands than the colours that are read: write them as .npy files to "
            "train on all bands",
            seen.losing_bands,
            looked_at,
        )


def check_same_range(training: TrainingData, held_out: TrainingData) -> None:
    """Raise ValueError if held-out images are scaled from other values than the training images."""
    own, other = (data.value_range or OWN_RANGES["uint8"] for data in (training, held_out))
    if own != other:
        raise ValueError(
            f"the values {own[0]:g} to {own[1]:g} of the training images become -1 to 1, and {other[0]:g} to "
            f"{other[1]:g} of the held-out images: say with --value_range LOW HIGH which values it are in both, or "
            "write them as files of one type"
        )


class Batch(NamedTuple):
    """Images, labels and noise of one backward pass of one process."""

    images: Tensor  # uint8 [B, C, H, W], or float32 in [-1, 1]
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
    noise: str = "generator"  # one of DRAWS, which draws all that follows from a position

    @property
    def draws(self) -> Draws:
        """The functions that draw."""
        return DRAWS[self.noise]

    def __getitem__(self, position: int) -> Tensor:
        """The image at a position of the stream: uint8 [C, H, W], or float32 in [-1, 1]."""
        return self.load(position)[0]

    def load(self, position: int) -> tuple[Tensor, int, list[str]]:
        """The image at a position, its place in the data set, and what is wrong with those that were passed over.

        An image that cannot be read gives way to the next one in the data set.

        Raises BadImages if the image cannot be read and no other one is to take its place; or no image can be read.
        """
        total = len(self.data.images)
        unreadable: list[str] = []
        first = self.data.index_at(self.seed, position)
        for index in (*range(first, total), *range(first)) if self.skip_bad_images else (first,):
            try:
                return self.augmented(self.data.images[index], position), index, unreadable
            except BadImages as error:
                if not self.skip_bad_images:
                    raise BadImages(f"{error}; {REMEDY}") from error
                unreadable.append(str(error))
        raise BadImages(f"none of {total} images can be read; the last: {unreadable[-1]}")

    def augmented(self, image: Tensor, position: int) -> Tensor:
        """The image cropped, and flipped or not, as the position says."""
        if image.shape[1:] == self.data.size and not self.random_flip:
            return image
        words = self.draws.placement(self.seed, torch.tensor([position]))
        top, left, flipped = (int(value) for value in self.place(words, (image.shape[1], image.shape[2])))
        image = image[:, top : top + self.data.size[0], left : left + self.data.size[1]]
        return image.flip(2) if flipped else image

    def place(self, words: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Top and left edge of the crop from images of this size, and whether it is flipped.

        Args:
            words: int64 [B, 3], as `Draws.placement` draws them.
            size: (height, width) of the images.

        Returns:
            int64 [B], int64 [B], bool [B].
        """
        edges = words.new_full(words[:, :2].shape, CENTRE) if self.center_crop else words[:, :2]
        free = [whole - wanted for whole, wanted in zip(size, self.data.size, strict=True)]
        top, left = ((edges[:, side] * (pixels + 1)) >> 32 for side, pixels in enumerate(free))
        return top, left, (words[:, 2] < HALF) & self.random_flip

    def labels_at(self, positions: Tensor, indices: Sequence[int]) -> Tensor | None:
        """The labels of the images at these positions, or the null label in their place: int64 [len(positions)]."""
        labels = self.data.labels
        if labels is None:
            return None
        dropped = dropped_labels(self.draws, self.seed, positions, self.label_dropout)
        return labels.of_images[list(indices)].masked_fill(dropped, labels.null)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The images at these positions with their labels and their noise."""
        images, indices, unreadable = zip(*map(self.load, positions), strict=True)
        batch, places = torch.stack(images), torch.tensor(positions)
        noise = self.draws.noise(self.seed, places, batch.shape[1:])
        return Batch(batch, self.labels_at(places, indices), noise, tuple(itertools.chain(*unreadable)))


@dataclass(frozen=True)
class StreamBatches:
    """The positions of each backward pass of one process, from a step on to the end of the run."""

    micro_steps: range
    rank: int
    world_size: int
    batch_size: int

    def positions(self, micro_step: int) -> range:
        """Positions of one backward pass."""
        return batch_positions(micro_step, self.rank, self.world_size, self.batch_size)

    def __iter__(self) -> Iterator[range]:
        """One batch of positions after another."""
        return map(self.positions, self.micro_steps)

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
    """Batches of images and their labels, in the order that `batches` says, whatever the number of workers."""
    return torch.utils.data.DataLoader(
        stream,
        batch_sampler=cast(Any, batches),  # DataLoader only iterates over it
        num_workers=num_workers,
        collate_fn=as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_run,
    )
