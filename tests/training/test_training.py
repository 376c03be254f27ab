"""Training: exact resume, the learning rate, EMA, random draws, data, configuration, outputs and the upload."""

import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import diffusers.training_utils
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import train as script
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchUNet2DModel
from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data import sources
from ddpm_from_scratch.data.config import EMBEDDED_DATA, EMBEDDED_TEST_SET
from ddpm_from_scratch.evaluation.figures import smoothed
from ddpm_from_scratch.runtime import devices
from ddpm_from_scratch.runtime import random_streams as draws
from ddpm_from_scratch.sampling import checkpoints
from ddpm_from_scratch.sampling.previews import image_grid
from ddpm_from_scratch.training import arguments as cli
from ddpm_from_scratch.training import checkpoint
from ddpm_from_scratch.training import config as training_config
from ddpm_from_scratch.training import loop as train
from ddpm_from_scratch.training import model as networks
from ddpm_from_scratch.training import optimizer as optimization
from ddpm_from_scratch.training.config import PRESETS, TrainingConfig
from ddpm_from_scratch.training.optimizer import EMA, ema_decay
from ddpm_from_scratch.training.run import final_loss
from helpers.paths import ROOT, TRAINING
from helpers.runs import (
    BATCH,
    NUM_IMAGES,
    SIZE,
    STEPS,
    TOKEN,
    assert_equal,
    checkpoint_tensors,
    encode,
    picture,
    run_main,
    run_process,
    stratified_timesteps,
    write_parquet,
)


@pytest.mark.parametrize(("step", "workers"), [(1, 0), (4, 2), (8, 0), (9, 2)])
def test_resumed_run_equals_whole_run_bit_for_bit(inputs, whole_run, tmp_path, step, workers):
    start = whole_run / "checkpoints" / f"step_{step:08d}"
    flags = ("--resume_from_checkpoint", start, "--dataloader_num_workers", workers, "--checkpointing_steps", "1")
    resumed = run_main(inputs, tmp_path / "model", *flags)
    assert_equal(checkpoint_tensors(resumed), checkpoint_tensors(whole_run))
    assert_equal(
        load_file(resumed / "unet" / "diffusion_pytorch_model.safetensors"),
        load_file(whole_run / "unet" / "diffusion_pytorch_model.safetensors"),
    )
    losses = [
        checkpoints.read_state(f / "checkpoints" / f"step_{STEPS:08d}")["progress"]["losses"]
        for f in (resumed, whole_run)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_killed_run_continues_from_its_latest_checkpoint(inputs, whole_run, tmp_path, monkeypatch):
    train_step = train.train_step

    def killed_in_step_5(run, batches, step):
        if step == 5:
            raise KeyboardInterrupt
        return train_step(run, batches, step)

    flags = ("--checkpointing_steps", "2", "--resume_from_checkpoint", "latest")  # no checkpoint yet: starts afresh
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", killed_in_step_5)
        run_main(inputs, tmp_path / "model", *flags)
    assert not (tmp_path / "model" / "model_index.json").exists()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "model" / "checkpoints")] == [
        "step_00000002",
        "step_00000004",
    ]
    resumed = run_main(inputs, tmp_path / "model", *flags)
    assert_equal(checkpoint_tensors(resumed), checkpoint_tensors(whole_run))


def test_resuming_a_finished_run_trains_no_further(inputs, whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "model")
    run_main(inputs, folder, "--resume_from_checkpoint", "latest")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(folder / name), load_file(whole_run / name))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (("--seed", "1"), "seed: 0 in the checkpoint, 1 now"),
        (("--train_batch_size", "2"), "train_batch_size"),
        (("--model.layers_per_block", "2"), "model.layers_per_block: 1 in the checkpoint, 2 now"),
        (("--prediction_type", "v_prediction"), "prediction_type"),
        (("--random_flip", "false"), "random_flip"),
        (("--dataset_name", str(EMBEDDED_DATA), "--resolution", "8"), "fingerprint"),
    ],
)
def test_resume_refuses_another_run(inputs, whole_run, tmp_path, flags, field):
    with pytest.raises(ValueError, match=field):
        run_main(
            inputs, tmp_path / "model", "--resume_from_checkpoint", whole_run / "checkpoints/step_00000004", *flags
        )
    assert not (tmp_path / "model").exists()


