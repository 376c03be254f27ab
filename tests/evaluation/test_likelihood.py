"""Bits per dimension: against a second implementation, closed forms, entropies and densities that are known."""

import itertools
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers import UNet2DModel as StockUNet
from scipy.special import log_ndtr, ndtr, ndtri

from ddpm_from_scratch import ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim, ode_bits_per_dim
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised
from helpers.paths import python_path

LINEAR = oracles.Chain(oracles.linear_betas())
SHORT = {"num_train_timesteps": 12, "beta_start": 0.01, "beta_end": 0.5}
SHORT_CHAIN = oracles.Chain(oracles.linear_betas(12, 0.01, 0.5))
BITS = 1 / math.log(2)
LEVELS = np.arange(256) / 127.5 - 1


def measure(network, scheduler, images, **options):
    return bits_per_dim(network, scheduler, images, progress=False, **options)


def measure_ode(network, scheduler, images, **options):
    return ode_bits_per_dim(network, scheduler, images, progress=False, **options)


def network_of(function):
    """A function of x and t with the face of a network, which knows neither dtype nor device nor configuration."""
    return lambda x, t: types.SimpleNamespace(sample=function(x, t))


def tiny_unet(**options):
    return randomised(ScratchUNet2DModel(**{**TINY_NETWORK, **options})).double().eval()


# --- against the second implementation -------------------------------------------------------------------------------

FULL = list(range(12))
CHAINS = {"full": FULL, "respaced": [0, 2, 6, 11], "neither end": [1, 5, 9], "one step": [7]}
KINDS = ["fixed_small", "fixed_large", "learned", "learned_range", "optimal"]
MATRIX = [
    *itertools.product(KINDS, ["full", "respaced"], [True, False], ["epsilon"]),
    *itertools.product(["fixed_large", "learned_range", "optimal"], ["neither end", "one step"], [True], ["sample"]),
    *itertools.product(["fixed_small", "learned_range"], ["full", "respaced"], [True, False], ["v_prediction"]),
]


class Recorder:
    """A network that keeps what it was given."""

    def __init__(self, unet):
        self.unet, self.seen = unet, []

    def __call__(self, x, t):
        self.seen.append((x, t))
        return self.unet(x, t)


@pytest.mark.parametrize(("kind", "which", "clip", "prediction_type"), MATRIX)
def test_it_equals_the_papers_formulas_for_the_noise_that_was_drawn(kind, which, clip, prediction_type):
    optimal, timesteps = kind == "optimal", CHAINS[which]
    moments = np.linspace(0.005, 0.4, 12) * (1 - SHORT_CHAIN.alpha_bar) ** 0.5
    scheduler = ScratchDDPMScheduler(
        **SHORT,
        variance_type="fixed_small" if optimal else kind,
        clip_sample=clip,
        prediction_type=prediction_type,
        x_0_mse=list(enumerate(moments)) if optimal else None,
        optimal_variance=True if optimal else None,
    )
    unet = tiny_unet(out_channels=1 if optimal or kind.startswith("fixed") else 2)
    recorder = Recorder(unet)
    images = oracles.grid_data(2, 1, 8, 8, seed=3)
    chosen = {} if which == "full" else {"timesteps": timesteps[::-1]}
    found = measure(recorder, scheduler, images, **chosen)

    assert [t.tolist() for _, t in recorder.seen] == [[t, t] for t in timesteps]
    chain = SHORT_CHAIN.respaced(np.array(timesteps))
    signal, sigma = (np.sqrt(a).reshape(-1, 1, 1, 1, 1) for a in (chain.alpha_bar, 1 - chain.alpha_bar))
    noise = (np.stack([x.numpy() for x, _ in recorder.seen]) - signal * images.numpy()) / sigma

    def network(x, k):
        with torch.no_grad():
            return unet(torch.from_numpy(x), torch.tensor(timesteps[k])).sample.numpy()

    prior, terms = oracles.bound(
        chain,
        network,
        images.numpy(),
        noise,
        variance_type=kind,
        prediction_type=prediction_type,
        clip=1.0 if clip else None,
        x_0_variance=moments[timesteps] if optimal else None,
    )
    np.testing.assert_allclose(found.prior, prior, rtol=1e-6)
    np.testing.assert_allclose(found.terms, terms, rtol=1e-6)
    np.testing.assert_allclose(found.total, prior + terms.sum(1), rtol=1e-6)
    assert found.timesteps.tolist() == timesteps


