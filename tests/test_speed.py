"""The benchmark of speed, made tiny."""

import pytest
import torch
from conftest import randomised
from diffusers import UNet2DModel
from test_few_steps_page import load
from test_sampling_pages import ROOT


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load(ROOT / "benchmarks" / "speed.py")


def test_a_ratio_is_of_rounds_side_by_side(benchmark):
    slow, fast = {"seconds": [3.0, 30.0, 6.0]}, {"seconds": [1.0, 10.0, 3.0]}
    assert benchmark.ratio(fast, slow) == 3 and benchmark.ratio(slow, fast) == pytest.approx(1 / 3)
    rows = {
        "diffusers fp32, NCHW": {"seconds": [2.0, 2.0]},
        "diffusers fp32, channels last": {"seconds": [1.5, 1.5]},
        "ours fp32": {"seconds": [1.0, 1.0]},
        "diffusers bf16, NCHW": {"seconds": [1.0, 1.0]},
        "diffusers bf16, channels last": {"seconds": [1.2, 1.2]},
        "ours bf16": {"seconds": [0.5, 0.5]},
        "ours, default": {"seconds": [0.4, 0.4]},
    }
    assert list(benchmark.ratios(rows).values()) == [1.5, 2, 5]


TINY = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
}


def test_all_systems_do_the_same_step(benchmark, monkeypatch):
    """From the same weights, the loss of the same step is the same in every system, to its precision."""
    monkeypatch.setattr(benchmark, "network_config", lambda preset: TINY)
    monkeypatch.setitem(benchmark.BATCHES, "tiny", 4)
    build, mse_loss, losses = benchmark.build_network, benchmark.F.mse_loss, []
    weights = randomised(UNet2DModel(**TINY)).state_dict()

    def build_with_these_weights(*arguments):
        unet = build(*arguments)
        unet.load_state_dict(weights)
        return unet

    monkeypatch.setattr(benchmark, "build_network", build_with_these_weights)
    monkeypatch.setattr(benchmark.F, "mse_loss", lambda *both: losses.append(mse_loss(*both)) or losses[-1])
    device = torch.device("cpu")
    chosen = {name: system for name, system in benchmark.systems(device).items() if not system.compiled}
    assert len(chosen) == 7 and len({system.precision for system in chosen.values()}) == 2
    for system in chosen.values():
        step = benchmark.training_step(system, "tiny", device)
        torch.manual_seed(0)
        step()
        step()
    pairs = torch.stack(losses).detach().view(7, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    for pair, system in zip(pairs, chosen.values(), strict=True):
        torch.testing.assert_close(pair, pairs[0], rtol=2e-2 if system.precision == "bf16" else 1e-3, atol=0)


def test_systems_take_turns(benchmark, tmp_path):
    args = benchmark.parse(
        ["--device", "cpu", "--rounds", "2", "--repeats", "1", "--results", str(tmp_path / "a.json")]
    )
    systems = benchmark.systems(torch.device("cpu"))
    chosen = {name: systems[name] for name in ("diffusers fp32, NCHW", "ours fp32")}
    measured = benchmark.take_turns("training", "fashion_mnist_quick", chosen, args)
    assert list(measured) == list(chosen) and not list(tmp_path.iterdir())
    for row in measured.values():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["set_up"] > sum(row["seconds"]) / 2
        assert 2e8 < row["peak_memory"] < 2e10


def test_a_system_that_fails_ends_the_benchmark(benchmark, tmp_path):
    args = benchmark.parse(["--device", "cpu", "--results", str(tmp_path / "a.json")])
    with pytest.raises(RuntimeError, match="a system failed"):
        benchmark.take_turns("training", "no_such_preset", {"ours": benchmark.System(True, "no")}, args)
    assert not list(tmp_path.iterdir())