def test_resume_allows_the_same_global_batch_cut_differently(inputs, whole_run, tmp_path):
    start = whole_run / "checkpoints" / "step_00000009"
    flags = ("--resume_from_checkpoint", start, "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    assert (run_main(inputs, tmp_path / "model", *flags) / "model_index.json").exists()


def test_optimizer_state_takes_the_layout_of_its_parameter():
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    names = {parameter: name for name, parameter in conv.named_parameters()}

    def stepped():
        optimizer = torch.optim.AdamW(conv.parameters(), fused=True)
        conv(torch.ones(1, 4, 5, 5)).sum().backward()
        optimizer.step()
        return optimizer

    saved = {k: t.contiguous().clone() for k, t in checkpoint.optimizer_tensors(stepped(), names).items()}
    loaded = torch.optim.AdamW(conv.parameters(), fused=True)
    checkpoint.load_optimizer_tensors(loaded, names, saved)
    assert loaded.state[conv.weight]["exp_avg"].stride() == conv.weight.stride()
    assert_equal(checkpoint.optimizer_tensors(loaded, names), saved)


# Learning rate, accumulation, processes


def rates_of(config, total):
    return [optimization.learning_rate(step, config, total) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decaying_rates_warm_up_and_end_at_zero(schedule):
    rates = rates_of(TrainingConfig(learning_rate=0.5, lr_warmup_steps=10, lr_scheduler=schedule), 100)
    assert rates[0] == pytest.approx(0.05) and rates[9] == rates[10] == 0.5
    assert rates[100] == pytest.approx(0, abs=1e-15)
    assert rates[55] == pytest.approx(0.25)  # half way from step 10 to step 100
    assert np.all(np.diff(rates[10:]) < 0)


def test_constant_rates():
    assert set(rates_of(TrainingConfig(learning_rate=0.5, lr_scheduler="constant"), 20)) == {0.5}
    warm = rates_of(TrainingConfig(learning_rate=0.5, lr_scheduler="constant_with_warmup", lr_warmup_steps=5), 20)
    assert warm[0] == pytest.approx(0.1) and set(warm[5:]) == {0.5}


def test_steps_that_count_images_mean_the_same_for_every_batch(inputs, tmp_path, monkeypatch):
    """With twice the batch, everything comes after half as many optimiser steps; the saved preset is the one given."""
    flags = ("--step_images", BATCH, "--checkpointing_steps", "4", "--lr_warmup_steps", "4", "--log_steps", "2")
    runs = {}
    for batch in (BATCH, 2 * BATCH):
        rates = []
        with monkeypatch.context() as patch:
            patch.setattr(train, "set_learning_rate", lambda _, rate, rates=rates: rates.append(rate))
            folder = run_main(inputs, tmp_path / str(batch), *flags, "--train_batch_size", batch)
        progress = checkpoints.read_state(checkpoint.list_checkpoints(folder / "checkpoints")[-1])["progress"]
        saved = [path.name for path in checkpoint.list_checkpoints(folder / "checkpoints")]
        results = json.loads((folder / "results.json").read_text())
        runs[batch] = (rates, saved, [step for step, _ in progress["losses"]], results["images_seen"])
        assert yaml.safe_load((folder / "training_config.yaml").read_text())["checkpointing_steps"] == 4
    rates, saved, logged, images = runs[BATCH]
    assert len(rates) == 10 and rates.index(max(rates)) in (3, 4) and images == 40
    assert saved == ["step_00000004", "step_00000008", "step_00000010"] and logged == [2, 4, 6, 8, 10]
    rates, saved, logged, images = runs[2 * BATCH]
    assert len(rates) == 5 and rates.index(max(rates)) in (1, 2) and images == 40
    assert saved == ["step_00000002", "step_00000004", "step_00000005"] and logged == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("power", [2 / 3, 0.75, 1.0])
@pytest.mark.parametrize("ratio", [0.25, 2, 8])
def test_the_horizon_of_the_average_is_the_same_in_images(power, ratio):
    """The mean age, in images, of what is averaged: late in a run, and where the largest decay binds."""

    def age(config, images_a_step, images):
        average = 0.0  # of the number of images at which each weight was seen
        steps = round(images / images_a_step)
        for step in range(1, steps + 1):
            decay = ema_decay(step, config.ema_inv_gamma, config.ema_power, config.ema_max_decay)
            average = decay * average + (1 - decay) * step * images_a_step
        return images - average

    for largest in (0.9999, 0.99):
        given = TrainingConfig(model={}, ema_power=power, ema_max_decay=largest, step_images=32)
        resolved = optimization.in_optimizer_steps(given, round(32 * ratio))
        expected = age(given, 32, 32 * 8000)
        assert age(resolved, 32 * ratio, 32 * 8000) == pytest.approx(expected, rel=0.05, abs=32 * max(1, ratio))


def test_accumulation_gives_the_same_weights_and_rates(inputs, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(
        train, "set_learning_rate", lambda opt, rate: (used.append(rate), optimization.set_learning_rate(opt, rate))
    )
    common = ("--model.dropout", "0.0", "--checkpointing_steps", STEPS)
    whole = run_main(inputs, tmp_path / "whole", *common)
    parts = run_main(
        inputs, tmp_path / "parts", *common, "--train_batch_size", "1", "--gradient_accumulation_steps", "4"
    )
    assert used[:STEPS] == used[STEPS:] and len(used) == 2 * STEPS
    assert json.loads((parts / "results.json").read_text())["final_learning_rate"] == pytest.approx(0, abs=1e-15)
    expected = checkpoint_tensors(whole)
    for name, tensor in checkpoint_tensors(parts).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.full
def test_two_processes_equal_one_with_accumulation(inputs, tmp_path):
    """One launch of two processes; `accelerate launch --cpu --num_processes 2` would run a single one."""
    steps = ("--checkpointing_steps", "4", "--max_train_steps", "4", "--log_steps", "1", "--sample_steps", "2")
    common = ("--model.dropout", "0.0", *steps, "--train_batch_size", "2", "--eval_batch_size", "5")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(TRAINING / "train.py")]
    arguments = [inputs.preset, "--output_dir", str(tmp_path / "two"), *common]
    done = run_process([*command, *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "two")]
    one = run_main(inputs, tmp_path / "one", *common, "--gradient_accumulation_steps", "2")
    assert json.loads((tmp_path / "two" / "results.json").read_text())["num_processes"] == 2
    expected = checkpoint_tensors(one, 4)
    for name, tensor in checkpoint_tensors(tmp_path / "two", 4).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    curves = [
        checkpoints.read_state(folder / "checkpoints" / "step_00000004")["progress"]["losses"]
        for folder in (one, tmp_path / "two")
    ]
    assert len(curves[0]) == 4 and np.asarray(curves[1]) == pytest.approx(np.asarray(curves[0]), rel=1e-5)
    for grid in ("samples.png", "samples/step_2.png"):  # five images, which two processes share
        alone, shared = (np.asarray(Image.open(folder / grid)).astype(int) for folder in (one, tmp_path / "two"))
        assert np.abs(alone - shared).max() <= 1 and alone.std() > 10


def test_gradients_are_clipped(inputs, tmp_path):
    flags = ("--max_train_steps", "1", "--checkpointing_steps", "1", "--max_grad_norm", "0.01")
    folder = run_main(inputs, tmp_path / "model", *flags)
    tensors = checkpoint_tensors(folder, 1)
    means = [tensor.flatten() for name, tensor in tensors.items() if name.endswith("/exp_avg")]
    assert torch.cat(means).norm() == pytest.approx((1 - 0.9) * 0.01, rel=1e-3)  # Adam's mean after one step


def test_dropout_is_on_in_training(inputs, whole_run, tmp_path):
    without = run_main(inputs, tmp_path / "model", "--model.dropout", "0.0", "--checkpointing_steps", STEPS)
    name = "unet/conv_in.weight"
    assert not torch.allclose(checkpoint_tensors(without)[name], checkpoint_tensors(whole_run)[name])


# Exponential moving average


def test_ema_of_a_run_equals_a_hand_written_loop(whole_run):
    """From the weights after each step; the last update is included, and the average is what the folder holds."""
    average = None
    for step in range(1, STEPS + 1):
        weights = load_file(whole_run / "checkpoints" / f"step_{step:08d}" / "unet.safetensors")
        decay = min(0.9999, 1 - (1 + (step - 1)) ** -0.75)
        average = {
            k: decay * average[k] + (1 - decay) * w.double() if average else w.double() for k, w in weights.items()
        }
    for key, tensor in load_file(whole_run / "unet" / "diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(tensor.double(), average[key], rtol=1e-5, atol=1e-6)
    assert_equal(
        load_file(whole_run / "unet" / "diffusion_pytorch_model.safetensors"),
        load_file(whole_run / "checkpoints" / f"step_{STEPS:08d}" / "ema.safetensors"),
    )


def test_ema_decay_is_that_of_diffusers():
    network = nn.Linear(1, 1)
    oracle = diffusers.training_utils.EMAModel(
        network.parameters(), decay=0.99, use_ema_warmup=True, inv_gamma=2.0, power=0.6
    )
    ours = [ema_decay(step, 2.0, 0.6, 0.99) for step in range(1, 5000)]
    assert ours == [oracle.get_decay(step) for step in range(1, 5000)]
    assert ours[0] == 0 and ours[-1] == 0.99


def test_ema_holds_float32_and_leaves_the_network_alone():
    network = nn.Linear(2, 2).bfloat16()
    ema = EMA(network, 1.0, 0.75, 0.9999)
    assert {p.dtype for p in ema.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ema.network.parameters())


def test_without_ema_the_trained_weights_are_saved(inputs, tmp_path):
    folder = run_main(
        inputs, tmp_path / "model", "--use_ema", "false", "--checkpointing_steps", STEPS, "--max_train_steps", "3"
    )
    last = folder / "checkpoints" / "step_00000003"
    assert not (last / "ema.safetensors").exists()
    assert_equal(load_file(folder / "unet/diffusion_pytorch_model.safetensors"), load_file(last / "unet.safetensors"))


# Random draws


def test_timesteps_fill_every_stratum():
    for step in range(50):
        t = stratified_timesteps(0, step, 8, 1000)
        assert t.dtype == torch.long
        assert sorted((t // 125).tolist()) == list(range(8))


def test_timesteps_of_a_row_are_uniform():
    t = torch.stack([stratified_timesteps(3, step, 4, 10) for step in range(4000)])  # [steps, rows]
    assert t.min() == 0 and t.max() == 9
    for row in t.T:
        counts = torch.bincount(row, minlength=10)  # expected 400, standard deviation 19
        assert ((counts - 400).abs() < 5 * 19).all()


def test_timesteps_with_more_rows_than_steps_stay_in_range():
    t = stratified_timesteps(0, 0, 1000, 10)
    assert torch.bincount(t).tolist() == [100] * 10


def test_epochs_visit_each_image_once_in_a_new_order():
    order = [draws.image_index(0, position, NUM_IMAGES) for position in range(3 * NUM_IMAGES)]
    epochs = [order[start : start + NUM_IMAGES] for start in range(0, len(order), NUM_IMAGES)]
    assert all(sorted(epoch) == list(range(NUM_IMAGES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(NUM_IMAGES))
    assert order != [draws.image_index(1, position, NUM_IMAGES) for position in range(3 * NUM_IMAGES)]


@pytest.mark.parametrize(("world_size", "passes"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_global_batch_does_not_depend_on_how_it_is_cut(world_size, passes):
    size = 8 // (world_size * passes)
    for step in range(5):
        rows = [
            position
            for micro_step in range(step * passes, (step + 1) * passes)
            for rank in range(world_size)
            for position in draws.batch_positions(micro_step, rank, world_size, size)
        ]
        assert rows == list(range(8 * step, 8 * (step + 1)))


def test_noise_is_float32_standard_normal_and_per_position():
    torch.set_default_dtype(torch.float64)
    try:
        noise = draws.noise_rows(0, torch.arange(2000), (1, 4, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert torch.equal(noise[5:9], draws.noise_rows(0, torch.arange(5, 9), (1, 4, 4)))
    assert not torch.equal(noise[:4], draws.noise_rows(1, torch.arange(4), (1, 4, 4)))


def test_purposes_draw_independently():
    seeds = {
        draws.derived_seed(*key)
        for key in [(0, "a", 1), (0, "a", 11), (0, "b", 1), (1, "a", 1), (0, "a"), (0, "a", 1, 1)]
    }
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_diffusion_is_float32_under_bf16(inputs, tmp_path, monkeypatch):
    seen = set()
    build = script.build

    def spied_build(config):
        run = build(config)
        original = run.scheduler.add_noise

        def add_noise(x_0, noise, t):
            x_t = original(x_0, noise, t)
            seen.update({x_0.dtype, noise.dtype, x_t.dtype})
            return x_t

        monkeypatch.setattr(run.scheduler, "add_noise", add_noise)
        return run

    monkeypatch.setattr(script, "build", spied_build)
    folder = run_main(inputs, tmp_path / "model", "--mixed_precision", "bf16", "--max_train_steps", "2")
    assert seen == {torch.float32}
    assert json.loads((folder / "results.json").read_text())["mixed_precision"] == "bf16"
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True, "amx_bf16": False}, "no")],
)
def test_auto_precision_asks_the_cpu(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert devices.resolve_precision("auto", torch.device("cpu")) == precision
    assert devices.resolve_precision("no", torch.device("cpu")) == "no"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "1"}, None),  # somebody's choice
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 4),  # the launcher's default
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8"}, 1),
    ],
)
def test_a_launched_cpu_run_takes_all_cores(environment, threads):
    assert devices.threads_per_process(environment, cores=4) == threads


PAGE_FAULTS = """
import resource, sys, torch
from ddpm_from_scratch.runtime.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told")
def test_freed_memory_is_kept_for_the_next_step():
    """The system has to provide the same memory five times, or not at all."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    faults = {
        kind: int(
            subprocess.run(
                [sys.executable, "-c", PAGE_FAULTS, kind], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
        for kind in ("keep", "give back")
    }
    assert faults["give back"] > 100  # where the system gives 2 MiB at a time; else 512 times as many
    assert faults["keep"] < faults["give back"] / 4


def test_fp16_needs_a_gpu():
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        devices.resolve_precision("fp16", torch.device("cpu"))


# Data


def load(**options):
    config = TrainingConfig(**options)
    return data.load_data(config, None, config.resolution)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L"], 1), (["RGB"], 3), (["L", "RGB"], 3), (["1", "L"], 1), (["LA", "L"], 1), (["P"], 3), (["RGBA", "L"], 3)],
)
def test_channels_follow_from_the_images(tmp_path, modes, channels):
    path = write_parquet(tmp_path / "set.parquet", [picture(mode) for mode in modes])
    loaded = load(dataset_name=str(path))
    assert (loaded.channels, loaded.resolution) == (channels, SIZE)
    assert isinstance(loaded.images, torch.Tensor) and loaded.images.dtype == torch.uint8
    assert loaded.images.shape == (len(modes), channels, SIZE, SIZE)


def test_pixels_arrive_unchanged(tmp_path):
    images = [picture("RGB", seed=seed) for seed in range(3)]
    loaded = load(dataset_name=str(write_parquet(tmp_path / "set.parquet", images)))
    for decoded, image in zip(loaded.images, images, strict=True):
        assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.asarray(image))
    edges = train.to_unit_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert edges.tolist() == [-1, 1] and edges.dtype == torch.float32


def test_a_grayscale_set_serves_a_network_with_three_channels(tmp_path):
    path = str(write_parquet(tmp_path / "set.parquet", [picture("L")]))
    assert data.load_data(TrainingConfig(dataset_name=path), 3, None).images.shape == (1, 3, SIZE, SIZE)
    colour = str(write_parquet(tmp_path / "colour.parquet", [picture("RGB")]))
    with pytest.raises(ValueError, match="network takes 1 channel"):
        data.load_data(TrainingConfig(dataset_name=colour), 1, None)


def test_embedded_data():
    loaded = load()
    assert loaded.images.shape == (10_000, 1, 28, 28) and loaded.images.float().mean() == pytest.approx(73, abs=3)
    test = pyarrow.parquet.read_table(EMBEDDED_TEST_SET)
    assert test.num_rows == 2000 and test.column_names == ["image", "label"]
    assert (EMBEDDED_DATA.parent / "LICENSE.fashion-mnist").is_file()


def test_image_folder_and_saved_dataset(tmp_path):
    folder = tmp_path / "pictures" / "shoes"
    folder.mkdir(parents=True)
    for seed in range(3):
        picture("RGB", seed=seed).save(folder / f"{seed}.png")
    from_folder = load(train_data_dir=str(tmp_path / "pictures"), cache_dir=str(tmp_path / "cache"))
    assert from_folder.images.shape == (3, 3, SIZE, SIZE)
    rows = datasets.Dataset.from_dict(
        {"n": [0, 1], "photo": [picture("L", seed=s) for s in range(2)]},
        features=datasets.Features({"n": datasets.Value("int64"), "photo": datasets.Image()}),
    )
    rows.save_to_disk(tmp_path / "saved")
    assert load(dataset_name=str(tmp_path / "saved")).images.shape == (2, 1, SIZE, SIZE)


def test_images_are_resized_and_cropped(tmp_path):
    path = str(write_parquet(tmp_path / "set.parquet", [picture("RGB", (40, 20)), picture("RGB", (16, 16))]))
    loaded = load(dataset_name=path, resolution=16)
    assert [tuple(image.shape) for image in loaded.images] == [(3, 16, 32), (3, 16, 16)]
    wide = loaded.images[0]
    centre = data.ImageStream(loaded, 0, center_crop=True, random_flip=False)
    crops = [centre[position] for position in range(40)]
    assert all(any(torch.equal(crop, whole) for whole in (wide[:, :, 8:24], loaded.images[1])) for crop in crops)
    moving = data.ImageStream(loaded, 0, center_crop=False, random_flip=False)
    assert (
        len({moving[position].sum().item() for position in range(200)}) == 18
    )  # 17 places in one image, 1 in the other


def test_photographs_are_turned_upright(tmp_path):
    image, buffer = picture("RGB"), io.BytesIO()
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    image.save(buffer, format="PNG", exif=exif)
    loaded = load(dataset_name=str(write_parquet(tmp_path / "set.parquet", [buffer.getvalue()])))
    assert np.array_equal(loaded.images[0].permute(1, 2, 0).numpy(), np.rot90(np.asarray(image), -1))


def test_half_of_the_images_are_flipped(tmp_path):
    loaded = load(dataset_name=str(write_parquet(tmp_path / "set.parquet", [picture()])))
    stream = data.ImageStream(loaded, 0, center_crop=False, random_flip=True)
    original = loaded.images[0]
    flipped = [torch.equal(stream[position], original.flip(2)) for position in range(400)]
    assert 160 < sum(flipped) < 240
    assert all(flip or torch.equal(stream[position], original) for position, flip in enumerate(flipped))


def test_large_sets_are_decoded_on_demand_with_equal_results(inputs, monkeypatch):
    kept = load(dataset_name=inputs.parquet)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    lazy = load(dataset_name=inputs.parquet)
    assert isinstance(lazy.images, data.DecodedOnDemand) and lazy.fingerprint == kept.fingerprint
    batches = [data.StreamBatches(range(3, 9), rank=0, world_size=1, batch_size=BATCH)] * 2
    streams = [data.ImageStream(loaded, 0, center_crop=False, random_flip=True) for loaded in (kept, lazy)]
    loaders = [data.build_loader(s, b, workers, False) for s, b, workers in zip(streams, batches, (0, 2), strict=True)]
    pairs = list(zip(*loaders, strict=True))
    assert len(pairs) == 6 and all(torch.equal(one.images, other.images) for one, other in pairs)


def test_a_large_parquet_file_is_read_from_the_disk(inputs, tmp_path, monkeypatch):
    config = TrainingConfig(dataset_name=inputs.parquet, cache_dir=str(tmp_path), class_conditional=True)
    whole = data.load_data(config, None, None)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(sources, "READ_WHOLE_BYTES", 0)
    loaded = data.load_data(config, None, None)
    files = loaded.images.rows.cache_files
    assert files and all(str(tmp_path) in file["filename"] for file in files)
    assert loaded.fingerprint == whole.fingerprint and torch.equal(loaded.labels.of_images, whole.labels.of_images)
    assert all(torch.equal(loaded.images[index], whole.images[index]) for index in range(NUM_IMAGES))


def test_broken_images_are_named(tmp_path):
    whole = encode(picture(size=(64, 64)))
    for broken in (b"no image at all", whole[: len(whole) // 2]):
        path = write_parquet(tmp_path / "set.parquet", [picture(size=(64, 64)), broken])
        with pytest.raises(ValueError, match="image 1 cannot be read"):
            load(dataset_name=str(path))
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture().save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png\) cannot be read"):
        load(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))


def test_sets_that_cannot_be_trained_on(tmp_path):
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"price": [1.0], "name": ["shoe"]}), table)
    with pytest.raises(ValueError, match="no column of the data set holds images; its columns: price, name"):
        load(dataset_name=str(table))
    mixed = write_parquet(tmp_path / "mixed.parquet", [picture(size=(8, 8)), picture(size=(16, 12))])
    with pytest.raises(ValueError, match=r"from 8x8 to 12x16 pixels large \(height x width\).*--resolution"):
        load(dataset_name=str(mixed))
    deep = [Image.fromarray(np.full((8, 8), 40_000, np.uint16)), picture()]
    with pytest.raises(ValueError, match="image 0 is uint16 of 1 channels, and image 1 is an 8-bit picture"):
        load(dataset_name=str(write_parquet(tmp_path / "deep.parquet", deep)))
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), empty)
    with pytest.raises(ValueError, match="holds no images"):
        load(dataset_name=str(empty))


