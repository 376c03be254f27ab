"""ADM's networks (Dhariwal & Nichol 2021) and the rarer keys of UNet2DModel, against stock on the same weights."""

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchUNet2DModel
from ddpm_from_scratch.diffusion.blocks import ResnetBlock
from helpers.networks import inputs, pair, randomised

# guided-diffusion's networks at a sixth of the width or less.
ADM = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 32,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
}
CONFIGS = {
    "resnet-sampling": ADM,
    "no-attention": {
        **ADM,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 3,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 3,
        "add_attention": False,
    },
    "class-conditional": {**ADM, "num_class_embeds": 7},
    "learned-range": {**ADM, "out_channels": 6},
    "heads-by-width": {**ADM, "attention_head_dim": 16},
    "one-head": {**ADM, "attention_head_dim": None},
    "non-square": {**ADM, "sample_size": (16, 24)},
    "three-layers": {**ADM, "layers_per_block": 3, "block_out_channels": (32, 32, 64)},
    "attention-on-top": {
        **ADM,
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        "num_class_embeds": 3,
        "out_channels": 6,
    },
    "additive-time": {**ADM, "resnet_time_scale_shift": "default", "attn_norm_num_groups": None},
    "convolutions-where-levels-attend": {**ADM, "downsample_type": "conv", "upsample_type": "conv"},
    "residual-blocks-where-levels-attend": {
        **ADM,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "class-vectors": {**ADM, "class_embed_type": "identity"},
    "learned-timesteps": {**ADM, "time_embedding_type": "learned", "num_train_timesteps": 1000},
}


def gradients(network, arguments):
    """The output and, by name, the gradient of each weight."""
    output = network(**arguments).sample
    output.square().mean().backward()
    return output.detach(), {name: weight.grad for name, weight in network.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_stock_in_float64(name):
    stock, own = (network.double() for network in pair(CONFIGS[name]))
    arguments = inputs(CONFIGS[name], dtype=torch.float64)
    (expected, wanted), (output, got) = gradients(stock, arguments), gradients(own, arguments)
    assert (output - expected).abs().max() <= 1e-9 * expected.abs().max()
    largest = max(gradient.norm() for gradient in wanted.values())
    for weight, gradient in got.items():
        assert (gradient - wanted[weight]).norm() <= 1e-9 * largest, weight


def test_classes_as_numbers_equal_stock():
    """In float32: stock's embedding of such labels does not follow the network's precision."""
    config = {**ADM, "class_embed_type": "timestep"}
    stock, own = pair(config)
    arguments = inputs(config)
    expected, got = stock(**arguments).sample, own(**arguments).sample
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    other = own(**{**arguments, "class_labels": torch.tensor([13.0, 250.5])}).sample
    assert not torch.allclose(other[0], got[0]) and torch.allclose(other[1], got[1])


def test_both_ways_of_a_residual_block_change_the_resolution():
    own = ScratchUNet2DModel(**ADM)
    assert [type(sampler) for block in own.down_blocks for sampler in block.downsamplers] == [ResnetBlock] * 2
    assert [type(sampler) for block in own.up_blocks for sampler in block.upsamplers] == [ResnetBlock] * 2
    block = own.down_blocks[0].downsamplers[0]
    x, emb = torch.randn(2, 32, 8, 6), torch.randn(2, 128)
    shortcut = x.unflatten(2, (4, 2)).unflatten(4, (3, 2)).mean((3, 5))  # of means over 2 x 2 pixels
    torch.testing.assert_close(block(x, emb), shortcut)  # its last convolution starts as zeros


def test_a_width_of_heads_for_each_level():
    """The same as stock's where all are alike; with four heads of several widths, every level has four."""
    config = {**ADM, "block_out_channels": (32, 64, 96)}
    stock, own = pair(config)
    alike = ScratchUNet2DModel(**{**config, "attention_head_dim": (None, 32, 32)}).eval()
    alike.load_state_dict(stock.state_dict())
    assert torch.equal(alike(**inputs(config)).sample, own(**inputs(config)).sample)
    several = ScratchUNet2DModel(**{**config, "attention_head_dim": (None, 16, 24)})
    blocks = [*several.down_blocks[1:], several.mid_block, *several.up_blocks[:2]]
    assert {attention.heads for block in blocks for attention in block.attentions} == {4}


def test_fractions_of_learned_timesteps_are_refused():
    own = ScratchUNet2DModel(**CONFIGS["learned-timesteps"])
    with pytest.raises(ValueError, match=r"whole timesteps alone, not torch\.float32"):
        own(torch.zeros(1, 3, 16, 16), 3.5)


def test_a_class_for_each_vector_has_its_width():
    own = ScratchUNet2DModel(**CONFIGS["class-vectors"])
    with pytest.raises(ValueError, match=r"class_labels has shape \(2,\); a batch of 2 needs 128 numbers each"):
        own(torch.zeros(2, 3, 16, 16), 3, class_labels=torch.tensor([1, 2]))


def test_a_pipeline_draws_with_numbered_classes_alone():
    pipeline = ScratchDDPMPipeline(ScratchUNet2DModel(**CONFIGS["class-vectors"]), DDPMScheduler())
    with pytest.raises(ValueError, match="class_embed_type='identity' has no numbered classes"):
        pipeline(num_inference_steps=1)


@pytest.mark.parametrize("heads", [32, (8, 16, 32)])
def test_folders_are_whole(tmp_path, heads):
    """Saved and loaded it draws the same; stock draws it too where it knows such heads."""
    unet = randomised(ScratchUNet2DModel(**{**ADM, "attention_head_dim": heads})).eval()
    pipeline = ScratchDDPMPipeline(unet, DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    options = {"num_inference_steps": 2, "output_type": "np"}
    expected = pipeline(generator=torch.Generator().manual_seed(0), **options).images
    loaded = ScratchDDPMPipeline.from_pretrained(tmp_path)
    drawn = loaded(generator=torch.Generator().manual_seed(0), **options).images
    assert abs(drawn - expected).max() < 1e-5
    if isinstance(heads, int):
        stock = DiffusionPipeline.from_pretrained(tmp_path)
        assert type(stock.unet) is UNet2DModel
        drawn = stock(generator=torch.Generator().manual_seed(0), **options).images
        assert abs(drawn - expected).max() < 1e-4
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(tmp_path)
