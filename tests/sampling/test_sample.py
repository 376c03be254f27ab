"""`ddpm sample`: its picture holds the images of the pipeline, and wrong calls are refused before a model is loaded."""

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.runtime.random_streams import generator
from ddpm_from_scratch.sampling import sample
from helpers.networks import TINY_NETWORK, randomised

SIDE = TINY_NETWORK["sample_size"]


@pytest.fixture
def model(tmp_path):
    names = dict(enumerate(["Bag", "Dress", "Coat", "Shirt"]))
    network = randomised(UNet2DModel(**TINY_NETWORK, num_class_embeds=5)).eval()
    ScratchDDPMPipeline(network, ScratchDDPMScheduler(20), names).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def cells(path, count, columns):
    """The images of a grid, which shows tiny ones twice as large."""
    pixels = np.asarray(Image.open(path))[::2, ::2]
    return [
        pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        for row, column in (divmod(number, columns) for number in range(count))
    ]


@pytest.mark.parametrize("batch_size", [2, 64])
def test_images_are_those_of_the_pipeline(model, tmp_path, batch_size, capsys):
    out = tmp_path / "new" / "grid.png"
    flags = ["--num_images", "5", "--num_inference_steps", "3", "--out", str(out), "--seed", "4"]
    labels = ["--class_labels", "Bag", "2", "--guidance_scale", "2", "--batch_size", str(batch_size)]
    sample.main([model, *flags, *labels, "--mixed_precision", "no"])
    assert capsys.readouterr().out.strip() == str(out)
    pipeline = ScratchDDPMPipeline.from_pretrained(model)
    options = {"class_labels": ["Bag", 2, "Bag", 2, "Bag"], "guidance_scale": 2.0, "num_inference_steps": 3}
    images = pipeline(generator=[generator(4, "sample", number) for number in range(5)], **options).images
    for found, expected in zip(cells(out, 5, 3), images, strict=True):
        assert abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_another_scheduler_draws_other_images(model, tmp_path):
    flags = ["--num_images", "1", "--num_inference_steps", "3", "--mixed_precision", "no"]
    for name in ("ddpm", "ddim", "dpmsolver++", "unipc"):
        sample.main([model, *flags, "--scheduler", name, "--out", str(tmp_path / f"{name}.png")])
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ("ddpm", "ddim", "dpmsolver++")}) == 3


WRONG = [
    (["--num_images", "0"], "--num_images=0"),
    (["--num_inference_steps", "0"], "--num_inference_steps=0"),
    (["--seed", "-1"], "--seed=-1"),
    (["--out", "grid.txt"], "grid.txt"),
    (["--guidance_scale", "2"], "--class_labels"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_flags_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        sample.main([str(tmp_path / "missing"), *flags])
    assert list(tmp_path.iterdir()) == []


def test_what_the_model_cannot_do_leaves_no_file(model, tmp_path):
    out = tmp_path / "grid.png"
    with pytest.raises(ValueError, match="Sneaker"):
        sample.main([model, "--class_labels", "Sneaker", "--out", str(out)])
    DDPMPipeline(UNet2DModel(**TINY_NETWORK), DDPMScheduler(20)).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="class_labels"):
        sample.main([str(tmp_path / "plain"), "--class_labels", "0", "--out", str(out)])
    with pytest.raises(FileNotFoundError, match="missing"):
        sample.main([str(tmp_path / "missing"), "--out", str(out)])
    assert not out.exists()
