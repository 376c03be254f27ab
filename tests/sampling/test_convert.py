"""OpenAI's checkpoints, converted, against what their code makes of the same weights (`helpers/openai_files.py`)."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.sampling import convert
from helpers.networks import TINY_NETWORK
from helpers.openai_files import CASES, LINEAR, OUTPUTS, WHOLE, converted, weights_of
from helpers.paths import ROOT


def inputs_of(name):
    """x_t, t, and labels where there are classes."""
    steps, classes = CASES[name]["steps"], CASES[name]["classes"]
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((3, 3, 8, 8))).float()
    labels = None if classes is None else torch.tensor([0, classes // 2, classes - 1])
    return x, torch.tensor([0, steps // 3, steps - 1]), labels


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_steps_are_theirs(tmp_path, name):
    pipeline = ScratchDDPMPipeline.from_pretrained(converted(tmp_path, name))
    x, t, labels = inputs_of(name)
    with torch.no_grad():
        output = pipeline.unet(x, t, class_labels=labels).sample
    expected = OUTPUTS[f"{name}/output"]
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    step = pipeline.scheduler.p_reverse(expected, x, t)  # of the first and the last timestep, and one in between
    torch.testing.assert_close(step.mean, OUTPUTS[f"{name}/mean"], rtol=1e-5, atol=1e-5)
    log_variance = OUTPUTS[f"{name}/log_variance"].expand(x.shape)
    torch.testing.assert_close(step.log_variance.expand(x.shape), log_variance, rtol=1e-5, atol=1e-5)
    pipeline.scheduler.set_timesteps(7)
    assert sorted(pipeline.scheduler.timesteps.tolist()) == CASES[name]["respaced"]


@pytest.mark.parametrize("name", CASES)
def test_the_folder_is_as_any_other(tmp_path, name):
    """It draws; its network trains; stock diffusers draws the same where it can run such a network."""
    folder = converted(tmp_path, name)
    pipeline = ScratchDDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np", "batch_size": 2}
    classes = {} if CASES[name]["classes"] is None else {"class_labels": [0, "2"]}
    images = pipeline(generator=torch.Generator().manual_seed(0), **options, **classes).images
    assert images.shape == (2, 8, 8, 3) and images.std() > 0.1
    x, t, labels = inputs_of(name)
    pipeline.unet.train()(x, t, class_labels=labels).sample.square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in pipeline.unet.parameters())
    index = json.loads((folder / "model_index.json").read_text())
    if index["_class_name"] == "DDPMPipeline":
        stock = DiffusionPipeline.from_pretrained(folder)
        assert type(stock.unet) is UNet2DModel
        with torch.no_grad():
            theirs = stock.unet(x, t).sample
        expected = OUTPUTS[f"{name}/output"]
        assert (theirs - expected).abs().max() <= 1e-5 * expected.abs().max()
    else:
        assert classes or len(pipeline.unet.config.attention_head_dim) > 1


def test_which_folders_stock_diffusers_loads():
    """All without classes, but for four heads of several widths."""
    stock = {name for name in CASES if CASES[name]["classes"] is None} - {
        "improved cosine, learned variance, 4000 steps"
    }
    assert len(stock) == 4


@pytest.mark.parametrize("order", ["True", "False"])
def test_the_order_of_query_key_and_value_matters(tmp_path, order):
    """The wrong one gives another network, which shows that the right one is needed."""
    name = "guided, unconditional, old order"
    pipeline = ScratchDDPMPipeline.from_pretrained(converted(tmp_path, name, "--use_new_attention_order", order))
    x, t, _ = inputs_of(name)
    with torch.no_grad():
        error = (pipeline.unet(x, t).sample - OUTPUTS[f"{name}/output"]).abs().max()
    assert (error > 1e-2) == (order == "True")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        (LINEAR, ["--num_channels", "64"], "--num_channels 64: .* it is 32"),
        (LINEAR, ["--num_res_blocks", "2"], "--num_res_blocks 2: .* it is 1"),
        (LINEAR, ["--channel_mult", "1,1"], "--channel_mult 1,1: .* it is 1,2"),
        (LINEAR, ["--attention_resolutions", "8"], "--attention_resolutions 8: .* it is 4"),
        (LINEAR, ["--image_size", "16"], "--attention_resolutions 16,4: .* it is 8"),
        (LINEAR, ["--class_cond", "True"], "--class_cond True: .* it is False"),
        (LINEAR, ["--learn_sigma", "True"], "--learn_sigma True: .* it is False"),
        (LINEAR, ["--use_scale_shift_norm", "True"], "--use_scale_shift_norm True: .* it is False"),
        (WHOLE, ["--resblock_updown", "False"], "--resblock_updown False: .* it is True"),
        (WHOLE, ["--num_heads", "4"], "--num_head_channels or --num_heads, one of the two"),
        (WHOLE, ["--num_head_channels", "40"], r"--num_head_channels 40 does not divide .* \[64, 96, 96\]"),
        (WHOLE, ["--sigma_small", "True"], "--sigma_small .* predicts it"),
        (WHOLE, ["--diffusion_steps", "4000"], "--diffusion_steps 4000 needs --rescale_timesteps"),
        (WHOLE, ["--diffusion_steps", "0"], "--diffusion_steps=0"),
        (WHOLE, ["--image_size", "10"], "sample_size=10"),
        (WHOLE, ["--dropout", "2"], "--dropout=2"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, name, flags, message):
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, name, *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}


def without(part):
    return lambda weights: {name: weight for name, weight in weights.items() if not name.startswith(part)}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LINEAR, without("output_blocks"), "half a network, as a classifier is"),
        (
            LINEAR,
            without("input_blocks.2.0.op"),
            "input_blocks.2 consists of nothing, where convolution .*conv_resample",
        ),
        (LINEAR, without("input_blocks.3.1"), "input_blocks.3 consists of residual, where residual, attention"),
        (LINEAR, without("output_blocks.3"), "input_blocks.1 consists of residual, where residual, attention"),
        (LINEAR, without("input_blocks.3"), "input_blocks has 3 blocks, where 4"),
        (
            LINEAR,
            without("middle_block.0.emb_layers.1.bias"),
            "mid_block.resnets.0.time_emb_proj.bias has the shape None",
        ),
        (LINEAR, lambda w: w | {"surplus.weight": torch.zeros(1)}, "surplus.weight is no weight of"),
        (LINEAR, lambda w: w | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "3 channels of 6.* Upsamplers"),
        (
            "guided, unconditional, old order",
            lambda w: w | {"time_embed.0.weight": torch.zeros(128, 64)},
            "64 sinusoids",
        ),
        (LINEAR, lambda w: {"state_dict": w}, "around the weights"),
        (LINEAR, lambda w: {"state": {}, "param_groups": []}, "other things than tensors .*an optimizer's state"),
        (
            LINEAR,
            lambda w: UNet2DModel(**TINY_NETWORK).state_dict(),
            "a network of diffusers, which needs no conversion",
        ),
        (LINEAR, lambda w: {"layer.weight": torch.zeros(2)}, "1 entries, the first called layer.weight"),
        (LINEAR, lambda w: list(w.values()), "holds a list, not weights by their names"),
    ],
)
def test_other_weights_are_refused_with_what_they_are(tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, name, weights=change(weights_of(name)))
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}


@pytest.fixture
def whole(tmp_path):
    torch.save(weights_of(LINEAR), tmp_path / "whole.pt")
    return (tmp_path / "whole.pt").read_bytes()


def test_damaged_files_are_refused(tmp_path, whole):
    files = {
        "half.pt": (whole[: len(whole) // 2], "cut off"),
        "start.pt": (whole[:10], "cut off"),
        "empty.pt": (b"", "no file of PyTorch's, or a damaged one"),
        "page.pt": (b"<html>404</html>", "no file of PyTorch's, or a damaged one"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not read: it is .*{message}"):
            convert.read(tmp_path / name)
    for absent in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no file"):
            convert.read(absent)


def test_an_existing_folder_is_kept(tmp_path):
    folder = converted(tmp_path, LINEAR)
    with pytest.raises(ValueError, match="exists already"):
        converted(tmp_path, LINEAR)
    assert (folder / "model_index.json").is_file()


AUDITED = """
import sys
ran, watching = [], False

