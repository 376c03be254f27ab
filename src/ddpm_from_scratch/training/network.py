"""A new network that suits the data: its keys follow from the images' size, their number, and one word.

| what | rule | reason |
|---|---|---|
| levels | halve while the shorter side is above 8 pixels | a level below 8 pixels adds weights and little else |
| attention | in levels of at most 16 x 16 pixels, and in the middle | its cost grows with the square of the pixels |
| width | `SIZES`, times `MULTIPLIERS` by level | the finest levels of large images cost the most time |
| dropout | `DROPOUT`, by the number of images | few images are seen many times, and are learned by heart |
| learning rate | `SIZES`, by width | wide networks want small steps; 128 wide, the paper's 2e-4 |
"""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """What one word says of a network."""

    width: int  # channels of the first level
    layers_per_block: int
    attention_head_dim: int
    norm_num_groups: int
    learning_rate: float


SIZES = {
    "small": Size(32, 1, 32, 8, 1e-3),  # minutes on a CPU
    "base": Size(64, 2, 64, 16, 4e-4),  # hours on a CPU, minutes on a GPU
    "large": Size(128, 2, 64, 32, 2e-4),  # near Ho et al.'s network for CIFAR-10: for a GPU
}
# Channels of each level, in widths, by the number of levels.
MULTIPLIERS = {
    1: (1,),
    2: (1, 2),
    3: (1, 2, 4),
    4: (1, 2, 3, 4),
    5: (1, 1, 2, 3, 4),
    6: (1, 1, 2, 2, 4, 4),
    7: (1, 1, 1, 2, 2, 4, 4),
}
DROPOUT = ((2_000, 0.2), (10_000, 0.1))  # with fewer images than the first number; with more than all, none

# Pixels of the shorter side: halve above the first; the lowest level must not be above the second.
SMALLEST, LARGEST_UNHALVED = 8, 16
ATTENTION_PIXELS = 16 * 16
LARGEST = 1024  # pixels of a side: more can hardly be trained


def suited_network(size: tuple[int, int], num_images: int, model_size: str) -> dict[str, Any]:
    """The keys of a `UNet2DModel` for images of this size.

    Args:
        size: (height, width) in pixels.
        num_images: in the data set.
        model_size: one of SIZES.

    Raises:
        ValueError: the size cannot be halved often enough.
    """
    sides = [size]
    while min(sides[-1]) > SMALLEST and not any(side % 2 for side in sides[-1]) and len(sides) < max(MULTIPLIERS):
        sides.append((sides[-1][0] // 2, sides[-1][1] // 2))
    if min(sides[-1]) > LARGEST_UNHALVED:
        raise ValueError(unsuited(size))
    word = SIZES[model_size]
    attends = [height * width <= ATTENTION_PIXELS for height, width in sides]
    return {
        "block_out_channels": [word.width * factor for factor in MULTIPLIERS[len(sides)]],
        "layers_per_block": word.layers_per_block,
        "down_block_types": ["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "attention_head_dim": word.attention_head_dim,
        "norm_num_groups": word.norm_num_groups,
        "dropout": next((share for count, share in DROPOUT if num_images < count), 0.0),
    }


def unsuited(size: tuple[int, int]) -> str:
    """Why no network is made for images of this size, and the nearest size for which one is."""
    factor = 2
    while min(size) / factor > LARGEST_UNHALVED:
        factor *= 2
    nearest = [max(1, round(side / factor)) * factor for side in size]
    words = str(nearest[0]) if nearest[0] == nearest[1] else "x".join(map(str, nearest))
    if max(size) > LARGEST:
        words = "64 or 128, for instance"
    return (
        f"a network of at most {max(MULTIPLIERS)} levels cannot halve images of {size[0]}x{size[1]} pixels down to "
        f"{LARGEST_UNHALVED} pixels or fewer: choose --resolution {words}, or describe a network under `model:`"
    )