# Configuration

WRONG_CALLS = [
    (("--learning_rat", "1e-3"), "did you mean 'learning_rate'"),
    (("--max_tr", "7"), "nrecognized arguments: --max_tr"),  # no abbreviations
    (("--learning_rate", "fast"), "fast"),
    (("--learning_rate", "-1"), "learning_rate must be above 0 and finite, got -1"),
    (("--learning_rate", "nan"), "learning_rate"),
    (("--train_batch_size", "0"), "train_batch_size must be at least 1, got 0"),
    (("--train_batch_size", "2.5"), "2.5"),
    (("--max_train_steps", "-3"), "max_train_steps must be at least 1"),
    (("--num_epochs", "0"), "num_epochs"),
    (("--gradient_accumulation_steps", "0"), "gradient_accumulation_steps"),
    (("--eval_batch_size", "0"), "eval_batch_size"),
    (("--dataloader_num_workers", "-1"), "dataloader_num_workers"),
    (("--lr_warmup_steps", "-1"), "lr_warmup_steps"),
    (("--lr_scheduler", "cosin"), "did you mean 'cosine'"),
    (("--prediction_type", "epsilom"), "epsilon, sample, v_prediction, got 'epsilom'; did you mean 'epsilon'"),
    (("--ddpm_beta_schedule", "squaredcos"), "did you mean 'squaredcos_cap_v2'"),
    (("--ddpm_variance_type", "fixed_larg"), "did you mean 'fixed_large'"),
    (("--ddpm_variance_type", "learned_range"), "cannot be trained with the loss 'simple'"),
    (("--ddpm_timestep_spacing", "trailling"), "did you mean 'trailing'"),
    (("--sample_scheduler", "dpm"), "did you mean 'ddpm'"),
    (("--logger", "tensorbord"), "did you mean 'tensorboard'"),
    (("--logger", "clearml"), "not installed"),
    (("--logging_dir", "../logs"), "inside output_dir"),
    (("--mixed_precision", "bf61"), "did you mean 'bf16'"),
    (("--mixed_precision", "fp16"), "needs a CUDA device"),
    (("--rescale_betas_zero_snr", "true"), "needs prediction_type"),
    (("--ddpm_beta_start", "0.5"), "ddpm_beta_start <= ddpm_beta_end"),
    (("--ddpm_num_steps", "1"), "ddpm_num_steps"),
    (("--ddpm_num_inference_steps", "2000"), "exceeds ddpm_num_steps"),
    (("--ema_power", "0"), "ema_power"),
    (("--ema_max_decay", "1"), "ema_max_decay must be in"),
    (("--adam_beta1", "1.5"), "adam_beta1"),
    (("--max_grad_norm", "0"), "max_grad_norm"),
    (("--resolution", "9"), "must be a multiple of 2"),
    (("--resolution", "0"), "resolution must be at least 1"),
    (("--resolution", "16", "--model.sample_size", "8"), "leave one of them out"),
    (("--model.sample_size", "[8, 9]"), "must be a multiple of 2"),
    (("--model.sample_size", "[8, 8, 8]"), "must be a side, or [height, width], got [8, 8, 8]"),
    (("--resolution", "8 x 16"), "a side such as 64, or height x width such as 64x128, got '8 x 16'"),
    (("--resolution", "8x9"), "resolution 8x9 does not allow"),
    (("--model.block_out_chanels", "[8, 8]"), "did you mean 'block_out_channels'"),
    (("--model.block_out_channels", "8"), "must be a list"),
    (("--model.num_class_embeds", "10"), "class-conditional"),
    (("--model.out_channels", "2", "--model.in_channels", "1"), "a learned variance takes twice"),
    (("--model.in_channels", "2"), "2 channels"),
    (("--model_size", "small"), "--model null leaves out a preset's"),
    (("--model", "null", "--model_size", "tiny"), "one of small, base, large"),
    (("--max_train_minutes", "0"), "max_train_minutes must be above 0"),
    (("--num_epochs", "3", "--max_train_minutes", "2"), "give one of them"),
    (("--dataset_name", "no/such/set.parquet"), "no file or folder"),
    (("--train_data_dir", "."), "both name the training data"),
    (("--dataset_name", "null", "--train_data_dir", "no_such_folder"), "no folder no_such_folder"),
    (("--dataset_name", "null", "--dataset_config_name", "small"), "needs dataset_name"),
    (("--dataset_revision", "main"), "dataset_revision is of a dataset on the Hub"),
    (("--dataset_name", "null", "--dataset_revision", "main"), "dataset_revision is of a dataset on the Hub"),
    (("--model_revision", "main"), "model_revision is of a model on the Hub"),
    (("--model_config_name_or_path", "no/such/model/folder"), "no file or folder"),
    (("--model_config_name_or_path", "some/model", "--model.dropout", "0.2"), "give one"),
    (("--resume_from_checkpoint", "no_such_checkpoint"), "no folder no_such_checkpoint"),
    (("--resume_from_checkpoint", str(TRAINING)), "is no checkpoint"),
    (("--checkpoints_total_limit", "0"), "checkpoints_total_limit"),
    (("--push_to_hub", "--hub_model_id", "a/b/c", "--hub_token", TOKEN), "Repo id"),
    (("extra.yaml",), "a preset is the first argument"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG_CALLS, ids=[" ".join(flags)[:60] for flags, _ in WRONG_CALLS])
def test_wrong_calls_say_what_is_wrong_and_write_nothing(inputs, tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as raised:
        run_main(inputs, "model", *flags)
    if raised.type is SystemExit:
        assert raised.value.code == 2
        explanation = capfd.readouterr().err
    else:
        explanation = str(raised.value)
    assert message in explanation
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1.0e-3", "did you mean 'learning_rate'"),
        ("lr_scheduler: cosin", "did you mean 'cosine'"),
        ("train_batch_size: many", "many"),
        ("[1, 2", "preset"),
        ("model: {block_out_chanels: [8]}", "did you mean 'block_out_channels'"),
    ],
)
def test_wrong_presets(tmp_path, capsys, text, message):
    preset = tmp_path / "wrong.yaml"
    preset.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        cli.parse([str(preset)])
    assert message in capsys.readouterr().err


