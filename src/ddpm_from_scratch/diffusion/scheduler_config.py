"""The scheduler's configuration: its checks, and the tables that follow from it.

Analytic-DPM: Bao, Li, Zhu, Zhang 2022, https://arxiv.org/abs/2201.06503.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, LCMScheduler
from torch import Tensor

from .checks import check_choice, check_eta, check_whole, is_number
from .reverse_variance import REVERSE_LOG_VARIANCES
from .schedules import BETA_SCHEDULES, rescale_to_zero_terminal_snr
from .timesteps import TIMESTEP_CHOICES, TIMESTEP_SPACINGS, interpolate_moments

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

# The keys that diffusers.DDPMScheduler does not have, with their defaults: written only where they differ.
OWN_KEYS = {"eta": 1.0, "x_0_mse": None, "optimal_variance": None, "timestep_choice": None}

# diffusers passes over keys that begin with "_" in silence, and warns of any other that a class does not have.
SAVED_AS = {"eta": "_eta", "x_0_mse": "_x_0_mse"}

# Other names of our keys: in files, and in models saved by earlier versions.
OTHER_NAMES = {"_eta": "eta", "_x_0_mse": "x_0_mse", "second_moments": "x_0_mse"}

# What files say for LCMScheduler; here it follows from T.
OF_LCM = "original_inference_steps"

# JSON has no infinity.
INFINITY = "inf"
KNOWN_TO_OTHERS = (
    "linear",
    "scaled_linear",
    "squaredcos_cap_v2",
)  # schedules that diffusers' other classes make by name

Config = Mapping[str, Any]


def with_argument_names(config: Any) -> Any:  # noqa: ANN401
    """Rename keys of files and of earlier versions to the arguments' names; all but mappings are returned unchanged."""
    if not isinstance(config, Mapping) or not {*OTHER_NAMES, OF_LCM} & set(config):
        return config
    renamed = {OTHER_NAMES.get(name, name): value for name, value in config.items() if name != OF_LCM}
    return {**renamed, **({"eta": math.inf} if renamed.get("eta") == INFINITY else {})}


def stock_class(c: Config) -> type[DDPMScheduler] | type[LCMScheduler]:
    """Which scheduler of diffusers draws as this configuration does.

    Where all noise is fresh that is LCMScheduler: its boundary scaling leaves x̂_0 as it is at every timestep above some
    few.
    """
    known = c["trained_betas"] is not None or c["beta_schedule"] in KNOWN_TO_OTHERS
    return LCMScheduler if jumps(c) and known else DDPMScheduler


def of_stock_class(c: Config) -> tuple[list[str], dict[str, Any]]:
    """What a file of that class leaves out; and what it says otherwise: its own keys, and what JSON does not know."""
    kind, without = stock_class(c), own_keys_at_their_defaults(c)
    more: dict[str, Any] = {"_class_name": kind.__name__, **({"eta": INFINITY} if jumps(c) else {})}
    if kind is LCMScheduler:
        known = inspect.signature(LCMScheduler.__init__).parameters
        without += [key for key in c if not key.startswith("_") and key not in (*known, *OWN_KEYS)]
        more[OF_LCM] = c["num_train_timesteps"]
    return without, more


def check_config(c: Config) -> None:
    """Raise ValueError for a value that is not allowed, or keys that do not fit together."""
    check_choice("beta_schedule", c["beta_schedule"], BETA_SCHEDULES)
    if c["variance_type"] is not None:
        check_choice("variance_type", c["variance_type"], REVERSE_LOG_VARIANCES)
    check_choice("prediction_type", c["prediction_type"], PREDICTION_TYPES)
    check_choice("timestep_spacing", c["timestep_spacing"], TIMESTEP_SPACINGS)
    _check_numbers(c)
    _check_own_keys(c)


def _check_numbers(c: Config) -> None:
    for name, least in {"num_train_timesteps": 1, "steps_offset": 0}.items():
        check_whole(name, c[name], least)
    fraction: tuple[str, Callable[[float], bool]] = ("lie between 0 and 1", lambda x: 0 < x < 1)
    ranges = {} if c["trained_betas"] is not None else {"beta_start": fraction, "beta_end": fraction}
    ranges |= {
        "dynamic_thresholding_ratio": ("lie in (0, 1]", lambda x: 0 < x <= 1),
        "sample_max_value": ("be positive", lambda x: x > 0),
        "clip_sample_range": ("be positive", lambda x: x > 0),
    }
    for name, (allowed, fits) in ranges.items():
        if not (is_number(c[name]) and fits(c[name])):
            raise ValueError(f"{name}={c[name]!r} must be a number and {allowed}.")
    check_eta(c["eta"])
    if c["rescale_betas_zero_snr"] and c["num_train_timesteps"] == 1:
        raise ValueError("rescale_betas_zero_snr=True needs num_train_timesteps of at least 2.")