def test_the_noise_is_standard_normal_and_another_for_each_image_and_timestep():
    recorder = Recorder(network_of(lambda x, t: 0 * x))
    scheduler = ScratchDDPMScheduler(**SHORT)
    images = oracles.grid_data(5, 1, 40, 40)
    measure(recorder, scheduler, images)
    signal, sigma = (np.sqrt(a).reshape(-1, 1, 1, 1, 1) for a in (SHORT_CHAIN.alpha_bar, 1 - SHORT_CHAIN.alpha_bar))
    noise = (np.stack([x.numpy() for x, _ in recorder.seen]) - signal * images.numpy()) / sigma
    noise = noise.reshape(60, -1)  # 12 timesteps of 5 images, 1600 numbers each
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert noise.var() == pytest.approx(1, abs=5 * math.sqrt(2 / noise.size))
    correlations = np.corrcoef(noise)[np.triu_indices(60, 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(1600)


# --- Gaussian data ---------------------------------------------------------------------------------------------------


class Rounded:
    """N(mean, deviation²) rounded to 8 bits: levels [64, 64] in the right shares, and the network exact for them.

    The exact network of Gaussian data is linear, so it is the best linear one for any data of that mean and variance;
    the expectations of the divergences know no more of the data than that, and hold for rounded data too.
    """

    def __init__(self, mean, deviation, alpha_bar, shape=(64, 64)):
        places = (np.arange(math.prod(shape)) + 0.5) / math.prod(shape)
        k = np.clip(np.round((mean + deviation * ndtri(places) + 1) * 127.5), 0, 255).astype(int)
        shuffled = np.random.default_rng(0).permutation(k)
        self.images = torch.from_numpy(shuffled / 127.5 - 1).reshape(shape)
        self.shares = np.bincount(k, minlength=256) / len(k)
        self.exact = oracles.GaussianData(LEVELS[k].mean(), LEVELS[k].var())
        edges = ndtr((np.arange(1, 256) / 127.5 - 1 - 1 / 255 - mean) / deviation)
        mass = np.diff(np.concatenate([[0.0], edges, [1.0]]))
        self.entropy = -(self.shares[self.shares > 0] * np.log2(mass[self.shares > 0])).sum()
        self.alpha_bar = torch.from_numpy(alpha_bar)

    def epsilon(self, x, t):
        return self.exact.epsilon(x, self.alpha_bar[t][:, None])

    def network(self, values=None):
        """`values` is v of a learned range."""
        if values is None:
            return network_of(self.epsilon)
        return network_of(lambda x, t: torch.cat([self.epsilon(x, t), torch.full_like(x, values)], 1))

    def decoder_bits(self, alpha_bar, log_variance):
        """E of L_0: over the levels, and over the noise by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        x = np.sqrt(alpha_bar) * LEVELS[:, None] + np.sqrt(1 - alpha_bar) * nodes
        epsilon = self.exact.epsilon(torch.from_numpy(x), alpha_bar).numpy()
        mean = (x - np.sqrt(1 - alpha_bar) * epsilon) / np.sqrt(alpha_bar)
        lower, upper = ((LEVELS[:, None] + side / 255 - mean) * math.exp(-log_variance / 2) for side in (-1, 1))
        lower[0], upper[-1] = -np.inf, np.inf
        right = lower > 0
        lower, upper = np.where(right, -upper, lower), np.where(right, -lower, upper)
        log_mass = log_ndtr(upper) + np.log1p(-np.exp(log_ndtr(lower) - log_ndtr(upper)))
        return -BITS * self.shares @ log_mass @ weights / weights.sum()


MOMENTS = {"x_0_mse": list(enumerate(oracles.GaussianData(0, 0.09).x_0_variance(LINEAR.alpha_bar)))}
SIXTY = {"num_train_timesteps": 60, "beta_start": 0.002, "beta_end": 0.3}
SIXTY_CHAIN = oracles.Chain(oracles.linear_betas(60, 0.002, 0.3))
SPREAD = 0.4  # v of the learned range


@pytest.mark.parametrize("chosen", [None, [59, 40, 22, 10, 3, 0]], ids=["full", "respaced"])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range", "optimal"])
def test_each_term_has_its_closed_form_for_gaussian_data(kind, chosen):
    data = Rounded(0.2, 0.25, SIXTY_CHAIN.alpha_bar)
    optimal = kind == "optimal"
    moments = data.exact.x_0_variance(SIXTY_CHAIN.alpha_bar)
    scheduler = ScratchDDPMScheduler(
        **SIXTY,
        clip_sample=False,
        variance_type="fixed_small" if optimal else kind,
        x_0_mse=list(enumerate(moments)) if optimal else None,
        optimal_variance=True if optimal else None,
    )
    network = data.network(SPREAD if kind == "learned_range" else None)
    bits = measure(network, scheduler, data.images, timesteps=chosen)
    mean, error = bits.mean(), bits.standard_error()

    timesteps = np.arange(60) if chosen is None else np.array(chosen[::-1])
    chain = SIXTY_CHAIN.respaced(timesteps)
    small = chain.posterior_variance[1:]
    log_variance = {
        "fixed_small": chain.small,
        "fixed_large": chain.large,
        "learned_range": chain.log_variance("learned_range", np.full(len(timesteps), SPREAD)),
        "optimal": np.log(chain.posterior_variance + chain.on_x_0**2 * moments[timesteps]),
    }[kind]
    # E KL: the means differ by c (x_0 - x̂_0), and E (x_0 - x̂_0)² = Var(x_0 | x_t).
    squared = chain.on_x_0[1:] ** 2 * moments[timesteps][1:]
    variance = np.exp(log_variance[1:])
    terms = 0.5 * (np.log(variance / small) + (small + squared) / variance - 1) * BITS
    terms = np.append(data.decoder_bits(chain.alpha_bar[0], log_variance[0]), terms)
    # Quadratic in the noise of 4096 numbers: 2 % of what depends on it.
    assert (error.terms.numpy() < 0.03 * terms + 1e-6).all()
    assert (abs(mean.terms.numpy() - terms) < 4.5 * error.terms.numpy()).all()

    top = chain.alpha_bar[-1]
    prior = 0.5 * (-math.log(1 - top) - top + top * float(data.images.square().mean())) * BITS
    assert float(mean.prior) == pytest.approx(prior, rel=1e-9)
    assert abs(float(mean.total) - prior - terms.sum()) < 4.5 * float(error.total)
    torch.testing.assert_close(bits.total, bits.prior + bits.terms.sum(1))


HUNDRED = {"num_train_timesteps": 100, "beta_start": 1e-4, "beta_end": 0.2}
CHOSEN = {"timesteps": [99, 60, 30, 10, 3, 0]}


@pytest.mark.full
@pytest.mark.parametrize("mean", [0.0, 0.1])
@pytest.mark.parametrize(("chosen", "shape"), [({}, (64, 1024)), (CHOSEN, (64, 8192))], ids=["full", "respaced"])
def test_with_the_optimal_variance_the_bound_is_the_entropy(chosen, shape, mean):
    alpha_bar = oracles.Chain(oracles.linear_betas(100, 1e-4, 0.2)).alpha_bar
    data = Rounded(mean, 0.3, alpha_bar, shape)
    assert data.entropy == pytest.approx(7.30, abs=0.005)
    moments = list(enumerate(data.exact.x_0_variance(alpha_bar)))
    scheduler = ScratchDDPMScheduler(**HUNDRED, clip_sample=False, x_0_mse=moments, optimal_variance=True)
    bits = measure(data.network(), scheduler, data.images, **chosen)
    assert float(bits.standard_error().total) < 0.008
    assert float(bits.mean().total) == pytest.approx(data.entropy, abs=0.01)
    small = ScratchDDPMScheduler.from_config(scheduler.config, optimal_variance=False)
    worse = measure(data.network(), small, data.images, **chosen)
    assert float(worse.mean().total) > data.entropy + 0.02


def test_the_optimal_variance_is_automatic_where_set_timesteps_has_it():
    """For chains of fewer than T steps; the full one has its own."""
    moments, images = [(0, 0.01), (11, 0.3)], oracles.grid_data(2, 2, 3)
    totals = {
        (optimal, chosen): measure(
            network_of(curved),
            ScratchDDPMScheduler(**SHORT, x_0_mse=moments, optimal_variance=optimal),
            images,
            timesteps=chosen,
        ).total
        for optimal, chosen in itertools.product((None, True, False), (None, (11, 7, 0)))
    }
    assert torch.equal(totals[None, (11, 7, 0)], totals[True, (11, 7, 0)])
    assert torch.equal(totals[None, None], totals[False, None])
    assert (totals[True, (11, 7, 0)] != totals[False, (11, 7, 0)]).all()
    assert (totals[True, None] != totals[False, None]).all()


# --- fewer terms -----------------------------------------------------------------------------------------------------


def curved(x, t):
    """An inexact network, whose divergences differ between timesteps."""
    return torch.tanh(2 * x) * (1 + t / 6).reshape(-1, *(1,) * (x.ndim - 1))


@pytest.mark.full
@pytest.mark.parametrize("num_terms", [2, 4, 11])
def test_fewer_terms_estimate_the_bound_without_bias(num_terms):
    scheduler = ScratchDDPMScheduler(**SHORT)
    images = oracles.grid_data(50, 2, 3)
    differences, drawn = [], []
    for seed in range(40):
        full = measure(network_of(curved), scheduler, images, seed=seed)
        part = measure(network_of(curved), scheduler, images, seed=seed, num_terms=num_terms)
        differences.append(part.total - full.total)
        drawn.append(~part.terms.isnan())
        # What was evaluated is what it is in the full bound.
        assert torch.equal(part.terms[drawn[-1]], full.terms[drawn[-1]])
        assert torch.equal(part.prior, full.prior)
    difference, drawn = torch.cat(differences), torch.cat(drawn)
    error = float(difference.std()) / len(difference) ** 0.5
    assert 0 < error < 0.05 * float(full.mean().total)
    assert abs(float(difference.mean())) < 4 * error
    # L_0 always, and one timestep of each stratum, each as often as any other.
    assert drawn[:, 0].all()
    for stratum in np.array_split(np.arange(1, 12), num_terms - 1):
        assert (drawn[:, stratum].sum(1) == 1).all()
        share = drawn[:, stratum].double().mean(0)
        assert (abs(share - 1 / len(stratum)) < 5 * math.sqrt(0.25 / len(drawn))).all()


def test_all_terms_are_the_full_bound():
    scheduler, images = ScratchDDPMScheduler(**SHORT), oracles.grid_data(3, 2, 3)
    for options in ({}, {"timesteps": [7, 3]}, {"timesteps": [4]}):
        full = measure(network_of(curved), scheduler, images, **options)
        assert not full.terms.isnan().any()
        same = measure(network_of(curved), scheduler, images, **options, num_terms=len(full.timesteps))
        assert all(torch.equal(a, b) for a, b in zip(full, same, strict=True))


def test_mean_and_standard_error_leave_out_what_was_not_evaluated():
    scheduler, images = ScratchDDPMScheduler(**SHORT), oracles.grid_data(6, 2, 3)
    bits = measure(network_of(curved), scheduler, images, num_terms=4)
    mean, error = bits.mean(), bits.standard_error()
    assert mean.timesteps is error.timesteps is bits.timesteps
    for name in ("total", "prior"):
        values = getattr(bits, name).numpy()
        assert float(getattr(mean, name)) == pytest.approx(values.mean())
        assert float(getattr(error, name)) == pytest.approx(values.std(ddof=1) / 6**0.5)
    counts = set()
    for k, column in enumerate(bits.terms.numpy().T):
        there = column[~np.isnan(column)]
        counts.add(min(len(there), 2))
        if len(there) == 0:
            assert mean.terms[k].isnan()
        else:
            assert float(mean.terms[k]) == pytest.approx(there.mean())
        if len(there) < 2:
            assert error.terms[k].isnan()
        else:
            assert float(error.terms[k]) == pytest.approx(there.std(ddof=1) / len(there) ** 0.5)
    assert counts == {0, 1, 2}
    alone = measure(network_of(curved), scheduler, images[:1])
    assert alone.standard_error().total.isnan()


# --- what it depends on ----------------------------------------------------------------------------------------------


def same(found, expected, rtol):
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("num_terms", [None, 5])
def test_it_depends_on_the_seed_and_not_on_batches(num_terms):
    unet, scheduler, images = tiny_unet(), ScratchDDPMScheduler(**SHORT), oracles.grid_data(7, 1, 8, 8)
    whole = measure(unet, scheduler, images, num_terms=num_terms)
    again = measure(unet, scheduler, images, num_terms=num_terms)
    assert torch.equal(whole.total, again.total)
    for batch_size in (1, 3, 6):
        same(measure(unet, scheduler, images, num_terms=num_terms, batch_size=batch_size), whole, 1e-10)
    same(measure(unet, scheduler, images[:3], num_terms=num_terms).mean(), _first(whole, 3).mean(), 1e-10)
    other = measure(unet, scheduler, images, num_terms=num_terms, seed=1)
    assert (other.total != whole.total).all()
    assert torch.equal(other.prior, whole.prior)
    assert all(values.dtype == torch.float64 for values in whole[:3])


def _first(bits, count):
    return type(bits)(*(values[:count] for values in bits[:3]), bits.timesteps)


def test_every_kind_of_image_is_the_same_image():
    unet, scheduler = tiny_unet().float(), ScratchDDPMScheduler(**SHORT)
    exact = oracles.grid_data(3, 1, 8, 8)
    k = ((exact + 1) * 127.5).round().to(torch.uint8)
    expected = measure(unet, scheduler, k)
    for images in (exact.float(), (k / 255 - 0.5) / 0.5, k.float() * (2 / 255) - 1):
        assert torch.equal(measure(unet, scheduler, images).total, expected.total)
    double = measure(unet, scheduler, exact)
    assert not torch.equal(double.total, expected.total)
    same(double, expected, 1e-4)
    assert measure(unet.bfloat16(), scheduler, k).total == pytest.approx(expected.total, rel=0.05)


def test_the_network_sees_its_own_dtype_and_a_timestep_for_each_image():
    recorder = Recorder(tiny_unet())
    recorder.dtype = torch.float64
    measure(recorder, ScratchDDPMScheduler(**SHORT), oracles.grid_data(3, 1, 8, 8).float(), batch_size=2)
    assert {(x.dtype, t.dtype, t.shape == x.shape[:1]) for x, t in recorder.seen} == {
        (torch.float64, torch.int64, True)
    }
    assert [len(x) for x, _ in recorder.seen] == [2] * 12 + [1] * 12


def test_the_callers_scheduler_is_left_alone_and_its_chain_does_not_matter():
    fresh = ScratchDDPMScheduler(**SHORT, steps_offset=1)
    used = ScratchDDPMScheduler(**SHORT, steps_offset=1)
    used.set_timesteps(4, eta=0.3)
    before = {name: value for name, value in vars(used).items() if not isinstance(value, np.ndarray)}
    config, timesteps = dict(used.config), used.timesteps.clone()
    images = oracles.grid_data(2, 2, 3)
    for options in ({}, {"num_inference_steps": 5}, {"timesteps": [8, 4, 2]}, {"clip_sample": False}):
        found = measure(network_of(curved), used, images, **options)
        assert torch.equal(found.total, measure(network_of(curved), fresh, images, **options).total)
    after = {name: value for name, value in vars(used).items() if not isinstance(value, np.ndarray)}
    assert all(after[name] is before[name] for name in before)
    assert dict(used.config) == config
    assert torch.equal(used.timesteps, timesteps)
    x = torch.zeros(1, 1, dtype=torch.float64)
    variance = float(used.q_posterior(x, x, 7, 4).log_variance.exp())
    fresh.set_timesteps(4, eta=1.0)
    assert variance == pytest.approx(0.09 * float(fresh.q_posterior(x, x, 7, 4).log_variance.exp()))


def test_the_chain_is_that_of_set_timesteps():
    images = oracles.grid_data(2, 2, 3)
    scheduler = ScratchDDPMScheduler(**SHORT, timestep_spacing="trailing", eta=0.7)
    scheduler.set_timesteps(5)
    spaced = measure(network_of(curved), scheduler, images, num_inference_steps=5)
    assert spaced.timesteps.tolist() == scheduler.timesteps.tolist()[::-1]
    listed = measure(network_of(curved), scheduler, images, timesteps=scheduler.timesteps.tolist())
    assert torch.equal(listed.total, spaced.total)
    # eta < 1 is another posterior, with another bound.
    eta_1 = ScratchDDPMScheduler.from_config(scheduler.config, eta=1.0)
    assert (measure(network_of(curved), eta_1, images, num_inference_steps=5).total != spaced.total).all()


def test_arguments_by_position_are_kept():
    """from_config takes them for defaults."""
    images = oracles.grid_data(2, 2, 3)
    named = ScratchDDPMScheduler(num_train_timesteps=12, beta_start=0.01, beta_end=0.5, beta_schedule="sigmoid")
    bits = measure(network_of(curved), ScratchDDPMScheduler(12, 0.01, 0.5, "sigmoid"), images)
    assert torch.equal(bits.total, measure(network_of(curved), named, images).total)
    assert bits.terms.shape == (2, 12)


def test_clipping_can_be_overridden():
    images = oracles.grid_data(4, 2, 3)
    base = ScratchDDPMScheduler(**SHORT)
    variants = {
        clip: ScratchDDPMScheduler(**SHORT, clip_sample=clip, thresholding=thresholding, sample_max_value=1.5)
        for clip, thresholding in ((True, False), (False, False), ("threshold", True))
    }
    totals = {clip: measure(network_of(curved), variant, images).total for clip, variant in variants.items()}
    assert len({tuple(total.tolist()) for total in totals.values()}) == 3
    for scheduler, clip in itertools.product((base, *variants.values()), (True, False)):
        assert torch.equal(measure(network_of(curved), scheduler, images, clip_sample=clip).total, totals[clip])


@pytest.mark.full
def test_class_labels():
    scheduler, images = ScratchDDPMScheduler(**SHORT), oracles.grid_data(3, 1, 8, 8)
    unet = tiny_unet(num_class_embeds=5)
    null = measure(unet, scheduler, images)
    assert torch.equal(measure(unet, scheduler, images, class_labels=[4, 4, 4]).total, null.total)
    mixed = measure(unet, scheduler, images, class_labels=torch.tensor([4, 1, 4]), batch_size=2)
    differs = (mixed.total - null.total).abs() > 1e-6
    assert differs.tolist() == [False, True, False]
    # Alone in a batch, an image has steps of the solver of its own.
    alone = {"rtol": 1e-3, "atol": 1e-3, "batch_size": 1}
    ode = [measure_ode(unet, scheduler, images, class_labels=labels, **alone).total for labels in (None, [4, 1, 4])]
    assert (ode[0] != ode[1]).tolist() == [False, True, False]


def test_stock_networks_and_zero_terminal_snr():
    unet = randomised(StockUNet(**{**TINY_NETWORK, "out_channels": 2})).double().eval()
    process = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "variance_type": "learned_range"}
    scheduler, images = ScratchDDPMScheduler(**SHORT, **process), oracles.grid_data(3, 1, 8, 8)
    bits = measure(unet, scheduler, images)
    assert (bits.prior == 0).all()
    assert torch.isfinite(bits.terms).all()
    own = ScratchUNet2DModel.from_stock(unet)
    same(measure(own, scheduler, images), bits, 1e-5)
    same(measure_ode(own, scheduler, images), measure_ode(unet, scheduler, images), 1e-4)


PROCESSES = """
import sys, torch
from accelerate import Accelerator
from helpers.networks import TINY_NETWORK, randomised
from ddpm_from_scratch import ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from helpers import oracles

accelerator = Accelerator()
unet = accelerator.prepare(randomised(ScratchUNet2DModel(**TINY_NETWORK, num_class_embeds=5)).double()).eval()
scheduler = ScratchDDPMScheduler(12, beta_start=0.01, beta_end=0.5)
images, labels = oracles.grid_data(5, 1, 8, 8), [0, 1, 2, 3, 4]
results = [
    tuple(bits_per_dim(unet, scheduler, images[:count], class_labels=labels[:count], batch_size=2, num_terms=num_terms,
                       accelerator=accelerator, progress=False))
    for count, num_terms in ((5, None), (5, 4), (1, None))
]
torch.save((accelerator.num_processes, results), f"{sys.argv[1]}/{accelerator.process_index}.pt")
accelerator.end_training()
"""


@pytest.mark.full
def test_two_processes_equal_one(tmp_path):
    """Also with an odd number of images, and with fewer images than processes."""
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": python_path("src", "tests")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    unet = randomised(ScratchUNet2DModel(**TINY_NETWORK, num_class_embeds=5)).double().eval()
    scheduler, images = ScratchDDPMScheduler(**SHORT), oracles.grid_data(5, 1, 8, 8)
    for rank in range(2):
        processes, results = torch.load(tmp_path / f"{rank}.pt")
        assert processes == 2
        for result, (count, num_terms) in zip(results, ((5, None), (5, 4), (1, None)), strict=True):
            labels = list(range(count))
            expected = measure(unet, scheduler, images[:count], class_labels=labels, num_terms=num_terms)
            same(type(expected)(*result), expected, 1e-10)


# --- the probability-flow ODE ----------------------------------------------------------------------------------------


class Continuous:
    """ᾱ at fractional timesteps as the ODE has them: its angles and t are tied by a monotone cubic interpolation."""

    def __init__(self, alpha_bar):
        from scipy.interpolate import PchipInterpolator

        angles = np.arccos(np.sqrt(alpha_bar))
        self.angles = np.linspace(angles[0], angles[-1], 200_001)
        self.t = PchipInterpolator(angles, np.arange(len(angles)))(self.angles)

    def __call__(self, t):
        angle = np.interp(t[0].item(), self.t, self.angles)
        return math.cos(angle) ** 2


def output_of(epsilon, x, alpha_bar, prediction_type):
    x_0 = (x - (1 - alpha_bar) ** 0.5 * epsilon) / max(alpha_bar, 1e-30) ** 0.5
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * epsilon - (1 - alpha_bar) ** 0.5 * x_0
    return epsilon if prediction_type == "epsilon" else x_0


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("mean", [0.0, 0.4])
def test_the_ode_finds_the_entropy_of_gaussian_data(mean, prediction_type):
    data, continuous = Rounded(mean, 0.15, LINEAR.alpha_bar, shape=(8, 64)), Continuous(LINEAR.alpha_bar)
    calls = []

    def network(x, t):
        calls.append(t)
        return output_of(data.exact.epsilon(x, continuous(t)), x, continuous(t), prediction_type)

    scheduler = ScratchDDPMScheduler(prediction_type=prediction_type)
    bits = measure_ode(network_of(network), scheduler, data.images, batch_size=5)
    assert float(bits.mean().total) == pytest.approx(data.entropy, abs=0.01)
    torch.testing.assert_close(bits.total, bits.prior + bits.divergence + math.log2(127.5))
    # Two batches, of 5 and 3 images.
    assert bits.evaluations[0] + bits.evaluations[-1] == len(calls)
    assert bits.evaluations.tolist() == [bits.evaluations[0]] * 5 + [bits.evaluations[-1]] * 3
    assert 20 < bits.evaluations[0] < 200
    assert float(bits.mean().evaluations) == pytest.approx(len(calls) / 2, rel=0.2)
    assert float(bits.standard_error().total) == pytest.approx(bits.total.std() / 8**0.5)
    fractional = torch.stack([t[0] for t in calls])
    assert fractional.min() == pytest.approx(0, abs=1e-9)
    assert fractional.max() == pytest.approx(999)
    assert (fractional != fractional.round()).any()


def test_the_ode_from_pure_noise_itself():
    """At zero terminal SNR, where v is all that a network can say."""
    scheduler = ScratchDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    root = np.sqrt(LINEAR.alpha_bar)
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2  # Lin et al., algorithm 1
    data, continuous = Rounded(0.3, 0.15, alpha_bar, shape=(8, 64)), Continuous(alpha_bar)

    def network(x, t):
        a = continuous(t)
        # E[v | x_t] = φ-derivative of the exact flow, whose mean and variance are those of the marginals.
        mean, variance = data.exact.marginal(a)
        shrink = (1 - data.exact.variance) * math.sqrt(a * (1 - a)) / variance
        return shrink * (x - mean) - math.sqrt(1 - a) * data.exact.mean

    bits = measure_ode(network_of(network), scheduler, data.images)
    assert float(bits.mean().total) == pytest.approx(data.entropy, abs=0.01)


# Of mean 0, as is the pure noise: their difference at T - 1 is then negligible.
MIXTURE = {"weights": (0.3, 0.7), "means": (-0.56, 0.24), "deviations": (0.2, 0.12)}


def mixture(alpha_bar):
    """Weights, means and variances of the components of x_t."""
    weights, means, deviations = (torch.tensor(values, dtype=torch.float64) for values in MIXTURE.values())
    return weights, alpha_bar**0.5 * means, alpha_bar * deviations**2 + 1 - alpha_bar


def mixture_epsilon(x, alpha_bar):
    """E[ε | x_t] = √(1 - ᾱ) Σ share (x - mean) / variance."""
    weights, means, variances = mixture(alpha_bar)
    distance = x[..., None] - means
    share = torch.softmax(torch.log(weights) - 0.5 * torch.log(variances) - distance**2 / (2 * variances), -1)
    return (1 - alpha_bar) ** 0.5 * (share * distance / variances).sum(-1)


def test_the_ode_finds_the_density_of_each_image_of_a_mixture():
    """Not Gaussian: the divergence changes along x. The density at the dequantised images is known."""
    continuous = Continuous(LINEAR.alpha_bar)
    recorder = Recorder(network_of(lambda x, t: mixture_epsilon(x, continuous(t))))
    rng = np.random.default_rng(0)
    which = rng.random((20, 10)) < 0.3
    x = np.where(which, rng.normal(-0.56, 0.2, which.shape), rng.normal(0.24, 0.12, which.shape))
    images = torch.from_numpy(np.round((x.clip(-1, 1) + 1) * 127.5) / 127.5 - 1)
    bits = measure_ode(recorder, ScratchDDPMScheduler(), images, rtol=1e-7, atol=1e-7)

    dequantised = recorder.seen[0][0].detach()
    shift = (dequantised - images) * 127.5
    assert shift.abs().max() < 0.5
    assert float(shift.std()) == pytest.approx(12**-0.5, rel=0.1)
    assert abs(float(shift.mean())) < 5 * 12**-0.5 / shift.numel() ** 0.5
    weights, means, variances = mixture(LINEAR.alpha_bar[0])
    normal = torch.distributions.Normal(means, variances**0.5)
    density = torch.logsumexp(torch.log(weights) + normal.log_prob(dequantised[..., None]), -1)
    expected = -density.mean(1) * BITS - math.log2(2 / 255)
    torch.testing.assert_close(bits.total, expected, rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1


def test_the_trace_of_dependent_dimensions_has_no_bias():
    """Gaussian data with a covariance: Jacobians with entries beside the diagonal, which probes only average out."""
    covariance = torch.tensor([[0.09, 0.06, 0.0], [0.06, 0.06, 0.01], [0.0, 0.01, 0.04]], dtype=torch.float64)
    continuous, identity = Continuous(LINEAR.alpha_bar), torch.eye(3, dtype=torch.float64)

    def epsilon(x, t):
        a = continuous(t)
        return (1 - a) ** 0.5 * x @ torch.linalg.inv(a * covariance + (1 - a) * identity)

    x = oracles.randn(300, 3) @ torch.linalg.cholesky(covariance).T
    images = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    a = float(LINEAR.alpha_bar[0])
    normal = torch.distributions.MultivariateNormal(torch.zeros(3).double(), a * covariance + (1 - a) * identity)
    deviations = []
    for num_probes in (1, 4):
        recorder = Recorder(network_of(epsilon))
        bits = measure_ode(recorder, ScratchDDPMScheduler(), images, num_probes=num_probes, batch_size=300)
        exact = -normal.log_prob(recorder.seen[0][0].detach()) / 3 * BITS - math.log2(2 / 255)
        difference = bits.total - exact
        deviations.append(float(difference.std()))
        assert abs(float(difference.mean())) < 4 * deviations[-1] / 300**0.5
    assert deviations[0] > 0.1
    assert deviations[0] / deviations[1] == pytest.approx(2, rel=0.2)  # the root of the number of vectors


@pytest.mark.full
def test_the_ode_of_a_network_depends_on_the_seed_and_next_to_nothing_on_batches():
    unet, scheduler, images = tiny_unet(), ScratchDDPMScheduler(**SHORT), oracles.grid_data(4, 1, 8, 8)
    whole = measure_ode(unet, scheduler, images)
    assert torch.equal(measure_ode(unet, scheduler, images).total, whole.total)
    torch.testing.assert_close(measure_ode(unet, scheduler, images, batch_size=3).total, whole.total, rtol=0, atol=1e-3)
    assert (measure_ode(unet, scheduler, images, seed=1).total != whole.total).all()
    finer = measure_ode(unet, scheduler, images, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(finer.total, whole.total, rtol=0, atol=1e-3)
    assert (finer.evaluations > whole.evaluations).all()
    single = measure_ode(tiny_unet().float(), scheduler, images.float())
    torch.testing.assert_close(single.total, whole.total, rtol=0, atol=1e-3)
    assert all(weight.grad is None for weight in unet.parameters())


def test_without_scipy_the_ode_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match=r'pip install "ddpm-from-scratch\[metrics\]"'):
        measure_ode(network_of(curved), ScratchDDPMScheduler(), oracles.grid_data(1, 2))


# --- wrong calls -----------------------------------------------------------------------------------------------------


class NeverCalled:
    config, dtype, training = {}, torch.float32, False

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __call__(self, *_, **__):
        raise AssertionError("the network was called")


GRID = oracles.grid_data(2, 1, 4, 4).float()
CONDITIONAL = {"config": {"num_class_embeds": 5}}
OFF_GRID = GRID.clone()
OFF_GRID[1, 0, 2, 3] += 0.01 / 127.5
NOT_8_BIT = "images are not 8-bit: a value lies {} levels beside the grid"

# What both functions refuse: attributes of the network, images, options, and the message.
WRONG = {
    "off the grid": ({}, OFF_GRID, {}, NOT_8_BIT.format(r"0\.01")),
    "on [0, 255]": ({}, (GRID + 1) * 127.5, {}, NOT_8_BIT.format(r"3.*e\+04")),
    "on [0, 1]": ({}, (GRID + 1) / 2, {}, NOT_8_BIT.format(r"0\.5")),
    "beyond [-1, 1]": ({}, GRID * 0 + 1 + 2 / 255, {}, NOT_8_BIT.format("1")),
    "NaN": ({}, GRID * math.nan, {}, NOT_8_BIT.format("nan")),
    "infinite": ({}, GRID * 0 + math.inf, {}, NOT_8_BIT.format("inf")),
    "bfloat16 before": ({}, GRID.bfloat16().float(), {}, "16 bits"),
    "float16 before": ({}, GRID.half().float(), {}, "16 bits"),
    "bfloat16": ({}, GRID.bfloat16(), {}, r"torch.bfloat16 .* are not allowed: pass uint8 \[B, C, H, W\], or float32"),
    "whole numbers": ({}, GRID.long(), {}, r"torch.int64 and shape \(2, 1, 4, 4\) are not allowed: pass uint8"),
    "uint8 without channels": ({}, torch.zeros(2, 4, 4, dtype=torch.uint8), {}, r"\(2, 4, 4\) are not allowed"),
    "a float vector": ({}, torch.zeros(4) + 1, {}, r"shape \(4,\) are not allowed"),
    "no images": ({}, GRID[:0], {}, r"shape \(0, 1, 4, 4\) are not allowed: .* B >= 1"),
    "an array": ({}, GRID.numpy(), {}, "images is a ndarray: pass uint8"),
    "training mode": ({"training": True}, GRID, {}, r"in training mode, with dropout: call unet.eval\(\)"),
    "batch size": ({}, GRID, {"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
    "seed": ({}, GRID, {"seed": -1}, "seed=-1 must be a whole number, at least 0"),
    "labels of none": ({}, GRID, {"class_labels": [1, 2]}, "this network is not class-conditional"),
    "few labels": (CONDITIONAL, GRID, {"class_labels": [1]}, "class_labels has 1 entries for 2 images: pass one"),
    "unknown label": (CONDITIONAL, GRID, {"class_labels": [1, 5]}, r"\[1, 5\] must be .* from 0 to 4"),
    "names": (CONDITIONAL, GRID, {"class_labels": ["a", "b"]}, "pass numbers"),
}


@pytest.mark.parametrize("function", [measure, measure_ode])
@pytest.mark.parametrize(("attributes", "images", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls_are_refused_before_the_network_is_called(function, attributes, images, options, message):
    with pytest.raises(ValueError, match=message):
        function(NeverCalled(**attributes), ScratchDDPMScheduler(), images, **options)


@pytest.mark.parametrize("function", [measure, measure_ode])
def test_stock_schedulers_are_refused(function):
    with pytest.raises(ValueError, match=r"scheduler is a DDPMScheduler: pass ScratchDDPMScheduler\.from_config"):
        function(NeverCalled(), DDPMScheduler(), GRID)


WRONG_BOUNDS = {
    "both chains": ({"num_inference_steps": 5, "timesteps": [3, 1]}, "Pass either num_inference_steps or timesteps"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number from 1 to 12"),
    "ascending": ({"timesteps": [1, 3]}, "must descend strictly within 11..0"),
    "empty chain": ({"timesteps": []}, "non-empty list"),
    "no terms": ({"num_terms": 0}, "num_terms=0 must be a whole number from 2 to 12"),
    "one term": ({"num_terms": 1}, "num_terms=1 must be a whole number from 2 to 12"),
    "many terms": ({"num_terms": 13}, "num_terms=13 must be a whole number from 2 to 12"),
    "more terms than steps": ({"num_terms": 6, "num_inference_steps": 5}, "num_terms=6 .* from 2 to 5"),
    "terms of one step": ({"num_terms": 2, "timesteps": [5]}, "num_terms=2 .* from 1 to 1"),
    "half terms": ({"num_terms": 2.5}, "num_terms=2.5 must be a whole number"),
    "clipping": ({"clip_sample": "no"}, "clip_sample='no' must be True, False or None"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_BOUNDS.values(), ids=WRONG_BOUNDS)
def test_wrong_chains_are_refused_before_the_network_is_called(options, message):
    with pytest.raises(ValueError, match=message):
        measure(NeverCalled(), ScratchDDPMScheduler(**SHORT), GRID, **options)


def test_eta_0_is_refused_by_the_bound_only():
    scheduler = ScratchDDPMScheduler(**SHORT, eta=0.0)
    with pytest.raises(ValueError, match=r"infinite at eta=0.*from_config\(scheduler.config, eta=1.0\)"):
        measure(NeverCalled(), scheduler, GRID)
    images = oracles.grid_data(2, 3)
    expected = measure_ode(network_of(curved), ScratchDDPMScheduler(**SHORT), images)
    assert torch.equal(measure_ode(network_of(curved), scheduler, images).total, expected.total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes=0"),
        ({"rtol": 0}, r"rtol=0 .*\[1e-12, 1\]"),
        ({"rtol": "1e-5"}, "rtol='1e-5' must be a number"),
        ({"atol": -1}, r"atol=-1 .*\[0, 1\]"),
    ],
)
def test_wrong_odes_are_refused_before_the_network_is_called(options, message):
    with pytest.raises(ValueError, match=message):
        measure_ode(NeverCalled(), ScratchDDPMScheduler(), GRID, **options)


def test_odes_that_cannot_be_solved(monkeypatch):
    with pytest.raises(ValueError, match=r"in torch.bfloat16, too coarse for the solver: pass unet.float\(\)"):
        measure_ode(NeverCalled(dtype=torch.bfloat16), ScratchDDPMScheduler(), GRID)
    with pytest.raises(ValueError, match="num_train_timesteps=1"):
        measure_ode(NeverCalled(), ScratchDDPMScheduler(1), GRID)
    gave_up = types.SimpleNamespace(success=False, message="too small a step")
    monkeypatch.setattr("scipy.integrate.solve_ivp", lambda *_, **__: gave_up)
    with pytest.raises(RuntimeError, match="The solver gave up on images 0 to 1: too small a step"):
        measure_ode(network_of(curved), ScratchDDPMScheduler(), GRID)


def test_a_network_that_is_not_finite_is_named_with_the_timestep():
    broken = network_of(lambda x, t: torch.where((t == 5)[:, None], torch.nan, x))
    with pytest.raises(ValueError, match="bound of image 0 is NaN at t=5: the network's output is not finite"):
        measure(broken, ScratchDDPMScheduler(**SHORT), oracles.grid_data(2, 3))
    with pytest.raises(ValueError, match="not finite at t=0"):
        measure_ode(network_of(lambda x, t: x * math.nan), ScratchDDPMScheduler(**SHORT), oracles.grid_data(2, 3))
