"""The network against diffusers' UNet2DModel on the same weights."""

import inspect
import logging

import pytest
import torch
from diffusers import UNet2DModel
from torch._dynamo.utils import counters

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.diffusion.blocks import (
    FEW_TOKENS,
    Attention,
    GroupNorm,
    ResnetBlock,
    attend,
    group_norm_by_channel,
)
from helpers.networks import (
    TINY_NETWORK,
    inputs,
    pair,
    rewrite_weights,
    with_old_attention_names,
)

# The networks of Ho et al. 2020 (their names on the Hub: google/ddpm-...) at a quarter of the width or less.
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}
CELEBAHQ_256 = {
    **CIFAR10,
    "sample_size": 64,  # the network is fully convolutional; a quarter of the side keeps the test short
    "block_out_channels": (16, 16, 32, 32, 64, 64),
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
LSUN = {**CELEBAHQ_256, "norm_num_groups": 8, "layers_per_block": 1, "dropout": 0.1}
SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CONFIGS = {
    "cifar10": CIFAR10,
    "celebahq-256": CELEBAHQ_256,
    "lsun": LSUN,
    "defaults": {"sample_size": 16, "block_out_channels": (32, 64, 64, 96)},
    "class-conditional": {**SMALL, "num_class_embeds": 11},
    "scale-shift": {**SMALL, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 3},
    "scale-shift-attention-norm": {**SMALL, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "learned-variance": {**SMALL, "out_channels": 6, "attention_head_dim": 16},
    "non-square": {**SMALL, "sample_size": (16, 24)},
    "no-attention": {
        **SMALL,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "add_attention": False,
    },
    "no-mid-block": {**SMALL, "mid_block_type": None},
    "groups": {**SMALL, "norm_num_groups": 8, "attn_norm_num_groups": 16, "mid_block_scale_factor": 2**0.5},
    "heads-that-do-not-divide": {**SMALL, "attention_head_dim": 24},
    "centred-grayscale": {**SMALL, "in_channels": 1, "out_channels": 1, "center_input_sample": True},
    "time-embedding": {**SMALL, "time_embedding_dim": 77, "freq_shift": 1, "flip_sin_to_cos": False},
    "many-tokens": {**SMALL, "sample_size": 40},  # 400 tokens: past the length of plain matrix products
}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_stock(name):
    stock, own = pair(CONFIGS[name])
    arguments = inputs(CONFIGS[name])
    expected, got = stock(**arguments).sample, own(**arguments).sample
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    (expected**2).mean().backward()
    (got**2).mean().backward()
    expected_gradients = {name: weight.grad for name, weight in stock.named_parameters()}
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for weight_name, weight in own.named_parameters():
        assert (weight.grad - expected_gradients[weight_name]).norm() <= 1e-4 * largest, weight_name


@pytest.mark.parametrize("name", ["cifar10", "scale-shift", "heads-that-do-not-divide"])
def test_in_float64_the_difference_is_rounding(name):
    stock, own = pair(CONFIGS[name])
    arguments = inputs(CONFIGS[name], dtype=torch.float64)
    expected, got = stock.double()(**arguments).sample, own.double()(**arguments).sample
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_weights_are_large_enough_to_show_a_wrong_number_of_heads():
    stock, _ = pair(CONFIGS["learned-variance"])
    other = ScratchUNet2DModel(**{**CONFIGS["learned-variance"], "attention_head_dim": 32}).eval()
    other.load_state_dict(stock.state_dict())
    arguments = inputs(CONFIGS["learned-variance"])
    expected, got = stock(**arguments).sample, other(**arguments).sample
    assert (got - expected).abs().max() > 1e-3 * expected.abs().max()


def test_the_papers_cifar10_network_has_35_7_million_weights():
    full = {**CIFAR10, "block_out_channels": (128, 256, 256, 256)}
    with torch.device("meta"):
        own, stock = ScratchUNet2DModel(**full), UNet2DModel(**full)
    assert sum(weight.numel() for weight in own.parameters()) == 35_746_307
    assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}


def test_every_layer_is_our_own():
    own = ScratchUNet2DModel(**CIFAR10)
    foreign = [type(m) for m in own.modules() if type(m).__module__.startswith("diffusers")]
    assert isinstance(own, UNet2DModel)
    assert foreign == []


# One value of every key of UNet2DModel other than its default.
OTHER_VALUES = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 48,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "mid_block_scale_factor": 2.0,
    "downsample_padding": 0,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "dropout": 0.5,
    "act_fn": "gelu",
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "attn_norm_num_groups": 8,
    "norm_eps": 1e-2,
    "resnet_time_scale_shift": "scale_shift",
    "add_attention": False,
    "class_embed_type": "timestep",
    "num_class_embeds": 4,
    "num_train_timesteps": 100,
}
REFUSED = {"time_embedding_type", "act_fn"}


