"""The figures of docs/theory.md: what each of them draws, and the example of points that one of them runs."""

import functools
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from ddpm_from_scratch import ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.pipeline import Frame
from ddpm_from_scratch.evaluation.likelihood import BitsPerDim, bits_per_dim
from helpers import oracles
from helpers.networks import TINY_NETWORK, randomised
from helpers.pages import load
from helpers.paths import DOCS


@pytest.fixture(scope="module")
def script():
    return load(DOCS / "make_figures.py")


@pytest.fixture(scope="module")
def drawings(script):
    return script.drawings


@pytest.fixture(scope="module")
def results():
    return json.loads((DOCS / "results" / "figures.json").read_text(encoding="utf-8"))


def lines(axis):
    """The curves of an axis, as pairs of arrays."""
    return [(np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in axis.lines]


def pictures(figure):
    """The images of a figure as [rows, columns, H, W], whatever rectangle of axes it has."""
    rows, columns = figure.axes[0].get_subplotspec().get_gridspec().get_geometry()
    arrays = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    return np.array(arrays).reshape(rows, columns, *arrays[0].shape)


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- the process ---------------------------------------------------------------------------------------------------


def test_forward_draws_x_t_of_each_schedule_and_time(drawings):
    betas = {"gentle": [0.1, 0.2, 0.3], "harsh": [0.5, 0.6, 0.7]}
    schedulers = {
        name: ScratchDDPMScheduler(num_train_timesteps=3, trained_betas=values) for name, values in betas.items()
    }
    x_0, noise = uniform(1, 2, 2), uniform(1, 2, 2, seed=1)
    figure, numbers = drawings.forward(x_0, noise, schedulers, (0, 2))
    alpha_bar = np.array([[0.9, 0.9 * 0.8 * 0.7], [0.5, 0.5 * 0.4 * 0.3]])[..., None, None]
    expected = np.sqrt(alpha_bar) * x_0[0].numpy() + np.sqrt(1 - alpha_bar) * noise[0].numpy()
    np.testing.assert_allclose(pictures(figure), expected, atol=1e-6)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["$t = 0$", "$t = 2$"]
    assert [figure.axes[place].get_ylabel() for place in (0, 2)] == ["gentle", "harsh"]
    np.testing.assert_allclose(list(numbers["signal"].values()), np.sqrt(alpha_bar[..., 0, 0]), atol=1e-12)
    assert figure.axes[1].get_xlabel() == f"{math.sqrt(0.9 * 0.8 * 0.7):.3f}"


def test_schedules_are_those_of_the_papers(drawings):
    schedulers = {
        name: ScratchDDPMScheduler(num_train_timesteps=20, beta_end=0.3, beta_schedule=name) for name in oracles.BETAS
    }
    figure, numbers = drawings.schedules(schedulers)
    left, right = figure.axes
    for name, (t, alpha_bar), (_, log_snr) in zip(schedulers, lines(left), lines(right), strict=True):
        make = oracles.BETAS[name]
        betas = make(20) if name in ("squaredcos_cap_v2", "laplace") else make(20, 1e-4, 0.3)
        expected = np.cumprod(1 - betas)
        np.testing.assert_allclose(t, np.arange(20))
        np.testing.assert_allclose(alpha_bar, expected, rtol=1e-9)
        np.testing.assert_allclose(log_snr, np.log(expected / (1 - expected)), rtol=1e-7, atol=1e-9)
        assert np.all(np.diff(alpha_bar) < 0)
        assert numbers[name]["first_t_with_more_noise_than_signal"] == np.argmax(expected < 0.5)
        assert numbers[name]["last_log_snr"] == pytest.approx(np.log(expected[-1] / (1 - expected[-1])))


def test_a_variant_of_a_schedule_has_its_colour_and_an_end_without_signal(drawings):
    options = {"num_train_timesteps": 20, "beta_end": 0.3, "prediction_type": "v_prediction"}
    schedulers = {
        "linear": ScratchDDPMScheduler(**options),
        "sigmoid": ScratchDDPMScheduler(**options, beta_schedule="sigmoid"),
        "linear, rescaled": ScratchDDPMScheduler(**options, rescale_betas_zero_snr=True),
    }
    figure, numbers = drawings.schedules(schedulers)
    linear, sigmoid, rescaled = figure.axes[0].lines
    assert linear.get_color() == rescaled.get_color() != sigmoid.get_color()
    assert linear.get_linestyle() != rescaled.get_linestyle()
    assert rescaled.get_ydata()[-1] == 0 and numbers["linear, rescaled"]["last_log_snr"] is None
    json.dumps(numbers, allow_nan=False)


def test_posterior_draws_the_coefficients_of_equation_7(drawings):
    figure, numbers = drawings.posterior({"linear": ScratchDDPMScheduler(num_train_timesteps=30, beta_end=0.2)})
    chain = oracles.Chain(oracles.linear_betas(30, 1e-4, 0.2))
    left, right = figure.axes
    (t, on_x_0), (_, on_x_t) = lines(left)
    np.testing.assert_allclose(t, np.arange(30))
    np.testing.assert_allclose(on_x_0, chain.on_x_0, rtol=1e-9)
    np.testing.assert_allclose(on_x_t, chain.on_x_t, rtol=1e-9, atol=1e-12)
    assert (on_x_0[0], on_x_t[0]) == pytest.approx((1, 0), abs=1e-12)
    ((t, ratio),) = lines(right)
    np.testing.assert_allclose(t, np.arange(1, 30))
    np.testing.assert_allclose(ratio, (chain.posterior_variance / chain.beta)[1:], rtol=1e-6)
    assert numbers["linear"]["first_t_where_x_t_weighs_more"] == np.argmax(chain.on_x_t > chain.on_x_0)
    assert numbers["linear"]["variance_ratio"]["10"] == pytest.approx(chain.posterior_variance[10] / chain.beta[10])


# --- the network ---------------------------------------------------------------------------------------------------


def network(predict, classes=None):
    """A network that is a function; class labels are kept for a look."""

    def call(x_t, t, class_labels=None):
        call.labels = class_labels
        return SimpleNamespace(sample=predict(x_t, t))

    call.config = {"num_class_embeds": classes}
    return call


def test_errors_of_a_network_that_says_nothing(script):
    scheduler = ScratchDDPMScheduler(prediction_type="v_prediction")
    level, times = 0.6, (0, 300, 999)
    images = torch.full((16, 1, 16, 16), level)
    silent = network(lambda x_t, t: torch.zeros_like(x_t), classes=11)
    errors = script.prediction_errors(silent, scheduler, images, times)
    assert silent.labels.tolist() == [10] * 16
    alpha_bar = np.cumprod(1 - oracles.linear_betas())[list(times)]
    # With v̂ = 0, v - v̂ = √ᾱ ε - √(1-ᾱ) x_0, and x_0 - x̂_0 and ε - ε̂ are -√(1-ᾱ) and √ᾱ times it.
    expected = alpha_bar + (1 - alpha_bar) * level**2
    for name, factor in {"v": 1, "x_0": 1 - alpha_bar, "epsilon": alpha_bar}.items():
        assert errors[name].shape == (3, 16)
        np.testing.assert_allclose(errors[name].mean(1), factor * expected, rtol=0.1)
    np.testing.assert_allclose(errors["x_0"] / errors["v"], (1 - alpha_bar)[:, None].repeat(16, 1), rtol=1e-2)


def test_errors_of_a_network_that_knows_the_noise(script):
    scheduler = ScratchDDPMScheduler()  # which predicts epsilon, and clips
    images = uniform(4, 1, 4, 4) * 3  # beyond what clipping leaves

    def exact(x_t, t):
        alpha_bar = float(np.cumprod(1 - oracles.linear_betas())[t[0]])
        return (x_t - math.sqrt(alpha_bar) * images) / math.sqrt(1 - alpha_bar)

    errors = script.prediction_errors(network(exact), scheduler, images, (5, 500))
    assert max(of.max().item() for of in errors.values()) < 1e-6


def test_loss_draws_means_and_two_standard_errors(drawings):
    errors = {"epsilon": torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "v": torch.tensor([[2.0, 2.0], [1.0, 7.0]])}
    figure, numbers = drawings.loss(errors, (0, 9))
    (axis,) = figure.axes
    np.testing.assert_allclose([y for _, y in lines(axis)], [[2, 5], [2, 4]])
    assert lines(axis)[0][0].tolist() == [0, 9]
    low, high = axis.collections[0].get_paths()[0].vertices[:, 1].min(), 4
    assert (low, high) == pytest.approx((0, 4))  # 2 ± 2 · √2 / √2, and 5 ± 0
    assert axis.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(5)
    assert numbers["v"] == {"mean": [2, 4], "standard_error": pytest.approx([0, 3])}
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        r"$\Vert \epsilon - \hat \epsilon \Vert^2 / d$",
        r"$\Vert v - \hat v \Vert^2 / d$",
    ]


