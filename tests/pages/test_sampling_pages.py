"""docs/guidance.md and docs/editing.md say what the results say, and their code runs; the benchmarks, made tiny."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchUNet2DModel
from ddpm_from_scratch.data.dataset import TrainingData
from ddpm_from_scratch.data.labels import Labels
from ddpm_from_scratch.diffusion.guidance import Guidance
from helpers.networks import TINY_NETWORK, randomised
from helpers.pages import load
from helpers.paths import DOCS, ROOT

NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@pytest.fixture(scope="module")
def script():
    return load(DOCS / "make_sampling_pages.py")


@pytest.fixture(scope="module")
def guidance():
    return load(ROOT / "benchmarks" / "guidance.py")


@pytest.fixture(scope="module")
def editing():
    return load(ROOT / "benchmarks" / "editing.py")


@pytest.fixture
def models(tmp_path):
    """A folder with tiny models under the names that the pages use."""
    outputs = tmp_path / "outputs"
    ScratchDDPMPipeline(randomised(UNet2DModel(**TINY_NETWORK)), DDPMScheduler()).save_pretrained(
        outputs / "ddpm-fashion-mnist-quick"
    )
    ScratchDDPMPipeline(
        randomised(UNet2DModel(**TINY_NETWORK, num_class_embeds=11)), DDPMScheduler(), dict(enumerate(NAMES))
    ).save_pretrained(outputs / "ddpm-fashion-mnist-conditional-quick")
    return outputs


def few_images(config, channels, size):
    """In place of the embedded images: 50, the classes in turn, each of a gray of its own."""
    labels = torch.arange(50) % 10
    noise = torch.randint(0, 10, (50, channels, size, size), generator=torch.Generator().manual_seed(0))
    images = (25 * labels.reshape(-1, 1, 1, 1) + noise).to(torch.uint8)
    return TrainingData(
        images, channels, size, "", Labels("label", NAMES, labels) if config.class_conditional else None
    )


# --- the pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["guidance", "editing"])
def test_the_page_holds_the_tables_of_the_results(script, name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert script.fill(page, script.PAGES[name], script.results_of(name)) == page
    empty = script.fill(page, script.PAGES[name], {})
    assert script.fill(empty, script.PAGES[name], script.results_of(name)) == page


@pytest.mark.full
@pytest.mark.parametrize("name", ["guidance", "editing"])
def test_the_code_of_the_page_runs(script, models, name, monkeypatch):
    monkeypatch.chdir(models.parent)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    exec("\n".join(blocks), {})


def test_the_guidance_page_has_a_place_for_every_row(script, guidance):
    every = [None, *map(guidance.Guidance, guidance.SCALES), *guidance.VARIED]
    assert list(script.GUIDANCES.values()) == every
    results = script.results_of("guidance")
    assert all(script.guidance_of(row) in every for row in results.get("rows", []))


def test_the_editing_page_has_a_place_for_every_row(script, editing):
    for name in ("INVERSION_STEPS", "NUM_ITERATIONS", "JUMP_N_SAMPLES", "STRENGTHS"):
        assert getattr(script, name) == getattr(editing, name)


# --- the benchmark of guidance -------------------------------------------------------------------------------------


@pytest.fixture
def guide(guidance, models, tmp_path, monkeypatch):
    """Run the benchmark; its results."""
    monkeypatch.setattr(ScratchUNet2DModel, "compile", lambda self, **options: None)
    monkeypatch.setattr(guidance, "efficientnet_lite0_features", lambda images, size: images.reshape(-1, 64) / 255)
    monkeypatch.setattr(guidance, "load_data", few_images)

    def run(*options, model="ddpm-fashion-mnist-conditional-quick"):
        places = ["--results", str(tmp_path / "guidance.json"), "--figure", str(tmp_path / "figures" / "guidance.png")]
        guidance.main([str(models / model), "--images_per_class", "2", "--steps", "2", *places, *options])
        return json.loads((tmp_path / "guidance.json").read_text(encoding="utf-8"))

    return run


def test_every_guidance_is_measured_and_shown(script, guide, tmp_path):
    results = guide()
    assert [script.guidance_of(row) for row in results["rows"]] == list(script.GUIDANCES.values())
    table = script.guidance_table(results).splitlines()
    row = results["rows"][5]
    assert re.match(r"\| scale 8 \| \d+\.\d ± \d+\.\d % \| -?\d\.\d{3} ± \d\.\d{3} \| \d\.\d{3} \| \d+ \|$", table[7])
    assert f"{row['spread']:.3f}" in table[7] and f"{100 * row['accuracy']:.1f} ±" in table[7]
    assert re.match(r"\| no labels \| – \| -?\d\.\d{3} ± \d\.\d{3} \| – \| \d+ \|$", table[2])
    assert "N = 20 of each kind, 2 of each class, in 2 steps" in script.guidance_environment(results)
    with Image.open(tmp_path / "figures" / "guidance.png") as figure:
        assert figure.height > figure.width  # ten classes by five scales


def test_images_follow_seed_class_and_guidance(guidance, models):
    pipeline = ScratchDDPMPipeline.from_pretrained(models / "ddpm-fashion-mnist-conditional-quick")
    found = {g: guidance.sample(pipeline, g, 10, 2, 12) for g in (None, Guidance(1.0), Guidance(4.0, 0.7, (0.2, 0.8)))}
    assert {(x.shape, str(x.dtype)) for x in found.values()} == {((12, 8, 8, 1), "uint8")}
    options = {"num_inference_steps": 2, "output_type": "np"}
    for g, images in found.items():
        number = torch.Generator().manual_seed(11)
        labelled = {} if g is None else {"class_labels": ["Trouser"]}
        guided = {} if g is None else {f"guidance_{key}": value for key, value in g._asdict().items()}
        alone = pipeline(1, number, **options, **labelled, **guided).images[0]
        np.testing.assert_allclose(images[11], 255 * alone, atol=0.51)
    assert len({images.tobytes() for images in found.values()}) == 3


def test_real_images_come_with_their_classes(guidance, monkeypatch):
    monkeypatch.setattr(guidance, "load_data", few_images)
    images, labels, names = guidance.embedded(guidance.EMBEDDED_TEST_SET, 1, 8)
    assert names == dict(enumerate(NAMES)) and images.shape == (50, 8, 8, 1)
    assert np.array_equal(images[..., 0].min((1, 2)) // 25, labels)


def test_real_images_come_in_the_order_of_the_generated_ones(guidance):
    labels = np.array([1, 0, 0, 1, 1, 0, 0, 1])
    assert guidance.places(labels, 2).tolist() == [1, 0, 2, 3]
    assert guidance.places(labels, 2, 2).tolist() == [5, 4, 6, 7]


def test_spread_is_within_classes(guidance):
    images = np.zeros((4, 2, 2, 1), dtype=np.uint8)
    images[1::2] = 255
    assert guidance.spread(images, 2) == 0
    images[2] = 51  # of class 0, whose values are then 0 and 0.2
    assert guidance.spread(images, 2) == pytest.approx(0.1 * 2**0.5 / 2)


WRONG_GUIDANCE = {
    "an unconditional model": ([], "ddpm-fashion-mnist-quick", "has no classes"),
    "few images": (["--images_per_class", "1"], "ddpm-fashion-mnist-conditional-quick", "from 2 to 2"),
    "many images": (["--images_per_class", "3"], "ddpm-fashion-mnist-conditional-quick", "there are 5 of the rarest"),
    "a scale": (["--scales", "1", "-1"], "ddpm-fashion-mnist-conditional-quick", "guidance_scale"),
    "steps": (["--steps", "0"], "ddpm-fashion-mnist-conditional-quick", "has 1000 steps"),
}


@pytest.mark.parametrize(("options", "model", "message"), WRONG_GUIDANCE.values(), ids=WRONG_GUIDANCE)
def test_wrong_guidance_is_refused_before_any_work(guide, tmp_path, options, model, message):
    with pytest.raises(ValueError, match=message):
        guide(*options, model=model)
    assert not (tmp_path / "guidance.json").exists()


def test_a_model_of_other_classes_or_without_null_label_is_refused(guidance):
    names = dict(enumerate(NAMES))
    with pytest.raises(ValueError, match="classes are a, b; the embedded"):
        guidance.check_model({0: "a", 1: "b"}, 3, names)
    with pytest.raises(ValueError, match="10 labels for 10 classes"):
        guidance.check_model(names, 10, names)
    guidance.check_model(names, 11, names)


# --- the benchmark of editing --------------------------------------------------------------------------------------


@pytest.fixture
def edit(editing, models, tmp_path, monkeypatch):
    """Run the benchmark; its results."""
    small = {"PAIRS": 2, "NUM_FRAMES": 3, "INTERPOLATION_STEPS": 2, "INPAINTING_STEPS": 10, "IMG2IMG_STEPS": 5}
    for name, value in {**small, "CHAIN_STEPS": 3, "CHAIN_FRAMES": 2, "load_data": few_images}.items():
        monkeypatch.setattr(editing, name, value)

    def run(*options, model="ddpm-fashion-mnist-quick"):
        places = ["--results", str(tmp_path / "editing.json"), "--figures_dir", str(tmp_path / "figures")]
        editing.main([str(models / model), *places, *options])
        return json.loads((tmp_path / "editing.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.full
@pytest.mark.parametrize("model", ["ddpm-fashion-mnist-quick", "ddpm-fashion-mnist-conditional-quick"])
def test_every_edit_is_measured_and_shown(script, editing, edit, tmp_path, monkeypatch, model):
    monkeypatch.setattr(editing, "INVERSION_STEPS", (10,))
    results = edit("--num_images", "4", model=model)
    assert [row["num_iterations"] for row in results["inversion"]] == list(editing.NUM_ITERATIONS)
    assert results["interpolation"]["largest_difference"] == 0
    assert [row["changed_pixels"] for row in results["inpainting"]["rows"]] == [0, 0]
    found = [row["psnr"] for row in results["img2img"]["rows"]]
    assert found == sorted(found, reverse=True)

    first = results["inversion"][0]
    assert f"| 10 | {first['psnr']:.1f} ({first['worst']:.1f}) |" in script.inversion_table(results)
    assert "| 20 | – | – | – | – |" in script.inversion_table(results)
    assert "| `jump_n_sample=5` | 0 | " in script.inpainting_table(results)
    assert script.img2img_table(results).count("±") == 4
    assert "at most 0 of 255" in script.interpolation_line(results)
    assert "N = 4" in script.editing_environment(results)
    with Image.open(tmp_path / "figures" / "editing.png") as figure:
        assert figure.width > figure.height  # three rows of six columns
    with Image.open(tmp_path / "figures" / "chain.gif") as chain:
        assert chain.n_frames == 2 and chain.size == (2 * 4 * 8, 2 * 2 * 8)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["chain.gif", "editing.png"]


def test_signal_to_noise_ratio(editing):
    given = np.full((2, 4, 4, 1), 0.5)
    np.testing.assert_allclose(editing.psnr(given + np.array([0.1, 0.0]).reshape(2, 1, 1, 1), given), [20, 120])


def test_the_lower_half_is_painted(editing):
    mask = editing.lower_half(5, 3)
    assert mask.shape == (5, 3, 1) and (mask[:2] == 0).all() and (mask[2:] == 255).all()


@pytest.mark.parametrize("count", ["3", "51"])
def test_wrong_numbers_of_edits_are_refused(edit, count):
    with pytest.raises(ValueError, match=rf"--num_images {count}: from 4 to 50"):
        edit("--num_images", count)


@pytest.mark.parametrize("name", ["guidance", "editing"])
def test_a_folder_without_a_model_is_refused(name, request, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        request.getfixturevalue(name).main([str(tmp_path)])
