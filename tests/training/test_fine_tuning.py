"""Fine-tuning: a model keeps its process, its sampler and what it draws, unless a flag says otherwise."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.training import arguments
from helpers.runs import SIZE, assert_equal, picture, run_main

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STILL = ("--learning_rate", "1e-30", "--max_train_steps", "1")


def stock_model(folder, **scheduler):
    """A model as diffusers saves it, with betas and a sampler of its own."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    DDPMPipeline(unet, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def scheduler_of(folder):
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def tune(inputs, output, model, *flags):
    return run_main(inputs, output, "--model_config_name_or_path", model, *STILL, *flags)


def test_it_starts_from_the_trained_weights(inputs, whole_run, tmp_path):
    tuned = tune(inputs, tmp_path / "tuned", whole_run)
    assert_equal(load_file(tuned / WEIGHTS), load_file(whole_run / WEIGHTS))
    only_unet = tune(inputs, tmp_path / "only_unet", whole_run / "unet")
    assert_equal(load_file(only_unet / WEIGHTS), load_file(whole_run / WEIGHTS))


OWN_SCHEDULERS = {
    "sampler": {"variance_type": "fixed_small", "clip_sample": False, "timestep_spacing": "trailing"},
    "schedule": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "length": {"num_train_timesteps": 200, "beta_end": 0.1},
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "betas": {"trained_betas": (np.linspace(0.01, 0.1414, 50) ** 2).tolist(), "num_train_timesteps": 50},
    "thresholding": {"thresholding": True, "sample_max_value": 1.5},
}


@pytest.mark.parametrize("own", OWN_SCHEDULERS.values(), ids=OWN_SCHEDULERS)
def test_the_whole_scheduler_stays(inputs, tmp_path, own):
    model = stock_model(tmp_path / "model", **own)
    tuned = tune(inputs, tmp_path / "tuned", model, "--checkpointing_steps", "1")
    before, after = scheduler_of(model), scheduler_of(tuned)
    same = set(before) - {"_class_name", "_diffusers_version"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    exported = ScratchDDPMPipeline.from_pretrained(tuned).scheduler
    torch.testing.assert_close(exported.alphas_cumprod, DDPMScheduler(**own).alphas_cumprod, rtol=1e-4, atol=1e-6)
    again = tune(inputs, tmp_path / "again", tuned / "checkpoints" / "step_00000001")
    assert scheduler_of(again) == after
    torch.testing.assert_close(load_file(again / WEIGHTS), load_file(tuned / WEIGHTS), rtol=0, atol=1e-20)


def test_a_flag_changes_the_sampler_but_not_the_process(inputs, tmp_path):
    model = stock_model(tmp_path / "model", variance_type="fixed_small")
    tuned = tune(inputs, tmp_path / "tuned", model, "--ddpm_variance_type", "fixed_large")
    assert scheduler_of(tuned)["variance_type"] == "fixed_large"
    for flags in (("--prediction_type", "sample"), ("--ddpm_num_steps", "500"), ("--ddpm_beta_end", "0.1")):
        with pytest.raises(ValueError, match=f"which it keeps if nothing is said: leave out {flags[0]} "):
            tune(inputs, tmp_path / "refused", model, *flags)
    assert not (tmp_path / "refused").exists()


def test_a_preset_that_names_the_model_counts_as_flags(inputs, tmp_path):
    model = stock_model(tmp_path / "model", variance_type="fixed_small")
    preset = tmp_path / "tune.yaml"
    preset.write_text(f"model_config_name_or_path: {model}\nddpm_variance_type: fixed_large\n")
    config, _ = arguments.parse([str(preset)])
    assert config.ddpm_variance_type == "fixed_large" and config.ddpm_beta_schedule is None
    other = tmp_path / "other.yaml"
    other.write_text("ddpm_variance_type: fixed_large\n")
    config, _ = arguments.parse([str(other), "--model_config_name_or_path", str(model)])
    assert config.ddpm_variance_type is None


def test_the_steps_of_the_grids_must_fit_the_chain_of_the_model(inputs, tmp_path):
    model = stock_model(tmp_path / "model", num_train_timesteps=20)
    with pytest.raises(ValueError, match=r"ddpm_num_inference_steps \(30\) exceeds ddpm_num_steps \(20\)"):
        tune(inputs, tmp_path / "tuned", model, "--ddpm_num_inference_steps", "30")


def test_pickled_weights_come_with_a_command_that_converts_them(inputs, tmp_path):
    model = stock_model(tmp_path / "model")
    weights = model / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"use_safetensors=False\)\.save_pretrained\('converted'\)"):
        tune(inputs, tmp_path / "tuned", model)
    ScratchDDPMPipeline.from_pretrained(model, use_safetensors=False).save_pretrained(tmp_path / "converted")
    assert (tune(inputs, tmp_path / "tuned", tmp_path / "converted") / "model_index.json").is_file()