def test_bound_draws_terms_and_their_sum(drawings):
    terms = torch.tensor([[2.0, 0.5, 0.25], [4.0, 0.7, 0.15]], dtype=torch.float64)
    prior = torch.tensor([0.001, 0.003], dtype=torch.float64)
    figure, numbers = drawings.bound(BitsPerDim(terms.sum(1) + prior, prior, terms, torch.arange(3)))
    left, right = figure.axes
    (t, each), first, last = lines(left)
    assert t.tolist() == [0, 1, 2]
    np.testing.assert_allclose(each, [3, 0.6, 0.2])
    assert [of.item() for of in (*first, *last)] == pytest.approx([0, 3, 3, 0.002])
    (_, total), first, last = lines(right)
    np.testing.assert_allclose(total, [3, 3.6, 3.8])
    assert [of.item() for of in (*first, *last)] == pytest.approx([0, 3, 3, 3.802])
    assert numbers["bits_per_dim"] == pytest.approx(3.802) and numbers["error"] == pytest.approx((4.853 - 2.751) / 2)
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["$L_t$", "$L_0$ = 3.00", r"$L_T$ = $2.0 \cdot 10^{-3}$"]
    assert "3.80 ± 1.05" in right.get_title() and "2 test images" in right.get_title()


def test_the_sum_that_is_drawn_ends_at_the_bound_of_a_network(drawings):
    unet = randomised(UNet2DModel(**TINY_NETWORK)).eval()
    images = ((uniform(2, 1, 8, 8) + 1) * 127.5).to(torch.uint8)
    bits = bits_per_dim(unet, ScratchDDPMScheduler(num_train_timesteps=150), images, progress=False)
    figure, numbers = drawings.bound(bits)
    assert lines(figure.axes[1])[-1][1].item() == pytest.approx(bits.total.mean().item())
    parts = [numbers[name] for name in ("L_0", "L_1_to_10", "L_11_to_100", "L_101_and_above", "L_T")]
    assert sum(parts) == pytest.approx(bits.total.mean().item()) and min(parts) > 0


