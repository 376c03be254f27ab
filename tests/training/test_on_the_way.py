"""What a run shows while it goes on: its data as the network sees them, grids in trackers, checkpoints as models."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.data.dataset import ImageStream, load_data
from ddpm_from_scratch.evaluation import evaluate
from ddpm_from_scratch.sampling import sample
from ddpm_from_scratch.sampling.models import load_pipeline
from ddpm_from_scratch.training import export
from ddpm_from_scratch.training.arguments import parse
from helpers.evaluations import few_features
from helpers.paths import TRAINING
from helpers.runs import NUM_IMAGES, SIZE, picture, run_main, run_process, write_parquet


def test_data_png_holds_the_training_images_as_the_network_sees_them(inputs, tmp_path):
    folder = run_main(inputs, tmp_path / "model", "--max_train_steps", "1")
    shown = np.asarray(Image.open(folder / "data.png"))[::2, ::2]  # tiny images are enlarged
    config, _ = parse([inputs.preset])
    stream = ImageStream(load_data(config, 1, SIZE), config.seed, config.center_crop, config.random_flip)
    for number in range(NUM_IMAGES):  # in rows of five
        row, column = divmod(number, 5)
        cell = shown[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
        assert (cell == stream[number][0].numpy()).all()


def test_few_images_are_warned_of(inputs, tmp_path, caplog):
    run_main(inputs, tmp_path / "model", "--max_train_steps", "1")
    assert f"{NUM_IMAGES} images are few" in caplog.text and "neighbors.png" in caplog.text


def test_the_last_grid_shows_how_far_it_is(inputs, tmp_path, capsys):
    run_main(inputs, tmp_path / "model", "--max_train_steps", "3", "--sample_steps", "3")
    bars = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "%|" in line]
    assert [bar.partition(":")[0] for bar in bars if "samples.png" in bar][-1] == "drawing samples.png"
    assert "| 3/3 [" in [bar for bar in bars if "samples.png" not in bar][-1]  # the training
    assert "| 2/2 [" in bars[-1]  # ddpm_num_inference_steps; the grid on the way had no bar
    assert len([bar for bar in bars if "0/2 [" in bar]) == 1


@pytest.mark.parametrize(
    ("level", "said"), [("info", "next: ddpm sample"), ("warning", "images are few"), ("error", "")]
)
def test_what_a_run_says_follows_the_level(inputs, tmp_path, level, said):
    flags = ["--max_train_steps", "1", "--log_level", level, "--output_dir", str(tmp_path / "model")]
    done = run_process([sys.executable, str(TRAINING / "train.py"), inputs.preset, *flags])
    assert done.returncode == 0, done.stderr
    assert ("next: ddpm sample" in done.stderr) == (level == "info")
    assert ("images are few" in done.stderr) == (level != "error")


def test_two_processes_say_what_one_says(inputs, tmp_path):
    flags = ["--max_train_steps", "1", "--output_dir", str(tmp_path / "model"), "--num_processes", "2"]
    done = run_process([sys.executable, "-m", "ddpm_from_scratch.cli", "train", inputs.preset, *flags])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" images in ") == 1 and done.stderr.count("next: ddpm sample") == 1
    assert "Warning" not in done.stderr  # of accelerate, about threads


def test_grids_are_in_tensorboard(inputs, tmp_path):
    folder = run_main(
        inputs, tmp_path / "model", "--logger", "tensorboard", "--max_train_steps", "4", "--sample_steps", "2"
    )
    events = EventAccumulator(str(folder / "logs" / "ddpm")).Reload()
    logged = events.Images("samples")
    assert [image.step for image in logged] == [2, 4, 4]  # on the way, and at the end
    shown = np.asarray(Image.open(folder / "samples" / "step_2.png"))
    assert (logged[0].height, logged[0].width) == shown.shape[:2]


@pytest.fixture
def checkpoint(whole_run):
    return whole_run / "checkpoints" / "step_00000010"


def test_a_checkpoint_is_sampled_as_the_folder_made_of_it(checkpoint, tmp_path):
    export.main([str(checkpoint), str(tmp_path / "exported")])
    for name, model in {"direct": checkpoint, "folder": tmp_path / "exported"}.items():
        out = str(tmp_path / f"{name}.png")
        sample.main([str(model), "--num_images", "2", "--num_inference_steps", "2", "--out", out])
    assert (tmp_path / "direct.png").read_bytes() == (tmp_path / "folder.png").read_bytes()


@pytest.mark.filterwarnings("ignore:.* from 20 images")
def test_a_checkpoint_is_evaluated_beside_the_run(checkpoint, inputs, tmp_path, whole_run):
    others = write_parquet(tmp_path / "others.parquet", [picture(seed=100 + number) for number in range(20)])
    sets = ("--dataset_name", inputs.parquet, "--test_set", str(others), "--cache_dir", str(tmp_path / "features"))
    flags = ("--num_images", "20", "--num_inference_steps", "2", "--num_bound_images", "0", "--no-compile")
    with few_features():
        path = evaluate.main([str(checkpoint), *flags, *sets])
    assert path == whole_run / "evaluation" / checkpoint.name / "results.json"
    (measured,) = json.loads(path.read_text())["evaluation"]["samples"]
    assert measured["num_inference_steps"] == 2


def test_diffusers_own_pipeline_is_not_made_of_a_checkpoint(checkpoint):
    with pytest.raises(ValueError, match="ddpm export"):
        load_pipeline(str(checkpoint), dtype=torch.float32, stock=True)
    assert isinstance(load_pipeline(str(checkpoint), dtype=torch.float32), ScratchDDPMPipeline)


def test_a_checkpoint_of_before_has_a_scheduler_that_its_flags_describe(checkpoint, tmp_path):
    older = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, older)
    manifest = json.loads((older / "manifest.json").read_text())
    scheduler = manifest.pop("scheduler")
    (older / "manifest.json").write_text(json.dumps(manifest))
    found = load_pipeline(str(older), dtype=torch.float32).scheduler.config
    assert {key: found[key] for key in scheduler if key[0] != "_"} == {
        key: value for key, value in scheduler.items() if key[0] != "_"
    }
