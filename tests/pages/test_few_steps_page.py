"""docs/few_steps.md says what docs/results/few_steps.json says; the benchmark that measures it, on a tiny network."""

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised
from helpers.pages import load
from helpers.paths import DOCS, ROOT


@pytest.fixture(scope="module")
def script():
    return load(DOCS / "make_few_steps.py")


@pytest.fixture(scope="module")
def benchmark():
    module = load(ROOT / "benchmarks" / "few_steps.py")
    module.load_data = functools.cache(module.load_data)  # decoding 10,000 images takes seconds
    return module


@pytest.fixture(scope="module")
def results():
    return json.loads((DOCS / "results" / "few_steps.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page():
    return (DOCS / "few_steps.md").read_text(encoding="utf-8")


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_holds_the_tables_of_the_results(script, results, page):
    assert script.fill(page, results) == page


def test_filling_replaces_what_stands_between_the_markers(script, results, page):
    altered = json.loads(json.dumps(results))
    row = {"method": "unipc", "steps": 20, "kernel_distance": 7.654321, "kernel_distance_error": 0.1234}
    altered["rows"] = [{**row, "frechet_distance": 6543.21}]
    filled = script.fill(page, altered)
    assert "| UniPC | – | – | 7.654 ± 0.123 | – | – | – |" in filled
    assert "| UniPC | – | – | 6543.2 | – | – | – |" in filled
    assert script.fill(filled, results) == page


def test_the_page_has_a_place_for_every_cell(script, benchmark, results):
    assert list(script.METHODS) == list(benchmark.METHODS)
    assert script.STEPS == benchmark.STEPS
    assert all(row["method"] in script.METHODS and row["steps"] in script.STEPS for row in results["rows"])
    assert len(script.cells(results)) == len(results["rows"])


def test_the_page_describes_every_method(script, page):
    for name in script.METHODS.values():
        assert f"- **{name}**" in page


def test_the_figure_is_drawn_with_cells_missing(script, results, tmp_path):
    script.draw({**results, "rows": []}, tmp_path / "empty.png")
    script.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "empty.png").read_bytes() != (tmp_path / "figure.png").read_bytes()


# --- the benchmark -------------------------------------------------------------------------------------------------


def few_features(images, size):
    return efficientnet_lite0_features(images, size)[:, :16]


@pytest.fixture
def run(benchmark, tmp_path, monkeypatch):
    """Run the benchmark on a model in tmp_path, with the options given; its results."""
    monkeypatch.setattr(
        ScratchUNet2DModel, "compile", lambda self: None
    )  # takes a minute, and changes no more than bits
    monkeypatch.setattr(benchmark, "CALIBRATION_IMAGES", 16)
    monkeypatch.setattr(benchmark, "efficientnet_lite0_features", few_features)  # 1280 take seconds a distance
    ScratchDDPMPipeline(randomised(UNet2DModel(**TINY_NETWORK)), DDPMScheduler()).save_pretrained(tmp_path / "model")

    def run(*options):
        folders = ["--samples_dir", str(tmp_path / "samples"), "--results", str(tmp_path / "results.json")]
        benchmark.main([str(tmp_path / "model"), "--num_images", "20", "--no_bounds", *folders, *options])
        return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.full
def test_every_method_is_measured_and_sampled_once(run, benchmark, tmp_path):
    first = run("--steps", "2")
    assert [row["method"] for row in first["rows"]] == list(benchmark.METHODS)
    assert all(row["seconds"] > 0 and row["network_calls"] == 2 for row in first["rows"])
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == sorted(["model.json", *(f"{method}-2.npz" for method in benchmark.METHODS)])
    images = {method: np.load(tmp_path / "samples" / f"{method}-2.npz")["images"] for method in benchmark.METHODS}
    assert {(x.shape, str(x.dtype)) for x in images.values()} == {((20, 8, 8), "uint8")}
    assert (images["ddim"] != images["fixed_small"]).any()

    again = run("--steps", "2")
    assert all(row["seconds"] is None for row in again["rows"])
    strip = [[{**row, "seconds": None} for row in results["rows"]] for results in (first, again)]
    assert strip[0] == strip[1]


@pytest.mark.full
def test_cells_of_earlier_runs_are_kept_if_they_are_of_the_same_model(run, tmp_path):
    run("--steps", "3", "--methods", "ddim", "unipc")
    both = run("--steps", "2", "--methods", "ddim")
    assert [(row["method"], row["steps"]) for row in both["rows"]] == [("ddim", 2), ("ddim", 3), ("unipc", 3)]
    again = run("--steps", "3", "--methods", "ddim")
    assert [row["method"] for row in again["rows"]] == ["ddim", "ddim", "unipc"]
    (tmp_path / "results.json").write_text(json.dumps({**again, "num_images": 21}))
    assert len(run("--steps", "2", "--methods", "ddim")["rows"]) == 1


def test_images_are_those_of_the_pipeline_with_one_generator_each(run, tmp_path):
    run("--steps", "3", "--methods", "fixed_large")
    pipeline = ScratchDDPMPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.scheduler = ScratchDDPMScheduler(variance_type="fixed_large")
    generators = [torch.Generator().manual_seed(number) for number in range(20)]
    expected = pipeline(batch_size=20, generator=generators, num_inference_steps=3, output_type="np").images
    images = np.load(tmp_path / "samples" / "fixed_large-3.npz")["images"]
    np.testing.assert_array_equal(images, (255 * expected[..., 0]).round())
    assert images.std() > 20


def test_images_of_another_model_are_refused(run, tmp_path):
    run("--steps", "1", "--methods", "ddim")
    pipeline = ScratchDDPMPipeline.from_pretrained(tmp_path / "model")
    pipeline.scheduler = DDPMScheduler(clip_sample=False)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"another model .*: scheduler\)"):
        run("--steps", "1", "--methods", "ddim")
    (tmp_path / "samples" / "model.json").unlink()
    with pytest.raises(ValueError, match=r"no model\.json"):
        run("--steps", "1", "--methods", "ddim")


