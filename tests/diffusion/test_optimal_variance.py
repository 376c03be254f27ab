"""Few steps done right: the optimal variance and the chosen timesteps, against closed forms and brute force."""

import functools
import itertools
import json
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers import UNet2DModel as StockUNet

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.timesteps import TIMESTEP_CHOICES, bound_costs
from ddpm_from_scratch.evaluation.calibration import calibrate, moment_timesteps, x_0_mse
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised

CHAIN = oracles.Chain(oracles.linear_betas())
GAUSSIAN = oracles.GaussianData(mean=0.3, variance=0.25)
OVERLAPPING = oracles.MixtureData(weights=(0.3, 0.7), means=(-0.6, 0.4), deviations=(0.3, 0.2))
SEPARATE = oracles.MixtureData(weights=(0.3, 0.7), means=(-0.9, 0.5), deviations=(0.15, 0.1))
COUNTS = (2, 5, 10, 50)


@functools.cache
def moments_of(data):
    return list(enumerate(np.maximum(data.x_0_variance(CHAIN.alpha_bar), 1e-12).tolist()))


def make(data, **settings):
    return ScratchDDPMScheduler(clip_sample=False, timestep_spacing="linspace", x_0_mse=moments_of(data), **settings)


def steps_of(scheduler, data, x):
    """For each step of the chain, p(x_s | x_t) at the points x [N], and whether noise is drawn from it."""
    for t in scheduler.timesteps.tolist():
        s = scheduler.previous_timestep(t)
        epsilon = data.epsilon(x, CHAIN.alpha_bar[t])
        yield scheduler.p_reverse(epsilon[:, None], x[:, None], t, s), s >= 0


def gaussian_moments(scheduler, data, count, eta=None):
    """Mean and variance of what the chain makes of x_T ~ N(0, 1), whose steps are affine for Gaussian data."""
    scheduler.set_timesteps(count, eta=eta)
    mean, variance = 0.0, 1.0
    for reverse, noisy in steps_of(scheduler, data, torch.tensor([0.0, 1.0], dtype=torch.float64)):
        shift, other = reverse.mean.flatten().tolist()
        mean = shift + (other - shift) * mean
        variance = (other - shift) ** 2 * variance + noisy * math.exp(reverse.log_variance)
    return mean, variance


def mixture_moments(scheduler, data, count):
    """The same for any data: densities on a grid, carried through the kernels of p."""
    grid = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    scheduler.set_timesteps(count)
    density = torch.exp(-(grid**2) / 2)
    for reverse, noisy in steps_of(scheduler, data, grid):
        density = density / density.sum()
        if noisy:
            kernel = torch.exp(-0.5 * (grid - reverse.mean) ** 2 * torch.exp(-reverse.log_variance))
            density = density @ (kernel / kernel.sum(1, keepdim=True))
    mean = (density * reverse.mean[:, 0]).sum()
    return mean.item(), (density * (reverse.mean[:, 0] - mean) ** 2).sum().item()


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", COUNTS)
def test_gaussian_data_gets_its_variance_at_any_number_of_steps_and_any_eta(count, eta):
    mean, variance = gaussian_moments(make(GAUSSIAN, optimal_variance=True), GAUSSIAN, count, eta)
    # The chain starts from N(0, 1) rather than q(x_T), and its last step adds no noise: 1e-4 each.
    assert mean == pytest.approx(GAUSSIAN.mean, rel=0.01)
    assert variance == pytest.approx(GAUSSIAN.variance, rel=1e-3)


@pytest.mark.parametrize("count", COUNTS)
def test_fixed_variances_miss_it_in_opposite_directions(count):
    small, large = (
        gaussian_moments(make(GAUSSIAN, variance_type=kind, optimal_variance=False), GAUSSIAN, count)[1]
        for kind in ("fixed_small", "fixed_large")
    )
    assert small < 0.99 * GAUSSIAN.variance
    assert large > 1.01 * GAUSSIAN.variance


def misses(data, count, **settings):
    mean, variance = mixture_moments(make(data, **settings), data, count)
    return abs(mean - data.mean), abs(variance - data.variance)


