"""Networks of OpenAI's improved-diffusion and guided-diffusion, recognised by their weights and turned into ours.

Papers: Nichol, Dhariwal 2021, https://arxiv.org/abs/2102.09672, and Dhariwal, Nichol 2021 (ADM),
https://arxiv.org/abs/2105.05233. Code: https://github.com/openai/improved-diffusion and .../guided-diffusion.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.blocks import timestep_embedding
from ..diffusion.unet import ScratchUNet2DModel

Weights = Mapping[str, Tensor]

NEEDED = (
    *("time_embed.0.weight", "time_embed.2.weight", "input_blocks.0.0.weight", "input_blocks.1.0.out_layers.3.weight"),
    *("input_blocks.1.0.emb_layers.1.weight", "middle_block.1.qkv.weight", "output_blocks.0.0.out_layers.3.weight"),
    "out.2.weight",
)
# A name that only such a file has, and what the file is then.
OTHERS = {
    "param_groups": "an optimizer's state; the network is in ema_*.pt or model*.pt",
    "conv_in.weight": "a network of diffusers, which needs no conversion",
    "out.1.positional_embedding": "a classifier",
    "input_blocks.1.0.in_layers.0.weight": "half a network, as a classifier is",
    "model.diffusion_model.input_blocks.0.0.weight": "a latent diffusion model",
    "state_dict": "a dictionary around the weights: save what is under state_dict by itself",
}
# The layer that a block's weights belong to, by the rest of a name that only it has.
LAYERS = {
    "in_layers.0.weight": "residual",
    "qkv.weight": "attention",
    "op.weight": "convolution",
    "conv.weight": "convolution",
    "weight": "convolution",
}
# What their layers are called in ours: those of the network's ends, and those inside of blocks.
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
INNER = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "qkv": "to_{}",
    "proj_out": "to_out.0",
    "op": "conv",
    "conv": "conv",
}
GROUPS = 32  # of every normalisation

# How far sinusoids may be off where fewer numbers stand for them: as far as float32 rounds the angles of a thousand.
SINUSOID_ERROR = 1e-4


class Form(NamedTuple):
    """What the names and shapes of weights say of a network; levels are counted from the top."""

    in_channels: int
    out_channels: int
    num_channels: int  # of the sinusoids
    channels: tuple[int, ...]  # of each level
    num_res_blocks: int
    attention: tuple[bool, ...]  # of each level
    resblock_updown: bool
    use_scale_shift_norm: bool
    num_classes: int | None

    @property
    def learn_sigma(self) -> bool:
        """Whether the network predicts the variance too."""
        return self.out_channels == 2 * self.in_channels


def seems(content: Mapping[str, Any]) -> str:
    """What a file holds that is no such network, by the names in it."""
    kinds = (kind for name, kind in OTHERS.items() if name in content)
    return next(kinds, f"{len(content)} entries, the first called {', '.join(map(str, list(content)[:3]))}")


def recognise(weights: Weights) -> Form:
    """The form of the network that the weights belong to.

    Raises:
        ValueError: it is none of the two repositories' networks that draw images, and what it seems to be.
    """
    if missing := [name for name in NEEDED if name not in weights]:
        raise ValueError(
            f"not a network of improved-diffusion or guided-diffusion, which has {missing[0]}; it seems to be "
            f"{seems(weights)}."
        )
    outputs = _blocks(weights, "output_blocks")
    # The first block that doubles the resolution is the last of its level, which has one more than on the way down.
    first = next((i for i, layers in enumerate(outputs) if _samples(layers)), len(outputs) - 1)
    on_a_level = first + 1
    ends = range(first, len(outputs), on_a_level)
    attention = tuple("attention" in outputs[end] for end in reversed(ends))
    of_levels = [f"input_blocks.{1 + on_a_level * level}.0.out_layers.3.weight" for level in range(len(attention))]
    form = Form(
        in_channels=weights["input_blocks.0.0.weight"].shape[1],
        out_channels=weights["out.2.weight"].shape[0],
        num_channels=weights["time_embed.0.weight"].shape[1],
        channels=tuple(weights[name].shape[0] for name in of_levels if name in weights),
        num_res_blocks=first,
        attention=attention,
        resblock_updown=_samples(outputs[first]) and outputs[first][-1] == "residual",
        use_scale_shift_norm=_doubles(weights, "input_blocks.1.0"),
        num_classes=weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
    )
    _check_blocks(form, _blocks(weights, "input_blocks"), outputs)
    check_channels(form)
    return form


def _blocks(weights: Weights, part: str) -> list[tuple[str, ...]]:
    """The layers of each block of a part, such as ("residual", "attention"); a block without weights has none."""
    found: dict[int, dict[int, str]] = defaultdict(dict)
    for name in weights:
        if match := re.fullmatch(rf"{part}\.(\d+)\.(\d+)\.(.+)", name):
            block, layer, rest = int(match[1]), int(match[2]), match[3]
            if rest in LAYERS:
                found[block][layer] = LAYERS[rest]
    return [tuple(found[block][layer] for layer in sorted(found[block])) for block in range(max(found) + 1)]


def _samples(layers: Sequence[str]) -> bool:
    """Whether a block of the way up ends by doubling the resolution."""
    return len(layers) > 1 and layers[-1] != "attention"


def _doubles(weights: Weights, block: str) -> bool:
    return weights[f"{block}.emb_layers.1.weight"].shape[0] == 2 * weights[f"{block}.out_layers.3.weight"].shape[0]


def _check_blocks(form: Form, inputs: list[tuple[str, ...]], outputs: list[tuple[str, ...]]) -> None:
    """Compare the blocks with those of a network of this form."""
    sampler = "residual" if form.resblock_updown else "convolution"
    down: list[tuple[str, ...]] = [("convolution",)]
    up: list[tuple[str, ...]] = []
    last = len(form.attention) - 1
    for level, attends in enumerate(form.attention):
        layers = ("residual", "attention") if attends else ("residual",)
        down += [layers] * form.num_res_blocks + [(sampler,)] * (level < last)
        up = [layers] * form.num_res_blocks + [(*layers, sampler) if level else layers] + up
    for part, found, expected in (("input_blocks", inputs, down), ("output_blocks", outputs, up)):
        for i, (there, due) in enumerate(zip(found, expected, strict=False)):
            if there != due:
                raise ValueError(
                    f"{part}.{i} consists of {', '.join(there) or 'nothing'}, where {', '.join(due)} would follow from "
                    "the other blocks. Networks without convolutions between the levels (conv_resample=False), or of "
                    "another make, have no counterpart here."
                )
        if len(found) != len(expected):
            raise ValueError(
                f"{part} has {len(found)} blocks, where {len(expected)} would follow from the other blocks."
            )


def check_channels(form: Form) -> None:
    """Raise ValueError for a network that does not draw images from noise alone."""
    if form.in_channels == 6 or form.out_channels not in (form.in_channels, 2 * form.in_channels):
        raise ValueError(
            f"the network makes {form.out_channels} channels of {form.in_channels}: where images are drawn from noise "
            "they are as many, or twice as many where the variance is predicted. Upsamplers take 6."
        )


def head_width(form: Form, num_heads: int | None, num_head_channels: int | None) -> int | list[int]:
    """The configuration's attention_head_dim: one width, or one for each level where they differ.

    Raises:
        ValueError: neither or both are given, or the heads do not divide the channels of a level that attends.
    """
    if (num_heads is None) == (num_head_channels is None):
        raise ValueError(
            "weights do not say how many heads attention has: pass --num_head_channels or --num_heads, one of the two, "
            "as in training. Where neither was said there, it is --num_heads 4."
        )
    name, asked = ("num_heads", num_heads) if num_heads is not None else ("num_head_channels", num_head_channels)
    attending = [c for c, attends in zip(form.channels, form.attention, strict=True) if attends] + [form.channels[-1]]
    if asked is None or asked < 1 or any(channels % asked for channels in attending):
        raise ValueError(f"--{name} {asked} does not divide the channels of the levels that attend, {attending}.")
    if num_head_channels is not None:
        return num_head_channels
    widths = {channels // asked for channels in attending}
    return widths.pop() if len(widths) == 1 else [max(1, channels // asked) for channels in form.channels]


def unet_config(form: Form, image_size: int, heads: int | list[int] | None, dropout: float) -> dict[str, Any]:
    """The configuration of our network, without the embedding of timesteps."""
    sampling = "resnet" if form.resblock_updown else "conv"
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if form.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    return {
        "sample_size": image_size,
        "in_channels": form.in_channels,
        "out_channels": form.out_channels,
        "block_out_channels": form.channels,
        "layers_per_block": form.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if attends else plain[0] for attends in form.attention),
        "up_block_types": tuple("AttnUpBlock2D" if attends else plain[1] for attends in reversed(form.attention)),
        "downsample_type": sampling,
        "upsample_type": sampling,
        "attention_head_dim": heads,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "resnet_time_scale_shift": "scale_shift" if form.use_scale_shift_norm else "default",
        "num_class_embeds": form.num_classes,
        "time_embedding_dim": 4 * form.num_channels,
        "dropout": dropout,
    }


def build(weights: Weights, config: dict[str, Any], form: Form, new_order: bool, times: Tensor) -> ScratchUNet2DModel:
    """Our network with the weights, in float32.

    Args:
        weights: under OpenAI's names.
        config: of `unet_config`.
        form: of `recognise`.
        new_order: whether the output of `qkv` is split into query, key and value first, and into heads then.
        times: what the network is told for each timestep, [T].

    Raises:
        ValueError: the weights are not those of such a network.
    """
    weights = {name: weight.float() for name, weight in weights.items()}
    embedding: dict[str, Tensor] = {}
    if not bool((times == torch.arange(len(times))).all()) or form.num_channels != form.channels[0]:
        config = {**config, "time_embedding_type": "learned", "num_train_timesteps": len(times)}
        embedding = _learned_timesteps(times, form, weights["time_embed.0.weight"])
    with torch.device("meta"):
        unet = ScratchUNet2DModel(**config)
    layers, ours = _layer_names(form), dict[str, Tensor]()
    for theirs, weight in weights.items():
        name = _our_name(theirs, layers)
        if "to_{}" in name:
            heads: int = unet.get_submodule(name.partition(".to_{}")[0]).heads
            ours |= {
                name.format(kind): part for kind, part in zip("qkv", _split(weight, heads, new_order), strict=True)
            }
        else:
            ours[name] = weight.flatten(1) if ".to_out." in name and weight.ndim > 1 else weight
    return load_exactly(unet, ours | embedding)


def load_exactly(unet: ScratchUNet2DModel, weights: Weights) -> ScratchUNet2DModel:
    """Give weights under our names to a network without any; ValueError unless they are just those of it."""
    expected = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wrong := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise ValueError(
            f"{len(wrong)} weights do not fit a network of this form: {wrong[0]} has the shape {found.get(wrong[0])}, "
            f"not {expected.get(wrong[0])}."
        )
    unet.load_state_dict({name: weight.contiguous() for name, weight in weights.items()}, assign=True)
    return unet.eval()


def _layer_names(form: Form) -> dict[str, str]:
    """Where the layers of their blocks are in ours, such as input_blocks.1.0: down_blocks.0.resnets.0."""
    names = {
        f"middle_block.{i}": f"mid_block.{ours}" for i, ours in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }
    last, on_a_level = len(form.attention) - 1, form.num_res_blocks + 1
    for level, attends in enumerate(form.attention):
        for i in range(on_a_level):
            down, up = f"input_blocks.{level * on_a_level + i + 1}", f"output_blocks.{(last - level) * on_a_level + i}"
            if i < form.num_res_blocks:
                names |= {
                    f"{down}.0": f"down_blocks.{level}.resnets.{i}",
                    f"{down}.1": f"down_blocks.{level}.attentions.{i}",
                }
            elif level < last:
                names[f"{down}.0"] = f"down_blocks.{level}.downsamplers.0"
            names |= {f"{up}.0": f"up_blocks.{last - level}.resnets.{i}"}
            names |= {f"{up}.1": f"up_blocks.{last - level}.attentions.{i}"} if attends else {}
        names[f"{up}.{1 + attends}"] = f"up_blocks.{last - level}.upsamplers.0"
    return names


def _our_name(name: str, layers: Mapping[str, str]) -> str:
    """Our name of a weight; a placeholder stands for q, k and v."""
    layer, _, tensor = name.rpartition(".")
    if layer in ENDS:
        return f"{ENDS[layer]}.{tensor}"
    match = re.fullmatch(r"(\w+\.\d+(?:\.\d+)?)\.(\w+(?:\.\d+)?)", layer)
    if match is None or match[1] not in layers or match[2] not in INNER:
        raise ValueError(f"{name} is no weight of a network of improved-diffusion or guided-diffusion.")
    return f"{layers[match[1]]}.{INNER[match[2]]}.{tensor}"


def _split(qkv: Tensor, heads: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of all heads, [C, ...] each, from the one layer that makes them, [3 C, ...]."""
    shape = (3, heads, -1) if new_order else (heads, 3, -1)
    parts = qkv.flatten(1) if qkv.ndim > 1 else qkv
    query, key, value = parts.unflatten(0, shape).unbind(0 if new_order else 1)  # [heads, d, ...] each
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def _learned_timesteps(times: Tensor, form: Form, linear: Tensor) -> dict[str, Tensor]:
    """A table of what the network is told of each timestep, and the layer that reads it.

    The table is [T, C] with C channels of the first level, while the sinusoids are [T, num_channels]. Where they are
    more than C, as in the network for 512 pixels, the C strongest of their singular directions stand for them: most of
    a hundred slow sinusoids are sums of the others over a thousand timesteps.
    """
    sinusoids = timestep_embedding(times, form.num_channels, flip_sin_to_cos=True, freq_shift=0)
    if form.num_channels == form.channels[0]:
        return {"time_proj.weight": sinusoids}
    left, values, right = torch.linalg.svd(sinusoids.double(), full_matrices=False)
    table = left[:, : form.channels[0]] * values[: form.channels[0]]
    directions = right[: form.channels[0]]
    if (error := float((table @ directions - sinusoids).abs().max())) > SINUSOID_ERROR:
        raise ValueError(
            f"the network is told its timesteps by {form.num_channels} sinusoids, and its first level has "
            f"{form.channels[0]} channels: as many numbers miss the sinusoids by {error:.1g}, which is more than "
            f"{SINUSOID_ERROR:g}."
        )
    return {
        "time_proj.weight": table.float(),
        "time_embedding.linear_1.weight": (linear.double() @ directions.T).float(),
    }
