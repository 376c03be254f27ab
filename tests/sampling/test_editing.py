"""Editing pipelines: exactness where it is promised, closed forms where they exist, and wrong calls."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.sampling.editing import (
    ScratchDDPMImg2ImgPipeline,
    ScratchDDPMInpaintPipeline,
    ScratchDDPMInterpolationPipeline,
    image_tensor,
    resampling_path,
    slerp,
    undo_ddim,
)
from helpers import oracles

PIPELINES = (ScratchDDPMImg2ImgPipeline, ScratchDDPMInpaintPipeline, ScratchDDPMInterpolationPipeline)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(stock_unet):
    return quiet(ScratchDDPMPipeline(stock_unet, DDPMScheduler()))


@pytest.fixture
def conditional(conditional_stock_unet):
    return quiet(ScratchDDPMPipeline(conditional_stock_unet, DDPMScheduler(), id2label={0: "bag", 1: "boot"}))


def made(kind, pipeline):
    return quiet(kind.from_pipe(pipeline))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, seed=0):
    """8-bit images [N, 8, 8, 1], and the same as PIL images."""
    array = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    return array, [Image.fromarray(one[..., 0]) for one in array]


def mask(*white):
    array = np.zeros((8, 8), dtype=np.uint8)
    array[white] = 255
    return Image.fromarray(array)


LOWER_HALF = mask(slice(4, 8))


# --- made by from_pipe, saved as what they were made of --------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_they_share_the_parts_and_save_the_one_pipeline(kind, conditional, tmp_path):
    editing = made(kind, conditional)
    assert editing.unet is conditional.unet
    assert editing.config.id2label == conditional.config.id2label
    conditional.save_pretrained(tmp_path / "one")
    editing.save_pretrained(tmp_path / "other")
    for name in ("model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert "Inpaint" not in (tmp_path / "other" / "pipeline.py").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_shared_network_keeps_its_precision(pipeline, dtype):
    _, images = pictures(2)
    pipeline.to(dtype)
    for kind in PIPELINES:
        assert made(kind, pipeline).unet.dtype == pipeline.unet.dtype == dtype
    assert len(made(ScratchDDPMInpaintPipeline, pipeline)(images, LOWER_HALF, seeded(), 3, 1, 1).images) == 2
    assert ScratchDDPMImg2ImgPipeline.from_pipe(pipeline, dtype=torch.float32).unet.dtype == torch.float32


# --- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_known_pixels_are_returned_as_they_were_given(pipeline, output_type):
    array, images = pictures(3)
    arguments = {"num_inference_steps": 10, "jump_length": 2, "jump_n_sample": 2, "output_type": output_type}
    out = made(ScratchDDPMInpaintPipeline, pipeline)(images, LOWER_HALF, seeded(), **arguments).images
    out = np.stack([np.asarray(one).reshape(8, 8, 1) for one in out])
    if output_type == "pil":
        np.testing.assert_array_equal(out[:, :4], array[:, :4])
        assert (out[:, 4:] != array[:, 4:]).any()
    else:
        np.testing.assert_allclose(out[:, :4], array[:, :4] / 255, atol=1e-7)


def test_each_image_may_have_its_own_mask(pipeline):
    array, images = pictures(2)
    masks = [LOWER_HALF, mask(slice(0, 8), slice(0, 2))]
    out = made(ScratchDDPMInpaintPipeline, pipeline)(images, masks, seeded(), 5, 1, 1).images
    painted = np.stack([np.asarray(one) for one in out])[..., None] != array
    assert painted[0, 4:].mean() > 0.9
    assert painted[1, :, :2].mean() > 0.9
    assert not painted[0, :4].any()
    assert not painted[1, :, 2:].any()


@pytest.mark.parametrize(("steps", "jump_length", "jump_n_sample"), [(250, 10, 10), (20, 5, 3), (7, 10, 4), (5, 1, 2)])
def test_the_path_of_repaint(steps, jump_length, jump_n_sample):
    path = resampling_path(steps, jump_length, jump_n_sample)
    moves = [after - before for before, after in itertools.pairwise(path)]
    assert (path[0], path[-1]) == (steps, 0)
    assert max(path) == steps
    assert set(moves) <= {-1, jump_length}
    jumps = moves.count(jump_length)
    # One point of return every jump_length steps, as long as there is room above it.
    assert jumps == (jump_n_sample - 1) * len(range(1, steps - jump_length + 1, jump_length))
    assert moves.count(-1) == steps + jumps * jump_length
    if (steps, jump_length, jump_n_sample) == (250, 10, 10):  # the paper's 4570 transitions, up ones counted singly
        assert moves.count(-1) + jump_length * jumps == 4570


@pytest.mark.full
def test_inpainting_draws_from_the_conditional_distribution(pipeline):
    """Two pixels, jointly Gaussian: given one, the other has mean ρ a and variance (1 - ρ²) s². Resampling helps."""
    correlation, deviation, given = 0.9, 0.4, 0.5
    covariance = deviation**2 * torch.tensor([[1, correlation], [correlation, 1]])
    editing = made(ScratchDDPMInpaintPipeline, pipeline)
    editing.scheduler = ScratchDDPMScheduler(clip_sample=False, timestep_spacing="linspace")
    alpha_bar = editing.scheduler.alphas_cumprod

    def exact(x, t, class_labels=None):
        a = alpha_bar[int(t)]
        gain = (1 - a) ** 0.5 * torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2))
        pairs = x.reshape(len(x), -1, 2)
        return UNet2DOutput(sample=(pairs @ gain).reshape(x.shape))

    editing.unet.forward = exact  # 8 x 8 pixels are 32 independent pairs
    image = torch.full((32, 1, 8, 8), given / 2 + 0.5)
    paint = torch.zeros(1, 8, 8)
    paint[..., 1::2] = 1
    expected = correlation * given, deviation * math.sqrt(1 - correlation**2)
    misses = []
    for resamplings in (1, 10):
        out = editing(image, paint, seeded(1), 250, 10, resamplings, output_type="pt").images
        painted = 2 * out[..., 1::2] - 1
        misses.append((abs(float(painted.mean()) - expected[0]), abs(float(painted.std()) - expected[1])))
    assert misses[1][0] < 0.04
    assert misses[1][1] < 0.01
    assert misses[0][0] > 3 * misses[1][0]


# --- image to image --------------------------------------------------------------------------------------------------


def test_strength_sets_how_much_of_the_chain_is_run(pipeline):
    editing = made(ScratchDDPMImg2ImgPipeline, pipeline)
    calls = []
    editing.unet.register_forward_pre_hook(lambda module, arguments: calls.append(int(arguments[1])))
    _, images = pictures(2)
    editing(images, 0.3, seeded(), 10)
    assert calls == [200, 100, 0]


def test_the_less_strength_the_nearer_to_the_image(pipeline):
    editing, (array, images) = made(ScratchDDPMImg2ImgPipeline, pipeline), pictures(4)
    distances = []
    for strength in (0.02, 0.1, 0.3):
        out = editing(images, strength, seeded(), 100, output_type="np").images
        distances.append(np.abs(out - array / 255).mean())
    assert distances == sorted(distances)
    assert distances[0] < 0.1
    assert distances[-1] > 0.25


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_schedulers_start_in_the_middle_too(pipeline, scheduler):
    editing, (_, images) = made(ScratchDDPMImg2ImgPipeline, pipeline), pictures(2)
    editing.scheduler = scheduler.from_config(pipeline.scheduler.config)
    got = editing(images, 0.5, seeded(), 10, output_type="np").images
    by_hand = scheduler.from_config(pipeline.scheduler.config)
    by_hand.set_timesteps(10)
    by_hand.set_begin_index(5)
    x_0 = 2 * image_tensor("image", images, 1, (8, 8)) - 1
    noise = torch.randn(x_0.shape, generator=seeded())
    x = by_hand.add_noise(x_0, noise, by_hand.timesteps[5:6].repeat(2))
    for t in by_hand.timesteps[5:]:
        with torch.no_grad():
            output = pipeline.unet(by_hand.scale_model_input(x, t), t).sample
        x = by_hand.step(output, t, x).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_labels_and_guidance_reach_the_network(conditional):
    _, images = pictures(2)
    inpainting = {"mask_image": LOWER_HALF, "jump_length": 3, "jump_n_sample": 2}
    for kind, arguments in ((ScratchDDPMImg2ImgPipeline, {}), (ScratchDDPMInpaintPipeline, inpainting)):
        editing = made(kind, conditional)
        outputs = [
            editing(images, generator=seeded(), num_inference_steps=10, output_type="np", **arguments, **labels).images
            for labels in ({}, {"class_labels": ["bag", 1]}, {"class_labels": [0, 1], "guidance_scale": 3.0})
        ]
        for one, other in itertools.combinations(outputs, 2):
            assert np.abs(one - other).max() > 1e-3


# --- inversion and interpolation -------------------------------------------------------------------------------------


def smooth_images(count):
    """Images in mid-range, of which the random network's chain can be inverted without leaving the range."""
    return torch.rand(count, 1, 8, 8, generator=seeded(5)) * 0.2 + 0.4


