"""The pages of theory are true: their names exist, their code runs, both have the same formulas; and a few formulas."""

import ast
import importlib
import inspect
import re

import numpy as np
import pytest
import torch

from ddpm_from_scratch import ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.timesteps import log_snr
from helpers.paths import ROOT

ENGLISH, CHINESE, TABLE = (
    (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("theory.md", "theory.zh.md", "equations.md")
)
PAGES = pytest.mark.parametrize("page", [ENGLISH, CHINESE, TABLE], ids=["english", "chinese", "table"])
T = 1000


# --- the pages -----------------------------------------------------------------------------------------------------


def rows():
    """(function, test) of each row of the table."""
    cells = [re.split(r"(?<!\\\\)\|", line.strip("|")) for line in TABLE.splitlines() if line.startswith("| ")]
    return [tuple(cell.strip(" `") for cell in row[-2:]) for row in cells if row[0].strip() != "formula"]


PACKAGE = ROOT / "src" / "ddpm_from_scratch"
MODULES = {path.stem: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}


def resolve(name):
    """What a name of the pages means: of a module, with its room or without; alone, a method of the scheduler."""
    first, *path = name.split(".")
    if not path:
        return getattr(ScratchDDPMScheduler, first)
    if (PACKAGE / first).is_dir():
        first, *path = path
    found = importlib.import_module(".".join(["ddpm_from_scratch", *MODULES[first]]))
    for part in path:
        found = getattr(found, part)
    return found


def test_every_function_of_the_table_exists():
    assert len(rows()) > 40
    for function, _ in rows():
        assert resolve(function) is not None


def test_every_test_of_the_table_exists():
    for _, name in rows():
        file, _, function = name.partition("::")
        (path,) = (ROOT / "tests").rglob(file)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_every_public_method_of_the_scheduler_is_in_the_table():
    methods = inspect.getmembers(ScratchDDPMScheduler, inspect.isfunction)
    own = {name for name, method in methods if name[0] != "_" and method.__module__ == ScratchDDPMScheduler.__module__}
    assert len(own) > 15
    assert own - {function for function, _ in rows()} == {"to_json_file"}


@PAGES
def test_names_of_modules_in_the_text_exist(page):
    known = {*MODULES, *(path.name for path in PACKAGE.iterdir() if path.is_dir())}
    names = [name for name in re.findall(r"`([a-z_]+(?:\.\w+)+)[`(]", page) if name.split(".")[0] in known]
    names = [name for name in names if not name.endswith(".py")]
    assert names
    for name in names:
        assert resolve(name) is not None


def displayed(page):
    return [re.sub(r"\s+", " ", formula).strip() for formula in re.findall(r"\$\$(.*?)\$\$", page, re.DOTALL)]


def test_both_languages_have_the_same_formulas():
    assert len(displayed(ENGLISH)) > 25
    assert displayed(CHINESE) == displayed(ENGLISH)


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_the_code_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    found = {}
    exec("\n".join(blocks).replace("set_timesteps(1000)", "set_timesteps(20)"), found)  # the whole chain takes too long
    assert found["loss"].isfinite() and found["x_t"].isfinite().all() and found["x_t"].shape == (2, 1, 8, 8)


def test_the_factor_of_the_noise_error_has_the_values_that_the_page_says():
    text = re.sub(r"\s+", " ", ENGLISH)
    assert "falls from 0.5 at $t = 1$" in text and "to 0.005 at $t = 349$, and rises to 0.01 at $t = T$" in text
    scheduler = ScratchDDPMScheduler()
    beta = scheduler.betas.double()
    factor = beta / (2 * (1 - beta) * (1 - ALPHA_BAR))
    assert float(factor[0]) == pytest.approx(0.5, rel=1e-3) and float(factor[-1]) == pytest.approx(0.01, rel=0.03)
    assert int(factor.argmin()) == 349 - 1 and float(factor.min()) == pytest.approx(0.005, rel=0.01)


# --- formulas that no other file tests -----------------------------------------------------------------------------


ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)  # the default schedule
SNR = ALPHA_BAR / (1 - ALPHA_BAR)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_a_term_of_the_bound_is_half_the_gain_in_snr(prediction_type, t):
    scheduler = ScratchDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    x_0, x_t, output = torch.randn(3, 2, 5, 4, dtype=torch.float64, generator=generator)
    wrong = x_0 - scheduler.predict(output, x_t, t).x_0
    expected = (SNR[t - 1] - SNR[t]) / 2 * wrong.square().flatten(1).mean(1)
    torch.testing.assert_close(scheduler.vlb_term(output, x_0, x_t, t), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_the_mean_in_terms_of_the_noise(t):
    scheduler = ScratchDDPMScheduler(clip_sample=False)
    x_t, output = torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = ALPHA_BAR[t] / ALPHA_BAR[t - 1]
    expected = (x_t - (1 - alpha) / (1 - ALPHA_BAR[t]).sqrt() * output) / alpha.sqrt()
    torch.testing.assert_close(scheduler.p_reverse(output, x_t, t).mean, expected, rtol=1e-9, atol=1e-12)


def test_log_snr():
    assert log_snr(ALPHA_BAR.numpy()) == pytest.approx(SNR.log().numpy(), rel=1e-9)
    assert np.isfinite(log_snr(np.zeros(1)))


def two_points(scheduler, t, x_t):
    """E[x_0 | x_t] where x_0 is -1 or 1, by Bayes' rule."""
    like = [
        torch.distributions.Normal(mean, deviation.exp()).log_prob(x_t)
        for mean, deviation in ((g.mean, g.log_variance / 2) for g in (scheduler.q_marginal(x, t) for x in points(x_t)))
    ]
    weights = torch.stack(like).softmax(0)
    return weights[1] - weights[0]


def points(like):
    return -torch.ones_like(like), torch.ones_like(like)


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_the_conditional_mean_minimises_the_simple_loss(t):
    scheduler = ScratchDDPMScheduler(prediction_type="sample", clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(2, (100_000, 1), generator=generator).double() * 2 - 1
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    x_t = scheduler.add_noise(x_0, noise, t)
    best = two_points(scheduler, t, x_t)

    def loss(output):
        return float(scheduler.simple_loss(output, x_0, noise, torch.full((len(x_0),), t)).mean())

    for other in (0.05 * torch.tanh(x_t), 0.05 * torch.ones_like(x_t), 0.05 * best.sign()):
        assert loss(best) < loss(best + other) and loss(best) < loss(best - other)


@pytest.mark.parametrize("t", [0, 100, 500, 999])
def test_the_perfect_noise_is_the_score(t):
    """Of a mixture whose density is differentiated by autograd; and Tweedie's formula gives back the mean."""
    scheduler = ScratchDDPMScheduler(prediction_type="sample", clip_sample=False)
    x_t = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None].requires_grad_()
    alpha_bar = ALPHA_BAR[t]
    densities = [torch.distributions.Normal(x * alpha_bar.sqrt(), (1 - alpha_bar).sqrt()) for x in points(x_t)]
    log_density = torch.stack([density.log_prob(x_t) for density in densities]).logsumexp(0)
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    x_t = x_t.detach()
    mean = two_points(scheduler, t, x_t)
    epsilon = scheduler.predict(mean, x_t, t).epsilon
    torch.testing.assert_close(-epsilon / (1 - alpha_bar).sqrt(), score, rtol=1e-9, atol=1e-9)
    tweedie = (x_t + (1 - alpha_bar) * score) / alpha_bar.sqrt()
    torch.testing.assert_close(tweedie, mean, rtol=1e-9, atol=1e-9)


def test_v_is_the_velocity_in_angles():
    """The difference of x at neighbouring timesteps over that of their angles, for a schedule of many small steps."""
    scheduler = ScratchDDPMScheduler(num_train_timesteps=10_000, beta_start=1e-5, beta_end=2e-3)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 1, 50, dtype=torch.float64, generator=generator)
    angle = torch.acos(torch.cumprod(1 - scheduler.betas.double(), 0).sqrt())
    for t in (100, 3000, 9000):
        before, after = (scheduler.add_noise(x_0, noise, index) for index in (t - 1, t + 1))
        slope = (after - before) / (angle[t + 1] - angle[t - 1])
        torch.testing.assert_close(slope, scheduler.get_velocity(x_0, noise, t), rtol=0, atol=1e-3)