@pytest.mark.parametrize("key", [key for key in inspect.signature(UNet2DModel.__init__).parameters if key != "self"])
def test_every_configuration_key_is_honoured_or_refused_by_name(key):
    # The memory layout is the order of the dropout mask. Stock attention turns it: none for that key.
    config = {**(CONFIGS["no-attention"] if key == "dropout" else SMALL), key: OTHER_VALUES[key]}
    if key in REFUSED:
        with pytest.raises(ValueError, match=f"{key}={OTHER_VALUES[key]!r}"):
            ScratchUNet2DModel(**config)
        return
    stock, own = pair(config)
    stock.to(memory_format=torch.channels_last)  # as own does
    assert own.config[key] == stock.config[key]
    for mode in (True, False):  # dropout shows in training mode only
        results = []
        for network in (stock.train(mode), own.train(mode)):
            torch.manual_seed(5)
            results.append(network(**inputs(config)).sample)
        assert (results[0] - results[1]).abs().max() <= 1e-4 * results[0].abs().max()


def test_a_fresh_network_starts_as_the_papers():
    torch.manual_seed(0)
    own = ScratchUNet2DModel(**CIFAR10)
    assert not own(**inputs(CIFAR10)).sample.any()
    last = [m.conv2 for m in own.modules() if isinstance(m, ResnetBlock)]
    last += [m.to_out[0] for m in own.modules() if isinstance(m, Attention)]
    assert not any(layer.weight.any() for layer in [*last, own.conv_out])
    assert not any(w.any() for name, w in own.named_parameters() if name.endswith("bias"))
    weight = own.down_blocks[1].resnets[1].conv1.weight  # [64, 64, 3, 3]
    bound = (6 / (64 * 9 + 64 * 9)) ** 0.5  # Xavier
    assert 0.99 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / bound * 3**0.5 - 1) < 0.02  # of a uniform distribution


