"""Consistency tuning: the objective against a second implementation, its draws, its runs and what it refuses."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import LCMScheduler
from torch import nn

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.evaluation import calibrate
from ddpm_from_scratch.evaluation.measures import bound_scheduler
from ddpm_from_scratch.runtime.errors import Refused, Stopped
from ddpm_from_scratch.sampling.editing import ScratchDDPMInterpolationPipeline
from ddpm_from_scratch.training import run
from ddpm_from_scratch.training.arguments import parse
from ddpm_from_scratch.training.consistency import ConsistencyObjective
from ddpm_from_scratch.training.objectives import Objective
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised
from helpers.oracles import grid_data, randn
from helpers.paths import ROOT
from helpers.runs import BATCH, SIZE, assert_equal, checkpoint_tensors, run_main, stop_in_step

BETAS = {"linear": oracles.linear_betas(), "squaredcos_cap_v2": oracles.cosine_betas()}
LARGEST_SIGMA = 80.0
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def sigmas(schedule):
    alpha_bar = np.cumprod(1 - BETAS[schedule])
    return np.minimum(np.sqrt(1 / alpha_bar - 1), LARGEST_SIGMA)


def objective(schedule="squaredcos_cap_v2", prediction_type="v_prediction", **options):
    scheduler = ScratchDDPMScheduler(beta_schedule=schedule, prediction_type=prediction_type)
    return ConsistencyObjective(scheduler, **options)


# --- the objective ---------------------------------------------------------------------------------------------------


def second_implementation(network, prediction_type, alpha_bar, x_0, noise, t, q, c):
    """ECT's loss in its own notation, x = x_0 + σ ε, image by image; the jump at r is clipped."""

    def f(x, index, label):
        a = alpha_bar[index]
        output = network((math.sqrt(a) * x)[None], torch.tensor([index]), class_labels=label[None]).sample[0]
        if prediction_type == "epsilon":
            return x - math.sqrt(1 / a - 1) * output
        return output if prediction_type == "sample" else a * x - math.sqrt(1 - a) * output

    losses = []
    labels = torch.arange(len(x_0)) % 3
    sigma = [min(math.sqrt(1 / a - 1), LARGEST_SIGMA) for a in alpha_bar]
    for clean, epsilon, index, label in zip(x_0, noise, t.tolist(), labels, strict=True):
        wanted = sigma[index] * (1 - (1 + 8 / (1 + math.exp(sigma[index]))) / q)
        below = [i for i in range(index) if sigma[i] <= wanted]
        true_sigma = math.sqrt(1 / alpha_bar[index] - 1)
        jump = f(clean + true_sigma * epsilon, index, label)
        with torch.no_grad():
            r = below[-1] if below else None
            target = clean if r is None else f(clean + math.sqrt(1 / alpha_bar[r] - 1) * epsilon, r, label).clamp(-1, 1)
        noise_level = sigma[index] / math.hypot(1, sigma[index])
        target = torch.where(target.abs() == 1, target + 0.1 * noise_level * target.sign(), target)
        norm = ((jump - target).square().mean() + c**2).sqrt() - c
        losses.append(norm / (sigma[index] - (0 if r is None else sigma[r])))
    return torch.stack(losses)


