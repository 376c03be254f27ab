"""Our scheduler in diffusers' pipelines, and diffusers' schedulers in ours."""

import inspect
import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --- our scheduler in Stable Diffusion's pipelines -------------------------------------------------------------------

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
OTHER_SETTINGS = {
    "epsilon": {},
    "v_trailing": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "x_0_thresholding": {"prediction_type": "sample", "thresholding": True, "sample_max_value": 1.5},
}


@pytest.fixture(scope="module")
def parts():
    """Those of Stable Diffusion, tiny and random; the tokenizer knows letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    start, end = len(words) - 2, len(words) - 1
    text_config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return {
        "tokenizer": CLIPTokenizer({word: i for i, word in enumerate(words)}, merges=[], model_max_length=16),
        "text_encoder": randomised(CLIPTextModel(text_config)).eval(),
        "vae": randomised(vae).eval(),
        "unet": randomised(unet).eval(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def stable_diffusion(parts, scheduler):
    return quiet(StableDiffusionPipeline(**parts, scheduler=scheduler))


def paint(pipeline, seed=0, **arguments):
    arguments = {"num_inference_steps": 5, "output_type": "np"} | arguments
    return pipeline("a red cat", generator=seeded(seed), **arguments).images


@pytest.mark.parametrize("settings", OTHER_SETTINGS)
def test_stable_diffusion_paints_as_with_stock(parts, settings):
    config = STABLE_DIFFUSION | OTHER_SETTINGS[settings]
    stock, ours = (stable_diffusion(parts, kind(**config)) for kind in (DDPMScheduler, ScratchDDPMScheduler))
    expected, got = paint(stock), paint(ours)
    assert type(ours.scheduler) is ScratchDDPMScheduler
    assert expected.std() > 0.05
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(paint(ours, guidance_scale=1.0) - got).max() > 0.01  # guidance was on


def test_stable_diffusions_corrections_of_an_old_configuration_reach_ours(parts):
    # It sets steps_offset to 1 and clip_sample to False, in the configuration of the scheduler that it is given.
    images = []
    for kind in (DDPMScheduler, ScratchDDPMScheduler):
        with pytest.warns(FutureWarning, match="steps_offset|clip_sample"):
            pipeline = stable_diffusion(parts, kind())
        images.append(paint(pipeline))
        assert pipeline.scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    corrected = stable_diffusion(parts, ScratchDDPMScheduler(steps_offset=1, clip_sample=False))
    np.testing.assert_allclose(images[1], images[0], atol=1e-4)
    np.testing.assert_array_equal(images[1], paint(corrected))


def test_image_to_image_paints_as_with_stock(parts):
    image = torch.rand(1, 3, 16, 16, generator=seeded(1))
    images = []
    for kind in (DDPMScheduler, ScratchDDPMScheduler):
        base = stable_diffusion(parts, kind(**STABLE_DIFFUSION))
        pipeline = quiet(StableDiffusionImg2ImgPipeline.from_pipe(base))
        assert pipeline.scheduler is base.scheduler
        images.append([paint(pipeline, image=image, strength=strength) for strength in (0.4, 1.0)])
    np.testing.assert_allclose(images[1], images[0], atol=1e-4)
    assert np.abs(images[1][0] - images[1][1]).max() > 0.01


def test_the_eta_that_stable_diffusion_passes_does_not_reach_ours(parts):
    assert "eta" not in inspect.signature(ScratchDDPMScheduler.step).parameters
    latents = torch.randn(1, 4, 8, 8, generator=seeded(2))
    ours = stable_diffusion(parts, ScratchDDPMScheduler(**STABLE_DIFFUSION))
    images = paint(ours, latents=latents)
    assert np.abs(paint(ours, seed=1, latents=latents) - images).max() > 0.01
    for eta in (0.0, 1.0):
        np.testing.assert_array_equal(paint(ours, latents=latents, eta=eta), images)


def test_with_an_eta_of_0_of_its_own_ours_paints_as_ddim(parts):
    latents = torch.randn(1, 4, 8, 8, generator=seeded(2))
    ours = stable_diffusion(parts, ScratchDDPMScheduler(**STABLE_DIFFUSION, eta=0.0))
    stock = stable_diffusion(parts, DDIMScheduler(**STABLE_DIFFUSION))
    images = paint(ours, latents=latents)
    np.testing.assert_array_equal(paint(ours, seed=1, latents=latents, eta=1.0), images)
    np.testing.assert_allclose(images, paint(stock, latents=latents), atol=1e-4)


# --- our scheduler in the pipelines of DDPM and DDIM -----------------------------------------------------------------


def generate(pipeline, seed=0, **arguments):
    arguments = {"batch_size": 2, "output_type": "np"} | arguments
    return quiet(pipeline)(generator=seeded(seed), **arguments).images


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction", "timestep_spacing": "linspace", "variance_type": "fixed_large"},
        {"thresholding": True, "sample_max_value": 1.5, "timestep_spacing": "trailing"},
    ],
    ids=["defaults", "v_linspace", "thresholding_trailing"],
)
def test_ddpms_pipeline_generates_as_with_stock(stock_unet, config):
    stock, ours = (DDPMPipeline(stock_unet, kind(**config)) for kind in (DDPMScheduler, ScratchDDPMScheduler))
    expected = generate(stock, num_inference_steps=20)
    assert expected.std() > 0.1
    np.testing.assert_allclose(generate(ours, num_inference_steps=20), expected, atol=2e-4)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddims_pipeline_takes_ours_and_generates_what_ours_does_at_eta_0(stock_unet, clip, spacing, steps):
    scheduler = ScratchDDPMScheduler(timestep_spacing=spacing, clip_sample=clip)
    ddim = DDIMPipeline(stock_unet, scheduler)
    assert type(ddim.scheduler) is DDIMScheduler
    ours = generate(ScratchDDPMPipeline(stock_unet, scheduler), num_inference_steps=steps, eta=0.0)
    # When x_0 is clipped, the epsilon of ours always is the one that fits.
    got = generate(ddim, num_inference_steps=steps, use_clipped_model_output=True)
    np.testing.assert_allclose(got, ours, atol=2e-4)
    left_out = generate(ddim, num_inference_steps=steps)
    assert (np.abs(left_out - ours).max() > 0.01) == clip


# --- steps of DDIM ---------------------------------------------------------------------------------------------------

LIMITS = {
    "unclipped": {"clip_sample": False},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.9},
    "thresholded": {"thresholding": True, "sample_max_value": 1.1, "dynamic_thresholding_ratio": 0.9},
}
ALPHA_BAR = oracles.Chain(oracles.linear_betas(100)).alpha_bar


def stock_ddim(**config):
    """DDIMScheduler of 100 steps, with ᾱ in float64; ᾱ = 1 is where its chain ends, as ours does."""
    scheduler = DDIMScheduler(num_train_timesteps=100, set_alpha_to_one=True, **config)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
# DDIMScheduler steps from t to t - T // K, which under "linspace" is the next timestep at K = T only.
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 10), ("trailing", 10), ("trailing", 4), ("linspace", 100)])
def test_every_step_is_ddims(spacing, steps, kind, limit, eta):
    config = {"prediction_type": kind, "timestep_spacing": spacing, **LIMITS[limit]}
    stock, ours = stock_ddim(**config), ScratchDDPMScheduler(num_train_timesteps=100, eta=eta, **config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x, generator = oracles.randn(2, 3, 4, 4), seeded(1)
    limited = 0
    for t in stock.timesteps:
        output = oracles.analytic_network(x, int(t), ALPHA_BAR, kind)
        noise = torch.randn(x.shape, generator=generator.clone_state(), dtype=x.dtype)
        expected = stock.step(output, int(t), x, eta, use_clipped_model_output=True, variance_noise=noise)
        got = ours.step(output, t, x, generator=generator)
        torch.testing.assert_close(got.pred_original_sample, expected.pred_original_sample, rtol=0, atol=1e-9)
        torch.testing.assert_close(got.prev_sample, expected.prev_sample, rtol=0, atol=1e-9)
        # Without that option the epsilon is the network's, which is the same only where x_0 is as it predicts.
        plain = stock.step(output, int(t), x, eta, variance_noise=noise)
        limited += not torch.allclose(got.prev_sample, plain.prev_sample, rtol=0, atol=1e-3)
        x = got.prev_sample
    assert (limited > 0) == (limit != "unclipped")


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_a_chain_ends_at_the_data_as_ddims_does_with_set_alpha_to_one(set_alpha_to_one):
    stock = DDIMScheduler(set_alpha_to_one=set_alpha_to_one, clip_sample=False)
    ours = ScratchDDPMScheduler(eta=0.0, clip_sample=False)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    x, output = oracles.randn(2, 3, 4, 4), oracles.randn(2, 3, 4, 4, seed=1)
    got = ours.step(output, 0, x)
    assert torch.equal(got.prev_sample, got.pred_original_sample)
    same = torch.allclose(stock.step(output, 0, x).prev_sample, got.prev_sample, rtol=0, atol=1e-4)
    assert same == set_alpha_to_one


# --- diffusers' schedulers in our pipeline ---------------------------------------------------------------------------

SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "LMSDiscreteScheduler",
)
LABELS, NULL = [1, 3], 4


def network(**options):
    return randomised(UNet2DModel(**{**TINY_NETWORK, "num_class_embeds": 5, **options})).eval()


@torch.no_grad()
def own_loop(unet, scheduler, scale, steps=5, **step_options):
    """Guided, with one call of the network for each label and one for none."""
    generator = seeded()
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)

        def predict(label, i, t=t, model_input=model_input):
            return unet(model_input[i : i + 1], t, class_labels=torch.tensor([label])).sample[:, :1]

        with_label = torch.cat([predict(label, i) for i, label in enumerate(LABELS)])
        without = torch.cat([predict(NULL, i) for i in range(2)])
        x = scheduler.step(without + scale * (with_label - without), t, x, **step_options).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.full
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_any_scheduler_generates_with_labels_and_guidance(name, variance_type):
    unet = network(out_channels=2 if variance_type == "learned_range" else 1)
    # Not epsilon: from a random network, without clipping, nearly all of an image would lie outside [0, 1].
    config = ScratchDDPMScheduler(variance_type=variance_type, prediction_type="v_prediction").config
    scheduler, fresh = (getattr(diffusers, name).from_config(config) for _ in range(2))
    pipeline = ScratchDDPMPipeline(unet, scheduler)
    got = generate(pipeline, class_labels=LABELS, guidance_scale=2.0, num_inference_steps=5)
    expected = own_loop(unet, fresh, scale=2.0)
    assert pipeline.scheduler is scheduler
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.mean((expected > 0) & (expected < 1)) > 0.3
    unguided = generate(pipeline, class_labels=LABELS, num_inference_steps=5)
    assert np.abs(unguided - got).max() > 0.01


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_reaches_ddims_step(eta):
    pipeline = ScratchDDPMPipeline(network(), DDIMScheduler())
    got = generate(pipeline, class_labels=LABELS, guidance_scale=2.0, num_inference_steps=5, eta=eta)
    np.testing.assert_allclose(got, own_loop(pipeline.unet, DDIMScheduler(), 2.0, eta=eta), atol=1e-4)


def test_each_eta_gives_other_images_and_left_out_it_is_the_schedulers_own():
    options = {"class_labels": LABELS, "num_inference_steps": 5}
    for scheduler, own in ((DDIMScheduler(), 0.0), (ScratchDDPMScheduler(), 1.0), (ScratchDDPMScheduler(eta=0.5), 0.5)):
        pipeline = ScratchDDPMPipeline(network(), scheduler)
        images = {eta: generate(pipeline, eta=eta, **options) for eta in (0.0, 0.5, 1.0)}
        for one, other in itertools.combinations(images.values(), 2):
            assert np.abs(one - other).max() > 0.01
        np.testing.assert_array_equal(generate(pipeline, **options), images[own])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "DDIMScheduler"])
def test_eta_for_a_scheduler_without_one_is_refused(name):
    pipeline = ScratchDDPMPipeline(network(), getattr(diffusers, name)())
    with pytest.raises(ValueError, match=rf"eta=0\.5 was passed, but {name} has no eta: leave it out"):
        generate(pipeline, class_labels=LABELS, eta=0.5)
