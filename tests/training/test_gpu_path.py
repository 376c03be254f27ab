"""What training does for the sake of a GPU, shown on a CPU: batches made on the device, compiled passes, clocks."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.data.config import DataConfig
from ddpm_from_scratch.data.dataset import ImageStream, load_data
from ddpm_from_scratch.data.labels import Labels
from ddpm_from_scratch.data.resident import ResidentImages, can_reside
from ddpm_from_scratch.runtime import devices
from ddpm_from_scratch.runtime.errors import Fault
from ddpm_from_scratch.sampling.checkpoints import read_state
from ddpm_from_scratch.training import loop, run
from ddpm_from_scratch.training.arguments import parse
from ddpm_from_scratch.training.optimizer import ListedAdamW, clip_gradients, forget_gradients
from helpers.runs import BATCH, NUM_IMAGES, STEPS, assert_equal, checkpoint_tensors, picture, run_main, write_parquet

# --- batches made on the device --------------------------------------------------------------------------------------

NULL = 3


@pytest.fixture(scope="module")
def wide_pictures(tmp_path_factory):
    """Pictures of 12 x 8 pixels, so that squares are cropped from them."""
    path = tmp_path_factory.mktemp("wide") / "wide.parquet"
    write_parquet(path, [picture("RGB", size=(12, 8), seed=seed) for seed in range(NUM_IMAGES)])
    return load_data(DataConfig(dataset_name=str(path)), 3, 8)


def stream_of(data, labelled=True, **options):
    of_images = torch.arange(NUM_IMAGES) % NULL
    labels = Labels("kind", ("a", "b", "c"), of_images) if labelled else None
    data = SimpleNamespace(**{**vars(data), "labels": labels, "index_at": data.index_at})
    return ImageStream(data, **{"seed": 3, "center_crop": False, "random_flip": True, "noise": "philox", **options})


@pytest.mark.parametrize("options", [{}, {"center_crop": True}, {"random_flip": False}, {"labelled": False}], ids=str)
def test_the_device_makes_the_batches_of_the_stream(wide_pictures, options):
    stream = stream_of(wide_pictures, **{"label_dropout": 0.3, **options})
    resident = ResidentImages(stream, torch.device("cpu"))
    positions = range(NUM_IMAGES - 5, 3 * NUM_IMAGES)  # over the ends of epochs
    made = resident.batch(resident.indices(positions), torch.arange(positions.start, positions.stop))
    expected = stream.__getitems__(positions)
    assert torch.equal(made.images, expected.images) and made.images.shape[1:] == (3, 8, 8)
    assert torch.equal(made.noise, expected.noise)
    if options.get("labelled", True):
        assert torch.equal(made.labels, expected.labels)
        assert 0.2 < float((made.labels == NULL).float().mean()) < 0.45
    else:
        assert made.labels is None and expected.labels is None


def test_crops_and_flips_reach_every_place(wide_pictures):
    stream = stream_of(wide_pictures)
    words = stream.draws.placement(0, torch.arange(3000))
    top, left, flipped = stream.place(words, (8, 12))
    assert top.unique().tolist() == [0] and left.unique().tolist() == [0, 1, 2, 3, 4]
    assert abs(float(flipped.float().mean()) - 0.5) < 4 * (4 * 3000) ** -0.5
    assert np.abs(left.bincount().numpy() - 600).max() < 4 * (3000 * 0.2 * 0.8) ** 0.5


def test_only_decoded_images_of_one_size_and_counted_numbers_reside(wide_pictures):
    assert can_reside(stream_of(wide_pictures))
    assert not can_reside(stream_of(wide_pictures, noise="generator"))
    unequal = SimpleNamespace(**{**vars(wide_pictures), "images": list(wide_pictures.images)})
    unequal.index_at = wide_pictures.index_at
    assert not can_reside(ImageStream(unequal, 0, False, False, noise="philox"))


PHILOX = ("--noise", "philox")


def test_a_resident_run_is_that_of_the_loader_and_resumes_bit_for_bit(inputs, tmp_path, monkeypatch):
    flags = (*PHILOX, "--checkpointing_steps", 4)
    whole = run_main(inputs, tmp_path / "whole", *flags)
    halves = tmp_path / "halves"
    run_main(inputs, halves, *flags, "--max_train_steps", 4, "--lr_scheduler", "constant")
    run_main(inputs, tmp_path / "constant", *flags, "--lr_scheduler", "constant")
    run_main(inputs, halves, *flags, "--lr_scheduler", "constant")
    assert_equal(checkpoint_tensors(halves), checkpoint_tensors(tmp_path / "constant"))
    monkeypatch.setattr(loop, "can_reside", lambda _: False)
    loaded = run_main(inputs, tmp_path / "loaded", *flags)
    assert_equal(checkpoint_tensors(loaded), checkpoint_tensors(whole))


def noise_of(folder, step):
    return read_state(folder / "checkpoints" / f"step_{step:08d}")["identity"].get("noise", "generator")


def test_a_run_that_goes_on_keeps_its_random_numbers(inputs, tmp_path, monkeypatch):
    flags = ("--checkpointing_steps", 2, "--max_train_steps")
    old, new = tmp_path / "old", tmp_path / "new"
    run_main(inputs, old, *flags, 2)
    monkeypatch.setitem(run.NOISE_OF_DEVICE, "cpu", "philox")  # as if each went on on a GPU
    run_main(inputs, old, *flags, 4)
    run_main(inputs, new, *flags, 2)
    monkeypatch.setitem(run.NOISE_OF_DEVICE, "cpu", "generator")
    run_main(inputs, new, *flags, 4)
    assert (noise_of(old, 4), noise_of(new, 4)) == ("generator", "philox")
    with pytest.raises(Fault, match="noise"):
        run_main(inputs, new, *flags, 6, "--noise", "generator")


def test_a_new_run_draws_by_counters_on_a_gpu_alone():
    config, _ = parse(["fashion_mnist_quick"])
    chosen = {name: run.with_noise(config, torch.device(name), None).noise for name in ("cuda", "cpu", "mps", "xpu")}
    assert chosen == {"cuda": "philox", "cpu": "generator", "mps": "generator", "xpu": "generator"}


# --- less work for the host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, float("nan")])
def test_gradients_are_clipped_as_pytorch_clips_them(scale):
    shapes = [(7,), (3, 5), (2, 3, 3, 3)]
    gradients = [scale * torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    for weights in (ours, theirs):
        weights.append(nn.Parameter(torch.zeros(4)))  # unused, without a gradient
        for weight, gradient in zip(weights, gradients, strict=False):
            weight.grad = gradient.clone()
    norm, expected = clip_gradients(ours, 1.0), nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for one, other in zip(ours[:-1], theirs, strict=False):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0, equal_nan=True)
    forget_gradients(ours)
    assert all(weight.grad is None for weight in ours)


def test_the_network_is_walked_through_once_for_all_steps(inputs, tmp_path, monkeypatch):
    walks = []
    parameters = ScratchUNet2DModel.parameters
    monkeypatch.setattr(ScratchUNet2DModel, "parameters", lambda self, *_: walks.append(self) or parameters(self))
    advance = loop.advance

    def counted(*arguments):
        before = len(walks)
        loss = advance(*arguments)
        per_step.append(len(walks) - before)
        return loss

    per_step = []
    monkeypatch.setattr(loop, "advance", counted)
    run_main(inputs, tmp_path / "model")
    assert per_step == [1] + [0] * (STEPS - 1)


def test_the_clock_stops_after_the_device(inputs, tmp_path, monkeypatch):
    """A host that hands over its work at once, to a device that takes a second for each of three steps."""
    now, lag = [0.0], 3.0

    def reduced(self, tensor, reduction="mean"):
        if reduction == "sum":  # the losses, which are read here
            now[0] += lag
        return tensor

    clock = SimpleNamespace(**{**vars(time), "perf_counter": lambda: now[0]})
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr("accelerate.Accelerator.reduce", reduced)
    folder = run_main(inputs, tmp_path / "model", "--max_train_steps", 9, "--log_steps", 3)
    results = json.loads((folder / "results.json").read_text())
    assert results["seconds"] == 9 and results["images_per_second"] == pytest.approx(BATCH)


# --- what a device can do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "no")])
def test_bfloat16_that_a_gpu_emulates_is_not_fast(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert devices.resolve_precision("auto", torch.device("cuda")) == expected


def test_the_optimiser_that_lists_its_tensors_steps_as_pytorchs():
    """Over a change of its state, as a checkpoint makes it, a step that is left out, and a weight that misses one."""
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}
    listed, plain = ListedAdamW(ours, **options), torch.optim.AdamW(theirs.parameters(), **options)
    for number in range(12):
        for network, optimizer in ((ours, listed), (theirs, plain)):
            network(torch.full((5, 3), float(number))).square().sum().backward()
            optimizer.found_inf = torch.tensor(float(number == 5))
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            if number == 9:
                network[1].bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
        assert bool(listed._lists) == (number < 9)
        if number == 3:
            for state in listed.state.values():
                state.update({key: tensor.clone() for key, tensor in state.items()})
    assert_equal(ours.state_dict(), theirs.state_dict())
    kept = zip(listed.state.values(), plain.state.values(), strict=True)
    assert all(torch.equal(one[key], other[key]) for one, other in kept for key in other)
