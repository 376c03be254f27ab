"""Noise schedules against their definitions, timestep spacings against stock diffusers and their own properties."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_from_scratch.diffusion.scheduler import ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.schedules import BETA_SCHEDULES
from helpers import oracles

SPACINGS = ("leading", "linspace", "trailing")
T = 1000


def alpha_bar_of(scheduler: ScratchDDPMScheduler) -> np.ndarray:
    """[T] ᾱ in float64, read off q(x_t | x_0) at x_0 = 1."""
    mean = scheduler.q_marginal(torch.ones(len(scheduler), 1, dtype=torch.float64), torch.arange(len(scheduler))).mean
    return mean.squeeze(1).numpy() ** 2


def spaced(scheduler: ScratchDDPMScheduler | DDPMScheduler, count: int) -> np.ndarray:
    scheduler.set_timesteps(count)
    return scheduler.timesteps.numpy()


# --- noise schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_schedule_follows_its_definition(name, steps):
    chain = oracles.Chain(oracles.BETAS[name](steps))
    scheduler = ScratchDDPMScheduler(steps, beta_schedule=name)
    np.testing.assert_allclose(alpha_bar_of(scheduler), chain.alpha_bar, rtol=1e-11)
    for attribute, expected in (("betas", chain.beta), ("alphas", chain.alpha), ("alphas_cumprod", chain.alpha_bar)):
        table = getattr(scheduler, attribute)
        assert table.dtype == torch.float32
        np.testing.assert_allclose(table.numpy(), expected, rtol=2e-7)


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2"])
def test_schedule_equals_stock(name, steps):
    stock = DDPMScheduler(steps, beta_schedule=name)
    ours = ScratchDDPMScheduler(steps, beta_schedule=name)
    torch.testing.assert_close(ours.betas, stock.betas, rtol=0, atol=3e-7)
    # The drift of a cumulative product of a thousand float32 factors.
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=2e-4, atol=0)


def test_other_beta_range_reaches_every_schedule_that_has_one():
    for name in ("linear", "scaled_linear", "sigmoid"):
        chain = oracles.Chain(oracles.BETAS[name](50, 0.001, 0.05))
        scheduler = ScratchDDPMScheduler(50, beta_start=0.001, beta_end=0.05, beta_schedule=name)
        np.testing.assert_allclose(alpha_bar_of(scheduler), chain.alpha_bar, rtol=1e-12)


def test_cosine_schedule_is_capped():
    assert ScratchDDPMScheduler(beta_schedule="squaredcos_cap_v2").betas.max() == np.float32(0.999)


def test_laplace_log_snr_follows_its_definition_and_stock_does_not():
    alpha_bar = alpha_bar_of(ScratchDDPMScheduler(beta_schedule="laplace"))
    np.testing.assert_allclose(np.log(alpha_bar / (1 - alpha_bar)), oracles.laplace_log_snr(), atol=1e-9)
    assert alpha_bar[-1] == pytest.approx(0.001, rel=0.01)
    # Stock takes the square root, the coefficient of x_0, for ᾱ.
    assert float(DDPMScheduler(beta_schedule="laplace").alphas_cumprod[-1]) == pytest.approx(0.0316, rel=0.01)


def test_stocks_laplace_betas_can_be_kept():
    stock = DDPMScheduler(beta_schedule="laplace")
    ours = ScratchDDPMScheduler(trained_betas=stock.betas.tolist())
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize("betas", [oracles.linear_betas(20), list(oracles.linear_betas(20)), oracles.cosine_betas(20)])
def test_trained_betas_are_taken_as_they_are(betas):
    chain = oracles.Chain(np.asarray(betas))
    scheduler = ScratchDDPMScheduler(20, beta_start=0.0, trained_betas=betas)  # beta_start is not used, nor checked
    np.testing.assert_allclose(alpha_bar_of(scheduler), chain.alpha_bar, rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2"])
def test_zero_terminal_snr_is_lin_algorithm_1(name):
    options = {"beta_schedule": name, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    root = np.sqrt(oracles.Chain(oracles.BETAS[name](T)).alpha_bar)
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    scheduler = ScratchDDPMScheduler(T, **options)
    alpha_bar = alpha_bar_of(scheduler)
    np.testing.assert_allclose(alpha_bar, expected, rtol=1e-9, atol=1e-16)
    assert alpha_bar[-1] == 0  # exactly: the last x_t is noise alone
    assert alpha_bar[0] == pytest.approx(root[0] ** 2, rel=1e-12)
    torch.testing.assert_close(scheduler.alphas_cumprod, DDPMScheduler(T, **options).alphas_cumprod, rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("count", [1, 2, 10, T])
def test_zero_terminal_snr_samples_are_finite(prediction_type, count):
    scheduler = ScratchDDPMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        variance_type="learned_range",
    )
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in spaced(scheduler, count)[:2]:
        output = torch.cat([x, torch.zeros_like(x)], dim=1)
        assert torch.isfinite(
            scheduler.p_reverse(output, x, int(t), scheduler.previous_timestep(int(t))).log_variance
        ).all()
        x = scheduler.step(output, int(t), x, generator=torch.Generator().manual_seed(1)).prev_sample
        assert torch.isfinite(x).all()


def test_stock_zero_terminal_snr_with_epsilon_is_nan_and_ours_refuses_it():
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    stock = DDPMScheduler(rescale_betas_zero_snr=True)
    assert torch.isnan(stock.step(x, 999, x).pred_original_sample).any()
    with pytest.raises(ValueError, match=r"zero terminal SNR.*'v_prediction' or 'sample'"):
        ScratchDDPMScheduler(rescale_betas_zero_snr=True)


# --- timestep spacings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 999, T])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing_gives_k_descending_timesteps_from_near_the_top(spacing, steps):
    scheduler = ScratchDDPMScheduler(steps, timestep_spacing=spacing)
    for count in range(1, steps + 1):
        chain = spaced(scheduler, count)
        assert chain.dtype == np.int64
        assert len(chain) == count == scheduler.num_inference_steps
        assert np.all(np.diff(chain) < 0)
        assert chain[-1] >= 0
        if spacing == "leading":
            assert steps - 1 >= chain[0] >= steps - steps / count - 1e-9
            assert chain[-1] == 0
        else:
            assert chain[0] == steps - 1
        if spacing == "linspace" and count > 1:
            assert chain[-1] == 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing_equals_stock_where_stock_is_right(spacing):
    ours, stock = ScratchDDPMScheduler(timestep_spacing=spacing), DDPMScheduler(timestep_spacing=spacing)
    exceptions = []
    for count in range(1, T + 1):
        a, b = spaced(ours, count), spaced(stock, count)
        if not np.array_equal(a, b):
            exceptions.append(count)
    if spacing == "leading":
        # Exactly the counts that do not divide T: there stock's stride T // K leaves the top of the chain out.
        assert exceptions == [count for count in range(1, T + 1) if T % count]
    elif spacing == "linspace":
        assert exceptions == [1]  # stock starts the only step, from pure noise, at t = 0
        assert spaced(stock, 1).tolist() == [0]
    else:
        # Floating-point arange runs one too far, and that timestep is -1.
        assert exceptions[:3] == [61, 103, 121]
        for count in exceptions:
            wrong = spaced(stock, count)
            assert len(wrong) == count + 1
            assert wrong[-1] == -1
            assert spaced(ours, count).tolist() == wrong[:-1].tolist()


@pytest.mark.parametrize(
    ("count", "stock_first", "first"), [(600, 599, 999), (501, 500, 999), (3, 666, 667), (30, 957, 967)]
)
def test_leading_spacing_of_a_count_that_does_not_divide_T(count, stock_first, first):
    # Stock starts from pure noise at a timestep where the data's share is still large.
    assert spaced(DDPMScheduler(), count)[0] == stock_first
    chain = spaced(ScratchDDPMScheduler(), count)
    assert chain[0] == first
    gaps = -np.diff(chain)
    assert gaps.max() - gaps.min() <= 1


def test_steps_offset_shifts_the_leading_spacing_alone():
    for spacing in SPACINGS:
        options = {"timestep_spacing": spacing, "steps_offset": 1}
        ours, stock = ScratchDDPMScheduler(**options), DDPMScheduler(**options)
        for count in (2, 10, 50, 500):
            assert spaced(ours, count).tolist() == spaced(stock, count).tolist()
    assert spaced(ScratchDDPMScheduler(steps_offset=1), 10).tolist() == [*range(901, 0, -100)]


def test_steps_offset_that_leaves_the_chain():
    stock = DDPMScheduler(steps_offset=1)
    stock.set_timesteps(T)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(IndexError):
        stock.step(x, stock.timesteps[0], x)
    with pytest.raises(ValueError, match=r"steps_offset=1 .*starts at timestep 1000; the last one is 999"):
        ScratchDDPMScheduler(steps_offset=1).set_timesteps(T)


@pytest.mark.parametrize(
    "chain", [[999], [0], [100], [999, 500, 3], [10, 9, 8, 0], np.array([7, 5]), torch.tensor([7, 5])]
)
def test_custom_timesteps(chain):
    ours, stock = ScratchDDPMScheduler(), DDPMScheduler()
    ours.set_timesteps(timesteps=chain)
    stock.set_timesteps(timesteps=list(map(int, chain)))
    assert ours.timesteps.tolist() == stock.timesteps.tolist() == list(chain)
    assert ours.timesteps.dtype == torch.int64
    assert ours.custom_timesteps
    for t in stock.timesteps:
        assert ours.previous_timestep(t) == ours.previous_timestep(int(t)) == int(stock.previous_timestep(t))
    ours.set_timesteps(10)
    assert not ours.custom_timesteps


@pytest.mark.parametrize("chosen", [None, {"num_inference_steps": 4}, {"timesteps": [12, 5, 0]}])
def test_the_previous_timestep_has_stocks_type(chosen):
    """An int on the whole chain; the entry of the list that was set, or -1, as a tensor."""
    ours, stock = ScratchDDPMScheduler(20), DDPMScheduler(20)
    for scheduler in (ours, stock) if chosen is not None else ():
        scheduler.set_timesteps(**chosen)
    for t in stock.timesteps.tolist():
        got, expected = ours.previous_timestep(t), stock.previous_timestep(t)
        assert type(got) is type(expected) is (int if chosen is None else torch.Tensor)
        assert got == expected
        if chosen is not None:
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert got.item() == expected.item()


def test_a_new_scheduler_has_the_whole_chain():
    ours, stock = ScratchDDPMScheduler(20), DDPMScheduler(20)
    assert ours.timesteps.tolist() == stock.timesteps.tolist() == list(range(19, -1, -1))
    assert [ours.previous_timestep(t) for t in range(20)] == [stock.previous_timestep(t) for t in range(20)]
    assert len(ours) == len(stock) == 20
    assert (ours.init_noise_sigma, ours.order, ours.num_inference_steps) == (1.0, 1, None)
