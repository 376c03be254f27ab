"""Batches made where the network is: the set lies in the device's memory, and all random numbers are drawn there."""

import torch
from torch import Tensor

from ..runtime import philox
from ..runtime.random_streams import image_indices, is_dropped, philox_key
from .dataset import Batch, ImageStream


class ResidentImages:
    """The images of a stream on a device: the same batches as the stream's own, to the last bit.

    Args:
        stream: of counted random numbers, with images of one size that are decoded already: see `can_reside`.
        device: where the batches are wanted.
    """

    def __init__(self, stream: ImageStream, device: torch.device) -> None:
        assert isinstance(stream.data.images, Tensor)
        self.stream = stream
        self.pixels = stream.data.images.to(device)
        labels = stream.data.labels
        self.labels = None if labels is None else labels.of_images.to(device)
        self.key = philox_key(stream.seed)
        height, width = stream.data.size
        self.tables = philox.tables(device, stream.data.channels * height * width)
        self.one_block = philox.blocks(device, 4)
        self.rows, self.columns = torch.arange(height, device=device), torch.arange(width, device=device)
        self.channels = torch.arange(stream.data.channels, device=device)

    def indices(self, positions: range) -> Tensor:
        """Which images stand at these positions: int64 [B], on the host."""
        return image_indices(self.stream.seed, positions, len(self.pixels))

    def batch(self, indices: Tensor, positions: Tensor) -> Batch:
        """The images, cropped and flipped, their labels and their noise.

        Args:
            indices: of the images, int64 [B], on the device.
            positions: of the stream, int64 [B], on the device.
        """
        noise = philox.standard_normal(self.key, positions, self.shape, self.tables)
        return Batch(self.images(indices, positions), self.labels_at(indices, positions), noise)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return len(self.channels), len(self.rows), len(self.columns)

    def images(self, indices: Tensor, positions: Tensor) -> Tensor:
        """[B, C, H, W], by one reading of the set."""
        whole = self.pixels.shape[2:]
        if tuple(whole) == self.stream.data.size and not self.stream.random_flip:
            return self.pixels[indices]
        words = philox.placement(self.key, positions, self.one_block)
        top, left, flipped = self.stream.place(words, (whole[0], whole[1]))
        columns = torch.where(flipped[:, None], self.columns.flip(0), self.columns) + left[:, None]
        rows = self.rows + top[:, None]
        return self.pixels[
            indices[:, None, None, None], self.channels[:, None, None], rows[:, None, :, None], columns[:, None, None]
        ]

    def labels_at(self, indices: Tensor, positions: Tensor) -> Tensor | None:
        """int64 [B], some of them the null label; None for unconditional training."""
        known = self.stream.data.labels
        if known is None or self.labels is None:
            return None
        dropped = is_dropped(philox.label(self.key, positions, self.one_block), self.stream.label_dropout)
        return self.labels[indices].masked_fill(dropped, known.null)


def can_reside(stream: ImageStream) -> bool:
    """Whether the batches can be made on the device."""
    return stream.noise == "philox" and isinstance(stream.data.images, Tensor)