def test_chain_draws_each_image_above_its_prediction(drawings):
    images = uniform(2, 2, 2, 3, 3, seed=3).numpy()  # frame, x_t or x̂_0, image
    frames = [Frame(t, x_t[..., None], x_0[..., None]) for t, (x_t, x_0) in zip((9, 0), images, strict=True)]
    figure, numbers = drawings.chain(frames)
    drawn = pictures(figure)
    for column, (x_t, x_0) in enumerate(images):
        np.testing.assert_array_equal(drawn[:, column], [x_t[0], x_0[0], x_t[1], x_0[1]])
    assert [axis.get_title() for axis in figure.axes[:2]] == ["$t = 9$", "$t = 0$"]
    apart = math.sqrt(((images[0, 1] - images[1, 1]) ** 2).mean())
    assert numbers["x_0_to_last_x_0"] == pytest.approx([apart, 0])


# --- points --------------------------------------------------------------------------------------------------------


def test_points_draw_both_rows_in_the_same_order_and_colours(drawings):
    forward = {t: uniform(5, 2, seed=t + 1) for t in (-1, 3, 9)}
    reverse = {t: uniform(5, 2, seed=t + 100) for t in (-1, 3, 9)}
    figure, _ = drawings.points(forward, reverse)
    drawn = [axis.collections[0] for axis in figure.axes]
    for found, cloud in zip(drawn, [*forward.values(), *reverse.values()], strict=True):
        np.testing.assert_allclose(found.get_offsets(), cloud)
    for row, clouds in zip((drawn[:3], drawn[3:]), (forward, reverse), strict=True):
        for found in row:
            np.testing.assert_allclose(found.get_array(), clouds[-1][:, 1])
    assert [axis.get_title() for axis in figure.axes[:3]] == ["$x_0$", "$t = 3$", "$t = 9$"]


def test_jumps_are_drawn_before_the_data(drawings):
    rows = {name: {steps: uniform(5, 2, seed=steps + place) for steps in (1, 4)} for place, name in enumerate("ab")}
    data = uniform(7, 2)
    figure, numbers = drawings.jumps(rows, data)
    assert [axis.get_title() for axis in figure.axes] == ["a, 1 step", "a, 4 steps", "b, 1 step", "b, 4 steps"]
    for axis, cloud in zip(figure.axes, [*rows["a"].values(), *rows["b"].values()], strict=True):
        behind, before = axis.collections
        np.testing.assert_allclose(behind.get_offsets(), data)
        np.testing.assert_allclose(before.get_offsets(), cloud)
    assert numbers == {"num_points": 7, "steps": [1, 4]}


