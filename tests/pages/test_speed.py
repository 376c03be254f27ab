"""The benchmarks of speed, made tiny."""

import json
import statistics

import pytest
import torch
import yaml
from diffusers import UNet2DModel

from ddpm_from_scratch.runtime.devices import resolve_precision
from helpers.networks import randomised
from helpers.pages import load
from helpers.paths import DOCS, ROOT


@pytest.fixture
def benchmark():
    return load(ROOT / "benchmarks" / "speed.py")


@pytest.fixture
def systems(benchmark):
    import systems

    return systems


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


def test_all_systems_do_the_same_step(systems, monkeypatch):
    """From the same weights, the loss of the same step is the same in every system, to its precision."""
    monkeypatch.setattr(systems, "network_config", lambda preset: TINY)
    monkeypatch.setattr(systems, "keep_freed_memory", lambda: None)  # it holds for the whole process
    monkeypatch.setitem(systems.BATCHES, "tiny", 4)
    build, mse_loss, losses = systems.build_network, systems.F.mse_loss, []
    weights = randomised(UNet2DModel(**TINY)).state_dict()

    def build_with_these_weights(*arguments):
        unet = build(*arguments)
        unet.load_state_dict(weights)
        return unet

    monkeypatch.setattr(systems, "build_network", build_with_these_weights)
    monkeypatch.setattr(systems.F, "mse_loss", lambda *both: losses.append(mse_loss(*both)) or losses[-1])
    device = torch.device("cpu")
    found = systems.systems(device)
    chosen = {name: found[name] for name in found if not found[name].compiled and name != systems.PEER}
    assert len(chosen) == 7 and len({system.precision for system in chosen.values()}) == 2
    for system in chosen.values():
        step = systems.training_step(system, "tiny", device)
        torch.manual_seed(0)
        step()
        step()
    pairs = torch.stack(losses).detach().view(7, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    for pair, system in zip(pairs, chosen.values(), strict=True):
        torch.testing.assert_close(pair, pairs[0], rtol=2e-2 if system.precision == "bf16" else 1e-3, atol=0)


@pytest.mark.full
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


@pytest.mark.full
def test_a_system_that_fails_ends_the_benchmark(benchmark, tmp_path):
    args = benchmark.parse(["--device", "cpu", "--results", str(tmp_path / "a.json")])
    with pytest.raises(RuntimeError, match="a system failed"):
        benchmark.take_turns("training", "no_such_preset", {"ours": benchmark.System("ours", "no")}, args)
    assert not list(tmp_path.iterdir())


def test_ours_is_measured_with_what_the_script_does(systems):
    """The memory format, precision and optimiser of the default system are those that a run is built with."""
    default = systems.systems(torch.device("cpu"))["ours, default"]
    assert default.channels_last and default.precision == resolve_precision("auto", torch.device("cpu"))
    step = systems.training_step(default, "fashion_mnist_quick", torch.device("cpu"))
    optimizer = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "param_groups"))
    assert optimizer.defaults["fused"]


@pytest.mark.full
def test_the_loader_delivers_and_the_peak_is_above_every_share(benchmark):
    rates = benchmark.loading_rates((0,))
    assert list(rates) == ["0"] and rates["0"] > 100
    rate = benchmark.peak_rate(torch.device("cpu"), torch.float32)
    assert 1e9 < rate < 1e14
    # Two convolutions of 3x3 over 8 channels at 28x28, to begin with.
    assert benchmark.operations("small") > 2 * 2 * 28 * 28 * 32 * 32 * 9


@pytest.mark.full
def test_time_to_quality_stops_at_its_marks_and_measures(monkeypatch, tmp_path):
    """A few seconds of each recipe: all four are there with the weights of three times, and the average is another."""
    script = load(ROOT / "benchmarks" / "time_to_quality.py")
    monkeypatch.setattr(script, "PRESET", tmp_path / "tiny.yaml")
    monkeypatch.setattr(script, "TRIAL", 2)
    monkeypatch.setattr(script, "TURN", 0.2)
    monkeypatch.setattr(script, "STEPS", 2)
    model = {key: TINY[key] for key in TINY if key not in ("sample_size", "in_channels", "out_channels")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"model": model, "train_batch_size": 8}))
    results = tmp_path / "results.json"
    arguments = ["--minutes", "0.02", "--short", "0.01", "--num_images", "20", "--results", str(results)]
    script.main(arguments)
    found = json.loads(results.read_text())
    by_recipe: dict[str, list[dict]] = {}
    for point in found["points"]:
        by_recipe.setdefault(point["recipe"], []).append(point)
    assert [len(points) for points in by_recipe.values()] == [3] * 4
    for name, points in by_recipe.items():
        assert [point["steps"] for point in points] == sorted(point["steps"] for point in points)
        assert points[0]["seconds"] < points[1]["seconds"] < points[2]["seconds"]
        if name.startswith("usual"):
            assert points[2]["seconds"] >= 1.2
    plain, averaged = (by_recipe[f"usual, 0.02 minutes{end}"] for end in ("", ", with an average"))
    assert averaged[2]["steps"] <= plain[2]["steps"]
    assert averaged[2]["kernel_distance"] != plain[2]["kernel_distance"]


def test_the_page_is_what_its_script_writes():
    script = load(DOCS / "make_speed.py")
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.fill(page) == page
    speed, quality = script.read()
    rows = speed["networks"]["small"]["training"]
    expected = statistics.median(
        b / a for a, b in zip(*(rows[n]["seconds"] for n in (script.OURS, script.STOCK)), strict=True)
    )
    assert f"**{expected:.2f}**" in script.ratio_table(speed, quality)
    assert len(quality["points"]) == 12 and quality["num_images"] == 500


def test_what_no_gpu_measured_is_said_so(tmp_path):
    tables = load(DOCS / "gpu_tables.py")
    empty = tables.parts(tmp_path / "none.jsonl")
    assert empty["gpu speed"].count(tables.NOT_MEASURED) == 4 * (len(tables.TRAINED) + len(tables.SAMPLED))
    assert empty["gpu checks"].count(tables.NOT_MEASURED) == len(tables.CHECKED)
    rows = [
        {"part": "shipped", "name": "eager", "seconds": 0.5, "fastest": 0.4, "slowest": 1.0, "images_per_second": 512}
        | {"host_seconds": 0.3},
        {"part": "right", "name": "resumed", "at": 1, "again": 0, "resumed": 3, "of": 9, "seconds": 2},
    ]
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = tables.parts(path)
    assert "busy for 300 ms of an eager training step of 500 ms" in found["gpu facts"]
    assert "| 512 (256 to 640) |" in found["gpu speed"] and "again: 0, resumed: 3, of: 9" in found["gpu checks"]
