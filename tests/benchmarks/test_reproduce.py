"""`benchmarks/reproduce.py`: its commands are ones that `ddpm` takes, in the order in which they need each other."""

import json
import re
import subprocess
import sys

import pytest
import reproduce
import torch
from diffusers import UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data.config import EMBEDDED_DATA, EMBEDDED_TEST_SET
from ddpm_from_scratch.evaluation import calibrate
from ddpm_from_scratch.evaluation import config as evaluate
from ddpm_from_scratch.hub import publish
from ddpm_from_scratch.training import arguments as cli
from helpers.networks import TINY_NETWORK, randomised

EVALUATION = "--num_inference_steps 5 10 --num_images 30 20 --num_class_images 40 --num_bound_images 7 --num_terms 3"
CALLS = 30 * 5 + 20 * 10 + 40 * 5 + 7 * 3
RESULTS = {
    "evaluation": {
        "samples": [
            {"num_inference_steps": 5, "size": 112, "kernel_distance": 0.5, "kernel_distance_error": 0.03},
            {"num_inference_steps": 9, "size": 112, "kernel_distance": 0.4, "kernel_distance_error": 0.03},
        ],
        "classes": {"accuracy": 0.9, "accuracy_error": 0.01},
        "bound": {"bits_per_dim": None, "error": None},
    }
}


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "class_conditional: true\nmax_train_steps: 3\ntrain_batch_size: 2\nlr_warmup_steps: 0\nlogger: none\n"
        "model:\n  block_out_channels: [8, 8]\n  layers_per_block: 1\n  norm_num_groups: 4\n"
        "  down_block_types: [DownBlock2D, DownBlock2D]\n  up_block_types: [UpBlock2D, UpBlock2D]\n"
        "eval_batch_size: 2\nddpm_num_inference_steps: 2\noutput_dir: outputs/tiny-model\n"
    )
    return path


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What is run, in order; in place of the commands, their last one leaves results."""
    done = []

    def run(arguments, check):
        assert check and arguments[0] == sys.executable
        done.append(arguments[1:])
        command, after = command_of(arguments)
        if command == "train":
            folder = after[after.index("--output_dir") + 1]
            unet = randomised(UNet2DModel(**TINY_NETWORK))
            ScratchDDPMPipeline(unet, ScratchDDPMScheduler()).save_pretrained(folder)
            (tmp_path / "out" / "training" / "results.json").write_text('{"steps": 3}')
        if command == "evaluate":
            config = evaluate.parse(after)
            config.validate()
            folder = config.folder
            folder.mkdir(parents=True, exist_ok=True)
            before = evaluate.read_results(folder / "results.json")
            (folder / "results.json").write_text(json.dumps({**before, **RESULTS}))

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    return done


@pytest.fixture
def reference(tmp_path):
    there = json.loads(json.dumps(RESULTS))
    there["evaluation"]["samples"][0] |= {"kernel_distance": 0.45, "kernel_distance_error": 0.04}
    del there["evaluation"]["samples"][1]
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(there))
    return folder


def command_of(arguments):
    """The name of a command of `ddpm`, and its arguments."""
    number = arguments.index("ddpm_from_scratch.cli") + 1
    return arguments[number], arguments[number + 1 :]


@pytest.mark.full
def test_each_command_is_one_that_its_script_takes(tmp_path, preset, commands, reference, capsys):
    folder = tmp_path / "out"
    reproduce.main(
        [str(preset), "--output_dir", str(folder), "--evaluation", EVALUATION, "--reference", str(reference)]
    )
    names, given = zip(*map(command_of, commands), strict=True)
    assert names == ("train", "calibrate", "evaluate", "publish")
    config, _ = cli.parse(given[0])
    assert (config.output_dir, config.max_train_steps) == (str(folder / "training"), 3)
    model = folder / "tiny-model"
    assert calibrate.parse(given[1]).model == model
    measured = evaluate.parse(given[2])
    assert (measured.model, measured.num_images, measured.images_dir) == (str(model), [30, 20], folder / "images")
    published = publish.parse(given[3])
    publish.check(published)
    assert published.folder == model and published.page_only

    unet = ScratchDDPMPipeline.from_pretrained(model).unet
    trained = ScratchDDPMPipeline.from_pretrained(folder / "training").unet
    for name, weight in unet.state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name].half().float())
    size = (model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 0.75 * (folder / "training" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert json.loads((model / "results.json").read_text()) == {"steps": 3, **RESULTS}

    told = capsys.readouterr().out
    assert f"{CALLS} images through the network" in told and "1. train: 3 steps; about 0:00:" in told
    assert "kernel distance, 5 steps, 112 px: 0.5000 ± 0.0300, shipped 0.4500 ± 0.0400: 1.0 standard errors" in told
    assert "9 steps" not in told and "bits per dimension" not in told
    assert re.search(r"accuracy of the classes: .* 0\.0 standard errors", told)


@pytest.mark.full
def test_the_plan_alone_does_nothing(tmp_path, preset, commands, capsys):
    reproduce.main([str(preset), "--output_dir", str(tmp_path / "out"), "--plan_only"])
    assert commands == [] and not (tmp_path / "out").exists()
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.full
def test_data_sets_are_passed_on(tmp_path, preset, commands, reference):
    where = ["--dataset_name", str(EMBEDDED_DATA), "--test_set", str(EMBEDDED_TEST_SET)]
    folder = ["--output_dir", str(tmp_path / "out"), "--reference", str(reference), "--evaluation", EVALUATION]
    reproduce.main([str(preset), *where, *folder])
    given = dict(map(command_of, commands))
    assert cli.parse(given["train"])[0].dataset_name == str(EMBEDDED_DATA)
    assert calibrate.parse(given["calibrate"]).dataset_name == str(EMBEDDED_DATA)
    measured = evaluate.parse(given["evaluate"])
    assert (measured.dataset_name, measured.test_set) == (str(EMBEDDED_DATA), str(EMBEDDED_TEST_SET))


def test_a_model_is_measured_again_and_stays_as_it_is(tmp_path, commands, reference, capsys):
    """The shipped preset's images are on the Hub, and so are its held-out ones."""
    unet = randomised(UNet2DModel(**TINY_NETWORK))
    ScratchDDPMPipeline(unet, ScratchDDPMScheduler()).save_pretrained(tmp_path / "model")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")}
    places = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--reference", str(reference)]
    reproduce.main([*places, "--evaluation", EVALUATION])
    ((name, given),) = map(command_of, commands)
    measured = evaluate.parse(given)
    assert name == "evaluate" and measured.output_dir == tmp_path / "out" / "again"
    assert (measured.dataset_name, measured.test_split) == ("zalando-datasets/fashion_mnist", "test")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "model").rglob("*")} == before
    assert "1.0 standard errors" in capsys.readouterr().out


@pytest.mark.full
def test_nothing_comes_after_a_part_that_fails(tmp_path, preset, monkeypatch, capsys):
    done = []

    def run(arguments, check):
        done.append(command_of(arguments)[0])
        raise subprocess.CalledProcessError(70, arguments)

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        reproduce.main([str(preset), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 70 and done == ["train"]
    assert "train ended with code 70" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