def test_forward_clouds_keep_the_moments_of_the_process(script):
    torch.manual_seed(0)
    x_0 = torch.full((4000, 2), 3.0)
    clouds = script.forward_clouds(x_0, ScratchDDPMScheduler(), (200,))
    alpha_bar = np.cumprod(1 - oracles.linear_betas())[200]
    assert clouds[-1] is x_0
    assert clouds[200].mean().item() == pytest.approx(3 * math.sqrt(alpha_bar), abs=0.05)
    assert clouds[200].std().item() == pytest.approx(math.sqrt(1 - alpha_bar), rel=0.05)


def test_the_s_curve_is_an_s(script):
    torch.manual_seed(0)
    x, y = script.points.s_curve(5000).T
    top = y > 0
    radius = (x**2 + (y - torch.where(top, 1.0, -1.0)) ** 2).sqrt()
    assert (radius - 1).abs().mean() < 0.06  # two circles of radius 1, above each other
    gap = (x > 0.3) & (y > 0.2) & (y < 0.8)  # an S is open at the right above, at the left below
    assert not gap.any() and not ((x < -0.3) & (y < -0.2) & (y > -0.8)).any()
    assert top.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_distance_of_points(script):
    some, others = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0]])
    assert script.points.distance(some, others) == pytest.approx((1 + (1 + math.sqrt(18)) / 2) / 2)


@pytest.mark.full
def test_the_example_of_points_learns(script, monkeypatch, capsys):
    short = functools.partial(ScratchDDPMScheduler, num_train_timesteps=100, beta_end=0.1)  # a tenth of the work
    monkeypatch.setattr(script.points, "ScratchDDPMScheduler", short)
    monkeypatch.setattr(sys, "argv", ["points.py", "1500"])
    script.points.main()
    loss, *distances = capsys.readouterr().out.splitlines()
    noise, samples, other = (float(line.split()[-1]) for line in distances)
    assert other < samples < 0.4 * noise
    assert float(loss.split()[-3]) < 0.6 * float(loss.split()[1])


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_same_bytes_again_and_other_figures_are_kept(script, tmp_path):
    paths = ["--figures", str(tmp_path), "--results", str(tmp_path / "figures.json")]
    picture, found = tmp_path / "theory_posterior.png", tmp_path / "figures.json"
    script.main(["--only", "theory_posterior", *paths])
    first = picture.read_bytes()
    script.main(["--only", "theory_schedules", "theory_posterior", *paths])
    assert picture.read_bytes() == first
    script.main(["--only", "theory_schedules", *paths])
    results = json.loads(found.read_text())
    assert list(results["figures"]) == ["theory_schedules", "theory_posterior"]
    assert results["figures"]["theory_posterior"]["linear"]["at_t_0"] == pytest.approx([1, 0])

    found.write_text(json.dumps(results | {"device": "another"}))
    with pytest.raises(ValueError, match="make all figures"):
        script.main(["--only", "theory_schedules", *paths])


def test_every_figure_is_there_with_its_numbers(script, results):
    assert list(results["figures"]) == list(script.FIGURES)
    for name in results["figures"]:
        assert 0 < (DOCS / "figures" / f"{name}.png").stat().st_size < 200_000


def test_the_numbers_fit_together(results):
    figures = results["figures"]
    bound = figures["theory_bound"]
    parts = sum(value for name, value in bound.items() if name.startswith("L_"))
    assert parts == pytest.approx(bound["bits_per_dim"], rel=1e-6)
    points = figures["theory_points"]
    assert points["distance"][0] < 1.3 * points["distance_of_other_data"][0] < 0.1 * points["distance_of_noise"]
    assert figures["theory_chain"]["x_0_to_last_x_0"][-1] == 0
    jumps = figures["questions_points"]
    before, after = jumps["distance"].values()
    assert before[0] > 10 * after[0] and before == sorted(before, reverse=True) and after == sorted(after, reverse=True)
    assert jumps["distance_of_other_data"] < after[2] < 2 * jumps["distance_of_other_data"]


def test_what_the_captions_claim(results):
    bound = results["figures"]["theory_bound"]
    assert bound["L_0"] + bound["L_1_to_10"] > 2 / 3 * bound["bits_per_dim"]
    ranges = {}
    for name in ("epsilon", "x_0", "v"):
        errors, _ = results["figures"]["theory_loss"][name].values()  # and their standard errors
        ranges[name] = max(errors) / min(errors)
    assert ranges["v"] < 10 < 1000 < min(ranges["epsilon"], ranges["x_0"])
