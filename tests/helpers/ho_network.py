"""The network of Ho et al. 2020 (appendix B) under the names of pesser/pytorch_diffusion, as functions of the weights.

Written a second time, from the paper and the published names of the weights, for what the converter makes of them.
"""

import numpy as np
import torch
import torch.nn.functional as F


def shapes(ch, ch_mult, num_res_blocks, attention, channels=3):
    """The shape of each weight by its name; `attention` says of each level whether it attends."""
    found = {}

    def layer(name, out, *rest):
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, *rest), (out,)

    def residual(name, inputs, outputs):
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        layer(f"{name}.temb_proj", outputs, 4 * ch)
        layer(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def attend(name, width):
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    layer("temb.dense.0", 4 * ch, ch)
    layer("temb.dense.1", 4 * ch, 4 * ch)
    layer("conv_in", ch, channels, 3, 3)
    widths, last = [ch * mult for mult in ch_mult], len(ch_mult) - 1
    skips, width = [ch], ch
    for level, out in enumerate(widths):
        for block in range(num_res_blocks):
            residual(f"down.{level}.block.{block}", width, out)
            if attention[level]:
                attend(f"down.{level}.attn.{block}", out)
            width = out
            skips.append(width)
        if level < last:
            layer(f"down.{level}.downsample.conv", width, width, 3, 3)
            skips.append(width)
    residual("mid.block_1", width, width)
    attend("mid.attn_1", width)
    residual("mid.block_2", width, width)
    for level in reversed(range(last + 1)):
        for block in range(num_res_blocks + 1):
            residual(f"up.{level}.block.{block}", width + skips.pop(), widths[level])
            width = widths[level]
            if attention[level]:
                attend(f"up.{level}.attn.{block}", width)
        if level:
            layer(f"up.{level}.upsample.conv", width, width, 3, 3)
    layer("norm_out", width)
    layer("conv_out", channels, width, 3, 3)
    return found


def output(weights, x, t, ch, ch_mult, num_res_blocks, attention):
    """The predicted noise [B, C, H, W] for x_t and t [B]."""

    def of(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def norm(name, h):
        return F.group_norm(h, 32, *of(name), eps=1e-6)

    def residual(name, h, emb):
        inner = F.conv2d(F.silu(norm(f"{name}.norm1", h)), *of(f"{name}.conv1"), padding=1)
        inner = inner + F.linear(F.silu(emb), *of(f"{name}.temb_proj"))[:, :, None, None]
        inner = F.conv2d(F.silu(norm(f"{name}.norm2", inner)), *of(f"{name}.conv2"), padding=1)
        return inner + (F.conv2d(h, *of(f"{name}.nin_shortcut")) if f"{name}.nin_shortcut.weight" in weights else h)

    def attend(name, h):
        query, key, value = (F.conv2d(norm(f"{name}.norm", h), *of(f"{name}.{part}")).flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", query, key) / h.shape[1] ** 0.5  # of each pixel i for each pixel j
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), value).reshape(h.shape)
        return h + F.conv2d(mixed, *of(f"{name}.proj_out"))

    frequencies = 10000 ** (-np.arange(ch // 2) / (ch // 2 - 1))
    angles = t.double()[:, None] * torch.from_numpy(frequencies)
    emb = F.linear(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype), *of("temb.dense.0"))
    emb = F.linear(F.silu(emb), *of("temb.dense.1"))
    levels = len(ch_mult)
    results = [F.conv2d(x, *of("conv_in"), padding=1)]
    for level in range(levels):
        for block in range(num_res_blocks):
            h = residual(f"down.{level}.block.{block}", results[-1], emb)
            results.append(attend(f"down.{level}.attn.{block}", h) if attention[level] else h)
        if level < levels - 1:
            padded = F.pad(results[-1], (0, 1, 0, 1))
            results.append(F.conv2d(padded, *of(f"down.{level}.downsample.conv"), stride=2))
    h = attend("mid.attn_1", residual("mid.block_1", results[-1], emb))
    h = residual("mid.block_2", h, emb)
    for level in reversed(range(levels)):
        for block in range(num_res_blocks + 1):
            h = residual(f"up.{level}.block.{block}", torch.cat([h, results.pop()], 1), emb)
            h = attend(f"up.{level}.attn.{block}", h) if attention[level] else h
        if level:
            h = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), *of(f"up.{level}.upsample.conv"), padding=1)
    return F.conv2d(F.silu(norm("norm_out", h)), *of("conv_out"), padding=1)
