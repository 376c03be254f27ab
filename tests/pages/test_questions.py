"""docs/questions.md says what the results say; the experiments behind it, made tiny."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from ddpm_from_scratch.sampling.generate import SampleSpec
from helpers.networks import TINY_NETWORK, randomised
from helpers.pages import load
from helpers.paths import DOCS, ROOT


@pytest.fixture(scope="module")
def page_script():
    return load(DOCS / "make_questions.py")


@pytest.fixture(scope="module")
def benchmark():
    return load(ROOT / "benchmarks" / "two_questions.py")


# --- the page ------------------------------------------------------------------------------------------------------


def results_of(name):
    return json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_page_is_what_its_script_writes(page_script):
    page = page_script.PAGE.read_text(encoding="utf-8")
    assert page_script.fill(page) == page
    # A number of each table, read from the results by hand.
    assert f"| {results_of('predictions')['rows'][1]['bits_per_dim']:.2f} ±" in page
    assert f"| {results_of('jumps')['rows'][0]['from_mean_of_data']:.1f} |" in page


def test_the_plot_shows_the_errors_of_the_results(page_script):
    results = results_of("predictions")
    left, right = page_script.draw(results).axes
    assert len(left.lines) == len(right.lines) == len(results["rows"])
    row, t = results["rows"][0], 5
    alpha_bar = results["alpha_bar"][str(row["errors"][t]["t"])]
    assert left.lines[0].get_ydata()[t] == row["errors"][t]["error"]
    assert right.lines[0].get_ydata()[t] == pytest.approx(row["errors"][t]["error"] * alpha_bar / (1 - alpha_bar))


def test_what_the_page_claims_of_predictions():
    rows = {row["prediction"]: row for row in results_of("predictions")["rows"]}
    errors = {name: {error["t"]: error["error"] for error in row["errors"]} for name, row in rows.items()}
    epsilon, x_0, v, weighted = errors.values()
    assert x_0[0] > 50 * max(epsilon[0], v[0]) and epsilon[990] > 10 * max(x_0[990], v[990])
    assert all(error < 1.2 * min(epsilon[t], x_0[t]) for t, error in v.items())
    assert weighted[0] < x_0[0] / 10 and all(weighted[t] > error for t, error in epsilon.items() if t < 900)
    assert rows["x_0"]["bits_per_dim"] > 10 * rows["epsilon"]["bits_per_dim"]
    distances = [row["kernel_distance"] for row in rows.values()]
    assert max(distances) == rows["x_0, weighted as epsilon"]["kernel_distance"]
    error = max(row["kernel_distance_error"] for row in rows.values())
    assert max(distances[:3]) - min(distances[:3]) < 4 * error


def test_what_the_page_claims_of_jumps():
    results = results_of("jumps")
    rows, data = results["rows"], results["real"]
    assert [row["steps"] for row in rows] == [1, 2, 5, 10, 50, 1000]
    for distance in ("from_mean_of_data", "from_their_own_mean"):
        grows = [row[distance] for row in rows]
        assert grows[0] < data[distance] / 10 and grows[:5] == sorted(grows[:5])
        assert grows[4] == pytest.approx(data[distance], rel=0.1)
    falls = [row["kernel_distance"] for row in rows[:5]]
    assert falls == sorted(falls, reverse=True)


def test_what_the_page_claims_of_tuning():
    results = results_of("few_step_tuning")
    found = {tuple(row[key] for key in ("model", "labels", "steps")): row for row in results["rows"].values()}
    for labels in ("null", "in turn"):
        before, after = (
            [found[model, labels, steps]["kernel_distance"] for steps in (1, 2, 4)]
            for model in ("teacher, noise fresh", "tuned")
        )
        assert all(new < 0.2 * old for new, old in zip(after, before, strict=True))
        assert after == sorted(after, reverse=True)
    for steps in (1, 2, 4):
        assert found["tuned", "in turn", steps]["kernel_distance"] < found["tuned", "null", steps]["kernel_distance"]
        assert 0.85 < found["tuned", "in turn", steps]["accuracy"] < found["teacher", "in turn", 4]["accuracy"]
        ours, stock = (found[model, "null", steps] for model in ("tuned", "tuned, by stock classes"))
        error = max(ours["kernel_distance_error"], stock["kernel_distance_error"])
        assert abs(ours["kernel_distance"] - stock["kernel_distance"]) < 3 * error
    assert found["tuned", "in turn", 2]["kernel_distance"] < found["tuned", "null", 4]["kernel_distance"]
    seconds = results["seconds"]
    assert max(seconds[str(steps)] for steps in (1, 2, 4)) < 0.1 * seconds["teacher"]
    assert seconds["2"] < 0.06 * seconds["teacher"]


def test_what_the_page_claims_of_the_tuned_model_beside_its_teacher():
    tuned, teacher = (
        {row["steps"]: row for row in results_of("few_step_tuning")["evaluated"][name]} for name in ("tuned", "teacher")
    )
    assert all(row["num_images"] == 5000 for row in (*tuned.values(), teacher[20]))
    distance = {steps: row["kernel_distance"] for steps, row in (*teacher.items(), *tuned.items())}
    error = {steps: row["kernel_distance_error"] for steps, row in (*teacher.items(), *tuned.items())}
    assert abs(distance[2] - distance[20]) < 2 * error[20] and distance[4] < distance[20] - 2 * error[20]
    assert distance[1] < 1.3 * distance[10]
    lack = {steps: teacher[50]["recall"] - row["recall"] for steps, row in tuned.items()}
    assert lack[1] > 0.2 > max(lack[2], lack[4]) > min(lack[2], lack[4]) > 0.05


def test_what_the_page_claims_of_the_last_run():
    found = {(row["images_seen"], row["steps"]): row for row in results_of("few_step_curve")["rows"].values()}
    first, last = min(found)[0], max(found)[0]
    for steps, better in ((1, False), (2, True), (4, True)):
        assert (found[last, steps]["kernel_distance"] < found[first, steps]["kernel_distance"]) == better


# --- the experiments -----------------------------------------------------------------------------------------------


def noisy_grays(name, count, channels, size):
    """In place of the embedded images."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, channels), generator=generator).to(torch.uint8).numpy()