@pytest.mark.full
@pytest.mark.parametrize(("data", "count"), [*itertools.product([OVERLAPPING], COUNTS), (SEPARATE, 2), (SEPARATE, 10)])
def test_mixtures_come_nearer_than_with_either_fixed_variance(data, count):
    """One variance for every x_t is not exact for mixtures, and yet better.

    Where the modes are far apart and the steps are many, β can be nearer in the variance, though not in the mean: the
    errors of its early and its late steps cancel.
    """
    optimal = misses(data, count, optimal_variance=True)
    for kind in ("fixed_small", "fixed_large"):
        fixed = misses(data, count, variance_type=kind, optimal_variance=False)
        assert optimal[0] < fixed[0]
        assert optimal[1] < fixed[1]


# --- where it is used ------------------------------------------------------------------------------------------------


def variance(scheduler, t=500, s=400):
    x = torch.zeros(1, 1, dtype=torch.float64)
    return float(scheduler.p_reverse(x, x, t, s).log_variance.exp())


def test_the_variance_is_that_of_the_paper():
    """Analytic-DPM eq. 11, written with E‖ε̂‖² for the exact predictor, at several eta."""
    scheduler = make(GAUSSIAN, optimal_variance=True)
    for eta in (0.0, 0.3, 1.0):
        scheduler.set_timesteps(10, eta=eta)
        a_t, a_s = CHAIN.alpha_bar[500], CHAIN.alpha_bar[400]
        posterior = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        squared_epsilon = (1 - a_t) / GAUSSIAN.marginal(a_t)[1]  # E‖ε̂‖² / d
        lam = eta**2 * posterior
        root = math.sqrt((1 - a_t) / (a_t / a_s)) - math.sqrt(1 - a_s - lam)
        expected = lam + root**2 * (1 - squared_epsilon)
        assert variance(scheduler) == pytest.approx(expected, rel=1e-9)


def test_it_is_used_for_fewer_steps_than_T_unless_eta_is_0_or_one_says_otherwise():
    def used(steps, eta=None, **settings):
        scheduler = make(GAUSSIAN, **settings)
        scheduler.set_timesteps(steps, eta=eta)
        typed = make(GAUSSIAN, optimal_variance=False)
        typed.set_timesteps(steps, eta=eta)
        return variance(scheduler) != variance(typed)

    assert used(999)
    assert used(10, eta=0.5)
    assert not used(1000)
    assert not used(10, eta=0.0)
    assert not used(10, optimal_variance=False)
    assert used(1000, optimal_variance=True)
    assert used(10, eta=0.0, optimal_variance=True)


def test_the_bounds_of_the_paper():
    huge = [(0, 5.0), (999, 5.0)]
    unclipped = ScratchDDPMScheduler(x_0_mse=huge, optimal_variance=True, clip_sample=False)
    clipped = ScratchDDPMScheduler(x_0_mse=huge, optimal_variance=True, clip_sample_range=0.8)
    a_t, a_s = CHAIN.alpha_bar[500], CHAIN.alpha_bar[400]
    posterior = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    on_x_0 = math.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)
    assert variance(unclipped) == pytest.approx(posterior + on_x_0**2 * min(5.0, (1 - a_t) / a_t), rel=1e-9)
    assert variance(clipped) == pytest.approx(posterior + on_x_0**2 * 0.8**2, rel=1e-9)
    a_t, a_s = CHAIN.alpha_bar[50], CHAIN.alpha_bar[20]
    expected = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s) + a_s * ((1 - a_t / a_s) / (1 - a_t)) ** 2 * (1 - a_t) / a_t
    assert variance(unclipped, 50, 20) == pytest.approx(expected, rel=1e-9)


