"""Run diffusers' DDPMScheduler and ours side by side on every known difference, and on what is equal.

    python docs/make_differences.py

writes docs/results/differences.json and the two tables of docs/differences.md (about half a minute on a CPU).
"""

import json
import math
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddpm_from_scratch import ScratchDDPMScheduler
from pages import replace_parts, table, versions

DOCS = Path(__file__).parent
JSON = DOCS / "results" / "differences.json"
PAGE = DOCS / "differences.md"

T = 1000
BETAS = np.linspace(1e-4, 0.02, T)
ALPHA_BAR = np.cumprod(1 - BETAS)  # float64
SPACINGS = ("leading", "linspace", "trailing")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Scheduler = DDPMScheduler | ScratchDDPMScheduler
Numbers = dict[str, Any]


def both(**options: object) -> tuple[DDPMScheduler, ScratchDDPMScheduler]:
    """The two schedulers of one configuration."""
    return DDPMScheduler(**options), ScratchDDPMScheduler(**options)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spaced(scheduler: Scheduler, count: int) -> list[int]:
    """The timesteps of a chain of count steps."""
    scheduler.set_timesteps(count)
    return scheduler.timesteps.tolist()


def error_of(call: Callable[[], object]) -> str:
    """Name of the exception that a call raises; "none" if it returns."""
    try:
        call()
    except Exception as error:  # any: which one it is, is the result
        return type(error).__name__
    return "none"


# --- differences: each returns its numbers -------------------------------------------------------------------------


def final_noise() -> Numbers:
    """Standard deviation of the last sample's noise, where x_0 is predicted without any: it should be 0."""
    cases: dict[str, tuple[dict, dict]] = {
        "offset": ({"steps_offset": 1}, {"num_inference_steps": 10}),
        "trailing": ({"timestep_spacing": "trailing"}, {"num_inference_steps": 10}),
        "list": ({}, {"timesteps": [100]}),
    }
    x = torch.zeros(4, 1, 128, 128, dtype=torch.float64)
    numbers: Numbers = {"N": x.numel()}
    for name, (options, chain) in cases.items():
        for kind, scheduler in zip(("stock", "ours"), both(variance_type="fixed_large", **options), strict=True):
            scheduler.set_timesteps(**chain)
            last = scheduler.timesteps[-1]
            final = scheduler.step(x, last, x, generator=torch.Generator().manual_seed(0)).prev_sample
            numbers[f"{name}_last"] = int(last)
            numbers[f"{name}_{kind}"] = float(final.std())
    return numbers


def leading() -> Numbers:
    """The leading spacing of a number of steps that does not divide T."""
    stock, ours = both()
    differ = sum(spaced(stock, count) != spaced(ours, count) for count in range(1, T + 1))
    numbers: Numbers = {"counts_that_differ": differ}
    for count in (501, 600):
        for kind, scheduler in (("stock", stock), ("ours", ours)):
            first = spaced(scheduler, count)[0]
            numbers[f"{kind}_{count}"] = {"first": first, "signal": math.sqrt(ALPHA_BAR[first])}
    return numbers


def linspace() -> Numbers:
    """The linspace spacing of one step."""
    stock, ours = both(timestep_spacing="linspace")
    return {"stock": spaced(stock, 1), "ours": spaced(ours, 1)}


def trailing() -> Numbers:
    """Step counts for which the trailing spacing has a timestep too many."""
    stock, ours = both(timestep_spacing="trailing")
    wrong = [count for count in range(1, T + 1) if len(spaced(stock, count)) != count]
    return {
        "stock_counts": len(wrong),
        "stock_examples": ", ".join(map(str, wrong[:3])),
        "stock_last_timestep": spaced(stock, wrong[0])[-1],
        "ours_counts": sum(len(spaced(ours, count)) != count for count in range(1, T + 1)),
    }


def nan_variances() -> Numbers:
    """Share of NaN after one step at t = 500."""
    x = randn(4, 3, 16, 16)
    outputs = {"fixed_large_log": x, "learned": torch.cat([x, torch.full_like(x, -5.0)], 1)}
    numbers: Numbers = {"N": x.numel()}
    for variance_type, output in outputs.items():
        for kind, scheduler in zip(("stock", "ours"), both(variance_type=variance_type), strict=True):
            result = scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
            numbers[f"{variance_type}_{kind}"] = float(result.isnan().double().mean())
    return numbers