def watch(event, arguments):
    if watching and (event == "pickle.find_class" or event.startswith(("os.system", "subprocess", "exec"))):
        ran.append((event, *map(str, arguments)))

import torch
from ddpm_from_scratch.sampling import convert
convert.read(convert.Path("whole.pt"))  # what PyTorch imports for it
sys.addaudithook(watch)
for name in sys.argv[1:]:
    watching = True
    try:
        convert.read(convert.Path(name))
    except ValueError as error:
        print(error)
    watching = False
print("ran", ran)
"""


class Harmful:
    """An object whose pickle, once it is loaded as Python does, makes a folder."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_no_code_of_a_file_runs(tmp_path, whole):
    """Seen by an audit hook, which sees the same file loaded as Python does."""
    marks = [tmp_path / f"mark{i}" for i in range(3)]
    torch.save({"weight": torch.zeros(2), "more": Harmful(marks[0])}, tmp_path / "zip.pt")
    torch.save({"more": Harmful(marks[1])}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"more": Harmful(marks[2])}))
    names = ["zip.pt", "old.pt", "plain.pt"]
    command = [sys.executable, "-c", AUDITED, *names, "whole.pt"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=True
    )
    *messages, ran = done.stdout.splitlines()
    assert ran == "ran []"
    assert ["mkdir)" in message for message in messages] == [True, True, False]
    for name, message in zip(names, messages, strict=True):
        assert f"{name} is not read: it is a pickle of other things than tensors, which may run code" in message
    assert not any(mark.exists() for mark in marks)
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert marks[2].exists()  # so it would have
