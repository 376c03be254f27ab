"""Counter-based random numbers: the same bits on every device, for any batch, in eager and in compiled code.

Philox-4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") turns a counter of four 32-bit words
and a key of two into four random words. Here the key is the seed, and the counter says what the words are for:
(block within the image, purpose, position in the stream). All of it is integer arithmetic on int64 tensors, so it runs
where the tensors are, and nothing depends on what was drawn before.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WORD = 2**32 - 1  # the lowest 32 bits
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key from round to round
ROUNDS = 10

# Purposes: the second word of the counter.
PLACEMENT, LABEL, NOISE = range(3)

HALF_BITS = 16  # of the two parts of a word that pick a quantile each


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
        # An int64 product holds the lowest 64 bits, which as an unsigned number are the whole product.
        product_0, product_1 = c_0 * MULTIPLIERS[0], c_2 * MULTIPLIERS[1]
        c_0 = ((product_1 >> 32) & WORD) ^ c_1 ^ k_0
        c_2 = ((product_0 >> 32) & WORD) ^ c_3 ^ k_1
        c_1, c_3 = product_1 & WORD, product_0 & WORD
        k_0, k_1 = (k_0 + WEYL[0]) & WORD, (k_1 + WEYL[1]) & WORD
    return [c_0, c_1, c_2, c_3]


def words(seed: int, purpose: int, positions: Tensor, count: int) -> Tensor:
    """Random words for positions of the stream: int64 [B, count], each uniform on [0, 2^32).

    Args:
        seed: in [0, 2^64).
        purpose: PLACEMENT, LABEL or NOISE; their words are independent.
        positions: int64 [B], not negative.
        count: words for each position.
    """
    blocks = torch.arange(math.ceil(count / 4), device=positions.device)[None, :]
    purposes = torch.full_like(blocks, purpose)
    low, high = (positions & WORD)[:, None], (positions >> 32)[:, None]
    drawn = philox((blocks, purposes, low, high), (seed & WORD, seed >> 32))
    return torch.stack(drawn, dim=-1).flatten(1)[:, :count]


@lru_cache(maxsize=8)
def normal_quantiles(device: torch.device) -> Tensor:
    """2^16 equally likely values of variance 1/2 that are spread as a normal distribution: float32 [2^16]."""
    levels = (torch.arange(2**HALF_BITS, dtype=torch.float64) + 0.5) / 2**HALF_BITS
    quantiles = torch.special.ndtri(levels)
    return (quantiles / (quantiles.square().mean() * 2).sqrt()).float().to(device)


def standard_normal(seed: int, positions: Tensor, shape: Sequence[int], quantiles: Tensor) -> Tensor:
    """Standard normal noise for positions of the stream: float32 [B, *shape].

    A number is the sum of two of the quantiles, picked by the halves of a word: 2^32 equally likely pairs, a normal
    distribution within what 10 million draws can tell, cut at ±6.1. Where transcendental functions differ from device
    to device in their last bit, one addition does not.

    Args:
        seed: in [0, 2^64).
        positions: int64 [B], not negative.
        shape: of the noise of one position.
        quantiles: `normal_quantiles` of the positions' device.
    """
    drawn = words(seed, NOISE, positions, math.prod(shape))
    noise = quantiles[drawn >> HALF_BITS] + quantiles[drawn & (2**HALF_BITS - 1)]
    return noise.reshape(-1, *shape)