def laplace() -> Numbers:
    """ᾱ at the last timestep of the laplace schedule."""
    stock, ours = both(beta_schedule="laplace")
    log_snr = 0.5 * math.log(1e-6)  # at u = 1
    return {
        "definition": 1 / (1 + math.exp(-log_snr)),
        "stock": float(stock.alphas_cumprod[-1]),
        "ours": float(ours.alphas_cumprod[-1]),
    }


def half_precision_noise() -> Numbers:
    """The share of the noise in add_noise's output over all t, at x_0 = 0, by projection on the noise."""
    noise = randn(T, 2048, dtype=torch.float32)
    exact = np.sqrt(1 - ALPHA_BAR)
    numbers: Numbers = {"N": noise.shape[1]}
    for name, dtype in DTYPES.items():
        for kind, scheduler in zip(("stock", "ours"), both(), strict=True):
            noisy = scheduler.add_noise(torch.zeros_like(noise, dtype=dtype), noise, torch.arange(T)).double()
            share = ((noisy * noise).sum(1) / (noise.double() ** 2).sum(1)).numpy()
            error = np.abs(share / exact - 1)
            numbers[f"{name}_{kind}"] = {
                "timesteps_without_noise": int((share == 0).sum()),
                "timesteps_off_by_10_percent": int((error > 0.1).sum()),
                "largest_relative_error": float(error.max()),
            }
    return numbers


def half_precision_step() -> Numbers:
    """Largest error of one step's x_s over all t, for the same 16-bit inputs, against the formula in float64."""
    numbers: Numbers = {"N": 48}
    reference = ScratchDDPMScheduler(variance_type="fixed_small")
    for name, dtype in DTYPES.items():
        x, output = (randn(1, 3, 4, 4, seed=seed).to(dtype) for seed in (1, 2))
        worst = {"stock": 0.0, "ours": 0.0}
        for t in range(T):
            exact = reference.p_reverse(output.double(), x.double(), t)
            noise = randn(*x.shape, dtype=dtype).double() if t else torch.zeros_like(exact.mean)
            right = exact.mean + torch.exp(0.5 * exact.log_variance) * noise
            for kind, scheduler in zip(worst, both(), strict=True):
                result = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample.double()
                worst[kind] = max(worst[kind], float((result - right).abs().max()))
        numbers |= {f"{name}_{kind}": error for kind, error in worst.items()}
        # Half a unit in the last place of the largest value.
        numbers[f"{name}_rounding"] = torch.finfo(dtype).eps / 2 * 2 ** math.floor(math.log2(float(x.abs().max())))
    return numbers


def zero_terminal_snr() -> Numbers:
    """Epsilon prediction at a zero terminal SNR: share of NaN in x_0, and what the constructor does."""
    x = randn(4, 3, 16, 16)
    stock = DDPMScheduler(rescale_betas_zero_snr=True)
    return {
        "stock_nan": float(stock.step(x, T - 1, x).pred_original_sample.isnan().double().mean()),
        "ours_error": error_of(lambda: ScratchDDPMScheduler(rescale_betas_zero_snr=True)),
        "N": x.numel(),
    }


def offset_beyond_the_chain() -> Numbers:
    """steps_offset = 1 with all T steps."""

    def run(scheduler: Scheduler) -> None:
        scheduler.set_timesteps(T)
        scheduler.step(torch.zeros(1, 1, 2, 2), scheduler.timesteps[0], torch.zeros(1, 1, 2, 2))

    stock, ours = both(steps_offset=1)
    return {
        "stock_error": error_of(lambda: run(stock)),
        "ours_error": error_of(lambda: ours.set_timesteps(T)),
    }