def test_one_step_is_undone_exactly():
    scheduler = ScratchDDPMScheduler(clip_sample=False)
    alpha_bar = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000))
    x_t, output = oracles.randn(2, 2, 1, 8, 8)
    for chain in ([999, 500, 3], [40, 20, 0]):
        scheduler.set_timesteps(timesteps=chain, eta=0.0)
        for t in chain:
            x_s = scheduler.step(output, t, x_t).prev_sample
            back = undo_ddim(alpha_bar, scheduler.predict(output, x_t, t), x_s, t, scheduler.previous_timestep(t))
            torch.testing.assert_close(back, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_inversion_and_sampling_return_the_image_the_better_the_more_iterations(pipeline):
    editing = made(ScratchDDPMInterpolationPipeline, pipeline)
    images = smooth_images(1)
    errors = []
    for iterations in (1, 3, 6):
        noise = editing.invert(images, 100, iterations)
        again = editing.generate(noise, 100, output_type="pt").images
        errors.append(float((again - images).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 5e-3


def test_the_noise_of_gaussian_data_is_gaussian(pipeline):
    """For N(m, s²) data the deterministic flow is affine: x_T = (x_0 - m) / s, up to the steps' size."""
    data = oracles.GaussianData(mean=0.1, variance=0.09)
    editing = made(ScratchDDPMInterpolationPipeline, pipeline)
    alpha_bar = oracles.Chain(oracles.linear_betas()).alpha_bar
    editing.unet.forward = lambda x, t, class_labels=None: UNet2DOutput(sample=data.epsilon(x, alpha_bar[int(t)]))
    images = torch.rand(1, 1, 8, 8, generator=seeded())
    noise = editing.invert(images, 500)
    expected = (2 * images - 1 - data.mean) / data.variance**0.5
    torch.testing.assert_close(noise, expected, rtol=0.02, atol=0.02)


def test_the_ends_of_an_interpolation_are_the_inputs(pipeline):
    editing, (array, images) = made(ScratchDDPMInterpolationPipeline, pipeline), pictures(2)
    frames = editing(*images, num_frames=5, num_inference_steps=10, num_iterations=1).images
    assert len(frames) == 5
    np.testing.assert_array_equal(np.asarray(frames[0]), array[0, ..., 0])
    np.testing.assert_array_equal(np.asarray(frames[-1]), array[1, ..., 0])
    for one, other in itertools.pairwise(frames):
        assert one.tobytes() != other.tobytes()


def test_the_same_image_twice_stays_itself(pipeline):
    editing = made(ScratchDDPMInterpolationPipeline, pipeline)
    image = smooth_images(1)
    frames = editing(image, image, 3, 10, output_type="pt").images
    torch.testing.assert_close(frames, image.expand(3, -1, -1, -1), rtol=0, atol=1e-5)


def test_slerp_stays_on_the_sphere():
    a, b = oracles.randn(2, 1, 3, 16, 16)
    a, b = a / a.norm(), b / b.norm()
    share = torch.linspace(0, 1, 7, dtype=torch.float64).reshape(-1, 1, 1, 1)
    path = slerp(a, b, share)
    torch.testing.assert_close(path.flatten(1).norm(dim=1), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(path[:1], a)
    torch.testing.assert_close(path[-1:], b)
    angles = torch.arccos((path[1:] * path[:-1]).sum((1, 2, 3)))
    torch.testing.assert_close(angles, angles[:1].expand(6))


# --- images in any form ----------------------------------------------------------------------------------------------


def test_the_forms_of_an_image():
    array, images = pictures(2)
    expected = torch.from_numpy(array).movedim(-1, 1) / 255
    forms = [images, array, array / 255, expected, torch.from_numpy(array).movedim(-1, 1), expected.double()]
    for form in forms:
        torch.testing.assert_close(image_tensor("image", form, 1, (8, 8)), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(image_tensor("image", images[0], 1, (8, 8)), expected[:1])
    torch.testing.assert_close(image_tensor("image", array[0], 1, (8, 8)), expected[:1])
    torch.testing.assert_close(image_tensor("image", images, 3, (8, 8)), expected.expand(-1, 3, -1, -1))


# --- wrong calls -----------------------------------------------------------------------------------------------------

IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("shoe.png", "must be PIL images, an array or a tensor, not str"),
        ([], "not list"),
        (torch.zeros(1, 1, 9, 8), r"shape \(1, 1, 9, 8\).*needs \(1, 8, 8\) each: resize or crop"),
        (torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\)"),
        (torch.zeros(2, 8), r"\(1, 1, 2, 8\)"),
        (np.zeros((9, 8)), r"\(1, 1, 9, 8\)"),
        (torch.zeros(0, 1, 8, 8), "holds no image"),
        (torch.full((1, 1, 8, 8), -0.5), r"values from -0.5 to -0.5: pass uint8, or floats in \[0, 1\]"),
        (torch.full((1, 1, 8, 8), 200), "to 200.0"),
        (torch.full((1, 1, 8, 8), float("nan")), "to nan"),
        (Image.new("L", (16, 16)), r"\(1, 1, 16, 16\)"),
    ],
)
def test_wrong_images(pipeline, image, message):
    for call in (
        made(ScratchDDPMImg2ImgPipeline, pipeline),
        lambda image: made(ScratchDDPMInpaintPipeline, pipeline)(image, LOWER_HALF),
        lambda image: made(ScratchDDPMInpaintPipeline, pipeline)(IMAGE, image),
        lambda image: made(ScratchDDPMInterpolationPipeline, pipeline)(IMAGE, image),
        made(ScratchDDPMInterpolationPipeline, pipeline).invert,
    ):
        with pytest.raises(ValueError, match=message):
            call(image)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ScratchDDPMImg2ImgPipeline, {"strength": 1.5}, r"strength=1.5 .*\[0, 1\]"),
        (ScratchDDPMImg2ImgPipeline, {"strength": "0.5"}, "strength='0.5'"),
        (ScratchDDPMImg2ImgPipeline, {"strength": 0.0}, "strength=0.0 of 1000 steps is less than one step"),
        (ScratchDDPMImg2ImgPipeline, {"strength": 0.1, "num_inference_steps": 5}, "of 5 steps is less than one"),
        (ScratchDDPMImg2ImgPipeline, {"output_type": "jpg"}, "output_type='jpg'"),
        (ScratchDDPMImg2ImgPipeline, {"generator": [seeded(), seeded()]}, "2 entries for 1 images"),
        (ScratchDDPMImg2ImgPipeline, {"eta": -2}, "eta=-2"),
        (ScratchDDPMImg2ImgPipeline, {"class_labels": [1]}, "not class-conditional"),
        (ScratchDDPMInpaintPipeline, {"jump_length": 0}, "jump_length=0"),
        (ScratchDDPMInpaintPipeline, {"jump_n_sample": 0}, "jump_n_sample=0"),
        (ScratchDDPMInpaintPipeline, {"jump_n_sample": 1.5}, "jump_n_sample=1.5"),
        (ScratchDDPMInpaintPipeline, {"num_inference_steps": 10}, "jump_length=10 leaves no room .* in 10 steps"),
        (ScratchDDPMInpaintPipeline, {"num_inference_steps": 0}, "num_inference_steps=0"),
        (ScratchDDPMInpaintPipeline, {"mask_image": [LOWER_HALF] * 3}, "3 masks for 1 images"),
        (ScratchDDPMInterpolationPipeline, {"num_frames": 1}, "num_frames=1"),
        (ScratchDDPMInterpolationPipeline, {"num_iterations": 0}, "num_iterations=0"),
        (ScratchDDPMInterpolationPipeline, {"other_image": torch.zeros(2, 1, 8, 8)}, "other_image holds 2 images"),
    ],
)
def test_wrong_arguments(pipeline, kind, arguments, message):
    needed = {ScratchDDPMInpaintPipeline: "mask_image", ScratchDDPMInterpolationPipeline: "other_image"}
    more = {needed[kind]: IMAGE} if kind in needed else {}
    with pytest.raises(ValueError, match=message):
        made(kind, pipeline)(**{"image": IMAGE, **more, **arguments})


