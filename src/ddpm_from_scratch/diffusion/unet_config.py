"""Checks of the network's configuration, whose keys are those of `UNet2DModel`."""

from typing import Any

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


def _check_sample_size(config: dict[str, Any]) -> None:
    size = config["sample_size"]
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    sides = () if size is None else (size, size) if isinstance(size, int) else tuple(size)
    if size is not None and (len(sides) != 2 or any(not isinstance(n, int) or n < 1 or n % factor for n in sides)):
        raise ValueError(
            f"sample_size={size!r} must be a side, or (height, width), divisible by {factor}: the network halves the "
            f"resolution {len(config['block_out_channels']) - 1} times."
        )