def test_the_bound_on_noise_leaves_what_the_posterior_has():
    """In a short chain the noise of x_1 is large by itself."""
    process = {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"}
    scheduler = ScratchDDPMScheduler(**process, x_0_mse=[(0, 0.1), (9, 0.3)], optimal_variance=True)
    alpha_bar = oracles.Chain(oracles.cosine_betas(10)).alpha_bar
    scheduler.set_timesteps(10)
    zero = torch.zeros(1, 100_000, dtype=torch.float64)
    x = scheduler.step(zero, 1, zero, generator=torch.Generator().manual_seed(0)).prev_sample
    posterior = (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * (1 - alpha_bar[1] / alpha_bar[0])
    assert float(x.std()) == pytest.approx(posterior**0.5, rel=0.01)
    assert posterior**0.5 > 5 * 2 * 2 / 255


def test_the_full_chain_does_not_depend_on_the_last_one_that_was_set():
    scheduler = make(GAUSSIAN)
    x, x_0 = oracles.randn(2, 3, 4)
    before = [*scheduler.p_reverse(x, x, 500), *scheduler.q_posterior(x_0, x, 500)]
    bound = scheduler.vlb_term(x, x_0, x, 500)
    for count, eta in ((10, 0.0), (20, 0.5), (10, None)):
        scheduler.set_timesteps(count, eta=eta)
        after = [*scheduler.p_reverse(x, x, 500), *scheduler.q_posterior(x_0, x, 500)]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert torch.equal(scheduler.vlb_term(x, x_0, x, 500), bound)


def test_noise_in_the_least_noisy_step_is_bounded_for_images_only():
    """At s = 0 its mean absolute value is at most 2 of 255 levels; p_reverse, of which the bound is made, keeps it."""
    noise = []
    for clip in (True, False):
        scheduler = ScratchDDPMScheduler(x_0_mse=[(0, 0.2), (999, 0.2)], clip_sample=clip)  # eta = 1
        scheduler.set_timesteps(timesteps=[200, 100, 0])
        zero = torch.zeros(1, 40_000, dtype=torch.float64)
        for t in (200, 100):
            x = scheduler.step(zero, t, zero, generator=torch.Generator().manual_seed(0)).prev_sample
            noise.append(float(x.abs().mean()) / (2 / 255))
    assert noise[1] == pytest.approx(2, rel=0.01)
    assert min(noise[0], noise[2], noise[3]) > 5


# --- calibration -----------------------------------------------------------------------------------------------------


class ExactNetwork:
    """The exact noise predictor of Gaussian data, with the face of a network."""

    config, dtype, device = {}, torch.float32, torch.device("cpu")

    def __call__(self, x, t):
        self.sample = GAUSSIAN.epsilon(x.double(), CHAIN.alpha_bar[int(t)]).float()
        return self


def gaussian_images(count):
    return (GAUSSIAN.mean + 0.15 * oracles.randn(count, 1, 8, 8)).clamp(-1, 1)


def test_estimated_moments_agree_with_the_closed_form():
    narrow = oracles.GaussianData(mean=GAUSSIAN.mean, variance=0.15**2)

    class Network(ExactNetwork):
        def __call__(self, x, t):
            self.sample = narrow.epsilon(x.double(), CHAIN.alpha_bar[int(t)]).float()
            return self

    scheduler = ScratchDDPMScheduler(clip_sample=False)
    moments = x_0_mse(Network(), scheduler, gaussian_images(256), progress=False)
    t, values = np.array(moments).T
    expected = narrow.x_0_variance(CHAIN.alpha_bar[t.astype(int)])
    assert (t[0], t[-1], len(t)) == (0, 999, 64)
    np.testing.assert_allclose(values, expected, rtol=0.03)  # 16384 squares have a relative error of 1.1 %
    # In between, interpolation adds next to nothing.
    calibrated = ScratchDDPMScheduler.from_config(scheduler.config, x_0_mse=moments, optimal_variance=True)
    exact = ScratchDDPMScheduler(
        clip_sample=False, x_0_mse=list(enumerate(narrow.x_0_variance(CHAIN.alpha_bar))), optimal_variance=True
    )
    for upper in range(30, 1000, 37):
        assert variance(calibrated, upper, upper - 30) == pytest.approx(variance(exact, upper, upper - 30), rel=0.03)


def test_batches_of_any_kind_give_the_same_moments():
    scheduler, images = ScratchDDPMScheduler(clip_sample=False), gaussian_images(32)
    whole = x_0_mse(ExactNetwork(), scheduler, images, num_timesteps=8, batch_size=8, progress=False)
    batches = x_0_mse(ExactNetwork(), scheduler, iter(images.split(8)), num_timesteps=8, progress=False)
    other_seed = x_0_mse(ExactNetwork(), scheduler, images, num_timesteps=8, seed=1, progress=False)
    assert whole == batches
    assert whole != other_seed


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize(("steps", "count"), [(1000, 64), (1000, 2), (40, 64), (1, 64)])
def test_the_timesteps_of_the_moments(schedule, steps, count):
    scheduler = ScratchDDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule)
    timesteps = moment_timesteps(scheduler, count)
    assert len(timesteps) == min(steps, count)
    assert timesteps == sorted(set(timesteps))
    assert (timesteps[0], timesteps[-1]) == (0, steps - 1)


def test_a_real_network_of_any_kind_is_calibrated():
    """Class-conditional, with a learned variance, at zero terminal SNR: finite, growing with the noise."""
    unet = randomised(StockUNet(**{**TINY_NETWORK, "out_channels": 2}, num_class_embeds=4)).eval()
    process = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "variance_type": "learned_range"}
    scheduler = ScratchDDPMScheduler(num_train_timesteps=50, **process)
    calibrated = calibrate(unet, scheduler, oracles.grid_data(4, 1, 8, 8).float(), num_timesteps=10, progress=False)
    moments = np.array(calibrated.config.x_0_mse)
    assert np.isfinite(moments).all()
    assert moments[0, 1] < moments[-1, 1]
    calibrated.set_timesteps(5)
    assert calibrated.config.variance_type == "learned_range"
    assert math.isfinite(variance(calibrated, 49, 39))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(0, 1, 8, 8), {}, "images is empty"),
        ([], {}, "images is empty"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), {}, r"dtype torch.uint8.*floats \[N, C, H, W\] in \[-1, 1\]"),
        (torch.full((2, 1, 8, 8), 1.5), {}, "to 1.5: pass floats"),
        (torch.full((2, 1, 8, 8), float("nan")), {}, "from nan to nan: pass floats"),
        (torch.zeros(2, 1, 8, 8), {"num_timesteps": 1}, "num_timesteps=1"),
        (torch.zeros(2, 1, 8, 8), {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_calibrations(images, options, message):
    with pytest.raises(ValueError, match=message):
        x_0_mse(ExactNetwork(), ScratchDDPMScheduler(), images, progress=False, **options)


def test_networks_and_schedulers_that_cannot_be_calibrated(stock_unet):
    images = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="in training mode"):
        x_0_mse(stock_unet.train(), ScratchDDPMScheduler(), images)
    with pytest.raises(ValueError, match=r"scheduler is a DDPMScheduler: pass ScratchDDPMScheduler\.from_config"):
        x_0_mse(stock_unet.eval(), DDPMScheduler(), images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": -0.5}, r"eta=-0.5 .* at least 0"),
        ({"eta": "1"}, "eta='1' must be a number"),
        ({"eta": None}, "eta=None"),
        ({"optimal_variance": "yes"}, "optimal_variance='yes' must be True, False or None"),
        ({"optimal_variance": True}, "optimal_variance=True needs x_0_mse: estimate them"),
        ({"timestep_choice": "likelihood"}, "timestep_choice='likelihood' needs x_0_mse"),
        ({"timestep_choice": "quadratc"}, r"'quadratc' is not known. .*did you mean 'quadratic'\?"),
        ({"x_0_mse": []}, r"x_0_mse=\[\] must be pairs"),
        ({"x_0_mse": 0.5}, "must be pairs"),
        ({"x_0_mse": {"0": 1}}, "must be pairs"),
        ({"x_0_mse": [[0, "a"]]}, "must be pairs"),
        ({"x_0_mse": [[0, 1], [1]]}, "must be pairs"),
        ({"x_0_mse": [(0, 0.0)]}, "with positive values"),
        ({"x_0_mse": [(0, float("nan"))]}, "must be pairs"),
        ({"x_0_mse": [(5, 0.1), (5, 0.2)]}, "must ascend within 0..999"),
        ({"x_0_mse": [(0, 0.1), (1000, 0.2)]}, "must ascend within 0..999"),
        ({"x_0_mse": [(0.5, 0.1)]}, "must ascend"),
    ],
)
def test_wrong_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        ScratchDDPMScheduler(**settings)