def test_colours_for_a_gray_network(pipeline):
    with pytest.raises(ValueError, match="image is of mode RGB; 1 channels are made of L or 1: convert it first"):
        made(ScratchDDPMImg2ImgPipeline, pipeline)(Image.new("RGB", (8, 8)))


def test_masks_of_any_mode_and_without_channels(pipeline):
    editing = made(ScratchDDPMInpaintPipeline, pipeline)
    array = np.array(LOWER_HALF)
    forms = [LOWER_HALF, LOWER_HALF.convert("RGB"), [LOWER_HALF.convert("1")], array, torch.from_numpy(array)]
    outputs = [editing(IMAGE, mask, seeded(), 3, 1, 1, "np").images for mask in forms]
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


def test_a_call_that_is_refused_leaves_the_chain_as_it_was(pipeline):
    before = pipeline.scheduler.timesteps.tolist()
    with pytest.raises(ValueError, match="return_trajectory=99"):
        pipeline(return_trajectory=99, num_inference_steps=5)
    with pytest.raises(ValueError, match="less than one step"):
        made(ScratchDDPMImg2ImgPipeline, pipeline)(IMAGE, 0.01, num_inference_steps=5)
    assert pipeline.scheduler.timesteps.tolist() == before


def test_steps_are_checked_for_every_scheduler(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    for wrong in (0, 2.0, True, 1001):
        with pytest.raises(ValueError, match=f"num_inference_steps={wrong!r} must be a whole number from 1 to 1000"):
            made(ScratchDDPMImg2ImgPipeline, pipeline)(IMAGE, num_inference_steps=wrong)


def test_inpainting_takes_the_steps_that_a_short_chain_has(stock_unet):
    pipeline = quiet(ScratchDDPMPipeline(stock_unet, DDPMScheduler(num_train_timesteps=20)))
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: calls.append(int(arguments[1])))
    made(ScratchDDPMInpaintPipeline, pipeline)(IMAGE, LOWER_HALF, jump_n_sample=1)
    assert calls == list(range(19, -1, -1))


