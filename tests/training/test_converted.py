"""What `ddpm convert` makes is a model as any other: it is fine-tuned, evaluated and calibrated."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.evaluation import calibrate
from helpers.evaluations import few_features, flags, run
from helpers.openai_files import WHOLE, converted
from helpers.runs import run_main

LEARNED = "improved cosine, learned variance, 4000 steps"
SIDE, CLASSES, COUNT = 8, 5, 20
CALIBRATION = ("--num_images", "6", "--num_timesteps", "3", "--batch_size", "6")


def folder_of(folder, names, first=0):
    """Random RGB pictures, the classes in turn, each in the folder of its class."""
    for number in range(first, first + COUNT):
        path = folder / names[number % CLASSES] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("data"), "01234")


@pytest.fixture(params=[LEARNED, WHOLE])
def model(request, tmp_path):
    return SimpleNamespace(folder=converted(tmp_path, request.param), conditional=request.param == WHOLE)


def outputs(folder, conditional):
    """Of the network in a folder, in every class."""
    unet = ScratchDDPMPipeline.from_pretrained(folder).unet
    x = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(CLASSES) if conditional else None
    with torch.no_grad():
        return unet(x, torch.tensor([0, 30, 300, 700, 999]), class_labels=labels).sample


def test_it_is_fine_tuned_from_what_it_was(inputs, data, model, tmp_path):
    """A network in which each label is a class gets one more, for none."""
    classes = ("--class_conditional", "--label_dropout", "0.5") if model.conditional else ()
    common = ("--model_config_name_or_path", model.folder, "--dataset_name", "null", "--train_data_dir", data)
    runs = {"still": "1e-30", "moved": "1e-3"}
    tuned = {
        name: run_main(
            inputs,
            tmp_path / name,
            *(*common, "--loss", "hybrid", "--use_ema", "false", "--max_train_steps", "2", "--learning_rate", rate),
            *classes,
        )
        for name, rate in runs.items()
    }
    before = outputs(model.folder, model.conditional)
    torch.testing.assert_close(outputs(tuned["still"], model.conditional), before, rtol=0, atol=1e-5)
    assert (outputs(tuned["moved"], model.conditional) - before).abs().max() > 1e-3
    pipeline = ScratchDDPMPipeline.from_pretrained(tuned["moved"])
    if model.conditional:
        assert pipeline.unet.config.num_class_embeds == CLASSES + 1
        assert pipeline.config.id2label == {number: str(number) for number in range(CLASSES)}
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(class_labels=["3"], guidance_scale=2.0, num_inference_steps=2).images


def test_it_is_evaluated(data, model, tmp_path):
    others = folder_of(tmp_path / "others", "01234", COUNT)
    named = SimpleNamespace(training=str(data), tests=str(others), cache=tmp_path / "cache")
    options = flags(named, num_terms=2, num_bound_images=2) + ["--balanced_labels"] * model.conditional
    with few_features():
        evaluation = run(model.folder, options)["evaluation"]
    (samples,) = evaluation["samples"]
    assert np.isfinite(samples["kernel_distance"])
    if model.conditional:
        assert "none is null" in evaluation["bound"]["left_out"]
    else:
        assert evaluation["bound"]["bits_per_dim"] > 0


def test_it_is_calibrated(data, model):
    """By the error of the image that the network predicts for each picture, in its class if there are any."""
    calibrate.main([str(model.folder), "--train_data_dir", str(data), *CALIBRATION])
    pipeline = ScratchDDPMPipeline.from_pretrained(model.folder)
    config, chosen = pipeline.scheduler.config, [number * COUNT // 6 for number in range(6)]
    files = sorted(data.rglob("*.png"))
    x_0 = torch.stack([torch.from_numpy(np.array(Image.open(files[number]))) for number in chosen])
    x_0 = x_0.permute(0, 3, 1, 2) / 127.5 - 1
    labels = torch.tensor([int(files[number].parent.name) for number in chosen]) if model.conditional else None
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    angles = (np.arange(config.num_train_timesteps + 1) / config.num_train_timesteps + 0.008) / 1.008 * np.pi / 2
    ratios = np.cos(angles[1:]) ** 2 / np.cos(angles[:-1]) ** 2  # the cosine schedule of Nichol & Dhariwal, eq. 17
    alpha_bars = np.cumprod(np.maximum(ratios, 1 - 0.999))
    for t, value in config.x_0_mse:
        signal, sigma = alpha_bars[t] ** 0.5, (1 - alpha_bars[t]) ** 0.5
        x_t = signal * x_0 + sigma * noise
        with torch.no_grad():
            epsilon = pipeline.unet(x_t, torch.tensor(t), class_labels=labels).sample[:, :3]
        predicted = ((x_t - sigma * epsilon) / signal).clamp(-1, 1)
        assert float((predicted - x_0).square().mean()) == pytest.approx(value, rel=1e-3)
    assert len(config.x_0_mse) == 3


def test_classes_of_other_names_are_refused(tmp_path):
    model, others = converted(tmp_path, WHOLE), folder_of(tmp_path / "others", "abcde")
    with pytest.raises(ValueError, match=r"the classes of the images are a, b, c, d, e; those of .* 0, 1, 2, 3, 4"):
        calibrate.main([str(model), "--train_data_dir", str(others), *CALIBRATION])
