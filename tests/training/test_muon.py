"""Muon against singular values, PyTorch's own implementation for matrices, and the promises of a run."""

import pytest
import torch
from torch import nn

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.runtime.errors import Refused
from ddpm_from_scratch.training import loop
from ddpm_from_scratch.training.faults import FiniteGuard
from ddpm_from_scratch.training.muon import ITERATIONS, A, B, C, Muon, matrix_weights, orthogonalised
from helpers.runs import STEPS, assert_equal, checkpoint_tensors, run_main

RATE, DECAY = 0.05, 0.1


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 16))


def with_gradients(*networks, seed):
    """Give all the same gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(network.parameters() for network in networks), strict=True):
        gradient = torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient.clone()


@pytest.mark.parametrize("shape", [(2, 16, 144), (3, 32, 16), (1, 24, 24)])
def test_singular_values_become_those_of_the_quintic(shape):
    """In float64, by a decomposition: the iteration must change them alone."""
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(ITERATIONS):
        s = A * s + B * s**3 + C * s**5
    torch.testing.assert_close(orthogonalised(matrices), (u * s[:, None]) @ vh, atol=1e-9, rtol=1e-9)
    found = torch.linalg.svdvals(orthogonalised(matrices.float()))
    assert found.max() < 1.21 and found.median() > 0.65


def test_the_steps_of_matrices_are_those_of_pytorch():
    """Which computes the iteration in bfloat16; the other parameters are AdamW's."""
    ours, theirs = network(), network()
    options = {"lr": RATE, "weight_decay": DECAY}
    matrices = matrix_weights(theirs)
    assert [tuple(weight.shape) for weight in matrices] == [(32, 16, 3, 3), (16, 32), (16, 16)]
    # It takes matrices alone: those of a convolution are shown to it as one.
    shown = [nn.Parameter(weight.detach().clone().flatten(1)) for weight in matrices]
    others = [parameter for parameter in theirs.parameters() if not any(parameter is weight for weight in matrices)]
    optimizers = [
        torch.optim.Muon(shown, **options, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, **options),
    ]
    muon = Muon(ours, **options)
    for step in range(4):
        with_gradients(ours, theirs, seed=step)
        for matrix, weight in zip(shown, matrices, strict=True):
            matrix.grad = weight.grad.flatten(1)
        for optimizer in (muon, *optimizers):
            optimizer.step()
    for weight, matrix in zip(matrix_weights(ours), shown, strict=True):
        start = next(each for each in matrix_weights(network()) if each.shape == weight.shape).flatten(1)
        moved = (matrix - start).norm()
        assert (weight.flatten(1) - matrix).norm() < 0.02 * moved and moved > RATE
    of_ours = [parameter for parameter in ours.parameters() if not any(parameter is w for w in matrix_weights(ours))]
    for parameter, expected in zip(of_ours, others, strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)


def test_layers_that_read_and_write_images_classes_and_norms_are_adamws():
    form = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "num_class_embeds": 20}
    levels = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = ScratchUNet2DModel(**form, **levels, **blocks)
    chosen = {id(weight) for weight in matrix_weights(unet)}
    names = {name for name, parameter in unet.named_parameters() if id(parameter) in chosen}
    assert {"mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight"} <= names
    assert not {"conv_in.weight", "conv_out.weight", "class_embedding.weight"} & names
    assert all(name.endswith("weight") and "norm" not in name for name in names)


def test_memory_layout_changes_nothing():
    networks = [network(), network().to(memory_format=torch.channels_last)]
    optimizers = [Muon(each, lr=RATE) for each in networks]
    for step in range(3):
        with_gradients(*networks, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(*(each.parameters() for each in networks), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing():
    disturbed, whole = network(), network()
    optimizers = [Muon(each, lr=RATE, fused=True) for each in (disturbed, whole)]
    guard = FiniteGuard(optimizers[0], torch.device("cpu"))
    for step, norm in enumerate((1.0, float("nan"), 1.0)):
        finite = norm == norm
        with_gradients(disturbed, whole, seed=step)
        if not finite:
            for parameter in disturbed.parameters():
                parameter.grad.fill_(norm)
        guard.check(torch.tensor(norm))
        optimizers[0].step()
        if finite:
            optimizers[1].step()
    for one, other in zip(disturbed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    assert guard.counts() == (1, 0)


WIDE = (
    "--optimizer",
    "muon",
    "--model.block_out_channels",
    "[16, 16]",
    "--learning_rate",
    "0.01",
    "--checkpointing_steps",
    "2",
)


def test_a_run_that_stops_goes_on_bit_for_bit(inputs, tmp_path, monkeypatch):
    whole = run_main(inputs, tmp_path / "whole", *WIDE)
    steps, stop = loop.train_step, RuntimeError("the power is cut")

    def cut(run, passes, step):
        if step == 4:
            raise stop
        return steps(run, passes, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power is cut"):
        patch.setattr(loop, "train_step", cut)
        run_main(inputs, tmp_path / "stopped", *WIDE)
    resumed = run_main(inputs, tmp_path / "stopped", *WIDE)
    assert_equal(checkpoint_tensors(resumed), checkpoint_tensors(whole))
    assert any(key.endswith("/momentum") for key in checkpoint_tensors(whole, STEPS))
    with pytest.raises(Refused, match="optimizer: 'muon' in the checkpoint"):
        run_main(inputs, tmp_path / "stopped", *WIDE[2:], "--max_train_steps", "40")