def test_the_bound_of_exactly_known_data(benchmark):
    """A network that knows x_0 has no divergences; what is left is L_T and the width of a bin in L_0."""
    images = oracles.grid_data(3, 1, 8, 8).float()

    class Oracle(torch.nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, x, t):
            return UNet2DOutput(sample=images[: len(x)])

    scheduler = ScratchDDPMScheduler(prediction_type="sample")
    scheduler.set_timesteps(timesteps=[999, 500, 0])
    bits = benchmark.bits_per_dim(Oracle(), scheduler, images)
    log_variance = scheduler.p_reverse(images, images, 0, -1).log_variance
    level = torch.special.ndtr(torch.exp(-0.5 * log_variance) / 255) * 2 - 1  # the mass of a bin around its centre
    expected = (scheduler.prior_kl(images) - torch.log(level)) / np.log(2)
    torch.testing.assert_close(bits, expected.float(), rtol=0.03, atol=0)  # bins at the ends have more


def test_every_chain_is_measured(benchmark, script, monkeypatch):
    monkeypatch.setattr(benchmark, "BOUND_STEPS", (2, 3))
    unet = ScratchUNet2DModel.from_stock(randomised(UNet2DModel(**TINY_NETWORK)))
    config = ScratchDDPMScheduler(x_0_mse=[(0, 1e-4), (999, 1.0)]).config
    rows = benchmark.measure_bounds(unet, config, oracles.grid_data(4, 1, 8, 8).float())
    assert [(row["chain"], row["steps"]) for row in rows] == list(itertools.product(script.BOUNDS, (2, 3)))
    assert all(0 < row["error"] < row["bits_per_dim"] < float("inf") for row in rows)


def test_every_method_calls_the_network_once_a_step(benchmark):
    config = ScratchDDPMScheduler(timestep_spacing="trailing", x_0_mse=[(0, 1e-4), (999, 1.0)]).config
    for make in benchmark.METHODS.values():
        scheduler = make(config)
        for steps in benchmark.STEPS:
            scheduler.set_timesteps(steps)
            assert len(scheduler.timesteps) == len(set(scheduler.timesteps.tolist())) == steps


WRONG = {
    "few images": (["--num_images", "19"], "from 20 to 5000"),
    "many images": (["--num_images", "5001"], "there are 10000"),
    "no steps": (["--steps", "5", "0"], "--steps 0"),
    "many steps": (["--steps", "1001"], "has 1000 steps"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_numbers_are_refused_before_any_work(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(*options)
    assert not (tmp_path / "samples").exists()


def test_a_folder_without_a_model_is_refused(benchmark, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        benchmark.main([str(tmp_path)])
