"""Small networks to work with, and their weights on disk."""

import torch
from safetensors.torch import load_file, save_file

TINY_NETWORK = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}


def randomised(network, seed=0):
    """The network with weights large enough that every layer matters for the output; a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise * weight[0].numel() ** -0.5)
            else:
                weight.copy_(weight.round() + 0.3 * noise)  # around 1 for a norm's scale, 0 for what PyTorch drew
    return network


def rewrite_weights(folder, change):
    """Replace the weights in a network's folder by what `change` makes of them."""
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def with_old_attention_names(weights):
    """The weights under the names of the oldest checkpoints."""
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
    assert any(".query." in name for name in weights)
    return weights
