"""Counter-based random numbers: the same bits on every device, for any batch, in eager and in compiled code.

Philox-4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") turns a counter of four 32-bit words
and a key of two into four random words. Here the key is the seed, and the counter says what the words are for:
(block within the image, purpose, position in the stream). All of it is integer arithmetic on int64 tensors, so it runs
where the tensors are, and nothing depends on what was drawn before.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

WORD, HALF_WORD = 2**32 - 1, 2**16 - 1  # the lowest 32 and 16 bits
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key from round to round
ROUNDS = 10

# Purposes: the second word of the counter.
PLACEMENT, LABEL, NOISE = range(3)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox-4x32-10: four random words for each counter.

    Args:
        counter: four int64 tensors of one shape, or that broadcast, with values in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c_0, c_1, c_2, c_3 = counter
    k_0, k_1 = key
    for _ in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = multiplied(c_0, MULTIPLIERS[0]), multiplied(c_2, MULTIPLIERS[1])
        c_0, c_1, c_2, c_3 = high_1 ^ c_1 ^ k_0, low_1, high_0 ^ c_3 ^ k_1, low_0
        k_0, k_1 = (k_0 + WEYL[0]) & WORD, (k_1 + WEYL[1]) & WORD
    return [c_0, c_1, c_2, c_3]


def multiplied(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the product of two words.

    By halves of the factor: the product itself may not fit into an int64, and compilers take it that numbers do.
    """
    lower = word * (factor & HALF_WORD)
    upper = word * (factor >> 16) + (lower >> 16)
    return upper >> 16, (upper & HALF_WORD) << 16 | lower & HALF_WORD


class Tables(NamedTuple):
    """What drawing looks up, on one device; inputs of compiled code, where a product with an index may have 32 bits."""

    blocks: Tensor  # int64 [n]: 0, 1, ...
    quantiles: Tensor  # float32 [2^16]


def words(seed: int, purpose: int, positions: Tensor, blocks: Tensor) -> Tensor:
    """Random words for positions of the stream: int64 [B, 4 n], each uniform on [0, 2^32).

    Args:
        seed: in [0, 2^64).
        purpose: PLACEMENT, LABEL or NOISE; their words are independent.
        positions: int64 [B], not negative.
        blocks: int64 [n], of four words each.
    """
    low, high = (positions & WORD)[:, None], (positions >> 32)[:, None]
    counter = (blocks[None, :], torch.full_like(blocks, purpose)[None, :], low, high)
    return torch.stack(philox(counter, (seed & WORD, seed >> 32)), dim=-1).flatten(1)


def placement(seed: int, positions: Tensor, one_block: Tensor) -> Tensor:
    """Words for the crop's top and left edge and the flip: int64 [B, 3]; the arguments are those of `words`."""
    return words(seed, PLACEMENT, positions, one_block)[:, :3]


def label(seed: int, positions: Tensor, one_block: Tensor) -> Tensor:
    """A word for the label's dropout: int64 [B]; the arguments are those of `words`."""
    return words(seed, LABEL, positions, one_block)[:, 0]


@lru_cache(maxsize=8)
def blocks(device: torch.device, count: int) -> Tensor:
    """Blocks for so many words: int64 [n]."""
    return torch.arange(math.ceil(count / 4), device=device)


@lru_cache(maxsize=8)
def normal_quantiles(device: torch.device) -> Tensor:
    """2^16 equally likely values of variance 1/2 that are spread as a normal distribution: float32 [2^16]."""
    levels = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    quantiles = torch.special.ndtri(levels)
    return (quantiles / (quantiles.square().mean() * 2).sqrt()).float().to(device)


def tables(device: torch.device, count: int) -> Tables:
    """What so many normal numbers are looked up in."""
    return Tables(blocks(device, count), normal_quantiles(device))


def standard_normal(seed: int, positions: Tensor, shape: Sequence[int], look_up: Tables) -> Tensor:
    """Standard normal noise for positions of the stream: float32 [B, *shape].

    A number is the sum of two of the quantiles, picked by the halves of a word: 2^32 equally likely pairs, a normal
    distribution within what 10 million draws can tell, cut at ±6.1. Where transcendental functions differ from device
    to device in their last bit, one addition does not.

    Args:
        seed: in [0, 2^64).
        positions: int64 [B], not negative.
        shape: of the noise of one position.
        look_up: `tables` of the positions' device, for as many numbers.
    """
    count = math.prod(shape)
    drawn = words(seed, NOISE, positions, look_up.blocks)[:, :count]
    noise = look_up.quantiles[drawn >> 16] + look_up.quantiles[drawn & HALF_WORD]
    return noise.reshape(-1, *shape)
