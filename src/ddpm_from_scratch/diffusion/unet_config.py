"""Checks of the network's configuration, whose keys are those of `UNet2DModel`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .checks import is_whole

# What each configuration key may be, for the keys of which not every value is implemented.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "time_embedding_type": ("positional", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}


class BlockKind(NamedTuple):
    """A level of the network."""

    attention: bool
    sampling: str | None  # by "conv" or "resnet"; None: by the configuration's downsample_type or upsample_type


DOWN_BLOCKS = {
    "DownBlock2D": BlockKind(attention=False, sampling="conv"),
    "AttnDownBlock2D": BlockKind(attention=True, sampling=None),
    "ResnetDownsampleBlock2D": BlockKind(attention=False, sampling="resnet"),
}
UP_BLOCKS = {
    "UpBlock2D": BlockKind(attention=False, sampling="conv"),
    "AttnUpBlock2D": BlockKind(attention=True, sampling=None),
    "ResnetUpsampleBlock2D": BlockKind(attention=False, sampling="resnet"),
}


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
    if config["time_embedding_type"] == "learned" and not is_whole(config["num_train_timesteps"]):
        raise ValueError("time_embedding_type='learned' needs num_train_timesteps: one embedding for each is learned.")
    for channels in config["block_out_channels"]:
        if channels % config["norm_num_groups"]:
            raise ValueError(
                f"block_out_channels={channels} is not divisible by norm_num_groups={config['norm_num_groups']}."
            )
    _check_heads(config)
    _check_sample_size(config)


def _check_heads(config: dict[str, Any]) -> None:
    asked, all_channels = config["attention_head_dim"], config["block_out_channels"]
    if isinstance(asked, Sequence) and len(asked) != len(all_channels):
        raise ValueError(
            f"attention_head_dim={asked!r} must be one width, or {len(all_channels)}, one for each level from the top."
        )
    kinds = zip(config["down_block_types"], reversed(config["up_block_types"]), strict=True)
    attending = [DOWN_BLOCKS[down].attention or UP_BLOCKS[up].attention for down, up in kinds]
    attending[-1] |= config["mid_block_type"] is not None and config["add_attention"]
    for channels, width, attends in zip(all_channels, head_widths(config), attending, strict=True):
        if attends and not (is_whole(width) and 1 <= width <= channels):
            raise ValueError(
                f"attention_head_dim={asked!r} must be a whole number, at least 1 and at most the channels of a level "
                f"that attends: one of them has {channels}."
            )


def head_widths(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Channels of an attention head on each level, from the top, as attention_head_dim says it (None: all channels)."""
    asked, all_channels = config["attention_head_dim"], config["block_out_channels"]
    if asked is None:
        return tuple(all_channels)
    return tuple(asked) if isinstance(asked, Sequence) else (asked,) * len(all_channels)


def embed_dim(config: Mapping[str, Any]) -> int:
    """Channels of the embedding of timesteps and classes."""
    return config["time_embedding_dim"] or 4 * config["block_out_channels"][0]


def takes_labels(config: Mapping[str, Any]) -> bool:
    """Whether a network is conditioned on class labels, of whichever form."""
    return config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None


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