def precision_of_tables() -> Numbers:
    """Relative errors of ᾱ and of the posterior variance over all t >= 1, against float64."""
    stock, ours = both()
    previous = np.append(1.0, ALPHA_BAR[:-1])
    right = ((1 - previous) / (1 - ALPHA_BAR) * BETAS)[1:]
    x = torch.zeros(T, 1)
    variances = {
        "stock": np.array([float(stock._get_variance(t)) for t in range(1, T)]),
        "ours": ours.q_posterior(x, x, torch.arange(T)).log_variance.double().exp().flatten().numpy()[1:],
    }
    numbers: Numbers = {}
    for kind, scheduler in (("stock", stock), ("ours", ours)):
        alpha_bar = scheduler.alphas_cumprod.double().numpy()
        numbers[f"{kind}_alpha_bar"] = float(np.abs(alpha_bar / ALPHA_BAR - 1).max())
        numbers[f"{kind}_variance"] = float(np.abs(variances[kind] / right - 1).max())
    return numbers


def last_log_variance() -> Numbers:
    """Lower end of the learned range's log-variance in the step to the data."""
    stock, ours = both(variance_type="learned_range")
    x, lower = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), -1.0, dtype=torch.float64)
    return {
        "stock": float(stock._get_variance(0, predicted_variance=lower)),
        "ours": float(ours.p_reverse(torch.cat([x, lower], 1), x, 0).log_variance),
    }


def unknown_options() -> Numbers:
    """What the constructors do with a misspelt option."""
    wrong = {"variance_type": "fixed_smal", "prediction_type": "eps", "timestep_spacing": "trailling"}
    numbers: Numbers = {}
    for name, value in wrong.items():
        numbers[f"stock_{name}"] = error_of(lambda options={name: value}: DDPMScheduler(**options))
        numbers[f"ours_{name}"] = error_of(lambda options={name: value}: ScratchDDPMScheduler(**options))
    return numbers


def wrong_calls() -> Numbers:
    """What add_noise and step do with the wrong timestep or shape."""
    x, one = torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    calls: dict[str, Callable[[Scheduler], object]] = {
        "negative_timestep": lambda s: s.add_noise(x, x, torch.tensor([-1, -1])),
        "timestep_not_in_chain": lambda s: (s.set_timesteps(10), s.step(x, 7, x)),
        "one_noise_for_two_samples": lambda s: s.add_noise(x, one, torch.tensor([5, 5])),
        "three_generators_for_two_samples": lambda s: s.step(x, 5, x, [torch.Generator() for _ in range(3)]),
    }
    numbers: Numbers = {}
    for name, call in calls.items():
        for kind, scheduler in zip(("stock", "ours"), both(), strict=True):
            numbers[f"{kind}_{name}"] = error_of(lambda call=call, scheduler=scheduler: call(scheduler))
    return numbers


# --- equalities ----------------------------------------------------------------------------------------------------


def network(x: Tensor, t: int, prediction_type: str, doubled: bool) -> Tensor:
    """A smooth function in the place of a trained network; doubled: with v of a learned range."""
    x_0 = 1.2 * torch.tanh(1.3 * x + 0.1 * t / T)
    signal, sigma = math.sqrt(ALPHA_BAR[t]), math.sqrt(1 - ALPHA_BAR[t])
    epsilon = (x - signal * x_0) / sigma
    output = {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - sigma * x_0}[prediction_type]
    return torch.cat([output, torch.sin(3 * x)], 1) if doubled else output


def settings() -> Iterator[dict[str, str]]:
    """Spacing, prediction type and variance type of every chain that is compared."""
    for spacing in SPACINGS:
        for prediction_type in PREDICTION_TYPES:
            for variance_type in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
                yield {
                    "timestep_spacing": spacing,
                    "prediction_type": prediction_type,
                    "variance_type": variance_type,
                }


def chain_difference(count: int, options: dict[str, str], dtype: torch.dtype, exact: bool) -> float:
    """Largest difference of two chains from the same seeds, over all steps; exact: stock gets the float64 ᾱ."""
    stock, ours = both(**options)
    if exact:
        stock.alphas_cumprod = torch.from_numpy(ALPHA_BAR)
    chain = spaced(ours, count)
    stock.set_timesteps(count)
    if chain[-1] != 0 and options["variance_type"] in ("fixed_large", "learned_range"):
        chain = chain[:-1]  # stock adds noise to this last step: see final_noise
    a = b = randn(2, 3, 4, 4, seed=7, dtype=dtype)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    doubled = options["variance_type"] == "learned_range"
    largest = 0.0
    for t in chain:
        a = stock.step(network(a, t, options["prediction_type"], doubled), t, a, generators[0]).prev_sample
        b = ours.step(network(b, t, options["prediction_type"], doubled), t, b, generators[1]).prev_sample
        largest = max(largest, float((a - b).abs().max()))
    return largest


