"""Every random number of a run as a pure function of the seed and of what it is for.

The rows of all global batches, one after another, form a stream. The image at a position of the stream, its flip, crop
and noise, and whether it loses its label, follow from (seed, position); the timesteps of a batch follow from
(seed, step). So nothing has to be saved to resume, and nothing changes with the number of processes, accumulation steps
or loader workers.

What follows from a position is drawn in one of two ways (`DRAWS`): by a generator of PyTorch's for each image, on the
CPU, or by counters, on any device.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import philox


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, such as ("noise", 3): independent of the seeds for all other names."""
    name = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A random generator for one purpose (see `derived_seed`), on the CPU so that all devices get the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    """The permutation in which an epoch visits the images: [num_images]."""
    return torch.randperm(num_images, generator=generator(seed, "order", epoch))


def image_index(seed: int, position: int, num_images: int) -> int:
    """The index of the image at a position of the stream; every num_images positions hold each image once."""
    epoch, offset = divmod(position, num_images)
    return int(epoch_order(seed, epoch, num_images)[offset])


def image_indices(seed: int, positions: range, num_images: int) -> Tensor:
    """`image_index` of each of these positions, which follow each other: int64 [len(positions)]."""
    parts, start = [], positions.start
    while start < positions.stop:
        epoch, offset = divmod(start, num_images)
        parts.append(epoch_order(seed, epoch, num_images)[offset : offset + positions.stop - start])
        start += len(parts[-1])
    return torch.cat(parts)


@dataclass(frozen=True)
class Block:
    """Rows of a streamed data set that are read together: start .. stop - 1."""

    start: int
    stop: int
    num_bytes: int


class Window(NamedTuple):
    """Blocks whose rows are shuffled together. They take the places of an epoch from `start` on."""

    start: int
    blocks: list[Block]


@dataclass(frozen=True, eq=False)  # so that a lookup in a cache compares no blocks
class WindowedOrder:
    """A permutation of the images for each epoch that has to hold only few blocks at a time.

    The blocks are shuffled, cut into windows of at most `window_bytes` (or one block), and the rows of each window are
    shuffled.
    """

    blocks: tuple[Block, ...]
    window_bytes: int

    def index_at(self, seed: int, position: int) -> int:
        """The index of the image at a position of the stream; an epoch holds each image once."""
        epoch, place = divmod(position, self.blocks[-1].stop)
        windows = self.windows(seed, epoch)
        number = bisect_right(windows, place, key=lambda window: window.start) - 1
        return int(self.rows(seed, epoch, number)[place - windows[number].start])

    @lru_cache(maxsize=2)  # noqa: B019 - one order lives as long as the run
    def windows(self, seed: int, epoch: int) -> list[Window]:
        """The windows of an epoch."""
        windows: list[Window] = []
        start, room = 0, 0
        for number in torch.randperm(len(self.blocks), generator=generator(seed, "blocks", epoch)).tolist():
            block = self.blocks[number]
            if not windows or block.num_bytes > room:
                windows.append(Window(start, []))
                room = self.window_bytes
            windows[-1].blocks.append(block)
            start, room = start + block.stop - block.start, room - block.num_bytes
        return windows

    @lru_cache(maxsize=2)  # noqa: B019
    def rows(self, seed: int, epoch: int, window: int) -> Tensor:
        """The rows of a window in their order."""
        rows = torch.cat([torch.arange(block.start, block.stop) for block in self.windows(seed, epoch)[window].blocks])
        return rows[torch.randperm(len(rows), generator=generator(seed, "window", epoch, window))]


def batch_positions(micro_step: int, rank: int, world_size: int, batch_size: int) -> range:
    """The positions of the stream that one process takes in one forward and backward pass."""
    first = (micro_step * world_size + rank) * batch_size
    return range(first, first + batch_size)


def stratified_uniforms(seed: int, step: int, global_batch_size: int) -> Tensor:
    """Uniform random numbers in [0, 1) for the timesteps of one optimiser step, stratified over the batch.

    Row i of a random permutation draws from the i-th of global_batch_size equal parts of [0, 1), which lowers the
    variance of the loss without a bias (low-discrepancy sampling, Kingma et al. 2021, appendix I.1).

    Returns:
        float64 [global_batch_size].
    """
    rng = generator(seed, "timesteps", step)
    part = torch.randperm(global_batch_size, generator=rng)
    within = torch.rand(global_batch_size, generator=rng, dtype=torch.float64)
    return (part + within) / global_batch_size


class Draws(NamedTuple):
    """Random numbers for positions of the stream, int64 [B], each a function of the seed and the position alone."""

    placement: Callable[[int, Tensor], Tensor]  # words for (top, left, flip): int64 [B, 3], uniform on [0, 2^32)
    label: Callable[[int, Tensor], Tensor]  # a word for the label's dropout: int64 [B]
    noise: Callable[[int, Tensor, Sequence[int]], Tensor]  # standard normal: float32 [B, *shape]


def uniform_words(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """32-bit words of a generator for each position: int64 [B, count], of which 24 bits are random."""
    u = [torch.rand(count, generator=generator(seed, purpose, position)) for position in positions.tolist()]
    return (torch.stack(u).double() * 2**32).long()


def noise_rows(seed: int, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of a generator for each position: float32 [B, *shape].

    16-bit noise would vanish beside x_0 at small t.
    """
    noise = torch.empty(len(positions), *shape, dtype=torch.float32)
    for row, position in zip(noise, positions.tolist(), strict=True):
        row.normal_(generator=generator(seed, "noise", position))
    return noise


@lru_cache(maxsize=2)
def philox_key(seed: int) -> int:
    """The key of a run's counters, which are not those of another seed."""
    return derived_seed(seed, "philox")


DRAWS = {
    "generator": Draws(
        placement=lambda seed, positions: uniform_words(seed, "augment", positions, 3),
        label=lambda seed, positions: uniform_words(seed, "label dropout", positions, 1)[:, 0],
        noise=noise_rows,
    ),
    "philox": Draws(
        placement=lambda seed, positions: philox.placement(
            philox_key(seed), positions, philox.blocks(positions.device, 4)
        ),
        label=lambda seed, positions: philox.label(philox_key(seed), positions, philox.blocks(positions.device, 4)),
        noise=lambda seed, positions, shape: philox.standard_normal(
            philox_key(seed), positions, shape, philox.tables(positions.device, math.prod(shape))
        ),
    ),
}


def dropped_labels(draws: Draws, seed: int, positions: Tensor, rate: float) -> Tensor:
    """Draw where the null label replaces the label: bool [B], true with probability `rate`."""
    return is_dropped(draws.label(seed, positions), rate)


def is_dropped(words: Tensor, rate: float) -> Tensor:
    """Whether random words say that a label is dropped, which a share of `rate` of all words does."""
    return words < math.ceil(rate * 2**32)


def generators_kept(device: torch.device) -> AbstractContextManager[None]:
    """A context after which the generators of the host and of this device are as they were before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