def test_moments_may_be_an_array(tmp_path):
    scheduler = ScratchDDPMScheduler(x_0_mse=np.array([[0, 0.01], [999, 0.3]]))
    scheduler.save_pretrained(tmp_path)
    assert ScratchDDPMScheduler.from_pretrained(tmp_path).config.x_0_mse == [[0, 0.01], [999, 0.3]]


def test_timesteps_of_the_least_bound_at_zero_terminal_snr():
    process = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = ScratchDDPMScheduler(**process, x_0_mse=[(0, 0.01), (999, 0.3)], timestep_choice="likelihood")
    scheduler.set_timesteps(10)
    assert len(set(scheduler.timesteps.tolist())) == 10


def test_the_bound_at_eta_0_is_refused():
    scheduler = make(GAUSSIAN)
    scheduler.set_timesteps(10, eta=0.0)
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="The bound is infinite at eta=0"):
        scheduler.vlb_term(x, x, x, 999, 888)


MOMENTS = [[0, 0.01], [999, 0.3]]


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_the_moments_pass_through_stock_classes_in_silence(kind, tmp_path, caplog):
    """Loaded and saved by a class that does not know them, they are still there; diffusers' logger says nothing."""
    ScratchDDPMScheduler(x_0_mse=MOMENTS).save_pretrained(tmp_path)
    diffusers.utils.logging.enable_propagation()
    try:
        kind.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
        back = ScratchDDPMScheduler.from_pretrained(tmp_path / "again")
    finally:
        diffusers.utils.logging.disable_propagation()
    assert caplog.records == [] and back.config.x_0_mse == MOMENTS
    other = ScratchDDPMScheduler.from_config(kind.from_pretrained(tmp_path).config, x_0_mse=[[0, 0.02]])
    assert other.config.x_0_mse == [[0, 0.02]]