@pytest.fixture
def tiny(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "images_of", noisy_grays)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)


def save(folder, prediction_type):
    torch.manual_seed(0)  # for biases, which `randomised` adds to
    scheduler = ScratchDDPMScheduler(20, prediction_type=prediction_type)
    ScratchDDPMPipeline(randomised(UNet2DModel(**TINY_NETWORK)), scheduler).save_pretrained(folder)


@pytest.mark.full
def test_each_prediction_is_trained_and_measured(benchmark, tiny, tmp_path, monkeypatch):
    trained = []

    def train(name, folder):
        trained.append(name)
        save(folder, benchmark.PREDICTIONS[name]["prediction_type"])

    monkeypatch.setattr(benchmark, "train", train)
    places = [f"--{name}_dir={tmp_path / name}" for name in ("models", "results", "figures")]
    numbers = ["--num_images=20", "--num_inference_steps=2", "--num_error_images=8", "--num_bound_images=4"]
    benchmark.main(["predictions", *places, *numbers, "--num_terms=20", "--timesteps", "0", "19"])
    results = json.loads((tmp_path / "results" / "predictions.json").read_text())
    assert trained == [row["prediction"] for row in results["rows"]] == list(benchmark.PREDICTIONS)
    assert (tmp_path / "figures" / "questions_predictions.png").stat().st_size > 1000
    images = torch.from_numpy(noisy_grays(None, 8, 1, 8)).permute(0, 3, 1, 2)
    pipeline = ScratchDDPMPipeline.from_pretrained(tmp_path / "models" / "x_0")
    bits = bits_per_dim(pipeline.unet, pipeline.scheduler, images[:4], progress=False)
    assert results["rows"][1]["bits_per_dim"] == pytest.approx(float(bits.total.mean()))
    # Networks of the same weights err alike in what they say, hence not in x_0.
    assert len({row["errors"][0]["error"] for row in results["rows"]}) == 3


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_errors_of_a_network_that_says_0_have_their_closed_form(benchmark, prediction_type):
    scheduler = ScratchDDPMScheduler(prediction_type=prediction_type)
    pipeline = SimpleNamespace(scheduler=scheduler, unet=lambda x_t, t: SimpleNamespace(sample=torch.zeros_like(x_t)))
    x_0 = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    second = float(x_0.square().mean())
    for row in benchmark.errors(pipeline, x_0, (0, 300, 999)):
        alpha_bar = float(scheduler.alphas_cumprod[row["t"]])
        expected = {
            "epsilon": (1 - alpha_bar) / alpha_bar,  # x̂_0 = x_t / √ᾱ
            "sample": second,
            "v_prediction": (1 - alpha_bar) ** 2 * second + alpha_bar * (1 - alpha_bar),  # x̂_0 = √ᾱ x_t
        }[prediction_type]
        assert row["error"] == pytest.approx(expected, abs=4.5 * row["standard_error"] + 1e-6)


