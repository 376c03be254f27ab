"""Networks of pesser/pytorch_diffusion, which holds the weights of Ho et al. 2020, recognised and turned into ours.

Code: https://github.com/pesser/pytorch_diffusion, a translation of https://github.com/hojonathanho/diffusion. The
network is that of the paper's appendix B: one head of attention, sines before cosines, downsampling padded at the far
ends.
"""

import re
from typing import Any

import torch

from ..diffusion.unet import ScratchUNet2DModel
from .openai import Form, Weights, check_channels, load_exactly, seems, unet_config

MARK = "down.0.block.0.norm1.weight"  # which OpenAI's networks do not have
NEEDED = (MARK, "temb.dense.0.weight", "conv_in.weight", "mid.attn_1.q.weight", "conv_out.weight")
# What all these networks are, beside what weights say.
CONSTANTS: dict[str, Any] = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}
# What their layers are called in ours: those of the network's ends, and those inside of blocks.
ENDS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
INNER = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2", "conv")},
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def recognise(weights: Weights) -> Form:
    """The form of the network that the weights belong to; ValueError if it is none that draws images."""
    if missing := [name for name in NEEDED if name not in weights]:
        raise ValueError(
            f"not a network of pesser/pytorch_diffusion, which has {missing[0]}; it seems to be {seems(weights)}."
        )
    found = [match for name in weights if (match := re.fullmatch(r"down\.(\d+)\.block\.(\d+)\.conv2\.weight", name))]
    levels = len({match[1] for match in found})
    form = Form(
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=weights["conv_out.weight"].shape[0],
        num_channels=weights["temb.dense.0.weight"].shape[1],
        channels=tuple(weights[match[0]].shape[0] for match in found if match[2] == "0"),
        num_res_blocks=sum(match[1] == "0" for match in found),
        attention=tuple(f"down.{level}.attn.0.q.weight" in weights for level in range(levels)),
        resblock_updown=False,
        use_scale_shift_norm=False,
        num_classes=None,
    )
    check_channels(form)
    return form


def build(weights: Weights, form: Form, image_size: int, dropout: float) -> ScratchUNet2DModel:
    """Our network with the weights, in float32; ValueError if they are not those of such a network."""
    with torch.device("meta"):
        unet = ScratchUNet2DModel(**{**unet_config(form, image_size, None, dropout), **CONSTANTS})
    layers, ours = _layer_names(form), {}
    for name, weight in weights.items():
        layer, _, tensor = name.rpartition(".")
        block, _, inner = layer.rpartition(".")
        if layer not in ENDS and (block not in layers or inner not in INNER):
            raise ValueError(f"{name} is no weight of a network of pesser/pytorch_diffusion.")
        our_layer = ENDS.get(layer) or f"{layers[block]}.{INNER[inner]}"
        # Query, key, value and output are convolutions of one pixel there, and linear layers here.
        linear = ".attentions." in our_layer and weight.ndim > 1
        ours[f"{our_layer}.{tensor}"] = weight.float().flatten(1) if linear else weight.float()
    return load_exactly(unet, ours)


def _layer_names(form: Form) -> dict[str, str]:
    """Where the layers of their blocks are in ours, such as up.0.block.1: up_blocks.3.resnets.1."""
    middle = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
    names = {f"mid.{theirs}": f"mid_block.{ours}" for theirs, ours in middle.items()}
    last = len(form.channels) - 1
    for level in range(last + 1):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        names |= {f"down.{level}.downsample": f"{down}.downsamplers.0", f"up.{level}.upsample": f"{up}.upsamplers.0"}
        for i in range(form.num_res_blocks + 1):
            for theirs, ours in ((f"down.{level}", down), (f"up.{level}", up)):
                names |= {f"{theirs}.block.{i}": f"{ours}.resnets.{i}", f"{theirs}.attn.{i}": f"{ours}.attentions.{i}"}
    return names