@pytest.mark.parametrize("key", ["x_0_mse", "second_moments"])
def test_keys_of_earlier_versions_load(key, tmp_path, stock_unet):
    """In both ways: by our scheduler itself, and by the pipeline, which diffusers gives a stock scheduler first."""
    ScratchDDPMPipeline(stock_unet, ScratchDDPMScheduler(x_0_mse=MOMENTS)).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({key if name == "_x_0_mse" else name: config[name] for name in config}))
    assert f'"{key}"' in path.read_text(encoding="utf-8")
    schedulers = [
        ScratchDDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        ScratchDDPMPipeline.from_pretrained(tmp_path).scheduler,
    ]
    for scheduler in schedulers:
        assert scheduler.config.x_0_mse == MOMENTS


def test_a_calibrated_folder_loads_everywhere(tmp_path, stock_unet):
    scheduler = ScratchDDPMScheduler(x_0_mse=[(0, 0.01), (999, 0.3)], timestep_choice="likelihood")
    pipeline = ScratchDDPMPipeline(stock_unet, scheduler)
    pipeline.save_pretrained(tmp_path)
    for stock in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        loaded = stock.from_pretrained(tmp_path, subfolder="scheduler")
        loaded.set_timesteps(4)
        x = torch.zeros(1, 1, 8, 8)
        for t in loaded.timesteps:
            x = loaded.step(x, t, x).prev_sample
        assert torch.isfinite(x).all()
        back = ScratchDDPMScheduler.from_config(loaded.config)
        assert back.config.x_0_mse == [[0, 0.01], [999, 0.3]]
    ours = ScratchDDPMPipeline.from_pretrained(tmp_path).scheduler
    ours.set_timesteps(4)
    scheduler.set_timesteps(4)
    assert ours.timesteps.tolist() == scheduler.timesteps.tolist()
    assert variance(ours) == variance(scheduler)


def test_keys_that_are_not_used_are_not_written(tmp_path):
    ScratchDDPMScheduler().save_pretrained(tmp_path)
    stock = DDPMScheduler()
    stock.save_pretrained(tmp_path / "stock")
    ours, theirs = (
        json.loads((folder / "scheduler_config.json").read_text()) for folder in (tmp_path, tmp_path / "stock")
    )
    assert ours == theirs


