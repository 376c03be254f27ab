"""Every random number of a run as a pure function of the seed and of what it is for.

The rows of all global batches, one after another, form a stream. The image at a position of the stream, its flip, crop
and noise, and whether it loses its label, follow from (seed, position); the timesteps of a batch follow from
(seed, step). So nothing has to be saved to resume, and nothing changes with the number of processes, accumulation steps
or loader workers.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def derived_seed(seed: int, purpose: str, *indices: int) -> int:
    """A 63-bit seed for one purpose: independent of the seeds for all other purposes and indices."""
    name = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A generator on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, *indices))


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    """The permutation in which an epoch visits the images: [num_images]."""
    return torch.randperm(num_images, generator=generator(seed, "order", epoch))


def image_index(seed: int, position: int, num_images: int) -> int:
    """Which image stands at a position of the stream; every num_images positions hold each image once."""
    epoch, offset = divmod(position, num_images)
    return int(epoch_order(seed, epoch, num_images)[offset])


def batch_positions(micro_step: int, rank: int, world_size: int, batch_size: int) -> range:
    """The stretch of the stream that one process takes in one backward pass."""
    first = (micro_step * world_size + rank) * batch_size
    return range(first, first + batch_size)


def stratified_uniforms(seed: int, step: int, global_batch_size: int) -> Tensor:
    """Numbers for the timesteps of one optimiser step: each uniform on its own, together spread evenly over [0, 1).

    Row i of a random permutation draws from the i-th of global_batch_size equal parts of [0, 1), which lowers the
    variance of the loss without a bias (low-discrepancy sampling, Kingma et al. 2021, appendix I.1).

    Returns:
        float64 [global_batch_size].
    """
    rng = generator(seed, "timesteps", step)
    part = torch.randperm(global_batch_size, generator=rng)
    within = torch.rand(global_batch_size, generator=rng, dtype=torch.float64)
    return (part + within) / global_batch_size


def stratified_timesteps(seed: int, step: int, global_batch_size: int, num_train_timesteps: int) -> Tensor:
    """Timesteps of one optimiser step, uniform over the chain.

    Returns:
        Long tensor [global_batch_size] with values in 0 .. num_train_timesteps - 1.
    """
    # The largest double below 1 times T may round up to T, hence the clamp.
    t = (stratified_uniforms(seed, step, global_batch_size) * num_train_timesteps).long()
    return t.clamp(max=num_train_timesteps - 1)


def dropped_labels(seed: int, positions: Sequence[int], rate: float) -> Tensor:
    """At which positions of the stream the label gives way to the null label: bool [len(positions)], true at `rate`."""
    u = [torch.rand((), generator=generator(seed, "label dropout", position)) for position in positions]
    return torch.stack(u) < rate


def noise_rows(seed: int, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, a row per position of the stream, always float32: [len(positions), *shape].

    16-bit noise would vanish beside x_0 at small t.
    """
    noise = torch.empty(len(positions), *shape, dtype=torch.float32)
    for row, position in zip(noise, positions, strict=True):
        row.normal_(generator=generator(seed, "noise", position))
    return noise
