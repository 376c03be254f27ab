"""The network that suits the data, and the preset of own images."""

import pytest
import torch

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.training import arguments
from ddpm_from_scratch.training.model import rate_for
from ddpm_from_scratch.training.network import SIZES, suited_network
from helpers.runs import picture, run_main

LEVELS = {  # height x width of the images: pixels of the shorter side at the lowest level, levels, levels that attend
    (16, 16): (8, 2, 2),
    (28, 28): (7, 3, 2),
    (32, 32): (8, 3, 2),
    (48, 48): (6, 4, 2),
    (64, 64): (8, 4, 2),
    (96, 96): (6, 5, 2),
    (128, 128): (8, 5, 2),
    (256, 256): (8, 6, 2),
    (64, 128): (8, 4, 1),
    (128, 64): (8, 4, 1),
    (7, 7): (7, 1, 1),
    (36, 36): (9, 3, 1),  # 9 is odd
    (1024, 1024): (16, 7, 1),
}


@pytest.mark.parametrize("model_size", SIZES)
@pytest.mark.parametrize("size", LEVELS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_levels_and_attention_follow_from_the_size(size, model_size):
    lowest, levels, attending = LEVELS[size]
    keys = suited_network(size, 100_000, model_size)
    assert len(keys["block_out_channels"]) == levels and min(size) // 2 ** (levels - 1) == lowest
    assert keys["down_block_types"].count("AttnDownBlock2D") == attending
    assert keys["up_block_types"] == [kind.replace("Down", "Up") for kind in reversed(keys["down_block_types"])]
    with torch.device("meta"):
        unet = ScratchUNet2DModel(sample_size=size, in_channels=3, out_channels=3, **keys)
        assert unet(torch.zeros(1, 3, *size), torch.zeros(1)).sample.shape == (1, 3, *size)


def test_larger_words_are_larger_networks():
    def parameters(model_size):
        with torch.device("meta"):
            return ScratchUNet2DModel(sample_size=32, **suited_network((32, 32), 50_000, model_size)).num_parameters()

    small, base, large = map(parameters, SIZES)
    assert 2e6 < small < 5e6 < 5 * small < base < 20e6 < 3 * base < large < 70e6


@pytest.mark.parametrize(("count", "dropout"), [(12, 0.2), (1999, 0.2), (2000, 0.1), (9999, 0.1), (10_000, 0.0)])
def test_dropout_by_the_number_of_images(count, dropout):
    assert suited_network((32, 32), count, "small")["dropout"] == dropout


@pytest.mark.parametrize(
    ("size", "advice"), [((33, 33), "32,"), ((50, 50), "48,"), ((90, 130), "88x128,"), ((250, 250), "256,")]
)
def test_sizes_that_cannot_be_halved_are_refused_with_the_nearest(size, advice):
    with pytest.raises(ValueError, match=f"--resolution {advice}"):
        suited_network(size, 100, "small")
    suited_network(tuple(map(int, (advice.strip(",").split("x") * 2)[:2])), 100, "small")


def test_photographs_of_a_camera_are_refused_with_a_size_that_can_be_trained():
    with pytest.raises(ValueError, match="--resolution 64 or 128"):
        suited_network((3000, 4000), 100, "small")


def test_the_learning_rate_is_that_of_the_nearest_width():
    assert [rate_for(width) for width in (8, 32, 64, 96, 128, 224)] == [1e-3, 1e-3, 4e-4, 4e-4, 2e-4, 2e-4]


OWN = ("--max_train_steps", "2", "--eval_batch_size", "2", "--ddpm_num_inference_steps", "2", "--logger", "none")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(12):
        picture("RGB", (20, 16), seed=number).save(path / f"{number}.png")
    return path


def test_a_folder_is_all_there_is_to_say(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = arguments.parse([str(folder), "--resolution", "16"])
    assert config.dataset_name == str(folder) and config.max_train_minutes == 20 and config.model is None
    model = ScratchUNet2DModel.from_pretrained(train(folder, "--resolution", "16") / "unet")
    assert model.config.block_out_channels == [32, 64] and model.config.dropout == 0.2
    changed = train(folder, "--resolution", "16", "--model.dropout", "0.5", "--output_dir", "other")
    changed = ScratchUNet2DModel.from_pretrained(changed / "unet").config
    assert changed.dropout == 0.5 and changed.block_out_channels == [32, 64]
    assert (tmp_path / "outputs" / "own-images" / "data.png").is_file()


def train(folder, *flags):
    class Inputs:
        preset = str(folder)

    output = ("--output_dir", "outputs/own-images") if "--output_dir" not in flags else ()
    return run_main(Inputs, "outputs/unused", *OWN, *flags, *output)


def test_the_preset_and_the_data_may_both_be_named(folder):
    config, _ = arguments.parse(["cifar10", str(folder)])
    assert config.dataset_name == str(folder) and config.train_batch_size == 128
    config, _ = arguments.parse(["uoft-cs/cifar10"])  # a data set of the Hub, and no preset
    assert config.dataset_name == "uoft-cs/cifar10" and config.max_train_minutes == 20
    config, _ = arguments.parse(["--train_data_dir", str(folder)])
    assert config.model is None and config.max_train_minutes == 20
    config, _ = arguments.parse([str(folder), "--preset", "cifar10"])
    assert config.dataset_name == str(folder) and config.train_batch_size == 128
    config, _ = arguments.parse([])
    assert config.model["block_out_channels"] == [32, 64, 128] and config.max_train_minutes == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset_name", "x.parquet"), "both name the data"),
        (("--train_data_dir", "x"), "both name the data"),
        (("cifar10",), "both name the data: give one (ddpm train [preset] [data] ...)"),
        (("--model_size", "bas"), "did you mean 'base'"),
        (("--model_size", "base", "--model.block_out_channels", "[8]"), "leave one of them out"),
    ],
)
def test_what_contradicts_itself_is_refused(folder, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        arguments.parse([str(folder), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("my-phots",),
            "Nor is it a file or folder of images; a Hub data set without an owner is named by --dataset_name",
        ),
        (("cifar10", "--preset", "fashion_mnist"), "cifar10 and --preset both name the preset"),
        (("cifar10", "fashion_mnist"), "cifar10 and fashion_mnist both name the preset"),
        (("no/such/*.parquet",), "no file or folder no/such/*.parquet"),
    ],
)
def test_names_of_nothing_and_of_two_presets_are_refused(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        arguments.parse(words)
    assert message in capsys.readouterr().err


def test_a_preset_wins_over_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert arguments.parse(["cifar10"])[0].train_batch_size == 128
    assert arguments.parse(["./cifar10"])[0].dataset_name == "./cifar10"


def test_switches_need_no_value():
    config, _ = arguments.parse(["--ddpm_clip_sample", "--prediction_type", "v_prediction", "--rescale_betas_zero_snr"])
    assert config.ddpm_clip_sample is True and config.rescale_betas_zero_snr is True