def test_gradient_checkpointing_computes_blocks_twice_and_gives_the_same_gradients():
    _, own = pair(SMALL)
    own.train()
    calls = []
    for block in (*own.down_blocks, own.mid_block, *own.up_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for enabled in (False, True):
        own.zero_grad()
        if enabled:
            own.enable_gradient_checkpointing()
        calls.clear()
        own(**inputs(SMALL)).sample.pow(2).mean().backward()
        gradients.append([w.grad.clone() for w in own.parameters()])
        assert len(calls) == (10 if enabled else 5)
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.full
def test_compiles_once_for_all_timesteps():
    _, own = pair(TINY_NETWORK)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    sample = inputs(TINY_NETWORK)["sample"]
    with torch.no_grad():
        for t in (999, 500, 3, 0):
            timestep = torch.tensor(t)
            torch.testing.assert_close(compiled(sample, timestep).sample, own(sample, timestep).sample)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_precision_is_near_float32(dtype):
    _, own = pair(SMALL)
    arguments = inputs(SMALL)
    expected = own(**arguments).sample
    got = own.to(dtype)(**{**arguments, "sample": arguments["sample"].to(dtype)}).sample
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_memory_format_does_not_change_the_output():
    _, own = pair(SMALL)
    arguments = inputs(SMALL)
    expected = own(**arguments).sample
    own.to(memory_format=torch.channels_last)
    arguments["sample"] = arguments["sample"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(own(**arguments).sample, expected, rtol=1e-4, atol=1e-5)
    assert own(**arguments).sample.is_contiguous()  # as stock's is: some reshape it by `view`


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_group_normalisation_and_its_gradient_are_those_of_float64(dtype, tolerance):
    """In whichever layout it is computed; the next convolution finds channels last."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 12, 5, 4)
    x, upstream = (
        torch.randn(shape, generator=generator).to(dtype).to(memory_format=torch.channels_last) for _ in "12"
    )
    norm = GroupNorm(4, 12).to(dtype)
    norm.weight.data.normal_(generator=generator)
    x.requires_grad_()
    got = norm(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    got.backward(upstream)

    exact = x.detach().double().requires_grad_()
    groups = exact.unflatten(1, (4, 3))
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
    normalised = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    expected = normalised * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    expected.backward(upstream.double())
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [49, FEW_TOKENS + 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_and_its_gradients_are_those_of_float64(tokens, dtype, tolerance):
    """Whichever way they are computed: that depends on the dtype, the gradient and the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, tokens, 8, generator=generator).to(dtype) for _ in range(3)]
    upstream = torch.randn(2, 3, tokens, 8, generator=generator).to(dtype)
    tracked = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    expected = (exact[0] @ exact[1].mT / 8**0.5).softmax(-1) @ exact[2]
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    output = attend(*tracked)
    for got, want in zip([output, *torch.autograd.grad(output, tracked, upstream)], wanted, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
    assert (attend(*inputs) - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_timesteps_of_every_form_mean_the_same(timestep):
    _, own = pair(TINY_NETWORK)
    sample = inputs(TINY_NETWORK)["sample"]
    torch.testing.assert_close(own(sample, timestep).sample, own(sample, torch.tensor([7, 7])).sample, rtol=0, atol=0)
    assert torch.equal(own(sample, timestep, return_dict=False)[0], own(sample, timestep).sample)


def test_from_stock_shares_the_tensors_and_the_mode(stock_unet):
    own = ScratchUNet2DModel.from_stock(stock_unet)
    theirs = dict(stock_unet.named_parameters())
    assert all(weight is theirs[name] for name, weight in own.named_parameters())
    assert not own.training
    assert not own.is_gradient_checkpointing
    stock_unet.train().enable_gradient_checkpointing()
    own = ScratchUNet2DModel.from_stock(stock_unet)
    assert own.training
    assert own.is_gradient_checkpointing


def test_checkpoints_go_both_ways_without_a_warning(tmp_path, stock_unet, caplog):
    caplog.set_level(logging.WARNING)
    stock_unet.save_pretrained(tmp_path / "stock")
    own = ScratchUNet2DModel.from_pretrained(tmp_path / "stock")
    own.save_pretrained(tmp_path / "own")
    back = UNet2DModel.from_pretrained(tmp_path / "own")
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, stock_unet.state_dict()[name])
    for key, value in stock_unet.config.items():
        assert key[0] == "_" or back.config[key] == (list(value) if isinstance(value, tuple) else value)
    assert caplog.records == []


def test_the_oldest_attention_names_load(tmp_path, stock_unet):
    """Breaks if diffusers stops renaming in modules marked `_from_deprecated_attn_block`: rename in our class then."""
    stock_unet.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, with_old_attention_names)
    own = ScratchUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(
        own(**inputs(TINY_NETWORK)).sample, ScratchUNet2DModel.from_stock(stock_unet)(**inputs(TINY_NETWORK)).sample
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {name: w[name] for name in w if name != "conv_in.weight"}, "missing keys: conv_in.weight"),
        (lambda w: w | {"surplus": torch.ones(1)}, "unexpected keys: surplus"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, stock_unet, change, message):
    stock_unet.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        ScratchUNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": 10, "block_out_channels": (32, 64, 64)}, "one for each level"),
        ({"sample_size": 15}, "sample_size=15 must be .* divisible by 2"),
        ({"sample_size": (16, 15)}, "sample_size"),
        ({"sample_size": "16"}, "sample_size"),
        ({"sample_size": 0}, "sample_size"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "Allowed: DownBlock2D, AttnDownBlock2D"),
        ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D")}, "up_block_types"),
        ({"up_block_types": ("UpBlock2D",)}, "up_block_types has 1 entries"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"norm_num_groups": 12}, "block_out_channels=32 is not divisible by norm_num_groups=12"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"layers_per_block": 1.5}, "layers_per_block=1.5"),
        ({"attention_head_dim": 128}, "attention_head_dim=128"),
        ({"attention_head_dim": 0}, "attention_head_dim=0"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
        ({"act_fn": "mish"}, "Allowed: 'silu', 'swish'"),
        ({"attention_head_dim": (8, 16, 16)}, "or 2, one for each level"),
        ({"attention_head_dim": (None, 65)}, r"attention_head_dim=\(None, 65\)"),
        ({"time_embedding_type": "learned"}, "time_embedding_type='learned' needs num_train_timesteps"),
        ({"class_embed_type": "projection"}, "Allowed: None, 'timestep', 'identity'"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        ScratchUNet2DModel(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": torch.zeros(2, 3, 15, 16)}, "divisible by 2"),
        ({"sample": torch.zeros(2, 1, 16, 16)}, r"takes \[B, 3, H, W\]"),
        ({"sample": torch.zeros(3, 16, 16)}, r"shape \(3, 16, 16\)"),
        ({"class_labels": torch.tensor([0, 1])}, "not class-conditional"),
        ({"timestep": torch.tensor([1, 2, 3])}, "3 timesteps for a batch of 2"),
    ],
)
def test_wrong_inputs(changes, message):
    with pytest.raises(ValueError, match=message):
        ScratchUNet2DModel(**SMALL)(**{**inputs(SMALL), **changes})


def test_missing_class_labels(conditional_stock_unet):
    own = ScratchUNet2DModel.from_stock(conditional_stock_unet)
    with pytest.raises(ValueError, match="class_labels is missing"):
        own(torch.zeros(2, 1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"class_labels has shape \(3,\)"):
        own(torch.zeros(2, 1, 8, 8), 3, class_labels=torch.tensor([1, 2, 3]))


@pytest.fixture(scope="module", params=["learned-variance", "class-conditional"])
def exported(request):
    """A network, and its program exported at a batch of two with any batch allowed."""
    _, own = pair(CONFIGS[request.param])
    arguments = inputs(CONFIGS[request.param])
    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(own, (), arguments, dynamic_shapes={name: {0: batch} for name in arguments})
    return own, program.module()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_an_exported_program_takes_every_batch(exported, batch):
    own, program = exported
    generator = torch.Generator().manual_seed(batch)
    arguments = {
        "sample": torch.randn(batch, 3, 16, 16, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
    if classes := own.config["num_class_embeds"]:
        arguments["class_labels"] = torch.randint(0, classes, (batch,), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(program(**arguments).sample, own(**arguments).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_group_norm_that_gpus_compile_is_pytorchs(dtype, layout):
    torch.manual_seed(0)
    x = (3 + torch.randn(2, 12, 5, 7)).to(dtype).to(memory_format=layout).requires_grad_()
    norm = torch.nn.GroupNorm(4, 12, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    precise = x.double().detach().requires_grad_()
    expected = torch.nn.functional.group_norm(precise, 4, norm.weight.double(), norm.bias.double(), 1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    norm.to(dtype)
    found = group_norm_by_channel(x, 4, norm.weight, norm.bias, 1e-5)
    assert found.dtype == dtype  # all of one type, as without autocast
    (found * weights).sum().backward()
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=5 * tolerance)
    torch.testing.assert_close(x.grad.double(), precise.grad, rtol=tolerance, atol=20 * tolerance)


def test_that_group_norm_gives_float32_where_autocast_would():
    norm = torch.nn.GroupNorm(4, 12)
    x = torch.randn(2, 12, 5, 7).bfloat16()
    assert group_norm_by_channel(x, 4, norm.weight, norm.bias, 1e-5).dtype == torch.float32


@pytest.mark.full
def test_repeated_blocks_compile_by_themselves():
    torch.manual_seed(0)
    unet = ScratchUNet2DModel(**TINY_NETWORK).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    graphs = []
    torch.compiler.reset()
    with torch.no_grad():
        expected = unet(x, t).sample
        unet.compile_repeated_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
        torch.testing.assert_close(unet(x, t).sample, expected)
    assert len(graphs) > 1
