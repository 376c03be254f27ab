"""Blocks of the network: residual blocks, attention and resampling, and the levels that they make.

Residual blocks may resample too, as in ADM: Dhariwal, Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis",
https://arxiv.org/abs/2105.05233, section 3.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .unet_config import BlockKind, embed_dim

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


def matrix_operand(x: Tensor) -> Tensor:
    """The tensor in the type and order that products of matrices take, for several that would each make a copy."""
    device = x.device.type
    casts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)  # others may know no autocast
    return x.to(torch.get_autocast_dtype(device) if casts else x.dtype).contiguous()


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


def group_norm_by_channel(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation, [B, C, ...], by the moments of each channel, computed in float32 at least.

    A compiler makes two passes over memory of it, whatever the layout: one for the moments, and one that scales, shifts
    and does what follows. Reductions over whole groups jump through channels last.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    within, mean = torch.var_mean(values.flatten(2), dim=2, correction=0)  # [B, C]
    grouped = mean.unflatten(1, (groups, -1))  # [B, groups, C / groups]
    of_group = grouped.mean(2, keepdim=True)
    between = grouped - of_group
    variance = (within.unflatten(1, (groups, -1)) + between.square()).mean(2, keepdim=True)
    scale = weight * (variance + eps).rsqrt().expand_as(between).flatten(1)  # [B, C]
    shift = bias - of_group.expand_as(between).flatten(1) * scale
    form = (*scale.shape, *(1,) * (x.ndim - 2))
    # As PyTorch's: of 16 bits where weights are too, else (by autocast) of float32.
    return (values * scale.reshape(form) + shift.reshape(form)).to(torch.promote_types(x.dtype, weight.dtype))


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the form in which each device is fast."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if x.device.type == "cuda" and torch.compiler.is_compiling():
            return group_norm_by_channel(x, self.num_groups, self.weight, self.bias, self.eps)
        # In channels last PyTorch takes up to six times as long for them as with turning them there and back.
        if x.device.type == "cpu" and x.dtype.itemsize == 2 and x.ndim == 4:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def halved(x: Tensor) -> Tensor:
    """Halve the resolution by averaging: [B, C, H, W] -> [B, C, H/2, W/2]."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Double the resolution by repeating pixels: [B, C, H, W] -> [B, C, 2 H, 2 W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution, plus the shortcut. The time embedding enters before or in the second norm.

    With `resample`, both ways change their resolution by it: the shortcut's at once, the other before its convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: dict[str, Any],
        scale_factor: float = 1.0,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
        self.scale_factor = scale_factor
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed_dim(config), out_channels * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(config["dropout"])
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, activated_emb: Tensor) -> Tensor:
        """[B, C_in, H, W] and SiLU of the embedding [B, E] -> [B, C_out, H, W], resampled."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
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
        tokens = matrix_operand(h.flatten(2).transpose(1, 2))  # [B, H W, C]
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
        return self.conv(doubled(x))


def run_sampler(sampler: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    """Apply a layer that changes the resolution; residual blocks take the embedding too."""
    resampled: Tensor = sampler(x, emb) if isinstance(sampler, ResnetBlock) else sampler(x)
    return resampled


class DownBlock(nn.Module):
    """Residual blocks with or without attention, then downsampling except on the last level."""

    def __init__(self, channels: Sequence[int], kind: BlockKind, halve: bool, config: dict[str, Any]) -> None:
        """`channels` has those of the input, then those of each residual block's output."""
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, config) for a, b in itertools.pairwise(channels))
        groups = config["norm_num_groups"]
        self.attentions = nn.ModuleList(Attention(c, groups, config) for c in channels[1:]) if kind.attention else None
        self.downsamplers = nn.ModuleList()
        if halve and (kind.sampling or config["downsample_type"]) == "resnet":
            self.downsamplers.append(ResnetBlock(channels[-1], channels[-1], config, resample=halved))
        elif halve:
            self.downsamplers.append(Downsample(channels[-1], config["downsample_padding"]))

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """All intermediate results, which the up blocks take as skips; the last one is the input of the next level."""
        results: tuple[Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            x = x if self.attentions is None else self.attentions[i](x)
            results += (x,)
        for downsample in self.downsamplers:
            results += (run_sampler(downsample, x, emb),)
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
        kind: BlockKind,
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
        attentions = [Attention(out_channels, groups, config) for _ in skips] if kind.attention else None
        self.attentions = None if attentions is None else nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList()
        if double and (kind.sampling or config["upsample_type"]) == "resnet":
            self.upsamplers.append(ResnetBlock(out_channels, out_channels, config, resample=doubled))
        elif double:
            self.upsamplers.append(Upsample(out_channels))

    def forward(self, x: Tensor, skips: Sequence[Tensor], emb: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C_out, 2 H, 2 W], or [B, C_out, H, W] on the last level."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[i]], dim=1), emb)
            x = x if self.attentions is None else self.attentions[i](x)
        for upsample in self.upsamplers:
            x = run_sampler(upsample, x, emb)
        return x
