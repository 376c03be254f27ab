"""Passes replayed by CUDA graphs: on a CPU a stand-in overwrites what a graph would; on a GPU the graphs themselves."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import Function

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.training import run
from ddpm_from_scratch.training.graphs import GraphedNetwork
from helpers.networks import TINY_NETWORK, randomised
from helpers.runs import SIZE, assert_equal, checkpoint_tensors, run_main


def overwriting(module, form):
    """What `torch.cuda.make_graphed_callables` promises, and no more: inputs, outputs, gradients of fixed places."""
    torch.rand(100)  # recording warms up, which may use up random numbers
    weights = tuple(module.parameters())
    kept, gradients = {}, [torch.empty_like(weight) for weight in weights]

    class Replayed(Function):
        @staticmethod
        def forward(ctx, *inputs):
            for place, given in zip(form, inputs, strict=False):
                place.copy_(given)
            with torch.enable_grad():
                kept["output"] = module(*form)
            found = kept["output"].detach()
            return kept.setdefault("place", found.clone()).copy_(found).detach()

        @staticmethod
        def backward(ctx, gradient):
            for place, found in zip(gradients, torch.autograd.grad(kept["output"], weights, gradient), strict=True):
                place.copy_(found)
            return (*(None for _ in form), *(place.detach() for place in gradients))

    return lambda *inputs: Replayed.apply(*inputs, *weights)


@pytest.fixture
def graphs(monkeypatch):
    """Runs replay their passes; the recorded networks."""
    recorded = []

    def record(module, form):
        recorded.append(form)
        return overwriting(module, form)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(run.Run, "graphs", property(lambda self: True))
    return recorded


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    unet = randomised(ScratchUNet2DModel(**TINY_NETWORK | {"sample_size": SIZE, "dropout": 0.1}))
    ScratchDDPMPipeline(unet, ScratchDDPMScheduler(50, prediction_type="v_prediction")).save_pretrained(folder)
    return folder


COMMON = ("--noise", "philox", "--max_train_steps", "4", "--checkpointing_steps", "2")
LOSSES = {"simple": (), "bound": ("--loss", "vlb"), "consistency": ("--loss", "consistency", "--consistency_q", "[4]")}


@pytest.mark.parametrize("loss", LOSSES)
def test_replayed_passes_train_the_same_weights(inputs, teacher, tmp_path, loss, monkeypatch, graphs):
    flags = [*COMMON, *LOSSES[loss]]
    if loss == "consistency":
        flags += ["--model_config_name_or_path", teacher]
    replayed = run_main(inputs, tmp_path / "replayed", *flags)
    assert len(graphs) == 1
    monkeypatch.setattr(run.Run, "graphs", property(lambda self: False))
    plain = run_main(inputs, tmp_path / "plain", *flags)
    assert len(graphs) == 1
    assert_equal(checkpoint_tensors(replayed, 4), checkpoint_tensors(plain, 4))


def test_inputs_of_another_form_go_through_the_network_itself(graphs):
    unet = randomised(ScratchUNet2DModel(**TINY_NETWORK))
    network = GraphedNetwork(unet)
    x, t = torch.randn(3, *x_shape(unet)), torch.tensor([1, 2, 3])
    network(x, t)
    with torch.no_grad():
        assert torch.equal(network(x[:2], t[:2]).sample, unet(x[:2], t[:2]).sample)
        assert torch.equal(network(x, t).sample, unet(x, t).sample)
    assert len(graphs) == 1


def x_shape(unet):
    return unet.config.in_channels, unet.config.sample_size, unet.config.sample_size


GRAPHED = {"compile": True, "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "noise": "philox"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"compile": False}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"gradient_checkpointing": True}, False),
        ({"noise": "generator"}, False),  # its loader's thread uses the device while passes are recorded
        ({"num_processes": 2}, False),
        ({"scaler": "a scaler"}, False),
        ({"device": "cpu"}, False),
    ],
    ids=str,
)
def test_passes_are_replayed_where_a_graph_can_stand_for_them(changes, expected):
    values = {**GRAPHED, "num_processes": 1, "scaler": None, "device": "cuda", **changes}
    device = torch.device(values["device"])
    engine = SimpleNamespace(device=device, num_processes=values["num_processes"], scaler=values["scaler"])
    stream = SimpleNamespace(noise=values["noise"], data=SimpleNamespace(images=torch.zeros(1)))
    one = SimpleNamespace(config=SimpleNamespace(**values), accelerator=engine, stream=stream)
    assert run.Run.graphs.fget(one) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_the_network_computes():
    torch.manual_seed(0)
    unet = randomised(ScratchUNet2DModel(**TINY_NETWORK)).cuda()
    network = GraphedNetwork(unet)
    for _ in range(3):
        x, t = torch.randn(4, *x_shape(unet), device="cuda"), torch.randint(0, 1000, (4,), device="cuda")
        found, expected = (gradients(unet, one, x, t) for one in (network, unet))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def gradients(unet, network, x, t):
    unet.zero_grad(set_to_none=True)
    network(x, t).sample.square().mean().backward()
    return [weight.grad.clone() for weight in unet.parameters()]