def chains() -> Numbers:
    """Largest difference for each number of steps, over all settings. At K = T the spacings are the same."""
    numbers: Numbers = {}
    for count in (1000, 100, 50, 10):
        chosen = [options for options in settings() if count < T or options["timestep_spacing"] == "leading"]
        numbers[str(count)] = {
            "chains": len(chosen),
            "as_it_comes": max(chain_difference(count, options, torch.float32, False) for options in chosen),
            "float64_table": max(chain_difference(count, options, torch.float64, True) for options in chosen),
        }
    return numbers


def spacings() -> Numbers:
    """For how many numbers of steps from 1 to T the timesteps are the same."""
    numbers: Numbers = {}
    for spacing in SPACINGS:
        stock, ours = both(timestep_spacing=spacing)
        numbers[spacing] = sum(spaced(stock, count) == spaced(ours, count) for count in range(1, T + 1))
    return numbers


DIFFERENCES: dict[str, Callable[[], Numbers]] = {
    function.__name__: function
    for function in (
        final_noise,
        leading,
        linspace,
        trailing,
        nan_variances,
        laplace,
        zero_terminal_snr,
        offset_beyond_the_chain,
        half_precision_noise,
        half_precision_step,
        precision_of_tables,
        last_log_variance,
        unknown_options,
        wrong_calls,
    )
}
EQUALITIES: dict[str, Callable[[], Numbers]] = {"chains": chains, "spacings": spacings}


# --- the tables ----------------------------------------------------------------------------------------------------