def test_a_training_is_the_quick_presets_with_another_prediction(benchmark, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, check: commands.append(command))
    benchmark.train("x_0, weighted as epsilon", tmp_path / "model")
    assert commands[0][:3] == [sys.executable, str(ROOT / "training" / "train.py"), str(benchmark.PRESET)]
    assert {"--prediction_type=sample", "--loss_weighting=epsilon"} < set(commands[0])
    save(tmp_path / "model", "sample")
    benchmark.train("x_0, weighted as epsilon", tmp_path / "model")
    assert len(commands) == 1  # it is there


@pytest.mark.full
def test_chains_of_any_length_are_measured(benchmark, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "LONG", 2)
    save(tmp_path / "model", "sample")
    places = [f"--{name}_dir={tmp_path / name}" for name in ("results", "figures")]
    benchmark.main(
        ["jumps", str(tmp_path / "model"), *places, "--num_images=40", "--num_images_of_long=20", "--steps", "1", "3"]
    )
    results = json.loads((tmp_path / "results" / "jumps.json").read_text())
    assert [(row["steps"], row["num_images"]) for row in results["rows"]] == [(1, 40), (3, 20)]
    assert (tmp_path / "figures" / "questions_jumps.png").stat().st_size > 1000
    data = noisy_grays(None, benchmark.TRAINING_IMAGES, 1, 8)[..., 0] / 1.0
    assert results["real"]["from_their_own_mean"] == results["real"]["from_mean_of_data"]
    assert results["real"]["from_their_own_mean"] == pytest.approx(np.sqrt(data.var(0).mean()))


def with_few_features(monkeypatch, tuning, *others):
    """Let the benchmarks take five pixels for the features of an image."""
    features = lambda images, _: images.reshape(len(images), -1)[:, 20:25].astype(float)  # noqa: E731
    monkeypatch.setattr(tuning, "efficientnet_lite0_features", features)
    for module in (tuning, *others):
        monkeypatch.setattr(module, "real_features", lambda _, count: np.random.default_rng(0).normal(size=(count, 5)))


@pytest.mark.full
def test_a_tuned_model_is_measured_beside_its_teacher(tmp_path, monkeypatch):
    tuning = load(ROOT / "benchmarks" / "few_step_tuning.py")
    monkeypatch.setattr(tuning, "train_classifier", lambda *_: "judge")
    monkeypatch.setattr(tuning, "classify", lambda _, images: np.arange(len(images)) % 2)
    monkeypatch.setattr(tuning, "embedded", lambda *_: (None, None, None))
    with_few_features(monkeypatch, tuning)
    network = randomised(ScratchUNet2DModel(**TINY_NETWORK, num_class_embeds=3))
    folders = {
        "teacher": ScratchDDPMScheduler(60),
        "tuned": ScratchDDPMScheduler(60, eta=math.inf, timestep_spacing="trailing"),
    }
    for name, scheduler in folders.items():
        ScratchDDPMPipeline(network, scheduler, {0: "bag", 1: "shoe"}).save_pretrained(tmp_path / name)
        sample = {
            "num_generated": 20,
            "kernel_distance": 0.1,
            "kernel_distance_error": 0.0,
            "precision": 1,
            "recall": 1,
        }
        sample |= {"num_inference_steps": 50, "size": tuning.SIZE}
        found = {"images_seen": 5, "evaluation": {"samples": [sample]}}
        (tmp_path / name / "results.json").write_text(json.dumps(found))
    results, picture = tmp_path / "results.json", tmp_path / "rows.png"
    arguments = [*map(str, (tmp_path / "tuned", tmp_path / "teacher")), "--num_images=20", "--rounds=1"]
    arguments += [f"--results={results}", f"--picture={picture}"]
    tuning.main(arguments)
    found = json.loads(results.read_text())
    assert len(found["rows"]) == 3 * 3 * 2 + 3 and picture.stat().st_size > 1000
    rows = {tuple(row[key] for key in ("model", "steps", "labels")): row for row in found["rows"].values()}
    assert all(row.get("accuracy") == (1 if row["labels"] == "in turn" else None) for row in rows.values())
    fresh, tuned = (rows[name, 2, "null"]["kernel_distance"] for name in ("teacher, noise fresh", "tuned"))
    assert fresh == tuned != rows["teacher", 2, "null"]["kernel_distance"]  # the same network, another sampler
    measured = []
    monkeypatch.setattr(tuning, "measure", lambda *arguments: measured.append(arguments))
    tuning.main(arguments)
    assert not measured  # all of it is there


