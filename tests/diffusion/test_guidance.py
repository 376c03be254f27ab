"""Class labels and classifier-free guidance in the pipeline, and the other arguments of a call."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.guidance import Guidance, guide
from ddpm_from_scratch.sampling.previews import strip, write_gif
from helpers.networks import TINY_NETWORK, randomised

NAMES = {0: "bag", 1: "boot", 2: "shirt", 3: "dress"}  # of the five labels, the last is null


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, seed=0, steps=5, **arguments):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    return pipeline(2, generators, steps, "np", **arguments)


def images(pipeline, **arguments):
    return generate(pipeline, **arguments).images


@pytest.fixture
def conditional(conditional_stock_unet):
    return quiet(ScratchDDPMPipeline(conditional_stock_unet, DDPMScheduler(), id2label=NAMES))


@pytest.fixture
def pipeline(stock_unet):
    return quiet(ScratchDDPMPipeline(stock_unet, DDPMScheduler()))


# --- labels ----------------------------------------------------------------------------------------------------------


def test_names_and_numbers_are_the_same_labels(conditional):
    by_number = images(conditional, class_labels=[1, 2])
    for same in (["boot", "shirt"], [1, "shirt"], torch.tensor([1, 2]), np.array([1, 2]), (1, 2)):
        np.testing.assert_array_equal(images(conditional, class_labels=same), by_number)
    assert np.abs(images(conditional, class_labels=[1, 3]) - by_number)[1].max() > 1e-3


def test_without_labels_the_last_index_is_meant(conditional):
    np.testing.assert_array_equal(images(conditional), images(conditional, class_labels=[4, 4]))
    assert np.abs(images(conditional) - images(conditional, class_labels=[0, 0])).max() > 1e-3


def test_names_are_saved_and_survive_from_pipe(conditional, tmp_path):
    conditional.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["id2label"] == {str(number): name for number, name in NAMES.items()}
    loaded = quiet(ScratchDDPMPipeline.from_pretrained(tmp_path))
    assert loaded.config.id2label == NAMES
    expected = images(conditional, class_labels=["dress", "bag"])
    np.testing.assert_array_equal(images(loaded, class_labels=["dress", "bag"]), expected)
    again = quiet(ScratchDDPMPipeline.from_pipe(loaded))
    np.testing.assert_array_equal(images(again, class_labels=["dress", "bag"]), expected)


# --- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_of_scale_1_is_none_bit_for_bit(conditional):
    plain = images(conditional, class_labels=[1, 2])
    options = {"guidance_rescale": 0.7, "guidance_interval": (0.2, 0.6)}
    np.testing.assert_array_equal(images(conditional, class_labels=[1, 2], guidance_scale=1.0, **options), plain)
    np.testing.assert_array_equal(images(conditional, class_labels=[1, 2], guidance_scale=1), plain)


def by_hand(pipeline, labels, scale, rescale, start, stop, steps=5):
    """The loop with two calls of the network per step."""
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators])
    scheduler = ScratchDDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    labels, null = torch.tensor(labels), torch.tensor([4, 4])
    for t in scheduler.timesteps:
        with torch.no_grad():
            conditional = pipeline.unet(x, t, class_labels=labels).sample
            unconditional = pipeline.unet(x, t, class_labels=null).sample
        output = conditional.clone()
        if start <= t / 1000 <= stop:
            mixed = (1 - scale) * unconditional[:, :1] + scale * conditional[:, :1]
            for i in range(2):
                full = mixed[i] * conditional[i, :1].std() / mixed[i].std()
                output[i, :1] = rescale * full + (1 - rescale) * mixed[i]
        x = scheduler.step(output, t, x, generator=generators).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("scale", "rescale", "interval"),
    [(2.0, 0.0, (0, 1)), (0.0, 0.0, (0, 1)), (3.0, 0.7, (0, 1)), (2.5, 1.0, (0.3, 0.7)), (4.0, 0.0, (0.7, 0.9))],
)
def test_guidance_equals_two_calls_by_hand(conditional, scale, rescale, interval):
    guidance = {"guidance_scale": scale, "guidance_rescale": rescale, "guidance_interval": interval}
    got = images(conditional, class_labels=[1, 3], **guidance)
    np.testing.assert_allclose(got, by_hand(conditional, [1, 3], scale, rescale, *interval), atol=1e-5)
    assert np.abs(got - images(conditional, class_labels=[1, 3])).max() > 1e-3


def test_a_learned_variance_stays_the_conditional_one():
    unet = randomised(UNet2DModel(**{**TINY_NETWORK, "out_channels": 2}, num_class_embeds=5)).eval()
    pipeline = quiet(ScratchDDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")))
    got = images(pipeline, class_labels=[1, 3], guidance_scale=2.0)
    np.testing.assert_allclose(got, by_hand(pipeline, [1, 3], 2.0, 0.0, 0, 1), atol=1e-5)


def test_guidance_is_one_call_of_the_network_per_step_and_none_more_outside_its_interval(conditional):
    batches = []
    conditional.unet.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    images(conditional, class_labels=[1, 3], guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    assert batches == [2, 4, 4, 2, 2]  # at t = 800, 600, 400, 200, 0


def test_rescaling_restores_the_contrast():
    conditional, unconditional = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = guide(conditional, unconditional, Guidance(5.0, 1.0))
    torch.testing.assert_close(guided.std((1, 2, 3)), conditional.std((1, 2, 3)))
    assert (guide(conditional, unconditional, Guidance(5.0)).std((1, 2, 3)) > 2).all()


# --- eta, trajectory, previews ---------------------------------------------------------------------------------------


def test_eta_of_a_call_beats_that_of_the_configuration(pipeline):
    # Without clipping, after which ours takes epsilon from the clipped x_0 and diffusers' DDIM by default does not.
    pipeline.scheduler = ScratchDDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    at_0 = images(pipeline, eta=0.0)
    ddim = quiet(ScratchDDPMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config)))
    np.testing.assert_allclose(at_0, images(ddim), atol=1e-5)
    assert np.abs(images(pipeline) - at_0).max() > 1e-2  # the next call has eta = 1 again
    pipeline.scheduler = ScratchDDPMScheduler.from_config(pipeline.scheduler.config, eta=0.0)
    np.testing.assert_array_equal(images(pipeline), at_0)
    assert np.abs(images(pipeline, eta=1.0) - at_0).max() > 1e-2


@pytest.mark.parametrize(("frames", "kept"), [(1, [4]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
def test_the_trajectory_holds_what_each_step_saw(pipeline, frames, kept):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append({name: (x / 2 + 0.5).clamp(0, 1) for name, x in tensors.items()} | {"t": int(t)})

    both = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["sample", "pred_original_sample"]}
    output = generate(pipeline, return_trajectory=frames, **both)
    assert [frame.timestep for frame in output.trajectory] == [seen[i]["t"] for i in kept]
    for i, frame in zip(kept, output.trajectory, strict=True):
        prediction = seen[i]["pred_original_sample"].permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(frame.pred_original_sample, prediction)
        if i > 0:  # what a step sees is what the one before made
            np.testing.assert_array_equal(frame.sample, seen[i - 1]["sample"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(output.trajectory[-1].pred_original_sample, output.images)
    np.testing.assert_array_equal(output.images, images(pipeline))


def test_a_trajectory_in_other_forms(pipeline):
    result, trajectory = generate(pipeline, return_trajectory=2, return_dict=False)
    assert len(trajectory) == 2
    assert result.shape == (2, 8, 8, 1)
    assert generate(pipeline).trajectory is None
    pictures = pipeline(2, num_inference_steps=3, return_trajectory=3).trajectory[0].sample
    assert [type(picture) for picture in pictures] == [Image.Image] * 2


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_strips_and_gifs(pipeline, tmp_path, output_type):
    output = pipeline(2, num_inference_steps=5, output_type=output_type, return_trajectory=4)
    picture = strip(output.trajectory, scale=3)
    assert picture.size == (4 * 8 * 3, 2 * 8 * 3)
    last = strip(output.trajectory, "pred_original_sample").crop((24, 0, 32, 8))
    final = output.images[0]
    if output_type != "pil":
        final = Image.fromarray((np.asarray(final).reshape(8, 8) * 255).round().astype(np.uint8))
    assert list(last.tobytes()) == list(final.tobytes())
    write_gif(output.trajectory, tmp_path / "chain.gif", "pred_original_sample", scale=2)
    with Image.open(tmp_path / "chain.gif") as animation:
        assert (animation.n_frames, animation.size) == (4, (2 * 8 * 2, 8 * 2))


# --- wrong calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": ["boots", 1]}, r"class_labels='boots' is not known. .*did you mean 'boot'\?"),
        ({"class_labels": "boot"}, "must be a list"),
        ({"class_labels": [5, 1]}, "from 0 to 4"),
        ({"class_labels": [True, 1]}, "whole numbers"),
        ({"class_labels": [1, 2], "guidance_scale": -1}, "guidance_scale=-1 must .* at least 0"),
        ({"class_labels": [1, 2], "guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"class_labels": [1, 2], "guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"class_labels": [1, 2], "guidance_scale": "2"}, "guidance_scale='2'"),
        ({"class_labels": [1, 2], "guidance_rescale": 1.5}, r"guidance_rescale=1.5 .*\[0, 1\]"),
        ({"class_labels": [1, 2], "guidance_interval": (0.6, 0.4)}, r"guidance_interval=0.4 .*\[0.6, 1\]"),
        ({"class_labels": [1, 2], "guidance_interval": (0, 2)}, r"guidance_interval=2 .*\[0, 1\]"),
        ({"class_labels": [1, 2], "guidance_interval": 0.5}, "guidance_interval=0.5 must be two numbers"),
        ({"class_labels": [1, 2], "guidance_interval": (0.5,)}, "must be two numbers"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
        ({"eta": -0.5}, r"eta=-0.5 .* at least 0"),
        ({"eta": "0"}, "eta='0'"),
        ({"return_trajectory": 0}, "return_trajectory=0 .* from 1 to 5"),
        ({"return_trajectory": 6}, "return_trajectory=6"),
        ({"return_trajectory": True}, "return_trajectory=True"),
    ],
)
def test_wrong_calls(conditional, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(conditional, **arguments)


def test_an_unconditional_network_has_nothing_to_follow(pipeline):
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a class-conditional network"):
        images(pipeline, guidance_scale=2.0)


def test_a_network_without_null_label(conditional_stock_unet):
    names = {**NAMES, 4: "coat"}
    pipeline = quiet(ScratchDDPMPipeline(conditional_stock_unet, DDPMScheduler(), id2label=names))
    assert images(pipeline, class_labels=["coat", "bag"]).shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="class_labels is missing: each label of this network is a class"):
        images(pipeline)
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs a null label"):
        images(pipeline, class_labels=[0, 1], guidance_scale=2.0)


def test_names_without_classes_and_wrong_names(stock_unet, conditional_stock_unet):
    with pytest.raises(ValueError, match="this model has no names"):
        images(quiet(ScratchDDPMPipeline(conditional_stock_unet, DDPMScheduler())), class_labels=["bag", "bag"])
    with pytest.raises(ValueError, match="not class-conditional"):
        ScratchDDPMPipeline(stock_unet, DDPMScheduler(), id2label=NAMES)
    for wrong, message in (({0: "a", 1: "a"}, "a name of its own"), ({0: 1}, "a name"), ({9: "a"}, "from 0 to 4")):
        with pytest.raises(ValueError, match=message):
            ScratchDDPMPipeline(conditional_stock_unet, DDPMScheduler(), id2label=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trajectory": None}, "There are no frames: ask the pipeline"),
        ({"part": "x_0"}, "part='x_0' is not known; allowed: sample, pred_original_sample"),
        ({"scale": 0}, "scale=0"),
        ({"milliseconds": 0}, "milliseconds=0"),
        ({"path": "chain.png"}, "must end in .gif"),
    ],
)
def test_wrong_previews(pipeline, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    right = {"trajectory": generate(pipeline, return_trajectory=2).trajectory, "path": "chain.gif"}
    with pytest.raises(ValueError, match=message):
        write_gif(**{**right, **change})
    assert list(tmp_path.iterdir()) == []
