"""The command that calibrates a saved model."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.evaluation.calibrate import main
from ddpm_from_scratch.evaluation.calibration import x_0_mse
from helpers.networks import TINY_NETWORK, randomised

SIZES = ["--num_images", "6", "--num_timesteps", "5", "--batch_size", "4"]


@pytest.fixture
def model(tmp_path):
    unet = randomised(UNet2DModel(**{**TINY_NETWORK, "sample_size": 28}))
    ScratchDDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_writes_the_moments_and_nothing_else(model, capsys):
    before = contents(model)
    main([str(model), *SIZES])
    after = contents(model)
    name = next(path for path in before if path.name == "scheduler_config.json")
    assert {path for path in after if after[path] != before.get(path)} == {name}
    old, new = json.loads(before[name]), json.loads(after[name])
    moments = new.pop("_x_0_mse")
    assert new == old
    assert moments[0][0] == 0
    assert len(moments) == 5
    assert ScratchDDPMPipeline.from_pretrained(model).scheduler.config.x_0_mse == moments
    assert capsys.readouterr().out.strip() == str(model)


@pytest.mark.full
def test_the_moments_are_those_of_the_training_images(model):
    from ddpm_from_scratch.data import dataset as data
    from ddpm_from_scratch.training.config import TrainingConfig

    main([str(model), *SIZES])
    pipeline = ScratchDDPMPipeline.from_pretrained(model)
    images = data.load_data(TrainingConfig(), 1, 28).images
    chosen = torch.stack([images[i] for i in (0, 1666, 3333, 5000, 6666, 8333)]).float() / 127.5 - 1
    scheduler = ScratchDDPMScheduler.from_config(pipeline.scheduler.config, x_0_mse=None)
    options = {"num_timesteps": 5, "batch_size": 4, "progress": False}
    expected = x_0_mse(pipeline.unet, scheduler, chosen, **options)
    assert pipeline.scheduler.config.x_0_mse == [list(pair) for pair in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_images", "0"], "--num_images 0: it must be at least 1"),
        (["--num_images", "10001"], "from 1 to 10000"),
        (["--num_timesteps", "1"], "--num_timesteps 1: it must be at least 2"),
        (["--dataset_name", "none.parquet"], "none.parquet"),
        (["--value_range", "5", "4"], "value_range must be two finite numbers, the lower one first"),
    ],
)
def test_wrong_calls_leave_the_folder_as_it_was(model, options, message):
    before = contents(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main([str(model), *SIZES, *options])
    assert contents(model) == before


def test_folders_that_cannot_be_calibrated(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json: pass the folder of a saved pipeline"):
        main([str(tmp_path)])
    pipeline = ScratchDDPMPipeline.from_pretrained(model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "ddim")
    with pytest.raises(ValueError, match="has a DDIMScheduler, which has no variance to calibrate"):
        main([str(tmp_path / "ddim"), *SIZES])