def test_diffusers_classes_draw_what_ours_draw(tmp_path):
    tuning = load(ROOT / "benchmarks" / "few_step_tuning.py")
    network = randomised(ScratchUNet2DModel(**TINY_NETWORK, num_class_embeds=3)).eval()
    ours = ScratchDDPMPipeline(network, ScratchDDPMScheduler(60, eta=math.inf, timestep_spacing="trailing"))
    ours.save_pretrained(tmp_path)
    images = tuning.drawn_by_stock(tmp_path, SampleSpec(1, 5, batch_size=3))
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    generator = torch.Generator().manual_seed(0)
    x_T = torch.cat([torch.randn(count, 1, 8, 8, generator=generator) for count in (3, 2)])
    with torch.no_grad():
        output = network(x_T, 59, class_labels=torch.full((5,), 2)).sample
    x_0 = ours.scheduler.predict(output, x_T, 59).x_0  # in one step that is the image
    expected = ((x_0 + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(images - expected).max() <= 1


def test_distances_from_means(benchmark):
    images = np.array([[[0, 10]], [[4, 10]]], dtype=np.uint8)
    found = benchmark.from_mean(images, np.array([[2.0, 7.0]]))
    assert found == pytest.approx({"from_mean_of_data": np.sqrt(26 / 4), "from_their_own_mean": np.sqrt(2)})


def test_a_folder_without_model_is_refused(benchmark, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json: pass the folder"):
        benchmark.main(["jumps", str(tmp_path)])


@pytest.mark.full
def test_checkpoints_of_a_tuning_are_measured_once(tmp_path, monkeypatch):
    curve = load(ROOT / "benchmarks" / "few_step_curve.py")
    with_few_features(monkeypatch, sys.modules["few_step_tuning"], curve)
    run, results = tmp_path / "run", tmp_path / "results.json"
    network = randomised(ScratchUNet2DModel(**TINY_NETWORK))
    for folder in (run, run / "checkpoints" / "step_00000002", run / "checkpoints" / "step_00000004"):
        network.conv_out.bias.data += 0.1
        if folder == run:
            ScratchDDPMPipeline(network, ScratchDDPMScheduler(60, eta=math.inf)).save_pretrained(run)
        else:
            folder.mkdir(parents=True)
            save_file(network.state_dict(), folder / "ema.safetensors")
    (run / "results.json").write_text(json.dumps({"images_seen": 12, "steps": 4}))
    arguments = [str(run), "--num_images=20", f"--results={results}"]
    curve.main(arguments)
    rows = json.loads(results.read_text())["rows"]
    assert [(row["images_seen"], row["steps"]) for row in rows.values()] == [(n, k) for n in (6, 12) for k in (1, 2, 4)]
    assert len({row["kernel_distance"] for row in rows.values()}) == 6
    monkeypatch.setattr(curve, "measure", None)
    curve.main(arguments)
    assert json.loads(results.read_text())["rows"] == rows
