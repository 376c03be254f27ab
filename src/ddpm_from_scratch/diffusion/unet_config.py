"""Checks of the network's configuration, whose keys are those of `UNet2DModel`."""

from collections.abc import Mapping, Sequence
from typing import Any

from .checks import is_whole

# What each configuration key may be, for the keys of which not every value is implemented.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}  # name: with attention?
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}


def check_network(config: dict[str, Any]) -> None:
    """Raise ValueError for a configuration that is not implemented or cannot be built."""
    for key, allowed in SUPPORTED.items():
        if config[key] not in allowed:
            raise ValueError(f"{key}={config[key]!r} is not supported. Allowed: {', '.join(map(repr, allowed))}.")
    for key, blocks in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        if not all(kind in blocks for kind in config[key]):
            raise ValueError(f"{key}={list(config[key])!r} is not supported. Allowed: {', '.join(blocks)}.")
        if len(config[key]) != len(config["block_out_channels"]):
            raise ValueError(
                f"{key} has {len(config[key])} entries, block_out_channels {len(config['block_out_channels'])}: "
                "one for each level is needed in both."
            )
    for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ValueError(f"{key}={config[key]!r} must be a whole number, at least 1.")
    _check_groups_and_heads(config)
    _check_sample_size(config)


def _check_groups_and_heads(config: dict[str, Any]) -> None:
    groups, head_dim = config["norm_num_groups"], config["attention_head_dim"]
    for channels in config["block_out_channels"]:
        if channels % groups:
            raise ValueError(f"block_out_channels={channels} is not divisible by norm_num_groups={groups}.")
    kinds = zip(
        config["block_out_channels"], config["down_block_types"], reversed(config["up_block_types"]), strict=True
    )
    attending = [c for c, down, up in kinds if DOWN_BLOCKS[down] or UP_BLOCKS[up]]
    if config["mid_block_type"] is not None and config["add_attention"]:
        attending.append(config["block_out_channels"][-1])
    if head_dim is not None and any(head_dim > channels or head_dim < 1 for channels in attending):
        raise ValueError(f"attention_head_dim={head_dim} must lie between 1 and the channels that attend, {attending}.")


def sides(sample_size: int | Sequence[int]) -> tuple[int, ...]:
    """A `sample_size` as (height, width)."""
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def halvings(block_out_channels: Sequence[int]) -> int:
    """2 to the number of times that a network halves its input; height and width must be multiples of it."""
    return 2 ** (len(block_out_channels) - 1)


def sample_sides(config: Mapping[str, Any], height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of samples: those that are asked for, the configuration's sample_size where they are None.

    Raises ValueError if there is no sample_size, or the network cannot halve a side.
    """
    size, factor = config["sample_size"], halvings(config["block_out_channels"])
    if size is None and None in (height, width):
        raise ValueError(
            "The network's configuration has no sample_size: set it to the side of the images or to [height, "
            "width], or pass height and width where the pipeline takes them."
        )
    own = (0, 0) if size is None else sides(size)
    asked = {"height": own[0] if height is None else height, "width": own[1] if width is None else width}
    for name, side in asked.items():
        if not (is_whole(side) and side >= 1 and side % factor == 0):
            raise ValueError(
                f"{name}={side!r} must be a multiple of {factor}: the network halves its input "
                f"{len(config['block_out_channels']) - 1} times."
            )
    return int(asked["height"]), int(asked["width"])


def _check_sample_size(config: dict[str, Any]) -> None:
    size, factor = config["sample_size"], halvings(config["block_out_channels"])
    both = () if size is None else sides(size)
    if size is not None and (len(both) != 2 or any(not isinstance(n, int) or n < 1 or n % factor for n in both)):
        raise ValueError(
            f"sample_size={size!r} must be a side, or (height, width), divisible by {factor}: the network halves the "
            f"resolution {len(config['block_out_channels']) - 1} times."
        )