@pytest.mark.parametrize("q", [4.0, 64.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", BETAS)
def test_losses_and_gradients_are_those_of_a_second_implementation(schedule, prediction_type, q):
    network = randomised(ScratchUNet2DModel(**TINY_NETWORK, num_class_embeds=4)).double().train()
    x_0, noise = grid_data(6, 1, 8, 8, seed=1), randn(6, 1, 8, 8, seed=2)
    t, y = torch.tensor([0, 5, 200, 500, 900, 999]), torch.arange(6) % 3
    ours = objective(schedule, prediction_type, q=[q])
    x_t = ours.scheduler.add_noise(x_0, noise, t)
    goal = ours.goal(network, x_0, noise, t, y)
    assert not goal.requires_grad
    losses = ours(network(x_t, t, class_labels=y).sample, goal, noise, x_t, t)
    alpha_bar = np.cumprod(1 - BETAS[schedule])
    expected = second_implementation(network, prediction_type, alpha_bar, x_0, noise, t, q, ours.huber_c)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    weights = list(network.parameters())
    gradients = torch.autograd.grad(losses.mean(), weights)
    others = torch.autograd.grad(expected.mean(), weights)
    largest = max(float(other.abs().max()) for other in others)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-9 * largest)


@pytest.mark.parametrize("schedule", BETAS)
def test_an_exact_consistency_function_has_no_loss(schedule):
    """That of a point: whatever x_t is, it came from there. And x̂_0 at r is never taken from beyond t."""
    place = 0.25
    alpha_bar = np.cumprod(1 - BETAS[schedule])

    def network(x, t, class_labels=None):
        a = torch.from_numpy(alpha_bar)[t].reshape(-1, 1)
        epsilon = (x - a.sqrt() * place) / (1 - a).sqrt()
        return type("Output", (), {"sample": a.sqrt() * epsilon - (1 - a).sqrt() * place})

    ours, t = objective(schedule), torch.arange(0, 1000, 7)
    x_0, noise = torch.full((len(t), 5), place, dtype=torch.float64), randn(len(t), 5)
    x_t = ours.scheduler.add_noise(x_0, noise, t)
    losses = ours(network(x_t, t).sample, ours.goal(network, x_0, noise, t, None), noise, x_t, t)
    assert losses.abs().max() < 1e-9
    others = ours(network(x_t, t).sample + 0.1, ours.goal(network, x_0, noise, t, None), noise, x_t, t)
    assert others.min() > 0


@pytest.mark.parametrize(
    ("clip_range", "expected"), [(1.0, [-1.1, 0.4, 1.1]), (2.0, [-1.5, 0.4, 1.3]), (None, [-1.5, 0.4, 1.3])]
)
def test_a_goal_at_a_limit_lies_beyond_it_where_there_is_noise(clip_range, expected):
    clipping = {"clip_sample": clip_range is not None, "clip_sample_range": clip_range or 1.0}
    ours = ConsistencyObjective(ScratchDDPMScheduler(prediction_type="sample", **clipping))
    said = torch.tensor([[[[-1.5, 0.4, 1.3]]]]).double()

    def network(x, t, class_labels=None):
        return type("Output", (), {"sample": said.expand_as(x)})

    x_0 = torch.tensor([[[[-1.0, 0.0, 1.0]]]]).double().expand(2, -1, -1, -1)
    noisy, clean = ours.goal(network, x_0, torch.zeros_like(x_0), torch.tensor([999, 0]), None)
    assert noisy.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    assert clean.flatten().tolist() == pytest.approx([-1, 0, 1], abs=2e-3)  # of the data


@pytest.mark.parametrize("schedule", BETAS)
def test_the_earlier_timestep(schedule):
    sigma, all_t = sigmas(schedule), np.arange(1000)
    for q in (1.0, 4.0, 64.0, 1e6):
        r = objective(schedule, q=[q]).earlier(all_t)
        assert (r >= -1).all() and (r < all_t).all()
        wanted = sigma * (1 - (1 + 8 / (1 + np.exp(sigma))) / q)
        expected = [max((i for i in range(t) if sigma[i] <= wanted[t]), default=-1) for t in all_t]
        np.testing.assert_array_equal(r, expected)
    assert (objective(schedule, q=[1.0]).earlier(all_t) == -1).all()
    below = np.flatnonzero(sigma < LARGEST_SIGMA)[1:]
    np.testing.assert_array_equal(objective(schedule, q=[1e6]).earlier(below), below - 1)


def test_the_ratio_goes_through_its_stages():
    ours = objective(q=[4, 16, 64, 256])
    parts = {0.0: 4, 0.2499: 4, 0.25: 16, 0.74: 64, 0.75: 256, 1.0: 256}
    assert {progress: ours.at(progress).ratio for progress in parts} == parts
    assert ours.ratio == 4


def test_both_calls_drop_the_same():
    drawn = []

    def network(x, t, class_labels=None):
        drawn.append(torch.rand(3))
        return type("Output", (), {"sample": torch.zeros_like(x)})

    torch.manual_seed(0)
    x = torch.zeros(2, 4)
    objective().goal(network, x, x, torch.tensor([500, 900]), None)
    network(x, None)
    assert torch.equal(*drawn)


# --- its timesteps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", BETAS)
def test_timesteps_have_a_log_normal_sigma(schedule):
    sigma = sigmas(schedule)
    t, weights = objective(schedule, mean=-0.5, std=1.8).sampler().draw((torch.arange(10**6).double() + 0.5) / 10**6)
    assert (weights == 1).all() and t.min() == 0 and t.max() == 999
    normal = scipy.stats.norm(-0.5, 1.8)
    capped = int(np.argmax(sigma >= sigma[-1]))  # those up to T - 1 are not told apart
    assert set(t.tolist()) <= {*range(capped), 999}
    for first, last in ((0, 100), (100, 400), (400, 800), (800, capped)):
        edges = [math.sqrt(sigma[i - 1] * sigma[i]) if i else 0.0 for i in (first, last)]
        share = float(((t >= first) & (t < last)).double().mean())
        assert share == pytest.approx(float(np.diff(normal.cdf(np.log(np.maximum(edges, 1e-300))))[0]), abs=2e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_pure_noise_is_trained_on(zero_snr):
    scheduler = ScratchDDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    ours = ConsistencyObjective(scheduler, mean=3.0, std=1.0)
    t, _ = ours.sampler().draw(torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.float64))
    assert (t == 999).sum() > 50
    x = randn(2, 4)
    losses = ours(x, torch.zeros_like(x), x, x, torch.tensor([999, 999]))
    assert losses.isfinite().all() and (losses > 0).all()


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_network_for_points_learns_to_jump_to_the_s_curve(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from jump import PROCESS, NoiseNetwork, distance, jumps, s_curve, train, tune

    torch.manual_seed(0)
    scheduler, network, data = ScratchDDPMScheduler(**PROCESS), NoiseNetwork(), s_curve(2000)
    train(network, scheduler, 2000)
    before = {steps: distance(jumps(network, scheduler, steps), data) for steps in (1, 2)}
    tune(network, scheduler, 2000)
    after = {steps: distance(jumps(network, scheduler, steps), data) for steps in (1, 2)}
    floor = distance(s_curve(2000), data)
    assert before[1] > 20 * floor  # the mean of the data is none of them
    assert after[1] < 0.25 * before[1] and after[2] < 0.5 * before[2]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    network = randomised(ScratchUNet2DModel(**TINY_NETWORK | {"sample_size": SIZE, "dropout": 0.1}))
    scheduler = ScratchDDPMScheduler(
        num_train_timesteps=50, prediction_type="v_prediction", x_0_mse=[(0, 1e-3), (49, 0.3)], optimal_variance=True
    )
    ScratchDDPMPipeline(network, scheduler).save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps({"evaluation": {"samples": SAMPLES}}))
    return folder


SAMPLES = [{"num_inference_steps": 50, "kernel_distance": 0.25}]


def flags(teacher, *more):
    return ("--loss", "consistency", "--model_config_name_or_path", teacher, *more)


def test_a_run_ends_in_a_model_for_few_steps(inputs, teacher, tmp_path):
    folder = run_main(inputs, tmp_path / "tuned", *flags(teacher, "--checkpointing_steps", "10"))
    pipeline = ScratchDDPMPipeline.from_pretrained(folder)
    config = pipeline.scheduler.config
    assert (config.eta, config.timestep_spacing, config.prediction_type) == (math.inf, "trailing", "v_prediction")
    assert config.x_0_mse is None and config.optimal_variance is None  # which were the teacher's
    assert pipeline.config.num_inference_steps == 2 and (folder / "samples.png").is_file()
    assert LCMScheduler.from_pretrained(folder, subfolder="scheduler").config.original_inference_steps == 50
    assert "original_inference_steps" not in config  # of which making another from it would warn
    results = json.loads((folder / "results.json").read_text())
    assert results["teacher"] == {"name": teacher.name, "samples": SAMPLES}
    checkpoint = next((folder / "checkpoints").iterdir())
    from_checkpoint = run_main(inputs, tmp_path / "again", *flags(checkpoint, "--max_train_steps", "1"))
    assert ScratchDDPMPipeline.from_pretrained(from_checkpoint).config.num_inference_steps == 2


def test_a_stopped_run_goes_on_bit_for_bit(inputs, teacher, tmp_path, monkeypatch):
    common = flags(teacher, "--checkpointing_steps", "10", "--consistency_q", "[4,16]")
    whole = run_main(inputs, tmp_path / "whole", *common)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_in_step(patch, 4)
        run_main(inputs, tmp_path / "parts", *common)
    parts = run_main(inputs, tmp_path / "parts", *common)
    assert_equal(checkpoint_tensors(parts), checkpoint_tensors(whole))
    with pytest.raises(Refused, match="consistency_q"):
        run_main(inputs, tmp_path / "parts", *flags(teacher, "--consistency_q", "[4,64]", "--max_train_steps", "12"))


def test_a_tuned_model_becomes_one_for_the_chain_again(inputs, teacher, tmp_path):
    tuned = run_main(inputs, tmp_path / "tuned", *flags(teacher, "--max_train_steps", "1"))
    twice = run_main(inputs, tmp_path / "twice", *flags(tuned, "--max_train_steps", "1"))
    results = json.loads((twice / "results.json").read_text())
    assert results["teacher"] == {"name": teacher.name, "samples": SAMPLES}
    (first,) = results["earlier_tunings"]
    assert first["images_seen"] == BATCH and first["seconds"] > 0 and first["device"] == results["device"]
    back = run_main(inputs, tmp_path / "back", "--model_config_name_or_path", tuned, "--max_train_steps", "1")
    pipeline = ScratchDDPMPipeline.from_pretrained(back)
    assert pipeline.scheduler.config.eta == 1.0 and pipeline.config.num_inference_steps is None


def test_an_evaluation_on_the_way_has_no_bound(inputs, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_from_scratch.training.validation.extract", lambda images: FewFeatures(images))
    options = ("--eval_steps", "5", "--eval_num_images", "20", "--test_set", inputs.parquet)
    folder = run_main(inputs, tmp_path / "tuned", *flags(teacher, *options))
    evaluations = json.loads((folder / "results.json").read_text())["evaluations"]
    assert len(evaluations) == 2 and all("bits_per_dim" not in figures for figures in evaluations)


class FewFeatures:
    def __init__(self, images):
        self.values = images.reshape(len(images), -1)[:, :8].astype(np.float64)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--model_config_name_or_path", "null"),
            "tunes a trained model for few steps: name it with --model_config_name",
        ),
        (("--consistency_q", "[]"), "consistency_q must be at least 1, got ()"),
        (("--consistency_q", "[16,0.5]"), "consistency_q must be at least 1, got (16.0, 0.5)"),
        (("--consistency_std", "0"), "consistency_std must be above 0"),
        (("--loss_weighting", "min_snr"), "'min_snr' is for the losses simple and hybrid: consistency has its own"),
        (("--timestep_sampling", "loss_aware"), "'loss_aware' is for the loss vlb"),
    ],
)
def test_wrong_flags(inputs, teacher, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as left:
        run_main(inputs, tmp_path / "tuned", *flags(teacher), *more)
    assert left.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"q": []}, {"q": [16, 0.5]}, {"k": -1}, {"b": 0}, {"std": 0}, {"sigma_max": math.inf}]
)
def test_wrong_objectives(options):
    with pytest.raises(ValueError, match=f"consistency_{next(iter(options))}"):
        objective(**options)