# What differs, stock's result and ours; the numbers of the page's notes. Fields are filled from the results.
FINAL = "`fixed_large`: standard deviation of the noise in the final sample (N = {final_noise[N]})"
ADD_NOISE = "none at {0[timesteps_without_noise]} timesteps, over 10 % off at {0[timesteps_off_by_10_percent]}"
ROWS = [
    (
        f'1. `timestep_spacing="trailing"`, 10 steps, {FINAL}',
        "{final_noise[trailing_stock]:.3f}",
        "{final_noise[trailing_ours]:g}",
    ),
    (f"1. `steps_offset=1`, 10 steps, {FINAL}", "{final_noise[offset_stock]:.3f}", "{final_noise[offset_ours]:g}"),
    (f"1. `timesteps=[100]`, {FINAL}", "{final_noise[list_stock]:.3f}", "{final_noise[list_ours]:g}"),
    *(
        (
            f"2. `leading` spacing, {count} steps: first timestep, and √ᾱ there",
            f"{{leading[stock_{count}][first]}}, {{leading[stock_{count}][signal]:.3f}}",
            f"{{leading[ours_{count}][first]}}, {{leading[ours_{count}][signal]:.3f}}",
        )
        for count in (501, 600)
    ),
    ("3. `linspace` spacing, 1 step: timesteps", "{linspace[stock]}", "{linspace[ours]}"),
    (
        "4. `trailing` spacing: numbers of steps K from 1 to 1000 with K + 1 timesteps, the last of them -1",
        "{trailing[stock_counts]} (K = {trailing[stock_examples]}, ...)",
        "{trailing[ours_counts]}",
    ),
    *(
        (
            f'5. `variance_type="{kind}"`: NaN after one step',
            f"{{nan_variances[{kind}_stock]:.0%}}",
            f"{{nan_variances[{kind}_ours]:.0%}}",
        )
        for kind in ("fixed_large_log", "learned")
    ),
    (
        "6. `laplace` schedule: ᾱ at the last timestep, {laplace[definition]:.5f} by definition",
        "{laplace[stock]:.5f}",
        "{laplace[ours]:.5f}",
    ),
    (
        "7. `rescale_betas_zero_snr=True` with epsilon prediction",
        "x_0 is NaN ({zero_terminal_snr[stock_nan]:.0%})",
        "{zero_terminal_snr[ours_error]} in the constructor",
    ),
    (
        "8. `steps_offset=1` with 1000 steps of 1000",
        "{offset_beyond_the_chain[stock_error]} in `step`",
        "{offset_beyond_the_chain[ours_error]} in `set_timesteps`",
    ),
    *(
        (
            f"9. `add_noise` in {dtype}, x_0 = 0, all t: amount of noise",
            ADD_NOISE.replace("0[", f"half_precision_noise[{dtype}_stock]["),
            f"largest error {{half_precision_noise[{dtype}_ours][largest_relative_error]:.0e}}",
        )
        for dtype in DTYPES
    ),
    *(
        (
            f"10. `step` in {dtype}, all t: largest error; rounding: {{half_precision_step[{dtype}_rounding]:.0e}}",
            f"{{half_precision_step[{dtype}_stock]:.1e}}",
            f"{{half_precision_step[{dtype}_ours]:.1e}}",
        )
        for dtype in DTYPES
    ),
    *(
        (
            f"11. {what} in float32, all t: largest relative error",
            f"{{precision_of_tables[stock_{key}]:.0e}}",
            f"{{precision_of_tables[ours_{key}]:.0e}}",
        )
        for key, what in (("alpha_bar", "ᾱ"), ("variance", "β̃"))
    ),
    (
        "12. `learned_range`: lower end of log σ² in the step to the data",
        "{last_log_variance[stock]:.1f}",
        "{last_log_variance[ours]:.1f}",
    ),
    *(
        (
            f"13. `{option}`: error in the constructor",
            f"{{unknown_options[stock_{key}]}}",
            f"{{unknown_options[ours_{key}]}}",
        )
        for key, option in (
            ("variance_type", 'variance_type="fixed_smal"'),
            ("prediction_type", 'prediction_type="eps"'),
            ("timestep_spacing", 'timestep_spacing="trailling"'),
        )
    ),
    *(
        (f"14. {what}: error", f"{{wrong_calls[stock_{key}]}}", f"{{wrong_calls[ours_{key}]}}")
        for key, what in (
            ("negative_timestep", "`add_noise` at timestep -1"),
            ("timestep_not_in_chain", "`step` at a timestep that is not in `timesteps`"),
            ("one_noise_for_two_samples", "`add_noise` of 2 samples with the noise of 1"),
            ("three_generators_for_two_samples", "`step` of 2 samples with 3 generators"),
        )
    ),
]


def difference_table(results: Numbers) -> str:
    """The first table of the page, in Markdown."""
    return table(("", "diffusers", "ours"), ROWS).format(**results["differences"])


def equality_table(results: Numbers) -> str:
    """The second table of the page, in Markdown."""
    rows = [
        (f"{count} steps", f"{n['chains']}", f"{n['as_it_comes']:.1e}", f"{n['float64_table']:.1e}")
        for count, n in results["equalities"]["chains"].items()
    ]
    found = table(("chains of", "chains", "largest difference, as they come", "with the same float64 ᾱ"), rows)
    same = ", ".join(f"{name} {count}" for name, count in results["equalities"]["spacings"].items())
    return "\n".join([found, "", f"Numbers of steps from 1 to {T} with the same timesteps: {same}."])


def environment_line(results: Numbers) -> str:
    """What the numbers were measured with."""
    return f"Measured with {versions(results)} on {results['device']}."


def fill(page: str, results: Numbers) -> str:
    """The page with what stands between its markers replaced."""
    parts = {"differences": difference_table, "equalities": equality_table, "environment": environment_line}
    return replace_parts(page, {name: make(results) for name, make in parts.items()})


def main() -> None:
    """Measure, write the results and fill the page."""
    warnings.filterwarnings("ignore", message="__array__ implementation")  # diffusers under numpy 2
    torch.set_num_threads(1)
    results: Numbers = {
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "diffusers": diffusers.__version__,
        },
        "device": "cpu",
        "differences": {name: measure() for name, measure in DIFFERENCES.items()},
        "equalities": {name: measure() for name, measure in EQUALITIES.items()},
    }
    JSON.parent.mkdir(exist_ok=True)
    JSON.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