def _check_own_keys(c: Config) -> None:
    if c["optimal_variance"] not in (None, True, False):
        raise ValueError(f"optimal_variance={c['optimal_variance']!r} must be True, False or None.")
    if c["timestep_choice"] is not None:
        check_choice("timestep_choice", c["timestep_choice"], TIMESTEP_CHOICES)
    for name, needed in {"optimal_variance": True, "timestep_choice": "likelihood"}.items():
        if c[name] == needed and c["x_0_mse"] is None:
            raise ValueError(f"{name}={needed!r} needs x_0_mse: estimate them with `ddpm calibrate`.")


# Why a network that was tuned for jumps cannot do what needs the mean of x_0 given x_t.
JUMPS = (
    "eta is infinite: the network was tuned to jump to an x_0 (--loss consistency), and no longer predicts the mean of "
    "x_0 given x_t"
)


def jumps(c: Config) -> bool:
    """Whether a scheduler's configuration is that of a consistency sampler, whose network was tuned for jumps."""
    return bool(c.get("eta") == math.inf)


def own_keys_at_their_defaults(c: Config) -> list[str]:
    """The keys unknown to diffusers' schedulers that have their default value, so that files leave them out."""
    return [name for name, default in OWN_KEYS.items() if not isinstance(c[name], np.ndarray) and c[name] == default]


def limits_x_0(c: Config) -> bool:
    """Whether the predicted x_0 is clipped or thresholded."""
    return bool(c["thresholding"] or c["clip_sample"])


def limit_x_0(x_0: Tensor, c: Config) -> Tensor:
    """Threshold the predicted x_0 dynamically (Imagen section 2.3), clip it, or leave it, as configured."""
    if c["thresholding"]:
        level = torch.quantile(x_0.reshape(len(x_0), -1).abs(), c["dynamic_thresholding_ratio"], dim=1)
        level = level.clamp(1, c["sample_max_value"]).reshape(-1, *(1,) * (x_0.ndim - 1))
        return torch.maximum(torch.minimum(x_0, level), -level) / level
    return x_0.clamp(-c["clip_sample_range"], c["clip_sample_range"]) if c["clip_sample"] else x_0


def make_betas(c: Config) -> np.ndarray:
    """Compute the betas, [T] in float64, and check them."""
    steps = c["num_train_timesteps"]
    if c["trained_betas"] is not None:
        betas = np.asarray(c["trained_betas"], dtype=np.float64)
        source = "trained_betas"
    else:
        source = f"beta_start={c['beta_start']!r}, beta_end={c['beta_end']!r}"
        betas = BETA_SCHEDULES[c["beta_schedule"]](c["beta_start"], c["beta_end"], steps)
    if betas.shape != (steps,):
        raise ValueError(f"{source} has shape {betas.shape}; num_train_timesteps asks for ({steps},).")
    if c["rescale_betas_zero_snr"]:
        betas = rescale_to_zero_terminal_snr(betas)
    if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
        raise ValueError(f"{source}: every beta must lie in (0, 1); only the last may be 1.")
    if betas[-1] == 1 and c["prediction_type"] == "epsilon":
        raise ValueError(
            "prediction_type='epsilon' cannot be used with a zero terminal SNR (rescale_betas_zero_snr=True): at "
            "the last timestep x_t is all noise, and x_0 would be a division by 0. Use 'v_prediction' or 'sample'."
        )
    if np.any(np.diff(np.cumprod(1 - betas), prepend=1.0) >= 0):
        raise ValueError(
            f"{source}: ᾱ must fall at every step; betas this small or large leave it as it is in float64."
        )
    return betas


def make_alpha_bar(c: Config) -> np.ndarray:
    """Compute ᾱ, [T] in float64."""
    return np.cumprod(1 - make_betas(c))


def make_x_0_variance(c: Config, alpha_bar: np.ndarray) -> np.ndarray | None:
    """E‖x_0 - x̂_0‖² / d at every timestep, [T] in float64: interpolated, and at most what an exact x̂_0 can have."""
    moments = c["x_0_mse"]
    if moments is None:
        return None
    variance = interpolate_moments(moments, alpha_bar)
    # Analytic-DPM theorem 2: no more than with x_t / √ᾱ_t for x̂_0, nor than data in ±r can have at all.
    with np.errstate(divide="ignore"):
        variance = np.minimum(variance, (1 - alpha_bar) / alpha_bar)
    limit = c["clip_sample_range"] if limits_x_0(c) else np.inf
    return np.minimum(variance, limit**2)
