"""Small networks to work with, and their weights on disk."""

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm_from_scratch import ScratchUNet2DModel

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


def pair(config, seed=0):
    """A stock network of random weights and ours with the same."""
    stock = randomised(UNet2DModel(**config), seed).eval()
    own = ScratchUNet2DModel(**config).eval()
    own.load_state_dict(stock.state_dict(), strict=True)
    return stock, own


def inputs(config, batch=2, dtype=torch.float32, seed=1):
    """Arguments of a network's call."""
    generator = torch.Generator().manual_seed(seed)
    size = config["sample_size"]
    sides = size if isinstance(size, tuple) else (size, size)
    arguments = {
        "sample": torch.randn(batch, config.get("in_channels", 3), *sides, generator=generator).to(dtype),
        "timestep": torch.tensor([3, 900])[:batch],
    }
    if config.get("class_embed_type") == "identity":
        width = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]
        arguments["class_labels"] = torch.randn(batch, width, generator=generator).to(dtype)
    elif config.get("class_embed_type") == "timestep":
        arguments["class_labels"] = torch.tensor([12.0, 250.5])[:batch]
    elif classes := config.get("num_class_embeds"):
        arguments["class_labels"] = torch.tensor([0, classes - 1])[:batch]
    return arguments


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
