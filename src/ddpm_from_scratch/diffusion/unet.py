"""The noise network of DDPM: a U-Net with `diffusers.UNet2DModel`'s configuration, weight names and outputs.

The architecture is that of Ho et al. 2020 (appendix B): residual blocks of two convolutions with group normalisation,
self-attention at some resolutions, and a sinusoidal embedding of the timestep added in every residual block. The layers
are this project's own; names and shapes of the weights are those of `UNet2DModel`, so checkpoints go both ways.
"""

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .stock import altered, safe_weights, write_config
from .unet_config import DOWN_BLOCKS, UP_BLOCKS, check_network, halvings

# On a CPU the fused attention's backward pass in bfloat16 takes ten times as long as plain matrix products do over few
# tokens; all else it does faster.
FEW_TOKENS = 256


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal embedding [B] -> [B, dim] of timesteps, in float32; sines first unless flipped (Ho et al., app. B)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / (half - freq_shift))
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, [B, heads, tokens, d] each."""
    slow_backward = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    if slow_backward and query.shape[2] <= FEW_TOKENS:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids: [B, dim] -> [B, embed_dim]."""

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """[B, dim] -> [B, embed_dim]."""
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class GroupNorm(nn.GroupNorm):
    """Group normalisation that converts 16-bit values to the memory layout in which a CPU is fast."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        # In channels last PyTorch takes up to six times as long for them as with turning them there and back.
        if x.device.type == "cpu" and x.dtype.itemsize == 2 and x.ndim == 4:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution, plus the shortcut. The time embedding enters before or in the second norm."""

    def __init__(self, in_channels: int, out_channels: int, config: dict[str, Any], scale_factor: float = 1.0) -> None:
        super().__init__()
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
        self.scale_factor = scale_factor
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(_embed_dim(config), out_channels * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(config["dropout"])
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, activated_emb: Tensor) -> Tensor:
        """[B, C_in, H, W] and SiLU of the embedding [B, E] -> [B, C_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_emb_proj(activated_emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x + h if self.scale_factor == 1 else (x + h) / self.scale_factor


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    # ModelMixin renames query, key, value and proj_attn of the oldest checkpoints in modules that bear this mark.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, groups: int | None, config: dict[str, Any], scale_factor: float = 1.0) -> None:
        super().__init__()
        head_dim = config["attention_head_dim"] or channels
        self.heads = channels // head_dim
        self.scale_factor = scale_factor
        inner = self.heads * head_dim
        self.group_norm = GroupNorm(groups, channels, config["norm_eps"]) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        h = x if self.group_norm is None else self.group_norm(x)
        tokens = h.flatten(2).transpose(1, 2)  # [B, H W, C]
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, H W, d]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = attend(query, key, value).transpose(1, 2).flatten(2)  # [B, H W, heads d]
        h = self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)
        return x + h if self.scale_factor == 1 else (x + h) / self.scale_factor


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution; without padding, one pixel is added right and below."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks with or without attention, then downsampling except on the last level."""

    def __init__(self, channels: Sequence[int], attention: bool, halve: bool, config: dict[str, Any]) -> None:
        """`channels` has those of the input, then those of each residual block's output."""
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, config) for a, b in itertools.pairwise(channels))
        groups = config["norm_num_groups"]
        self.attentions = nn.ModuleList(Attention(c, groups, config) for c in channels[1:]) if attention else None
        halving = [Downsample(channels[-1], config["downsample_padding"])] if halve else []
        self.downsamplers = nn.ModuleList(halving)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """All intermediate results, which the up blocks take as skips; the last one is the input of the next level."""
        results: tuple[Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            x = x if self.attentions is None else self.attentions[i](x)
            results += (x,)
        for downsample in self.downsamplers:
            results += (downsample(x),)
        return results


class MidBlock(nn.Module):
    """Residual block, attention unless configured away, residual block, at the lowest resolution."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        scale_factor, groups = config["mid_block_scale_factor"], config["attn_norm_num_groups"]
        if groups is None and config["resnet_time_scale_shift"] == "default":
            groups = config["norm_num_groups"]
        attentions = [Attention(channels, groups, config, scale_factor)] if config["add_attention"] else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config, scale_factor) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Residual blocks that also take the skips from the down blocks, then upsampling except on the top level."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        skips: Sequence[int],
        attention: bool,
        double: bool,
        config: dict[str, Any],
    ) -> None:
        """`channels` are those of the input, `skips` those of the skips in the order of their use."""
        super().__init__()
        inputs = [channels, *[out_channels] * (len(skips) - 1)]
        self.resnets = nn.ModuleList(
            ResnetBlock(a + skip, out_channels, config) for a, skip in zip(inputs, skips, strict=True)
        )
        groups = config["norm_num_groups"]
        self.attentions = nn.ModuleList(Attention(out_channels, groups, config) for _ in skips) if attention else None
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if double else [])

    def forward(self, x: Tensor, skips: Sequence[Tensor], emb: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C_out, 2 H, 2 W], or [B, C_out, H, W] on the last level."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[i]], dim=1), emb)
            x = x if self.attentions is None else self.attentions[i](x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class ScratchUNet2DModel(UNet2DModel):
    """A `diffusers.UNet2DModel` whose layers are this project's own.

    Configuration keys, weight names and outputs are those of `UNet2DModel` for the DDPM family, so that its checkpoints
    load here and those saved here load there. A fresh network starts as the paper's does: Xavier-uniform weights, and
    zeros in the last layer of every residual and attention block and of the network.

    Honoured as in `UNet2DModel`: sample_size, in_channels, out_channels (twice in_channels for a learned variance),
    center_input_sample, time_embedding_dim, freq_shift, flip_sin_to_cos, block_out_channels, layers_per_block,
    mid_block_scale_factor, downsample_padding (0 or 1), dropout, attention_head_dim, norm_num_groups,
    attn_norm_num_groups, norm_eps, add_attention, num_class_embeds, num_train_timesteps (recorded; not needed for
    sinusoids), mid_block_type "UNetMidBlock2D" or None, down_block_types "DownBlock2D" and "AttnDownBlock2D",
    up_block_types "UpBlock2D" and "AttnUpBlock2D", resnet_time_scale_shift "default" and "scale_shift".

    Refused with a ValueError that names the key: time_embedding_type "fourier" and "learned", downsample_type and
    upsample_type "resnet", act_fn other than "silu", class_embed_type "timestep" and "identity", other block types.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        # Past UNet2DModel's own constructor: its layers are never built.
        super(UNet2DModel, self).__init__()
        check_network(self.config)
        self.sample_size = sample_size
        self.gradient_checkpointing = False
        width, embed_dim = block_out_channels[0], _embed_dim(self.config)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.time_embedding = TimeEmbedding(width, embed_dim)
        self.class_embedding = nn.Embedding(num_class_embeds, embed_dim) if num_class_embeds is not None else None
        self._build_levels(dict(self.config))
        self.conv_norm_out = GroupNorm(norm_num_groups, width, norm_eps)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        self._initialise()

    def _build_levels(self, config: dict[str, Any]) -> None:
        """Build the down blocks, the middle block and the up blocks."""
        all_channels, layers = config["block_out_channels"], config["layers_per_block"]
        last = len(all_channels) - 1
        self.down_blocks = nn.ModuleList()
        skips = [all_channels[0]]  # channels of every result of the way down
        for level, (kind, channels) in enumerate(zip(config["down_block_types"], all_channels, strict=True)):
            halve, outputs = level < last, [channels] * layers
            self.down_blocks.append(DownBlock([skips[-1], *outputs], DOWN_BLOCKS[kind], halve, config))
            skips += outputs + [channels] * halve

        self.mid_block = MidBlock(skips[-1], config) if config["mid_block_type"] is not None else None

        self.up_blocks = nn.ModuleList()
        below = skips[-1]
        for level, (kind, channels) in enumerate(zip(config["up_block_types"], reversed(all_channels), strict=True)):
            taken = [skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(UpBlock(below, channels, taken, UP_BLOCKS[kind], level < last, config))
            below = channels

    def _initialise(self) -> None:
        """Initialise as the code of Ho et al. does: Xavier-uniform weights, zero biases, and zeros in last layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        last = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        last += [m.to_out[0] for m in self.modules() if isinstance(m, Attention)]  # type: ignore[misc]
        for module in (*last, self.conv_out):
            nn.init.zeros_(module.weight)

    @classmethod
    def from_stock(cls, unet: UNet2DModel) -> Self:
        """Wrap the tensors of a stock network in this class, without a copy and in the same mode.

        Raises:
            ValueError: if its configuration is one that this class refuses.
        """
        with torch.device("meta"):
            own: Self = altered(unet, cls)
        own.load_state_dict(unet.state_dict(keep_vars=True), strict=True, assign=True)
        if unet.is_gradient_checkpointing:
            own.enable_gradient_checkpointing()
        return own.train(unet.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # noqa: ANN401
        """As `ModelMixin.from_pretrained`, but a checkpoint that does not hold exactly this network is refused.

        Pickled weights (`.bin`) are only read with `use_safetensors=False`.

        Raises:
            ValueError: naming the weights that are missing, unexpected or of another shape.
            OSError: there are no weights, or only pickled ones.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        with safe_weights(pretrained_model_name_or_path, kwargs):
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        wrong = {kind: keys for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if (keys := info[kind])}
        if wrong:
            found = "; ".join(f"{kind.replace('_', ' ')}: {_shortened(keys)}" for kind, keys in wrong.items())
            raise ValueError(f"The weights in {pretrained_model_name_or_path} do not fit their config.json: {found}.")
        return (model, info) if wants_info else model

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration under the name of `UNet2DModel`, so that both classes can load it."""
        write_config(self.to_json_string(), json_file_path, _class_name=UNet2DModel.__name__)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from x_t and t.

        Args:
            sample: x_t, [B, in_channels, H, W]; H and W divisible by 2 ** (number of levels - 1).
            timestep: one for all, or [B].
            class_labels: LongTensor [B]; required if, and only if, the network is class-conditional.
            return_dict: False for a tuple.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: for a shape that does not fit, or labels that are missing or too many.
        """
        self._check_input(sample, class_labels)
        x = 2 * sample - 1 if self.config["center_input_sample"] else sample
        emb = F.silu(self._embed(timestep, class_labels, x))

        if x.device.type == "cpu":  # whose convolutions are fastest so; on a GPU the weights' format decides
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        results = [x]
        for block in self.down_blocks:
            results += self._run(block, results[-1], emb)
        x = results[-1]
        if self.mid_block is not None:
            x = self._run(self.mid_block, x, emb)
        for block in self.up_blocks:
            x = self._run(block, x, [results.pop() for _ in block.resnets], emb)  # type: ignore[union-attr]
        x = self.conv_out(F.silu(self.conv_norm_out(x))).contiguous()
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:  # noqa: ANN401
        """Run a block; with gradient checkpointing, the backward pass computes its inner results again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _embed(self, timestep: Tensor | float | int, class_labels: Tensor | None, x: Tensor) -> Tensor:
        """Embed timesteps and, if the network is class-conditional, class labels: [B, embed_dim]."""
        t = torch.as_tensor(timestep, device=x.device).reshape(-1)
        if len(t) not in (1, x.shape[0]):
            raise ValueError(f"{len(t)} timesteps for a batch of {x.shape[0]}: pass one, or one per sample.")
        t = t.expand(x.shape[0])
        width = self.config["block_out_channels"][0]
        sinusoids = timestep_embedding(t, width, self.config["flip_sin_to_cos"], self.config["freq_shift"])
        emb = self.time_embedding(sinusoids.to(self.time_embedding.linear_1.weight.dtype))
        return emb if self.class_embedding is None else emb + self.class_embedding(class_labels)

    def _check_input(self, sample: Tensor, class_labels: Tensor | None) -> None:
        channels, levels = self.config["in_channels"], len(self.config["block_out_channels"])
        factor = halvings(self.config["block_out_channels"])
        if sample.ndim != 4 or sample.shape[1] != channels or sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; this network takes [B, {channels}, H, W] with H and W "
                f"divisible by {factor}, since it halves the resolution {levels - 1} times."
            )
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "class_labels is missing: this network is class-conditional, pass a LongTensor [B]."
                if class_labels is None
                else "class_labels was passed, but this network is not class-conditional (num_class_embeds=None)."
            )
        if class_labels is not None and class_labels.shape != sample.shape[:1]:
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)}; a batch of {len(sample)} needs one each."
            )


def _embed_dim(config: dict[str, Any]) -> int:
    return config["time_embedding_dim"] or 4 * config["block_out_channels"][0]


def _shortened(keys: Sequence[object]) -> str:
    return ", ".join(map(str, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
