"""Log-variances, predictions and sampling, against the papers' formulas and stock diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_from_scratch.diffusion.scheduler import ScratchDDPMScheduler
from helpers import oracles
from helpers.oracles import randn

T = 1000
ALL = torch.arange(T)
CHAIN = oracles.Chain(oracles.linear_betas())
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def make(**options):
    return ScratchDDPMScheduler(**{"clip_sample": False, **options})


# --- log-variances -------------------------------------------------------------------------------------------------


def reverse_log_variances(variance_type, timesteps, values):
    """[K, ...] of p_reverse over the descending timesteps of a chain, in one call."""
    scheduler = make(variance_type=variance_type)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    t = torch.from_numpy(timesteps.copy())
    s = torch.cat([t[1:], torch.tensor([-1])])
    x = torch.zeros_like(values)
    output = torch.cat([x, values], dim=1) if "learned" in variance_type else x
    return scheduler.p_reverse(output, x, t, s).log_variance.expand_as(x).numpy()


@pytest.mark.parametrize(
    "timesteps", [np.arange(T)[::-1], np.arange(0, T, 20)[::-1], np.array([999, 500, 100]), np.array([5])]
)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_reverse_log_variance_equals_the_oracle_and_is_finite(variance_type, timesteps):
    values = torch.tanh(randn(len(timesteps), 3))
    ours = reverse_log_variances(variance_type, timesteps, values)
    chain = CHAIN.respaced(timesteps[::-1])
    expected = chain.log_variance(variance_type, values.numpy()[::-1])[::-1]
    if expected.ndim == 1:
        expected = expected[:, None]
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, np.broadcast_to(expected, ours.shape), rtol=1e-9)


def test_the_default_pair_is_the_adjacent_one():
    full, adjacent = make(variance_type="fixed_large"), make(variance_type="fixed_large")
    x, output = randn(T, 2), randn(T, 2, seed=1)
    full.set_timesteps(10)  # s left out means s = t - 1 in the full chain, whatever chain is set
    for a, b in zip(full.p_reverse(output, x, ALL), adjacent.p_reverse(output, x, ALL, ALL - 1), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(full.q_posterior(output, x, ALL), adjacent.q_posterior(output, x, ALL, ALL - 1), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_posterior_log_variance_at_the_end_is_that_of_the_next_step_up_the_chain():
    scheduler = make()
    full = scheduler.q_posterior(*torch.zeros(2, T, 1, dtype=torch.float64), ALL).log_variance.flatten()
    assert torch.isfinite(full).all()
    assert full[0] == full[1]
    scheduler.set_timesteps(timesteps=[700, 300, 100])
    x = torch.zeros(1, 1, dtype=torch.float64)
    last, above = scheduler.q_posterior(x, x, 100, -1), scheduler.q_posterior(x, x, 300, 100)
    assert last.log_variance.item() == pytest.approx(above.log_variance.item())
    # A floor, say 1e-20, would make the first likelihood term of a learned range huge.
    assert full.min() > math.log(1e-6)


def test_learned_range_spans_the_posterior_and_the_step():
    x = torch.zeros(T, 1, dtype=torch.float64)
    learned = make(variance_type="learned_range")
    at = {v: learned.p_reverse(torch.cat([x, x + v], 1), x, ALL).log_variance.flatten() for v in (-1, 0, 1)}
    small = make(variance_type="fixed_small").p_reverse(x, x, ALL).log_variance.flatten()
    torch.testing.assert_close(at[-1], small, rtol=1e-12, atol=0)
    np.testing.assert_allclose(at[1].numpy(), np.log(CHAIN.beta), rtol=1e-9)
    # The geometric mean of the variances.
    torch.testing.assert_close(at[0].exp(), (at[-1].exp() * at[1].exp()).sqrt(), rtol=1e-12, atol=0)


# --- predictions ---------------------------------------------------------------------------------------------------

LIMITS = {
    "none": {"clip_sample": False},
    "clip": {"clip_sample": True},
    "clip_range": {"clip_sample": True, "clip_sample_range": 2.5},
    "threshold": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.6},
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_prediction_is_a_consistent_pair_at_every_t(prediction_type, limit):
    x_t, output = randn(T, 3, 4), randn(T, 3, 4, seed=1)
    prediction = make(prediction_type=prediction_type, **LIMITS[limit]).predict(output, x_t, ALL)
    signal, sigma = (torch.from_numpy(np.sqrt(a))[:, None, None] for a in (CHAIN.alpha_bar, 1 - CHAIN.alpha_bar))
    torch.testing.assert_close(signal * prediction.x_0 + sigma * prediction.epsilon, x_t, rtol=0, atol=1e-10)
    assert prediction.variance_values is None
    bound = {"none": math.inf, "clip": 1, "clip_range": 2.5, "threshold": 1}[limit]
    assert prediction.x_0.abs().max() <= bound
    if limit == "none":
        stated = {
            "epsilon": prediction.epsilon,
            "sample": prediction.x_0,
            "v_prediction": signal * prediction.epsilon - sigma * prediction.x_0,
        }[prediction_type]
        torch.testing.assert_close(stated, output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("most", [0.5, 1.0, 1.7])
def test_thresholding_equals_stock(most):
    options = {
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.8,
        "sample_max_value": most,
        "prediction_type": "sample",
    }
    stock, ours = DDPMScheduler(**options), ScratchDDPMScheduler(**options)
    stock.alphas_cumprod = torch.from_numpy(CHAIN.alpha_bar)
    # Scales on both sides of the range in which the threshold moves, [1, sample_max_value].
    x = randn(8, 3, 6, 6) * torch.tensor([0.1, 0.5, 0.8, 1, 1.2, 1.4, 2, 9]).reshape(-1, 1, 1, 1)
    for t in (0, 1, 500, 999):
        expected = stock.step(x, t, x, generator=torch.Generator().manual_seed(0))
        result = ours.step(x, t, x, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=0, atol=1e-9)
    # As in stock, it takes the place of clipping.
    assert torch.equal(
        ScratchDDPMScheduler(**options, clip_sample_range=0.1).predict(x, x, 5).x_0, ours.predict(x, x, 5).x_0
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x_0_is_clipped_before_the_mean(prediction_type):
    x_t, output = 3 * randn(T, 4), 3 * randn(T, 4, seed=1)
    free, clipped = (make(prediction_type=prediction_type, clip_sample=c) for c in (False, True))
    x_0 = free.predict(output, x_t, ALL).x_0.clamp(-1, 1)
    torch.testing.assert_close(clipped.p_reverse(output, x_t, ALL).mean, free.q_posterior(x_0, x_t, ALL).mean)


def test_the_second_half_of_the_channels_is_handed_on():
    output, x = randn(2, 6, 4, 4), randn(2, 3, 4, 4, seed=1)
    prediction = make().predict(output, x, 3)
    assert torch.equal(prediction.epsilon, output[:, :3])
    assert torch.equal(prediction.variance_values, output[:, 3:])


# --- sampling ------------------------------------------------------------------------------------------------------


def learned_output(output, values):
    return torch.cat([output, values.expand_as(output)], dim=1)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("count", [1, 5, 50])
def test_log_variants_equal_their_twins_bitwise(kind, count):
    def chain(variance_type):
        scheduler = ScratchDDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(count)
        x, generator = randn(2, 3, 4, 4, dtype=torch.float32), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(
                oracles.analytic_network(x, int(t), CHAIN.alpha_bar, "epsilon"), t, x, generator
            ).prev_sample
        return x

    assert torch.equal(chain(kind), chain(f"{kind}_log"))
    assert torch.isfinite(chain(kind)).all()


def test_learned_holds_the_log_variance():
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for twin, table in (("fixed_small", CHAIN.small), ("fixed_large", CHAIN.large)):
        for t in (1, 2, 500, 999):
            values = torch.full((1, 1, 1, 1), table[t], dtype=torch.float64)
            learned = make(variance_type="learned").step(
                learned_output(output, values), t, x, torch.Generator().manual_seed(1)
            )
            fixed = make(variance_type=twin).step(output, t, x, torch.Generator().manual_seed(1))
            torch.testing.assert_close(learned.prev_sample, fixed.prev_sample, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned"])
def test_stock_steps_to_nan_where_ours_does_not(variance_type):
    x = randn(2, 3, 4, 4)
    output = torch.cat([x, x - 5], 1) if variance_type == "learned" else x
    generator = torch.Generator().manual_seed(0)
    assert torch.isnan(DDPMScheduler(variance_type=variance_type).step(output, 500, x, generator).prev_sample).any()
    assert torch.isfinite(
        ScratchDDPMScheduler(variance_type=variance_type).step(output, 500, x, generator).prev_sample
    ).all()


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("timesteps", [[100], [999, 1], [0], [500, 99]])
def test_the_last_step_adds_no_noise_wherever_it_starts(timesteps, variance_type):
    scheduler = make(variance_type=variance_type)
    scheduler.set_timesteps(timesteps=timesteps)
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    output = torch.cat([output, output], 1) if "learned" in variance_type else output
    t = timesteps[-1]
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    result = scheduler.step(output, t, x, generator)
    assert torch.equal(result.prev_sample, scheduler.p_reverse(output, x, t, -1).mean)
    torch.testing.assert_close(result.prev_sample, result.pred_original_sample, rtol=0, atol=1e-12)
    assert torch.equal(generator.get_state(), before)  # nothing is drawn


@pytest.mark.parametrize(
    ("options", "timesteps", "deviation"),
    [({"steps_offset": 1}, None, 0.015), ({}, [100], 0.32), ({"timestep_spacing": "trailing"}, None, 0.32)],
)
def test_stock_adds_noise_to_the_final_sample_under_fixed_large(options, timesteps, deviation):
    x = torch.zeros(64, 3, 8, 8, dtype=torch.float64)
    finals = []
    for kind in (DDPMScheduler, ScratchDDPMScheduler):
        scheduler = kind(variance_type="fixed_large", **options)
        scheduler.set_timesteps(**({"timesteps": timesteps} if timesteps else {"num_inference_steps": 10}))
        finals.append(scheduler.step(x, scheduler.timesteps[-1], x, torch.Generator().manual_seed(0)).prev_sample)
    assert finals[0].std().item() == pytest.approx(deviation, rel=0.02)
    assert finals[1].std() == 0


CHAINS = [pytest.param(1000, "leading", marks=pytest.mark.full)]
CHAINS += [(count, spacing) for count in (100, 50, 10) for spacing in SPACINGS]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("count", "spacing"), CHAINS)
def test_sampling_chains_equal_stock(count, spacing, prediction_type):
    """Same seeds, stock as it comes and stock with a float64 table of ᾱ, compared after every step.

    At K = T the three spacings are one.
    """
    for variance_type in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        options = {"prediction_type": prediction_type, "variance_type": variance_type, "timestep_spacing": spacing}
        doubled = variance_type == "learned_range"
        as_it_comes, exact, ours = DDPMScheduler(**options), DDPMScheduler(**options), ScratchDDPMScheduler(**options)
        exact.alphas_cumprod = torch.from_numpy(CHAIN.alpha_bar)
        schedulers = {"stock": as_it_comes, "exact": exact, "ours": ours}
        x = dict.fromkeys(schedulers, randn(2, 1, 3, 3, seed=7))
        generators = {name: torch.Generator().manual_seed(1) for name in schedulers}
        for scheduler in schedulers.values():
            scheduler.set_timesteps(count)
        assert ours.timesteps.tolist() == exact.timesteps.tolist()
        difference = {"stock": 0.0, "exact": 0.0}
        chain = ours.timesteps.tolist()
        # Stock adds noise to the final sample unless it comes from t = 0 (see the test above): leave that step out.
        if chain[-1] != 0 and variance_type in ("fixed_large", "learned_range"):
            chain = chain[:-1]
        for t in chain:
            for name, scheduler in schedulers.items():
                output = oracles.analytic_network(x[name], t, CHAIN.alpha_bar, prediction_type, doubled)
                x[name] = scheduler.step(output, t, x[name], generators[name]).prev_sample
            for name in difference:
                difference[name] = max(difference[name], (x[name] - x["ours"]).abs().max().item())
        assert difference["exact"] < 1e-9
        assert difference["stock"] < 5e-4


@pytest.mark.parametrize("count", [1000, 10])
def test_float32_sampling_chain_equals_stock(count):
    stock, ours = DDPMScheduler(), ScratchDDPMScheduler()
    a = b = randn(2, 3, 4, 4, dtype=torch.float32)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    stock.set_timesteps(count)
    ours.set_timesteps(count)
    for t in ours.timesteps:
        outputs = [oracles.analytic_network(x, int(t), CHAIN.alpha_bar, "epsilon") for x in (a, b)]
        a = stock.step(outputs[0], t, a, generators[0]).prev_sample
        b = ours.step(outputs[1], t, b, generators[1]).prev_sample
    torch.testing.assert_close(b, a, rtol=0, atol=5e-4)


SHAPES = [(4, 2), (4, 3, 10), (4, 3, 6, 6), (4, 2, 3, 4, 5)]
# A sample without channels has no second half of channels to learn a variance in.
SHAPES_AND_VARIANCES = [((4,), kind) for kind in VARIANCE_TYPES[:4]] + [
    (s, kind) for s in SHAPES for kind in VARIANCE_TYPES
]


@pytest.mark.parametrize(("shape", "variance_type"), SHAPES_AND_VARIANCES)
def test_samples_of_any_shape(shape, variance_type):
    learned = variance_type in ("learned", "learned_range")
    scheduler = ScratchDDPMScheduler(variance_type=variance_type)
    x_0, noise, t = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 1, 500, 999])
    x_t = scheduler.add_noise(x_0, noise, t)
    output = torch.cat([noise, torch.zeros_like(noise)], 1) if learned else noise
    assert (
        x_t.shape
        == scheduler.get_velocity(x_0, noise, t).shape
        == scheduler.training_target(x_0, noise, t).shape
        == shape
    )
    assert scheduler.simple_loss(output, x_0, noise, t).shape == (4,)
    terms = scheduler.vlb_term(output, x_0, x_t, t)
    assert terms.shape == scheduler.prior_kl(x_0).shape == (4,)
    assert scheduler.step(output, 500, x_t, torch.Generator().manual_seed(0)).prev_sample.shape == shape
    # Each sample by itself, with its own int timestep.
    for i, timestep in enumerate(t.tolist()):
        one = slice(i, i + 1)
        torch.testing.assert_close(scheduler.add_noise(x_0[one], noise[one], timestep), x_t[one], rtol=0, atol=0)
        torch.testing.assert_close(scheduler.vlb_term(output[one], x_0[one], x_t[one], timestep), terms[one])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_dtype_in_is_dtype_out_and_16_bits_compute_in_float32(prediction_type, dtype):
    scheduler = ScratchDDPMScheduler(prediction_type=prediction_type, variance_type="learned_range")
    x, noise = (randn(3, 2, 4, seed=i).to(dtype) for i in range(2))
    output = torch.cat([noise, torch.tanh(x)], 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for t in (0, 1, 500, 999):
        for method in (scheduler.add_noise, scheduler.get_velocity):
            assert method(x, noise, t).dtype == dtype
            assert torch.equal(method(x, noise, t), method(x.to(wide), noise.to(wide), t).to(dtype))
        step, reverse = (
            scheduler.step(output, t, x, torch.Generator().manual_seed(0)),
            scheduler.p_reverse(output, x, t),
        )
        assert step.prev_sample.dtype == step.pred_original_sample.dtype == dtype
        assert reverse.mean.dtype == wide
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        deviation = torch.exp(reverse.log_variance / 2) if t else 0
        assert torch.equal(step.prev_sample, (reverse.mean + deviation * drawn.to(wide)).to(dtype))
        assert scheduler.simple_loss(output, x, noise, t).dtype == wide
        assert scheduler.scale_model_input(x, t) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_output_does_not_round_the_noise_of_a_float32_sample(dtype):
    # Under autocast the network's output is 16 bit and the sample float32.
    scheduler, x = ScratchDDPMScheduler(), randn(2, 3, 4, 4, dtype=torch.float32)
    output = randn(2, 3, 4, 4, seed=1).to(dtype)
    steps = [scheduler.step(same, 500, x, torch.Generator().manual_seed(0)) for same in (output, output.float())]
    assert steps[0].prev_sample.dtype == torch.float32
    assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)


def test_samples_without_channels_can_be_thresholded():
    scheduler = ScratchDDPMScheduler(thresholding=True, sample_max_value=2.0, prediction_type="sample")
    x_0 = torch.tensor([-5.0, -1.5, 0.5])
    torch.testing.assert_close(scheduler.predict(x_0, x_0, 3).x_0, torch.tensor([-1.0, -1.0, 0.5]))


def test_step_returns_what_return_dict_says():
    scheduler, x = ScratchDDPMScheduler(), randn(1, 1, 2, 2)
    as_dict = scheduler.step(x, 5, x, torch.Generator().manual_seed(0))
    as_tuple = scheduler.step(x, 5, x, torch.Generator().manual_seed(0), return_dict=False)
    assert type(as_dict) is type(DDPMScheduler().step(x, 5, x))
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_dict.prev_sample, as_tuple[0])
    assert torch.equal(as_dict.pred_original_sample, as_tuple[1])


def test_step_follows_the_chain_that_is_set():
    # Every pair of one list: the same t goes to another s under another chain.
    scheduler, x = make(), randn(1, 1, 2, 2)
    for chain in ([999, 500, 20], [500, 499], [500]):
        scheduler.set_timesteps(timesteps=chain)
        for t, s in zip(chain, [*chain[1:], -1], strict=True):
            mean = scheduler.q_posterior(scheduler.predict(x, x, t).x_0, x, t, s).mean
            drawn = [scheduler.step(x, t, x, torch.Generator().manual_seed(seed)).prev_sample for seed in range(2)]
            noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype) for i in range(2)]
            deviation = 0 if s < 0 else CHAIN.respaced(np.array([s, t])).posterior_variance[1] ** 0.5
            for a, b in zip(drawn, noise, strict=True):
                torch.testing.assert_close(a, mean + deviation * b, rtol=1e-9, atol=1e-9)


def test_image_i_of_a_list_of_generators_does_not_depend_on_the_batch():
    def sample(seeds):
        scheduler = ScratchDDPMScheduler(variance_type="fixed_large")
        scheduler.set_timesteps(10)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        x = torch.cat([torch.randn(1, 3, 4, 4, generator=generator) for generator in generators])
        for t in scheduler.timesteps:
            x = scheduler.step(
                oracles.analytic_network(x, int(t), CHAIN.alpha_bar, "epsilon"), t, x, generators
            ).prev_sample
        return x

    batch = sample([3, 1, 4])
    for i, seed in enumerate([3, 1, 4]):
        torch.testing.assert_close(sample([seed]), batch[i : i + 1], rtol=0, atol=1e-5)
    assert not torch.equal(batch[0], batch[1])


def test_the_tables_stay_as_they_are():
    # Stock moves its table of ᾱ to the device and dtype of what it last saw.
    scheduler = ScratchDDPMScheduler()
    before = scheduler.alphas_cumprod.clone()
    x = randn(2, 3, dtype=torch.float16)
    scheduler.add_noise(x, x, torch.tensor([3, 4]))
    assert torch.equal(scheduler.alphas_cumprod, before)
    assert scheduler.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("chain", [{"eta": 0.0, "num_inference_steps": 2}, {"timesteps": [5]}])
def test_a_step_refuses_a_network_that_gives_no_variance(chain):
    """Also where it would not be used: in a step without noise."""
    scheduler = ScratchDDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(**chain)
    x = randn(2, 1, 4, 4, seed=0)
    with pytest.raises(ValueError, match="needs a network with twice the channels"):
        scheduler.step(x, scheduler.timesteps[-1], x)