def test_what_cannot_be_inverted(conditional_stock_unet, pipeline):
    names = dict(enumerate("abcde"))
    classes = quiet(ScratchDDPMPipeline(conditional_stock_unet, DDPMScheduler(), id2label=names))
    with pytest.raises(ValueError, match="Inversion needs a null label"):
        made(ScratchDDPMInterpolationPipeline, classes).invert(IMAGE)
    process = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    pipeline.scheduler = ScratchDDPMScheduler(**process)
    with pytest.raises(ValueError, match="goes from noise to data at once: take more steps"):
        made(ScratchDDPMInterpolationPipeline, pipeline).invert(IMAGE, 1)


def test_pipelines_that_need_our_scheduler_say_so(pipeline):
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    message = r"needs a ScratchDDPMScheduler, not DPMSolverMultistepScheduler: set pipeline\.scheduler ="
    for kind in (ScratchDDPMInpaintPipeline, ScratchDDPMInterpolationPipeline):
        with pytest.raises(ValueError, match=message):
            made(kind, pipeline)(IMAGE, IMAGE)


def test_noise_of_the_wrong_shape(pipeline):
    with pytest.raises(ValueError, match=r"noise must be a tensor \[B, 1, 8, 8\]"):
        made(ScratchDDPMInterpolationPipeline, pipeline).generate(torch.zeros(1, 8, 8))