def test_missing_preset_names_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse(["presets/cifar.yaml"])
    assert "did you mean 'cifar10'" in capsys.readouterr().err


def test_push_without_a_token_fails_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(training_config, "get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a token"):
        TrainingConfig(model={}, push_to_hub=True, output_dir=str(tmp_path / "model")).validate()


def test_flags_override_the_preset_and_booleans_need_no_value(inputs):
    config, dry = cli.parse(
        [inputs.preset, "--learning_rate", "2e-4", "--center_crop", "--use_ema", "false", "--dry_run"]
    )
    assert dry and config.learning_rate == 2e-4 and config.center_crop and not config.use_ema
    assert config.train_batch_size == BATCH and config.model["block_out_channels"] == [8, 8]
    assert cli.parse([])[0].ddpm_beta_schedule == "squaredcos_cap_v2"  # the default preset


def test_printed_config_is_a_preset_that_gives_itself(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.parse([inputs.preset, "--learning_rate", "3e-4", "--hub_token", TOKEN, "--print_config"])
    printed = capsys.readouterr().out
    assert TOKEN not in printed
    preset = tmp_path / "printed.yaml"
    preset.write_text(printed)
    direct, _ = cli.parse([inputs.preset, "--learning_rate", "3e-4"])
    assert cli.parse([str(preset)])[0] == direct


NEW_NETWORKS = sorted(path for path in PRESETS.glob("*.yaml") if path.stem != "fashion_mnist_few_steps")


def test_the_preset_for_few_steps_fits_the_shipped_model():
    model = ROOT / "models" / "ddpm-fashion-mnist"
    config, _ = cli.parse(["fashion_mnist_few_steps", "--model_config_name_or_path", str(model)])
    trained = networks.load_trained(config)
    scheduler = networks.build_scheduler(config, trained.scheduler)
    assert (scheduler.config.eta, scheduler.config.beta_schedule) == (math.inf, "squaredcos_cap_v2")
    assert networks.build_objective(networks.with_process_of(scheduler, config), scheduler).q == (16, 64)


@pytest.mark.parametrize("preset", NEW_NETWORKS, ids=lambda path: path.stem)
def test_presets_are_valid_and_build(preset, capsys):
    config, _ = cli.parse([str(preset)])
    resolution, channels = (32, 3) if preset.stem == "cifar10" else (28, 1)
    images = SimpleNamespace(channels=channels, size=(resolution, resolution), labels=None, images=range(10_000))
    with torch.device("meta"):
        unet = networks.build_unet(networks.network_config(config), config, images)
    assert networks.build_scheduler(config).config.prediction_type == config.prediction_type
    if preset.stem == "cifar10":
        assert unet.num_parameters() == 35_746_307  # that of google/ddpm-cifar10-32


def test_every_field_has_a_help_text(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.parse(["--help"])
    text = capsys.readouterr().out
    for field in TrainingConfig.__dataclass_fields__:
        assert f"--{field}" in text


# A whole run


def test_model_folder(whole_run):
    names = {str(path.relative_to(whole_run)) for path in whole_run.rglob("*") if path.is_file()}
    assert {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "samples.png",
        "samples/step_5.png",
        "samples/step_10.png",
        "loss.png",
        "results.json",
        "training_config.yaml",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]  # no pickles
    with Image.open(whole_run / "samples.png") as grid:
        assert grid.size == (2 * 2 * SIZE, 2 * 2 * SIZE) and grid.mode == "L"
    results = json.loads((whole_run / "results.json").read_text())
    assert results["steps"] == STEPS and results["images_seen"] == STEPS * BATCH and results["seed"] == 0
    assert results["dataset"]["num_images"] == NUM_IMAGES and np.isfinite(results["final_loss"])
    assert torch.__version__.startswith(results["versions"]["torch"])
    pipeline = ScratchDDPMPipeline.from_pretrained(whole_run)
    assert pipeline.unet.config.sample_size == SIZE and pipeline.unet.config.in_channels == 1
    assert results["num_parameters"] == pipeline.unet.num_parameters()


def test_saved_configuration_repeats_the_run(inputs, whole_run, tmp_path):
    again = script.main([str(whole_run / "training_config.yaml"), "--output_dir", str(tmp_path / "again")])
    name = "unet/diffusion_pytorch_model.safetensors"
    assert_equal(load_file(again / name), load_file(whole_run / name))


@pytest.mark.full
def test_accelerate_launch_prints_the_folder_last(inputs, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(TRAINING / "train.py"), inputs.preset]
    flags = ["--output_dir", "model", "--max_train_steps", "2", "--logger", "tensorboard", "--hub_token", TOKEN]
    done = run_process([*command, *flags], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "model"
    assert "images/s" in done.stderr and "lr" in done.stderr
    assert list((tmp_path / "model" / "logs").rglob("events.out.tfevents*"))
    assert not (tmp_path / "model" / "checkpoints").exists()
    for path in (tmp_path / "model").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in done.stdout + done.stderr


def test_dry_run_leaves_nothing(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(inputs, "model", "--dry_run", "--hub_token", TOKEN) is None
    text = capsys.readouterr().out
    for fact in (
        "learning_rate: 0.001",
        f"training images: {NUM_IMAGES}",
        "parameters:",
        "time for training:",
        "peak memory:",
        "precision: no",
    ):
        assert fact in text
    assert TOKEN not in text
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_does_not_overwrite_checkpoints(inputs, whole_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main(inputs, whole_run, "--resume_from_checkpoint", "null")
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err


def test_number_of_checkpoints_is_limited(inputs, tmp_path):
    folder = run_main(
        inputs,
        tmp_path / "model",
        "--checkpointing_steps",
        "2",
        "--checkpoints_total_limit",
        "2",
        "--max_train_steps",
        "7",
    )
    assert sorted(os.listdir(folder / "checkpoints")) == ["step_00000006", "step_00000007"]


def test_gradient_checkpointing_changes_nothing(inputs, tmp_path):
    flags = ("--max_train_steps", "3", "--model.dropout", "0.0")
    name = "unet/diffusion_pytorch_model.safetensors"
    plain, saving = (
        run_main(inputs, tmp_path / str(on), *flags, "--gradient_checkpointing", on) for on in ("false", "true")
    )
    for key, tensor in load_file(plain / name).items():
        torch.testing.assert_close(tensor, load_file(saving / name)[key])


def test_a_config_file_describes_a_new_network(inputs, whole_run, tmp_path):
    config, _ = cli.parse([inputs.preset, "--model_config_name_or_path", str(whole_run / "unet" / "config.json")])
    images = SimpleNamespace(channels=1, size=(SIZE, SIZE), labels=None, images=range(10_000))
    unet = networks.build_unet(networks.network_config(config), config, images)
    trained = ScratchUNet2DModel.from_pretrained(whole_run / "unet")
    assert unet.num_parameters() == trained.num_parameters()
    assert networks.load_trained(config) is None


# Report


def test_grids_enlarge_tiny_images_only():
    assert image_grid([picture(size=(8, 8))] * 5).size == (3 * 16, 2 * 16)
    assert image_grid([picture(size=(64, 64))] * 4).size == (128, 128)


def test_smoothing_starts_at_the_first_value():
    assert smoothed([3.0, 3.0, 3.0], 10) == pytest.approx([3.0] * 3)
    assert final_loss([(step, float(step > 90)) for step in range(1, 101)]) == 1.0