# --- chosen timesteps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(2, 9))
def test_dynamic_programming_finds_the_best_of_all_chains(count):
    alpha_bar = oracles.Chain(oracles.linear_betas(9, 0.02, 0.4)).alpha_bar
    # For exactly Gaussian data every chain has the same bound: the costs add up. A mixture tells chains apart.
    moments = SEPARATE.x_0_variance(alpha_bar)
    process = {"num_train_timesteps": 9, "beta_start": 0.02, "beta_end": 0.4, "clip_sample": False}
    scheduler = ScratchDDPMScheduler(
        **process, x_0_mse=list(enumerate(moments)), timestep_choice="likelihood", optimal_variance=True
    )
    scheduler.set_timesteps(count)

    def cost(chain):
        """Mean KL of a chain's steps by its definition: what the optimal variance is to the posterior's."""
        total = 0.0
        for s, t in itertools.pairwise(chain):
            a_t, a_s = alpha_bar[t], alpha_bar[s]
            posterior = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
            total += 0.5 * math.log(variance(scheduler, t, s) / posterior)
        return total

    chains = [(0, *middle, 8) for middle in itertools.combinations(range(1, 8), count - 2)]
    assert scheduler.timesteps.tolist() == list(min(chains, key=cost)[::-1])
    assert count in (2, 8) or cost(max(chains, key=cost)) > cost(min(chains, key=cost)) + 0.01


def test_chains_of_gaussian_data_all_have_the_same_bound():
    costs = bound_costs(CHAIN.alpha_bar, GAUSSIAN.x_0_variance(CHAIN.alpha_bar))
    for middle in (1, 10, 500, 998):
        assert costs[0, middle] + costs[middle, 999] == pytest.approx(costs[0, 999], rel=1e-9)


def test_the_costs_are_terms_of_the_bound():
    """At the optimal variance E KL(q || p) = ½ log(σ²/β̃): against vlb_term, averaged over draws of exact data."""
    scheduler = make(GAUSSIAN, optimal_variance=True)
    costs = bound_costs(CHAIN.alpha_bar, GAUSSIAN.x_0_variance(CHAIN.alpha_bar))
    scheduler.set_timesteps(timesteps=[900, 600, 300, 100, 10])
    x_0 = GAUSSIAN.mean + GAUSSIAN.variance**0.5 * oracles.randn(200_000, 1)
    for t, s in itertools.pairwise([900, 600, 300, 100, 10]):
        x_t = scheduler.add_noise(x_0, oracles.randn(200_000, 1, seed=t), t)
        term = scheduler.vlb_term(GAUSSIAN.epsilon(x_t, CHAIN.alpha_bar[t]), x_0, x_t, t, s).mean()
        assert float(term) == pytest.approx(costs[s, t], rel=0.02)


@pytest.mark.parametrize("choice", TIMESTEP_CHOICES)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_every_number_of_chosen_timesteps(choice, steps):
    moments = list(enumerate(GAUSSIAN.x_0_variance(oracles.Chain(oracles.linear_betas(steps)).alpha_bar)))
    scheduler = ScratchDDPMScheduler(steps, timestep_choice=choice, x_0_mse=moments)
    for count in range(1, steps + 1):
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps.tolist()
        assert len(timesteps) == count
        assert timesteps[0] == steps - 1
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert count == 1 or timesteps[-1] == 0


def test_quadratic_and_log_snr_are_what_they_say():
    scheduler = ScratchDDPMScheduler(timestep_choice="quadratic")
    scheduler.set_timesteps(10)
    np.testing.assert_allclose(np.sqrt(scheduler.timesteps), np.linspace(999**0.5, 0, 10), atol=0.6)
    scheduler = ScratchDDPMScheduler(timestep_choice="log_snr")
    scheduler.set_timesteps(10)
    alpha_bar = CHAIN.alpha_bar[scheduler.timesteps]
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    assert log_snr[1] == pytest.approx(-6, abs=0.1)  # after T - 1, from where x_t begins to tell of x_0
    steps = np.diff(log_snr[1:-1])  # near t = 0 whole timesteps are too coarse
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.1)