def test_rounding_that_would_drown_the_differences_is_refused(inputs, teacher, tmp_path):
    with pytest.raises(Refused, match=r"mixed_precision 'bf16' rounds more .* take 'no', or ratios of at most 32"):
        run_main(inputs, tmp_path / "tuned", *flags(teacher, "--mixed_precision", "bf16"))


def test_precision_follows_the_ratio(teacher):
    def precision(*more):
        config, _ = parse(["fashion_mnist_few_steps", *map(str, flags(teacher)), "--class_conditional", "false", *more])
        return run.precision_of(config, torch.device("cpu"))

    assert precision("--mixed_precision", "auto") == "no"
    assert precision("--mixed_precision", "bf16", "--consistency_q", "[4,32]") == "bf16"


def test_a_learned_variance_cannot_be_tuned():
    with pytest.raises(ValueError, match="cannot be trained with the loss 'consistency', which gives it no gradient"):
        ConsistencyObjective(ScratchDDPMScheduler(variance_type="learned_range"))


def test_what_needs_a_mean_refuses_a_tuned_model(inputs, teacher, tmp_path):
    folder = run_main(inputs, tmp_path / "tuned", *flags(teacher, "--max_train_steps", "1"))
    pipeline = ScratchDDPMPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"no longer predicts the mean .* whose error a calibration measures"):
        calibrate.main([str(folder), "--dataset_name", inputs.parquet, "--num_images", "4"])
    assert "which the bound needs" in bound_scheduler(pipeline)
    inversion = ScratchDDPMInterpolationPipeline.from_pipe(pipeline)
    with pytest.raises(ValueError, match="which the inversion of DDIM needs"):
        inversion.invert(torch.zeros(1, 1, SIZE, SIZE), num_inference_steps=5)


def test_without_a_network_of_two_calls_nothing_changes():
    """Other objectives compare with the data, whatever is over of the run."""
    ours, x = Objective(ScratchDDPMScheduler()), randn(2, 3)
    assert ours.at(0.7) is ours and ours.goal(nn.Identity(), x, x, torch.tensor([1, 2]), None) is x