def labelled(folder):
    for number in range(12):
        path = folder / ("boot", "coat", "shoe")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(path)
    return folder


def test_an_unconditional_model_gets_classes_that_change_nothing_at_first(inputs, tmp_path):
    model, data = stock_model(tmp_path / "model"), labelled(tmp_path / "data")
    classes = ("--dataset_name", "null", "--train_data_dir", data, "--class_conditional")
    tuned = ScratchDDPMPipeline.from_pretrained(tune(inputs, tmp_path / "tuned", model, *classes))
    assert list(tuned.config.id2label.values()) == ["boot", "coat", "shoe"]
    base = DDPMPipeline.from_pretrained(model)
    x, t = torch.randn(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 300, 700, 999])
    with torch.no_grad():
        for y in range(4):  # three classes and none
            out = tuned.unet(x, t, class_labels=torch.full((4,), y)).sample
            torch.testing.assert_close(out, base.unet(x, t).sample)
    learned = run_main(
        inputs, tmp_path / "learned", "--model_config_name_or_path", model, "--learning_rate", "1e-2", *classes
    )
    rows = load_file(learned / WEIGHTS)["class_embedding.weight"]
    assert (rows != 0).any(1).all()  # also that of no class


def test_a_checkpoint_is_a_model_to_start_from(inputs, whole_run, tmp_path):
    checkpoint = whole_run / "checkpoints" / "step_00000010"
    tuned = tune(inputs, tmp_path / "tuned", checkpoint)
    assert_equal(load_file(tuned / WEIGHTS), load_file(whole_run / WEIGHTS))
    broken = tmp_path / "step_00000010"
    shutil.copytree(checkpoint, broken)
    (broken / "ema.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        tune(inputs, tmp_path / "refused", broken)


def test_betas_of_a_models_own_are_part_of_the_run(inputs, tmp_path):
    betas = np.linspace(1e-3, 0.2, 50).tolist()
    model = stock_model(tmp_path / "model", trained_betas=betas, num_train_timesteps=50)
    flags = ("--checkpointing_steps", "1")
    tune(inputs, tmp_path / "tuned", model, *flags)
    other = stock_model(tmp_path / "other", trained_betas=betas[::-1], num_train_timesteps=50)
    with pytest.raises(ValueError, match="another run"):
        tune(inputs, tmp_path / "tuned", other, *flags)
    assert isinstance(ScratchDDPMPipeline.from_pretrained(tmp_path / "tuned").scheduler, ScratchDDPMScheduler)


def test_a_calibration_is_that_of_the_network_as_it_was(inputs, tmp_path, caplog):
    calibrated = {"x_0_mse": [[0, 0.01], [500, 0.1], [999, 0.9]], "optimal_variance": True}
    pipeline = ScratchDDPMPipeline.from_pretrained(stock_model(tmp_path / "stock"))
    scheduler = ScratchDDPMScheduler.from_config(pipeline.scheduler.config, **calibrated)
    ScratchDDPMPipeline(pipeline.unet, scheduler).save_pretrained(tmp_path / "model")
    assert "_x_0_mse" in scheduler_of(tmp_path / "model")
    tuned = tune(inputs, tmp_path / "tuned", tmp_path / "model")
    assert not {"_x_0_mse", "x_0_mse", "optimal_variance"} & set(scheduler_of(tuned))
    assert "run `ddpm calibrate`" in caplog.text
