"""ScratchDDPMPipeline of ddpm_from_scratch in one self-contained file, which `save_pretrained` writes.

Generated: change the package, not this file. SPDX-License-Identifier: Apache-2.0
"""

from collections.abc import Callable
from collections.abc import Callable, Mapping
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Callable, Sequence
from collections.abc import Collection, Iterable
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Mapping
from collections.abc import Mapping, Sequence
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from diffusers import ConfigMixin
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, LCMScheduler, SchedulerMixin, UNet2DModel
from diffusers import DDPMScheduler, LCMScheduler
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from pathlib import Path
from torch import Tensor
from torch import Tensor, nn
from types import MappingProxyType
from typing import Any
from typing import Any, ClassVar, NamedTuple
from typing import Any, NamedTuple
from typing import Any, Self
from typing import NamedTuple
from typing import TypeGuard
import ast
import difflib
import diffusers
import inspect
import itertools
import json
import math
import numbers
import numpy as np
import os
import re
import torch
import torch.nn.functional as F
import warnings


def suggestion(wrong: str, allowed: Collection[str]) -> str:
    """`; did you mean '...'?` with the nearest of the allowed names, or nothing if none is near."""
    nearest = difflib.get_close_matches(wrong, allowed, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Check that value is one of allowed; the error suggests the nearest one."""
    allowed = tuple(allowed)
    if value not in allowed:
        hint = suggestion(str(value), allowed)
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}{hint}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether value is a real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_range(name: str, value: object, least: float, most: float) -> None:
    """Check that value is a finite number from least to most."""
    if not (is_number(value) and least <= value <= most and abs(value) < math.inf):
        span = f"lie in [{least:g}, {most:g}]" if most < math.inf else f"be at least {least:g} and finite"
        raise ValueError(f"{name}={value!r} must be a number and {span}.")


def check_eta(value: object, most: float = math.inf) -> None:
    """Check that value is a number from 0 to most, which may be infinity."""
    if not (is_number(value) and 0 <= value <= most):
        span = f"lie in [0, {most:g}]" if most < math.inf else "be at least 0; math.inf draws all noise afresh"
        raise ValueError(f"eta={value!r} must be a number and {span}.")


def check_positive(name: str, value: object) -> None:
    """Check that value is a finite number above 0."""
    if not (is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"{name}={value!r} must be a number, above 0 and finite.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Check that value is a whole number, at least `least`."""
    if not (is_whole(value) and value >= least):
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")


def check_count(name: str, value: object, most: int) -> None:
    """Check that value is a whole number from 1 to most."""
    if not (is_whole(value) and 1 <= value <= most):
        raise ValueError(f"{name}={value!r} must be a whole number from 1 to {most}.")


def check_generator(generator: object, batch_size: int) -> None:
    """Check that generator is a torch.Generator, a list of one for each image, or None."""
    each = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(g, torch.Generator) for g in each):
        raise ValueError(f"generator={generator!r} must be a torch.Generator, or a list of them.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} entries for {batch_size} images: pass one, or one each.")


# How diffusers says that a model has no such weights.
NO_SAFETENSORS = re.compile(r"(no|have a) file named \S+\.safetensors|necessary `safetensors` weights")


def altered(part: ConfigMixin, kind: type[ConfigMixin] | None = None, /, **changes: object) -> Any:  # noqa: ANN401
    """A new scheduler or network with the configuration of part and some changes, of class `kind` or that of part.

    Like `kind.from_config(part.config, **changes)`, except that arguments which were passed by position are kept:
    `from_config` takes them for left out and drops their values, so that it makes 1000 steps of DDPMScheduler(12).
    Arguments that were really left out count as left out in the new object too.
    """
    config, parameters = part.config, inspect.signature(type(part).__init__).parameters
    # The value of an argument that was left out is the very object in the signature.
    left_out = [name for name in config.get("_use_default_values", ()) if config[name] is parameters[name].default]
    return (kind or type(part)).from_config({**config, "_use_default_values": left_out}, **changes)


@contextmanager
def safe_weights(name: str | os.PathLike[str], options: dict[str, Any]) -> Iterator[None]:
    """Set `use_safetensors=True` in options unless they say otherwise: unpickling can run code. Explain a failure."""
    asked = options.get("use_safetensors") is not None
    options["use_safetensors"] = options["use_safetensors"] if asked else True
    try:
        yield
    except OSError as error:
        if asked or not NO_SAFETENSORS.search(str(error)):
            raise
        raise OSError(
            f"{name} has no weights in safetensors under the name that was looked for. A variant is chosen with "
            "variant='...'. Pickled weights (.bin), which can run code as they are read, are only read with "
            f"use_safetensors=False. ({error})"
        ) from error


def write_config(
    json_text: str,
    path: str | os.PathLike[str],
    without: Collection[str] = (),
    saved_as: Mapping[str, str] = MappingProxyType({}),
    **names: object,
) -> None:
    """Write a configuration with `names` replaced, leaving out `without` and the folder that it was loaded from.

    Keys in `saved_as` are written under the names that it gives them.
    """
    config = json.loads(json_text) | names
    for name in ("_name_or_path", *without):
        config.pop(name, None)
    config = {saved_as.get(name, name): value for name, value in config.items()}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


Generators = torch.Generator | list[torch.Generator] | None

WITHOUT_SPECIAL_FUNCTIONS = ("mps",)  # devices that have neither erfcx nor log_ndtr


class Gaussian(NamedTuple):
    """The distribution N(mean, exp(log_variance) I). log_variance broadcasts over mean."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a sample, shaped like mean. The noise is drawn in `dtype`, by default that of the mean."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise_like(self.mean, generator, dtype)

    def kl(self, other: "Gaussian") -> Tensor:
        """KL(self || other) in nats, per element, shaped like the means."""
        difference = self.log_variance - other.log_variance
        distance = (self.mean - other.mean) ** 2 * torch.exp(-other.log_variance)
        return 0.5 * (torch.expm1(difference) - difference + distance)

    def discretized_log_prob(self, x: Tensor) -> Tensor:
        """Log-probability in nats, per element, of the 8-bit bin that holds x (DDPM eq. 13).

        x lies on the grid k / 127.5 - 1, k = 0..255. A bin reaches 1/255 to each side; the first and the last reach to
        infinity, so the 256 bins sum to 1. Exact normal distribution function, accurate far in the tails.
        """
        edge = 1e10  # stands for infinity: no mass is left there, and gradients stay finite
        precision = torch.exp(-0.5 * self.log_variance)
        lower = torch.where(x < -0.999, -edge, (x - 1 / 255 - self.mean) * precision)
        upper = torch.where(x > 0.999, edge, (x + 1 / 255 - self.mean) * precision)
        # Mirror bins right of the mean: differences of the distribution function cancel there, not on the left.
        right = lower + upper > 0
        lower, upper = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
        log_lower, log_upper = _log_ndtr(lower), _log_ndtr(upper)
        mass = -torch.expm1(log_lower - log_upper)
        return log_upper + torch.log(mass.clamp(min=torch.finfo(mass.dtype).tiny))


def noise_like(x: Tensor, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise with the shape and device of x, in `dtype`, by default that of x.

    Raises:
        ValueError: for a list of generators that is not as long as the batch.
    """
    if isinstance(generator, list) and len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for a batch of {len(x)}: pass one, or one per sample.")
    one = generator[0] if isinstance(generator, list) else generator
    # Numbers of a generator on the host reach a GPU without a wait.
    device = one.device if one is not None and one.device.type == "cpu" else x.device
    return moved(randn_tensor(x.shape, generator=generator, device=device, dtype=dtype or x.dtype), x.device)


def _log_ndtr(z: Tensor) -> Tensor:
    """log Φ(z), with an exact gradient in the far left tail, where that of `torch.special.log_ndtr` decays to 0."""
    if z.device.type in WITHOUT_SPECIAL_FUNCTIONS:
        return _log_ndtr(z.cpu()).to(z.device)
    left = z.clamp(max=0)
    tail = torch.log(torch.special.erfcx(-left * 0.5**0.5) / 2) - left**2 / 2
    return torch.where(z < 0, tail, torch.special.log_ndtr(z.clamp(min=0)))


Coefficient = np.ndarray  # on the host in float64: a scalar, or [B]


def upcast(x: Tensor) -> Tensor:
    """Convert 16-bit floats to float32; float32 and float64 stay as they are. ValueError for other dtypes."""
    if not x.is_floating_point():
        raise ValueError(f"A tensor of dtype {x.dtype} is not allowed: pass floats (scale images to [-1, 1] first).")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def broadcast(value: Coefficient, x: Tensor) -> float | Tensor:
    """Bring a host coefficient into a form that multiplies x: a float, or [B, 1, ...] in x's dtype on its device."""
    if np.ndim(value) == 0:
        return float(value)
    if len(value) != x.shape[0]:
        raise ValueError(f"{len(value)} timesteps for a batch of {x.shape[0]}: pass one, or one per sample.")
    tensor = torch.as_tensor(value, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return tensor.to(x.device, non_blocking=True)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a GPU copies it from pinned memory while the host goes on."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def plus(x: Tensor, factor: float | Tensor, y: Tensor) -> Tensor:
    """Compute x + factor * y, in one pass over memory if the factor is a number."""
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def as_tensor(value: Coefficient | Tensor, x: Tensor) -> Tensor:
    """Turn a coefficient or tensor into a tensor that broadcasts over x. A scalar stays on the host, at no cost."""
    return value if isinstance(value, Tensor) else torch.as_tensor(broadcast(value, x), dtype=x.dtype)


def check_shapes(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ValueError unless tensor has the shape of x: broadcasting would share one noise among samples."""
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have that of the samples, {tuple(x.shape)}.")


def is_entry(scalar: Tensor, vector: Tensor) -> bool:
    """Whether scalar is a view of an entry of vector, as one gets by iterating over it: they share their storage."""
    same = scalar.dtype == vector.dtype and scalar.numel() == 1
    return same and scalar.untyped_storage() is vector.untyped_storage()


def mean_of_sample(x: Tensor) -> Tensor:
    """The mean over all dimensions but the first: [B, ...] -> [B]."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


def split_channels(model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into the prediction, shaped like x, and the second half of its channels or None; upcast.

    Raises:
        ValueError: for a shape that is neither x's nor has twice its channels.
    """
    if model_output.shape == x.shape:
        return upcast(model_output), None
    if x.ndim > 1 and model_output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        prediction, second = upcast(model_output).split(x.shape[1], dim=1)
        return prediction, second
    raise ValueError(
        f"model_output has shape {tuple(model_output.shape)}; a sample of shape {tuple(x.shape)} needs the same "
        "shape, or twice its channels for a learned variance."
    )


def _linear(start: float, end: float, steps: int) -> np.ndarray:
    return np.linspace(start, end, steps)


def _scaled_linear(start: float, end: float, steps: int) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def _sigmoid(start: float, end: float, steps: int) -> np.ndarray:
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))


def _cosine(start: float, end: float, steps: int) -> np.ndarray:
    """iDDPM eq. 17: ᾱ = f(u) / f(0), f(u) = cos²((u + 0.008) / 1.008 · π/2)."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return _betas_of(alpha_bar)


def _laplace(start: float, end: float, steps: int) -> np.ndarray:
    """log SNR = -½ sgn(½ - u) log(1 - 2 |½ - u|), kept finite at u = 1; ᾱ = SNR / (1 + SNR). Hang & Gu, table 1."""
    u = np.arange(1, steps + 1) / steps
    log_snr = -0.5 * np.copysign(1, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    return _betas_of(np.concatenate([[1.0], 1 / (1 + np.exp(-log_snr))]))


def _betas_of(alpha_bar: np.ndarray) -> np.ndarray:
    """Betas [T] from T + 1 values of ᾱ, of which the first is the data's; at most 0.999 (iDDPM section 3.2)."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETA_SCHEDULES: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
    "laplace": _laplace,
}


def rescale_to_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Lin et al., algorithm 1: shift and scale √ᾱ so that its last value is 0 and its first one stays."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 1 - (root / np.concatenate([[1.0], root[:-1]])) ** 2


def _leading(steps: int, count: int) -> np.ndarray:
    return np.ceil(np.arange(count) * steps / count)


def _linspace(steps: int, count: int) -> np.ndarray:
    return np.linspace(0, steps - 1, count).round() if count > 1 else np.array([steps - 1])


def _trailing(steps: int, count: int) -> np.ndarray:
    # Rounding errors can make arange one longer than count.
    return np.round(np.arange(steps, 0, -steps / count)[:count])[::-1] - 1


TIMESTEP_SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
}

FLAT = -6.0  # log SNR below which the variance of x_0 given x_t hardly changes any more


def log_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """log(ᾱ / (1 - ᾱ)), kept finite where nothing of the data is left."""
    return np.log(np.maximum(alpha_bar, 1e-12)) - np.log(1 - alpha_bar)


def interpolate_moments(moments: Sequence[tuple[int, float]], alpha_bar: np.ndarray) -> np.ndarray:
    """Interpolate pairs [t, value] to all T timesteps: linearly in log value over log SNR, constant outside the pairs.

    Raises:
        ValueError: values that are not positive, or timesteps that do not ascend within 0..T-1.
    """
    try:
        pairs = np.asarray(moments, dtype=np.float64)
    except (TypeError, ValueError):  # not numbers, or not in pairs
        pairs = np.empty(0)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.all(np.isfinite(pairs)) or np.any(pairs[:, 1] <= 0):
        raise ValueError(f"x_0_mse={moments!r} must be pairs [t, value] with positive values.")
    t = pairs[:, 0]
    if np.any(t != t.round()) or np.any(np.diff(t) <= 0) or t[0] < 0 or t[-1] >= len(alpha_bar):
        raise ValueError(f"x_0_mse: the timesteps {t.tolist()} must ascend within 0..{len(alpha_bar) - 1}.")
    noise = -log_snr(alpha_bar)
    return np.exp(np.interp(noise, noise[t.astype(int)], np.log(pairs[:, 1])))


def nearest_distinct(positions: np.ndarray, steps: int) -> np.ndarray:
    """Round ascending positions to strictly ascending whole numbers within 0..steps-1."""
    i = np.arange(len(positions))
    ascending = np.maximum.accumulate(positions.round() - i) + i
    return np.minimum(ascending, steps - len(positions) + i).astype(np.int64)


def _quadratic(alpha_bar: np.ndarray, variance: np.ndarray | None, count: int) -> np.ndarray:
    """t ∝ i²: DDIM, appendix D.2, stretched to reach T - 1."""
    last = len(alpha_bar) - 1
    return nearest_distinct(np.linspace(0, last**0.5, count) ** 2 if count > 1 else np.array([last]), last + 1)


def evenly_in_log_snr(alpha_bar: np.ndarray, variance: np.ndarray | None, count: int) -> np.ndarray:
    """Timesteps evenly spaced in log SNR, as far as x_t still tells something about x_0; and T - 1."""
    last = len(alpha_bar) - 1
    noise = -log_snr(alpha_bar)
    targets = np.linspace(noise[0], min(noise[-1], -FLAT), count - 1)
    return nearest_distinct(np.append(np.interp(targets, noise, np.arange(last + 1)), last), last + 1)


def bound_costs(alpha_bar: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats per dimension at [s, t] of [T, T]; infinite unless s < t.

    p has the variance σ² that is optimal for E‖x_0 - x̂_0‖² / d = variance, so that the divergence is ½ log(σ²/β̃)
    (Analytic-DPM theorem 3).
    """
    a_s, a_t = alpha_bar[:, None], alpha_bar[None, :]
    below = np.tri(len(alpha_bar), k=-1, dtype=bool).T
    one_minus_alpha = 1 - np.divide(a_t, a_s, out=np.zeros(below.shape), where=below)
    small = (1 - a_s) / (1 - a_t) * one_minus_alpha
    from_x_0 = a_s * (one_minus_alpha / (1 - a_t)) ** 2 * variance[None, :]
    return np.where(below, 0.5 * np.log1p(from_x_0 / small), np.inf)


def _likelihood(alpha_bar: np.ndarray, variance: np.ndarray | None, count: int) -> np.ndarray:
    """The chain of K timesteps from T - 1 to 0 with the least sum of costs, by dynamic programming (Watson et al.)."""
    assert variance is not None  # checked by the scheduler
    last = len(alpha_bar) - 1
    if count == 1:
        return np.array([last])
    costs = bound_costs(alpha_bar, variance)
    best = np.where(np.arange(last + 1) == 0, 0.0, np.inf)  # least cost of a chain of n timesteps from 0 up to t
    came_from = []
    for _ in range(count - 1):
        sums = best[:, None] + costs
        came_from.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    chain = [last]
    for origin in reversed(came_from):
        chain.append(int(origin[chain[-1]]))
    return np.array(chain[::-1])


TIMESTEP_CHOICES: dict[str, Callable[[np.ndarray, np.ndarray | None, int], np.ndarray]] = {
    "quadratic": _quadratic,
    "log_snr": evenly_in_log_snr,
    "likelihood": _likelihood,
}


def _small(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Coefficient:
    return small


def _large(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Coefficient:
    return np.where(last, small, large)


def _learned(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Tensor:
    return values


def _learned_range(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Tensor:
    """iDDPM eq. 15: v in [-1, 1] spans log β̃ to log β."""
    fraction = (values + 1) / 2
    return fraction * broadcast(large, values) + (1 - fraction) * broadcast(small, values)


REVERSE_LOG_VARIANCES: dict[str, Callable[..., Coefficient | Tensor]] = {
    "fixed_small": _small,
    "fixed_small_log": _small,
    "fixed_large": _large,
    "fixed_large_log": _large,
    "learned": _learned,
    "learned_range": _learned_range,
}
LEARNED_VARIANCES = ("learned", "learned_range")


def check_variance_values(variance_type: str, values: Tensor | None) -> None:
    """Raise ValueError if the variance is learned but the network has no output for it."""
    if variance_type in LEARNED_VARIANCES and values is None:
        raise ValueError(
            f"variance_type={variance_type!r} needs a network with twice the channels of its input, half of them for "
            "the variance. Use such a network, or variance_type='fixed_small' or 'fixed_large'."
        )


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


Timestep = int | Tensor
Index = np.ndarray  # timesteps as whole numbers: a scalar, or [B]


class Transition(NamedTuple):
    """A step t -> s of a chain. u is the timestep before t in the chain, or T if t is its first."""

    t: Index
    s: Index
    u: Index
    eta: float
    optimal: bool  # whether the reverse variance is the optimal one


class StepPlan(NamedTuple):
    """Coefficients of a step t -> s. They do not depend on the samples, so they are computed once."""

    transition: Transition
    signal: float  # √ᾱ_t
    sigma: float  # √(1 - ᾱ_t)
    on_x_0: float  # coefficients of the mean, see `posterior_coefficients`
    on_x_t: float
    noise: float | None  # standard deviation of p(x_s | x_t); 0 where none is drawn, None where the network gives it


def posterior_coefficients(
    a_t: Coefficient, a_s: Coefficient, eta: float
) -> tuple[Coefficient, Coefficient, Coefficient]:
    """q(x_s | x_t, x_0) = N(on_x_0 x_0 + on_x_t x_t, variance I) between ᾱ_t and ᾱ_s: DDIM eqs. 7 and 16.

    The variance is η²β̃, but at most 1 - ᾱ_s, that of q(x_s | x_0): for η = ∞, x_s does not depend on x_t. The part of
    x_s's noise that is not newly drawn is the noise of x_t, scaled.
    """
    fresh = np.minimum(eta**2 * (1 - a_t / a_s) / (1 - a_t), 1)
    on_x_t = np.sqrt((1 - fresh) * (1 - a_s) / (1 - a_t))
    return np.sqrt(a_s) - on_x_t * np.sqrt(a_t), on_x_t, fresh * (1 - a_s)


def log_square(x: float) -> float:
    """log x², which is -∞ at 0."""
    return 2 * math.log(x) if x > 0 else -math.inf


def posterior_log_variance(alpha_bar: np.ndarray, step: Transition, eta: float = 1.0) -> Coefficient:
    """log of the variance of q(x_s | x_t, x_0), β̃ at η = 1.

    At s = -1, where β̃ is 0: that of u -> t, one step up the chain, as in DDPM and iDDPM.
    """
    last = step.s < 0
    a_t = alpha_bar[np.where(last, step.u, step.t)]
    a_s = alpha_bar[np.where(last, step.t, step.s)]
    # α is 0 where ᾱ_s is: pure noise (zero terminal SNR) stays pure noise.
    alpha = np.divide(a_t, a_s, out=np.zeros_like(a_t), where=a_s > 0)
    beta_tilde = np.log((1 - a_s) / (1 - a_t) * (1 - alpha))
    return np.minimum(beta_tilde + log_square(eta), np.log(1 - a_s))


class Chain:
    """The timesteps of a chain in descending order, with the next (s) and the previous one (u) of each t.

    Args:
        timesteps: [K], strictly descending within T-1..0.
        num_train_timesteps: T.
        eta: how much of the posterior's noise a step draws, at least 0; see `posterior_coefficients`.
        optimal: whether the reverse variance is the optimal one.
        device: where `timesteps` are kept for others to read.
    """

    def __init__(
        self,
        timesteps: np.ndarray,
        num_train_timesteps: int,
        eta: float,
        optimal: bool,
        device: str | torch.device | None = None,
    ) -> None:
        self.eta, self.optimal = float(eta), optimal
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)
        self._on_host = timesteps
        self._next = dict(itertools.pairwise([*timesteps.tolist(), -1]))
        self._above = np.full(num_train_timesteps, num_train_timesteps)
        self._above[timesteps[1:]] = timesteps[:-1]

    def transition(self, t: Index, s: Index) -> Transition:
        """The step t -> s, with the timestep before t in this chain and the chain's eta."""
        return Transition(t, s, self._above[t], self.eta, self.optimal)

    def previous(self, timestep: Timestep) -> tuple[int, int]:
        """(t, s) for a timestep t of the chain; s = -1 for its last one. Never waits for a device to read the value.

        Raises:
            ValueError: it is not one of them, or more than one.
        """
        t = self._one(timestep)
        if t not in self._next:
            raise ValueError(
                f"timestep {t} is not one of the {len(self._next)} in `timesteps`. Pass one of them, or choose others "
                "with set_timesteps."
            )
        return t, self._next[t]

    def _one(self, t: Timestep) -> int:
        if isinstance(t, Tensor) and t.device.type != "cpu" and is_entry(t, self.timesteps):
            # Its place is known without its value, for which the host would wait.
            return int(self._on_host[t.storage_offset()])
        if isinstance(t, Tensor) and t.device.type == "cpu" and t.ndim == 0:
            t = t.numpy().item()
        if type(t) is int and t in self._next:
            return t
        index = to_index(t, len(self._above))
        if np.ndim(index):
            raise ValueError(f"step takes one timestep for the whole batch, not {len(index)}.")
        return int(index)


def to_index(t: Timestep, steps: int, least: int = 0) -> Index:
    """Timesteps as a numpy array on the host; ValueError for values outside least..steps-1."""
    index = np.asarray(t.cpu() if isinstance(t, Tensor) else t)
    whole = np.issubdtype(index.dtype, np.integer)
    if not whole or index.size == 0 or index.min() < least or index.max() >= steps:
        raise ValueError(f"timestep {t!r} is not allowed: whole numbers from {least} to {steps - 1} are.")
    return index.reshape(()) if index.size == 1 else index.reshape(-1)


def spaced_timesteps(
    config: Mapping[str, Any], alpha_bar: np.ndarray, x_0_variance: np.ndarray | None, count: int
) -> np.ndarray:
    """The K timesteps of a chain, in descending order, by the configuration's `timestep_choice` or `timestep_spacing`.

    Args:
        config: of the scheduler.
        alpha_bar: [T].
        x_0_variance: [T] E‖x_0 - x̂_0‖² / d, for the choice "likelihood".
        count: K, from 1 to T.

    Raises:
        ValueError: an offset pushes the first timestep out of the range.
    """
    steps, offset, spacing = len(alpha_bar), config["steps_offset"], config["timestep_spacing"]
    if config["timestep_choice"] is not None:
        return TIMESTEP_CHOICES[config["timestep_choice"]](alpha_bar, x_0_variance, count)[::-1]
    chain = TIMESTEP_SPACINGS[spacing](steps, count) + (offset if spacing == "leading" else 0)
    if chain[-1] >= steps:
        raise ValueError(
            f"steps_offset={offset} with num_inference_steps={count} starts at timestep {int(chain[-1])}; the last "
            f"one is {steps - 1}. Take fewer steps, steps_offset=0 or timestep_spacing='trailing'."
        )
    return chain[::-1].astype(np.int64)


def listed_timesteps(timesteps: list[int], steps: int) -> np.ndarray:
    """The given timesteps as an array [K]; ValueError unless they descend strictly within steps-1..0."""
    chain = np.asarray(timesteps)
    if chain.ndim != 1 or len(chain) == 0 or not np.issubdtype(chain.dtype, np.integer):
        raise ValueError(f"timesteps={timesteps!r} must be a non-empty list of whole numbers.")
    if np.any(np.diff(chain) >= 0) or chain[0] >= steps or chain[-1] < 0:
        raise ValueError(f"timesteps={timesteps!r} must descend strictly within {steps - 1}..0.")
    return chain.astype(np.int64)


# Standard deviation of noise in p(x_1 | x_2), with the paper's indices, of which a pixel in [-1, 1] shows E|noise| = 2
# of its 255 levels: more than that would hardly be taken out again (Analytic-DPM, appendix on sampling).
LAST_NOISE = 2 * (2 / 255) * math.sqrt(math.pi / 2)


class Prediction(NamedTuple):
    """x_0 and the noise predicted by a network, consistent with each other: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) epsilon.

    `variance_values` is the second half of the output's channels, unchanged: v of iDDPM eq. 15 under "learned_range",
    the log-variance under "learned". None if the network has no such half.
    """

    x_0: Tensor
    epsilon: Tensor
    variance_values: Tensor | None


class ScratchDDPMScheduler(SchedulerMixin, ConfigMixin):
    r"""DDPM's forward process, posterior, bound, losses and sampler, with the interface of `diffusers.DDPMScheduler`.

    It never calls the network: tensors in, tensors out. Configurations, whose keys and defaults are the same, can be
    exchanged in both directions. Where the two differ, `docs/differences.md` says why.

    Args:
        num_train_timesteps: T, the length of the chain.
        beta_start: first β of the linear, scaled_linear and sigmoid schedules.
        beta_end: last β of them.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid" or "laplace".
        trained_betas: T betas to use instead of a schedule.
        variance_type: of p(x_s | x_t): "fixed_small" (β̃), "fixed_large" (β), each also as "..._log" (the same here),
            "learned" (the network's second half of channels is the log-variance) or "learned_range" (it is v, which
            interpolates log β̃ and log β). None, which DPM-Solver's saved configurations hold, means "fixed_small".
        clip_sample: clip the predicted x_0 to ±clip_sample_range.
        prediction_type: "epsilon", "sample" (x_0) or "v_prediction".
        thresholding: dynamic thresholding of the predicted x_0, instead of clipping.
        dynamic_thresholding_ratio: its quantile, in (0, 1].
        clip_sample_range: see clip_sample.
        sample_max_value: upper bound of the threshold, which is at least 1 where this allows it.
        timestep_spacing: "leading", "linspace" or "trailing", of K < T steps.
        steps_offset: added to the timesteps of the leading spacing.
        rescale_betas_zero_snr: rescale so that ᾱ of the last step is 0.
        eta: how much noise a step draws, a variance of η²β̃, but at most 1 - ᾱ_s: 1 is DDPM; 0 is DDIM, which draws none
            (DDIM eq. 16); with `math.inf` all of x_s's noise is fresh, as in consistency models (Song et al. 2023,
            algorithm 1). Above 1 the variance_type does not count. `set_timesteps` may choose another one for a chain.
        x_0_mse: E‖x_0 - x̂_0(x_t)‖² / d of one network and clipping at some timesteps, as ascending pairs [t, value];
            `ddpm calibrate` estimates them, and their logarithm is linear in log SNR in between. The variance of
            p(x_s | x_t) that is optimal for the bound follows from them.
        optimal_variance: use that variance instead of `variance_type`. None: where x_0_mse is given, for chains of
            fewer than T steps with 0 < eta <= 1.
        timestep_choice: which K < T timesteps, instead of timestep_spacing: "quadratic" (DDIM, appendix D.2), "log_snr"
            (even steps of it) or "likelihood" (those of the least variational bound, which needs x_0_mse).

    Raises:
        ValueError: for a value that is not allowed; the message lists what is. Predicting epsilon with a zero terminal
            SNR is refused: x_0 cannot be told from x_T = epsilon.
    """

    _compatibles = DDPMScheduler._compatibles  # which schedulers `from_config` may exchange with
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        eta: float = 1.0,
        x_0_mse: list[tuple[int, float]] | None = None,
        optimal_variance: bool | None = None,
        timestep_choice: str | None = None,
    ) -> None:
        check_config(self.config)
        self.variance_type = variance_type or "fixed_small"
        betas = make_betas(self.config)
        alpha_bar = np.cumprod(1 - betas)
        # float32 copies for other code to read; the formulas below use the float64 table.
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = torch.from_numpy(alpha_bar).float()
        # ᾱ_t at index t; pure noise above the chain, 0, at T; the data, 1, at the end, where index -1 finds it.
        self._alpha_bar = np.concatenate([alpha_bar, [0.0, 1.0]])
        self._x_0_variance = make_x_0_variance(self.config, alpha_bar)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._plans: dict[tuple[int, int, float, bool, str], StepPlan] = {}
        self._chosen: dict[int, np.ndarray] = {}  # by K: a choice may take a second to make
        self._set_chain(np.arange(num_train_timesteps)[::-1], eta)

    def __len__(self) -> int:
        """The number of training timesteps, T."""
        return int(self.config["num_train_timesteps"])

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401
        """As in diffusers, but our keys' names in files, now and in earlier versions, are accepted too."""
        return super().from_config(with_argument_names(config), **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration under the name of diffusers' class, so that both classes can load it."""
        without, more = of_stock_class(self.config)
        write_config(self.to_json_string(), json_file_path, without, SAVED_AS, **more)

    # --- forward process (DDPM section 2) ---------------------------------------------------------------------------

    def q_marginal(self, x_0: Tensor, t: Timestep) -> Gaussian:
        """q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I): DDPM eq. 4. x_0: [B, ...]."""
        x_0 = upcast(x_0)
        alpha_bar = self._alpha_bar[to_index(t, len(self))]
        return Gaussian(broadcast(np.sqrt(alpha_bar), x_0) * x_0, as_tensor(np.log(1 - alpha_bar), x_0))

    def q_transition(self, x_s: Tensor, t: Timestep, s: Timestep) -> Gaussian:
        """q(x_t | x_s) = N(√(ᾱ_t/ᾱ_s) x_s, (1 - ᾱ_t/ᾱ_s) I) for -1 <= s < t: DDPM eq. 2, one step or many."""
        x_s = upcast(x_s)
        step = self._transition(t, s)
        alpha = self._alpha_bar[step.t] / self._alpha_bar[step.s]
        return Gaussian(broadcast(np.sqrt(alpha), x_s) * x_s, as_tensor(np.log(1 - alpha), x_s))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) noise, a draw from DDPM eq. 4, in the dtype of original_samples."""
        check_shapes("noise", noise, original_samples)
        x_0 = upcast(original_samples)
        signal, sigma = self._signal_and_sigma(timesteps, x_0)
        return (signal * x_0 + sigma * upcast(noise)).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """v = √ᾱ_t noise - √(1 - ᾱ_t) x_0 (Salimans & Ho 2022, section 4), in the dtype of sample, which is x_0."""
        check_shapes("noise", noise, sample)
        x_0 = upcast(sample)
        signal, sigma = self._signal_and_sigma(timesteps, x_0)
        return (signal * upcast(noise) - sigma * x_0).to(sample.dtype)

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep | None = None) -> Gaussian:
        r"""q(x_s | x_t, x_0), DDPM eqs. 6-7, for any -1 <= s < t; with eta < 1, DDIM eq. 7.

        For neighbours at eta = 1 the mean is √ᾱ_s β_t / (1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_s) / (1 - ᾱ_t) x_t, and the
        variance β̃_t = (1 - ᾱ_s) / (1 - ᾱ_t) β_t.

        With s left out the chain is the full one, s = t - 1, with the configuration's eta; with s given it is that of
        `set_timesteps`. The mean is exact for s = -1 too (it is x_0); the log-variance there is not -∞ but that of the
        next step up the chain, as in the implementations of DDPM and iDDPM.
        """
        check_shapes("x_0", x_0, x_t)
        x_0, x_t, step = upcast(x_0), upcast(x_t), self._transition(t, s)
        on_x_0, on_x_t, _ = posterior_coefficients(self._alpha_bar[step.t], self._alpha_bar[step.s], step.eta)
        mean = plus(broadcast(on_x_0, x_0) * x_0, broadcast(on_x_t, x_t), x_t)
        return Gaussian(mean, as_tensor(posterior_log_variance(self._alpha_bar, step, step.eta), x_0))

    # --- reverse process (DDPM section 3.2) -------------------------------------------------------------------------

    def predict(self, model_output: Tensor, x_t: Tensor, t: Timestep) -> Prediction:
        """x_0 and epsilon from the network's output, whichever `prediction_type` it has (for epsilon, DDPM eq. 15).

        x_0 is clipped or thresholded as configured, and epsilon then follows from it.

        Args:
            model_output: [B, C, ...], or [B, 2 C, ...] with the values of the variance in the second half.
            x_t: [B, C, ...].
            t: one timestep, or one per sample.
        """
        output, variance_values = split_channels(model_output, x_t)
        x_t = upcast(x_t)
        signal, sigma = self._signal_and_sigma(t, x_t)
        x_0 = self._x_0(output, x_t, signal, sigma)
        kind = self.config["prediction_type"]
        if kind == "sample" or limits_x_0(self.config):
            epsilon = plus(x_t, -signal, x_0) / sigma
        elif kind == "epsilon":
            epsilon = output
        else:
            epsilon = plus(signal * output, sigma, x_t)
        return Prediction(x_0, epsilon, variance_values)

    def p_reverse(self, model_output: Tensor, x_t: Tensor, t: Timestep, s: Timestep | None = None) -> Gaussian:
        """p(x_s | x_t), DDPM eq. 1: the posterior's mean at the predicted x_0, and the variance of `variance_type`.

        Where the optimal variance is in use (see the class), it replaces the latter. s has the meaning that it has in
        `q_posterior`.
        """
        prediction = self.predict(model_output, x_t, t)
        mean = self.q_posterior(prediction.x_0, upcast(x_t), t, s).mean
        log_variance = self._reverse_log_variance(prediction.variance_values, self._transition(t, s))
        return Gaussian(mean, as_tensor(log_variance, mean))

    def _reverse_log_variance(self, values: Tensor | None, step: Transition) -> Coefficient | Tensor:
        """log σ² of p(x_s | x_t): the optimal one, for eta > 1 that of q, or that of `variance_type` and the values."""
        if step.optimal:
            return self._optimal_log_variance(step)
        if step.eta > 1:
            return posterior_log_variance(self._alpha_bar, step, step.eta)
        check_variance_values(self.variance_type, values)
        small = posterior_log_variance(self._alpha_bar, step)
        large = np.log(1 - self._alpha_bar[step.t] / self._alpha_bar[step.s])
        log_variance = REVERSE_LOG_VARIANCES[self.variance_type](small, large, step.s < 0, values)
        return log_variance + log_square(step.eta)

    def _optimal_log_variance(self, step: Transition) -> Coefficient:
        """log of the σ² that minimises the bound, from the mean squared error of x̂_0 (Analytic-DPM theorem 1)."""
        assert self._x_0_variance is not None  # checked on construction
        a_t, a_s = self._alpha_bar[step.t], self._alpha_bar[step.s]
        on_x_0, _, variance = posterior_coefficients(a_t, a_s, step.eta)
        return np.log(variance + on_x_0**2 * self._x_0_variance[step.t])

    # --- objectives (DDPM section 3) --------------------------------------------------------------------------------

    def training_target(self, x_0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """The regression target of the network: noise, x_0 or v, depending on `prediction_type`."""
        if self.config["prediction_type"] == "v_prediction":
            return self.get_velocity(x_0, noise, t)
        return noise if self.config["prediction_type"] == "epsilon" else x_0

    def simple_loss(self, model_output: Tensor, x_0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """L_simple, DDPM eq. 14: [B], the squared error of the training target, averaged over the dimensions."""
        check_shapes("noise", noise, x_0)
        output, _ = split_channels(model_output, x_0)
        target = upcast(self.training_target(upcast(x_0), upcast(noise), t))
        return mean_of_sample((output - target) ** 2)

    def vlb_term(
        self, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep | None = None
    ) -> Tensor:
        """A term of the variational bound, DDPM eq. 5: [B], in nats per dimension.

        KL(q(x_s | x_t, x_0) || p(x_s | x_t)), the L_{t-1} of the paper, for s >= 0; -log p(x_0 | x_t) by the discrete
        decoder of eq. 13, its L_0, for s = -1. x_0 lies on the grid k / 127.5 - 1. s as in `q_posterior`.

        Raises:
            ValueError: for eta = 0, where q has no variance and the divergence is infinite, or shapes that do not fit.
        """
        step = self._transition(t, s)
        if step.eta == 0:
            raise ValueError("The bound is infinite at eta=0, where q(x_s | x_t, x_0) is a point: take eta > 0.")
        check_shapes("x_0", x_0, x_t)
        x_0, x_t = upcast(x_0), upcast(x_t)
        reverse = self.p_reverse(model_output, x_t, t, s)
        kl = self.q_posterior(x_0, x_t, t, s).kl(reverse)
        decoder = -reverse.discretized_log_prob(x_0)
        last = torch.as_tensor(step.s < 0).reshape(-1, *(1,) * (x_0.ndim - 1)).to(x_0.device, non_blocking=True)
        return mean_of_sample(torch.where(last, decoder, kl))

    def prior_kl(self, x_0: Tensor, t: Timestep | None = None) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)), DDPM eq. 5: [B], nats per dimension; t is the chain's first timestep."""
        q = self.q_marginal(x_0, len(self) - 1 if t is None else t)
        return mean_of_sample(q.kl(Gaussian(torch.zeros_like(q.mean), torch.zeros_like(q.log_variance))))

    # --- sampling (DDPM algorithm 2) --------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        eta: float | None = None,
    ) -> None:
        """Choose the sampling chain: K spaced timesteps, or a strictly descending list; and its eta.

        Raises:
            ValueError: for both or neither, or a value that is not allowed.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either num_inference_steps or timesteps (a descending list), one of the two.")
        if eta is not None:
            check_eta(eta)
        chain = self._spaced(num_inference_steps) if timesteps is None else listed_timesteps(timesteps, len(self))
        self.num_inference_steps = len(chain)
        self.custom_timesteps = timesteps is not None
        self._set_chain(chain, self.config["eta"] if eta is None else eta, device)

    def _spaced(self, count: int | None) -> np.ndarray:
        check_count("num_inference_steps", count, len(self))
        assert count is not None
        if count not in self._chosen:
            self._chosen[count] = spaced_timesteps(self.config, self._alpha_bar[: len(self)], self._x_0_variance, count)
        return self._chosen[count]

    def _set_chain(self, timesteps: np.ndarray, eta: float, device: str | torch.device | None = None) -> None:
        automatic = self._x_0_variance is not None and len(timesteps) < len(self) and 0 < eta <= 1
        optimal = automatic if self.config["optimal_variance"] is None else self.config["optimal_variance"]
        self._chain = Chain(timesteps, len(self), eta, optimal, device)
        self.timesteps = self._chain.timesteps

    def previous_timestep(self, timestep: Timestep) -> Timestep:
        """The s after t in `timesteps`, or -1; a tensor on the CPU once they are set. ValueError if t is not there."""
        s = self._chain.previous(timestep)[1]
        return s if self.num_inference_steps is None else torch.tensor(s)

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """Return the sample unchanged: DDPM's network takes x_t itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of DDPM algorithm 2: draw x_s from p(x_s | x_t), s being next in `timesteps`; no noise at s = -1.

        Where x_0 is clipped, LAST_NOISE limits the noise of an optimal variance at s = 0.

        Args:
            model_output: [B, C, ...], or [B, 2 C, ...] (see `predict`).
            timestep: t, one of `timesteps`.
            sample: x_t, [B, C, ...].
            generator: of the noise; a list has one for each sample.
            return_dict: False for a tuple (prev_sample, pred_original_sample).

        Returns:
            prev_sample (x_s) and pred_original_sample (the predicted x_0), both in the dtype of sample.

        Raises:
            ValueError: for a timestep that is not in `timesteps`, or shapes that do not fit.
        """
        plan = self._plan(*self._chain.previous(timestep))
        output, variance_values = split_channels(model_output, sample)
        if not plan.transition.optimal:
            check_variance_values(self.variance_type, variance_values)
        x_t = upcast(sample)
        x_0 = self._x_0(output, x_t, plan.signal, plan.sigma)
        mean = plus(plan.on_x_0 * x_0, plan.on_x_t, x_t)
        if plan.noise is None:
            log_variance = as_tensor(self._reverse_log_variance(variance_values, plan.transition), x_t)
            x_s = Gaussian(mean, log_variance).sample(generator, dtype=sample.dtype)
        elif plan.noise == 0:
            x_s = mean
        else:
            x_s = plus(mean, plan.noise, noise_like(mean, generator, dtype=sample.dtype))
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _plan(self, t: int, s: int) -> StepPlan:
        """The coefficients of `p_reverse` at t -> s, computed once and kept for every chain with this step."""
        key = t, s, self._chain.eta, self._chain.optimal, self.variance_type
        if key not in self._plans:
            step = self._transition(t, s)
            alpha_bar, below = self._alpha_bar[step.t], self._alpha_bar[step.s]
            on_x_0, on_x_t, variance = map(float, posterior_coefficients(alpha_bar, below, step.eta))
            noise = self._step_noise(step, variance)
            self._plans[key] = StepPlan(step, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), on_x_0, on_x_t, noise)
        return self._plans[key]

    def _step_noise(self, step: Transition, variance: float) -> float | None:
        """Standard deviation of the noise that `step` adds; None if the network predicts it. See LAST_NOISE."""
        if step.s < 0 or (step.eta == 0 and not step.optimal):
            return 0.0
        if self.variance_type in LEARNED_VARIANCES and not step.optimal and step.eta <= 1:
            return None
        noise = math.exp(0.5 * float(self._reverse_log_variance(None, step)))
        if step.optimal and step.s == 0 and limits_x_0(self.config):
            noise = min(noise, max(LAST_NOISE * self.config["clip_sample_range"], math.sqrt(variance)))
        return noise

    # --- inner workings: tensors upcast, timesteps as host indices ---------------------------------------------------

    def _x_0(self, output: Tensor, x_t: Tensor, signal: float | Tensor, sigma: float | Tensor) -> Tensor:
        """The predicted x_0, clipped or thresholded as configured. All tensors are upcast."""
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            x_0 = plus(x_t, -sigma, output) / signal
        elif kind == "sample":
            x_0 = output
        else:
            x_0 = plus(signal * x_t, -sigma, output)
        return limit_x_0(x_0, self.config)

    def _signal_and_sigma(self, t: Timestep, x: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), broadcast over x, which is upcast."""
        alpha_bar = self._alpha_bar[to_index(t, len(self))]
        return broadcast(np.sqrt(alpha_bar), x), broadcast(np.sqrt(1 - alpha_bar), x)

    def _transition(self, t: Timestep, s: Timestep | None) -> Transition:
        """The step t -> s of the chain of `set_timesteps`; with s left out, t -> t - 1 of the full one."""
        at = to_index(t, len(self))
        if s is None:
            return Transition(at, at - 1, at + 1, self.config["eta"], self.config["optimal_variance"] is True)
        below = to_index(s, len(self), least=-1)
        if np.any(below >= at):
            raise ValueError(f"s={s} must be smaller than t={t}: a reverse step goes from t down to s.")
        return self._chain.transition(at, below)


# What each configuration key may be, for the keys of which not every value is implemented.
SUPPORTED: dict[str, tuple[object, ...]] = {
    "time_embedding_type": ("positional", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}


class BlockKind(NamedTuple):
    """A level of the network."""

    attention: bool
    sampling: str | None  # by "conv" or "resnet"; None: by the configuration's downsample_type or upsample_type


DOWN_BLOCKS = {
    "DownBlock2D": BlockKind(attention=False, sampling="conv"),
    "AttnDownBlock2D": BlockKind(attention=True, sampling=None),
    "ResnetDownsampleBlock2D": BlockKind(attention=False, sampling="resnet"),
}
UP_BLOCKS = {
    "UpBlock2D": BlockKind(attention=False, sampling="conv"),
    "AttnUpBlock2D": BlockKind(attention=True, sampling=None),
    "ResnetUpsampleBlock2D": BlockKind(attention=False, sampling="resnet"),
}


def check_network(config: dict[str, Any]) -> None:
    """Raise ValueError for a configuration that is not implemented or cannot be built."""
    for key, allowed in SUPPORTED.items():
        if config[key] not in allowed:
            raise ValueError(f"{key}={config[key]!r} is not supported. Allowed: {', '.join(map(repr, allowed))}.")
    for key, blocks in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        if not all(kind in blocks for kind in config[key]):
            raise ValueError(f"{key}={list(config[key])!r} is not supported. Allowed: {', '.join(blocks)}.")
        if len(config[key]) != len(config["block_out_channels"]):
            raise ValueError(
                f"{key} has {len(config[key])} entries, block_out_channels {len(config['block_out_channels'])}: "
                "one for each level is needed in both."
            )
    for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise ValueError(f"{key}={config[key]!r} must be a whole number, at least 1.")
    if config["time_embedding_type"] == "learned" and not is_whole(config["num_train_timesteps"]):
        raise ValueError("time_embedding_type='learned' needs num_train_timesteps: one embedding for each is learned.")
    for channels in config["block_out_channels"]:
        if channels % config["norm_num_groups"]:
            raise ValueError(
                f"block_out_channels={channels} is not divisible by norm_num_groups={config['norm_num_groups']}."
            )
    _check_heads(config)
    _check_sample_size(config)


def _check_heads(config: dict[str, Any]) -> None:
    asked, all_channels = config["attention_head_dim"], config["block_out_channels"]
    if isinstance(asked, Sequence) and len(asked) != len(all_channels):
        raise ValueError(
            f"attention_head_dim={asked!r} must be one width, or {len(all_channels)}, one for each level from the top."
        )
    kinds = zip(config["down_block_types"], reversed(config["up_block_types"]), strict=True)
    attending = [DOWN_BLOCKS[down].attention or UP_BLOCKS[up].attention for down, up in kinds]
    attending[-1] |= config["mid_block_type"] is not None and config["add_attention"]
    for channels, width, attends in zip(all_channels, head_widths(config), attending, strict=True):
        if attends and not (is_whole(width) and 1 <= width <= channels):
            raise ValueError(
                f"attention_head_dim={asked!r} must be a whole number, at least 1 and at most the channels of a level "
                f"that attends: one of them has {channels}."
            )


def head_widths(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Channels of an attention head on each level, from the top, as attention_head_dim says it (None: all channels)."""
    asked, all_channels = config["attention_head_dim"], config["block_out_channels"]
    if asked is None:
        return tuple(all_channels)
    return tuple(asked) if isinstance(asked, Sequence) else (asked,) * len(all_channels)


def embed_dim(config: Mapping[str, Any]) -> int:
    """Channels of the embedding of timesteps and classes."""
    return config["time_embedding_dim"] or 4 * config["block_out_channels"][0]


def takes_labels(config: Mapping[str, Any]) -> bool:
    """Whether a network is conditioned on class labels, of whichever form."""
    return config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None


def sides(sample_size: int | Sequence[int]) -> tuple[int, ...]:
    """A `sample_size` as (height, width)."""
    return (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)


def halvings(block_out_channels: Sequence[int]) -> int:
    """2 to the number of times that a network halves its input; height and width must be multiples of it."""
    return 2 ** (len(block_out_channels) - 1)


def sample_sides(config: Mapping[str, Any], height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width of samples: those that are asked for, the configuration's sample_size where they are None.

    Raises ValueError if there is no sample_size, or the network cannot halve a side.
    """
    size, factor = config["sample_size"], halvings(config["block_out_channels"])
    if size is None and None in (height, width):
        raise ValueError(
            "The network's configuration has no sample_size: set it to the side of the images or to [height, "
            "width], or pass height and width where the pipeline takes them."
        )
    own = (0, 0) if size is None else sides(size)
    asked = {"height": own[0] if height is None else height, "width": own[1] if width is None else width}
    for name, side in asked.items():
        if not (is_whole(side) and side >= 1 and side % factor == 0):
            raise ValueError(
                f"{name}={side!r} must be a multiple of {factor}: the network halves its input "
                f"{len(config['block_out_channels']) - 1} times."
            )
    return int(asked["height"]), int(asked["width"])


def _check_sample_size(config: dict[str, Any]) -> None:
    size, factor = config["sample_size"], halvings(config["block_out_channels"])
    both = () if size is None else sides(size)
    if size is not None and (len(both) != 2 or any(not isinstance(n, int) or n < 1 or n % factor for n in both)):
        raise ValueError(
            f"sample_size={size!r} must be a side, or (height, width), divisible by {factor}: the network halves the "
            f"resolution {len(config['block_out_channels']) - 1} times."
        )


# On a CPU the fused attention's backward pass in bfloat16 takes ten times as long as plain matrix products do over few
# tokens; all else it does faster.
FEW_TOKENS = 256


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoidal embedding [B] -> [B, dim] of timesteps, in float32; sines first unless flipped (Ho et al., app. B)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / (half - freq_shift))
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


def matrix_operand(x: Tensor) -> Tensor:
    """The tensor in the type and order that products of matrices take, for several that would each make a copy."""
    device = x.device.type
    casts = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)  # others may know no autocast
    return x.to(torch.get_autocast_dtype(device) if casts else x.dtype).contiguous()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, [B, heads, tokens, d] each."""
    slow_backward = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    if slow_backward and query.shape[2] <= FEW_TOKENS:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return scores.softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids: [B, dim] -> [B, embed_dim]."""

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """[B, dim] -> [B, embed_dim]."""
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


def group_norm_by_channel(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group normalisation, [B, C, ...], by the moments of each channel, computed in float32 at least.

    A compiler makes two passes over memory of it, whatever the layout: one for the moments, and one that scales, shifts
    and does what follows. Reductions over whole groups jump through channels last.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    within, mean = torch.var_mean(values.flatten(2), dim=2, correction=0)  # [B, C]
    grouped = mean.unflatten(1, (groups, -1))  # [B, groups, C / groups]
    of_group = grouped.mean(2, keepdim=True)
    between = grouped - of_group
    variance = (within.unflatten(1, (groups, -1)) + between.square()).mean(2, keepdim=True)
    scale = weight * (variance + eps).rsqrt().expand_as(between).flatten(1)  # [B, C]
    shift = bias - of_group.expand_as(between).flatten(1) * scale
    form = (*scale.shape, *(1,) * (x.ndim - 2))
    # As PyTorch's: of 16 bits where weights are too, else (by autocast) of float32.
    return (values * scale.reshape(form) + shift.reshape(form)).to(torch.promote_types(x.dtype, weight.dtype))


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the form in which each device is fast."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if x.device.type == "cuda" and torch.compiler.is_compiling():
            return group_norm_by_channel(x, self.num_groups, self.weight, self.bias, self.eps)
        # In channels last PyTorch takes up to six times as long for them as with turning them there and back.
        if x.device.type == "cpu" and x.dtype.itemsize == 2 and x.ndim == 4:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


def halved(x: Tensor) -> Tensor:
    """Halve the resolution by averaging: [B, C, H, W] -> [B, C, H/2, W/2]."""
    return F.avg_pool2d(x, 2)


def doubled(x: Tensor) -> Tensor:
    """Double the resolution by repeating pixels: [B, C, H, W] -> [B, C, 2 H, 2 W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution, plus the shortcut. The time embedding enters before or in the second norm.

    With `resample`, both ways change their resolution by it: the shortcut's at once, the other before its convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: dict[str, Any],
        scale_factor: float = 1.0,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        self.scale_shift = config["resnet_time_scale_shift"] == "scale_shift"
        self.scale_factor = scale_factor
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed_dim(config), out_channels * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(config["dropout"])
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, activated_emb: Tensor) -> Tensor:
        """[B, C_in, H, W] and SiLU of the embedding [B, E] -> [B, C_out, H, W], resampled."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        time = self.time_emb_proj(activated_emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x + h if self.scale_factor == 1 else (x + h) / self.scale_factor


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    # ModelMixin renames query, key, value and proj_attn of the oldest checkpoints in modules that bear this mark.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, groups: int | None, config: dict[str, Any], scale_factor: float = 1.0) -> None:
        super().__init__()
        head_dim = config["attention_head_dim"] or channels
        self.heads = channels // head_dim
        self.scale_factor = scale_factor
        inner = self.heads * head_dim
        self.group_norm = GroupNorm(groups, channels, config["norm_eps"]) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        h = x if self.group_norm is None else self.group_norm(x)
        tokens = matrix_operand(h.flatten(2).transpose(1, 2))  # [B, H W, C]
        query, key, value = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, H W, d]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = attend(query, key, value).transpose(1, 2).flatten(2)  # [B, H W, heads d]
        h = self.to_out[0](mixed).transpose(1, 2).reshape(x.shape)
        return x + h if self.scale_factor == 1 else (x + h) / self.scale_factor


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution; without padding, one pixel is added right and below."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(doubled(x))


def run_sampler(sampler: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    """Apply a layer that changes the resolution; residual blocks take the embedding too."""
    resampled: Tensor = sampler(x, emb) if isinstance(sampler, ResnetBlock) else sampler(x)
    return resampled


class DownBlock(nn.Module):
    """Residual blocks with or without attention, then downsampling except on the last level."""

    def __init__(self, channels: Sequence[int], kind: BlockKind, halve: bool, config: dict[str, Any]) -> None:
        """`channels` has those of the input, then those of each residual block's output."""
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, config) for a, b in itertools.pairwise(channels))
        groups = config["norm_num_groups"]
        self.attentions = nn.ModuleList(Attention(c, groups, config) for c in channels[1:]) if kind.attention else None
        self.downsamplers = nn.ModuleList()
        if halve and (kind.sampling or config["downsample_type"]) == "resnet":
            self.downsamplers.append(ResnetBlock(channels[-1], channels[-1], config, resample=halved))
        elif halve:
            self.downsamplers.append(Downsample(channels[-1], config["downsample_padding"]))

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """All intermediate results, which the up blocks take as skips; the last one is the input of the next level."""
        results: tuple[Tensor, ...] = ()
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            x = x if self.attentions is None else self.attentions[i](x)
            results += (x,)
        for downsample in self.downsamplers:
            results += (run_sampler(downsample, x, emb),)
        return results


class MidBlock(nn.Module):
    """Residual block, attention unless configured away, residual block, at the lowest resolution."""

    def __init__(self, channels: int, config: dict[str, Any]) -> None:
        super().__init__()
        scale_factor, groups = config["mid_block_scale_factor"], config["attn_norm_num_groups"]
        if groups is None and config["resnet_time_scale_shift"] == "default":
            groups = config["norm_num_groups"]
        attentions = [Attention(channels, groups, config, scale_factor)] if config["add_attention"] else []
        self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config, scale_factor) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, emb)


class UpBlock(nn.Module):
    """Residual blocks that also take the skips from the down blocks, then upsampling except on the top level."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        skips: Sequence[int],
        kind: BlockKind,
        double: bool,
        config: dict[str, Any],
    ) -> None:
        """`channels` are those of the input, `skips` those of the skips in the order of their use."""
        super().__init__()
        inputs = [channels, *[out_channels] * (len(skips) - 1)]
        self.resnets = nn.ModuleList(
            ResnetBlock(a + skip, out_channels, config) for a, skip in zip(inputs, skips, strict=True)
        )
        groups = config["norm_num_groups"]
        attentions = [Attention(out_channels, groups, config) for _ in skips] if kind.attention else None
        self.attentions = None if attentions is None else nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList()
        if double and (kind.sampling or config["upsample_type"]) == "resnet":
            self.upsamplers.append(ResnetBlock(out_channels, out_channels, config, resample=doubled))
        elif double:
            self.upsamplers.append(Upsample(out_channels))

    def forward(self, x: Tensor, skips: Sequence[Tensor], emb: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C_out, 2 H, 2 W], or [B, C_out, H, W] on the last level."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[i]], dim=1), emb)
            x = x if self.attentions is None else self.attentions[i](x)
        for upsample in self.upsamplers:
            x = run_sampler(upsample, x, emb)
        return x


class ScratchUNet2DModel(UNet2DModel):
    """A `diffusers.UNet2DModel` whose layers are this project's own.

    Configuration keys, weight names and outputs are those of `UNet2DModel` for the DDPM family, so that its checkpoints
    load here and those saved here load there. A fresh network starts as the paper's does: Xavier-uniform weights, and
    zeros in the last layer of every residual and attention block and of the network.

    Honoured as in `UNet2DModel`: sample_size, in_channels, out_channels (twice in_channels for a learned variance),
    center_input_sample, time_embedding_dim, freq_shift, flip_sin_to_cos, block_out_channels, layers_per_block,
    mid_block_scale_factor, downsample_padding (0 or 1), dropout, attention_head_dim, norm_num_groups,
    attn_norm_num_groups, norm_eps, add_attention, num_class_embeds, class_embed_type None, "timestep" and "identity",
    num_train_timesteps (recorded; needed for "learned" alone), time_embedding_type "positional" and "learned",
    mid_block_type "UNetMidBlock2D" or None, down_block_types "DownBlock2D", "AttnDownBlock2D" and
    "ResnetDownsampleBlock2D", up_block_types "UpBlock2D", "AttnUpBlock2D" and "ResnetUpsampleBlock2D", downsample_type
    and upsample_type "conv" and "resnet", resnet_time_scale_shift "default" and "scale_shift".

    Beyond `UNet2DModel`, attention_head_dim may be a list with a width for each level, as networks with a fixed number
    of heads need it.

    Refused with a ValueError that names the key: time_embedding_type "fourier" and the skip blocks, which are score
    SDEs'; blocks without a counterpart in pixel DDPMs (K-, Simple-, cross-attention, VAE's); act_fn other than "silu";
    resnet_time_scale_shift "ada_group" and "spatial"; downsample_padding above 1.
    """

    _repeated_blocks = ("ResnetBlock", "Attention")  # what `compile_repeated_blocks` compiles, once for each form

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | Sequence[int] | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        # Past UNet2DModel's own constructor: its layers are never built.
        super(UNet2DModel, self).__init__()
        check_network(self.config)
        self.sample_size = sample_size
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self._build_embeddings(dict(self.config))
        self._build_levels(dict(self.config))
        self.conv_norm_out = GroupNorm(norm_num_groups, block_out_channels[0], norm_eps)
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)
        self._initialise()

    def _build_embeddings(self, config: dict[str, Any]) -> None:
        """Build what embeds timesteps and class labels."""
        width, embedded = config["block_out_channels"][0], embed_dim(config)
        if config["time_embedding_type"] == "learned":
            self.time_proj = nn.Embedding(config["num_train_timesteps"], width)
        self.time_embedding = TimeEmbedding(width, embedded)
        self.class_embedding: nn.Module | None = None
        if config["class_embed_type"] == "timestep":
            self.class_embedding = TimeEmbedding(width, embedded)
        elif config["class_embed_type"] == "identity":
            self.class_embedding = nn.Identity()
        elif config["num_class_embeds"] is not None:
            self.class_embedding = nn.Embedding(config["num_class_embeds"], embedded)

    def _build_levels(self, config: dict[str, Any]) -> None:
        """Build the down blocks, the middle block and the up blocks."""
        all_channels, layers = config["block_out_channels"], config["layers_per_block"]
        last = len(all_channels) - 1
        configs = [{**config, "attention_head_dim": width} for width in head_widths(config)]
        self.down_blocks = nn.ModuleList()
        skips = [all_channels[0]]  # channels of every result of the way down
        for level, (kind, channels) in enumerate(zip(config["down_block_types"], all_channels, strict=True)):
            halve, outputs = level < last, [channels] * layers
            self.down_blocks.append(DownBlock([skips[-1], *outputs], DOWN_BLOCKS[kind], halve, configs[level]))
            skips += outputs + [channels] * halve

        self.mid_block = MidBlock(skips[-1], configs[-1]) if config["mid_block_type"] is not None else None

        self.up_blocks = nn.ModuleList()
        below = skips[-1]
        for level, (kind, channels) in enumerate(zip(config["up_block_types"], reversed(all_channels), strict=True)):
            taken = [skips.pop() for _ in range(layers + 1)]
            up = UpBlock(below, channels, taken, UP_BLOCKS[kind], level < last, configs[last - level])
            self.up_blocks.append(up)
            below = channels

    def _initialise(self) -> None:
        """Initialise as the code of Ho et al. does: Xavier-uniform weights, zero biases, and zeros in last layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        last = [m.conv2 for m in self.modules() if isinstance(m, ResnetBlock)]
        last += [m.to_out[0] for m in self.modules() if isinstance(m, Attention)]  # type: ignore[misc]
        for module in (*last, self.conv_out):
            nn.init.zeros_(module.weight)

    @classmethod
    def from_stock(cls, unet: UNet2DModel) -> Self:
        """Wrap the tensors of a stock network in this class, without a copy and in the same mode.

        Raises:
            ValueError: if its configuration is one that this class refuses.
        """
        with torch.device("meta"):
            own: Self = altered(unet, cls)
        own.load_state_dict(unet.state_dict(keep_vars=True), strict=True, assign=True)
        if unet.is_gradient_checkpointing:
            own.enable_gradient_checkpointing()
        return own.train(unet.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # noqa: ANN401
        """As `ModelMixin.from_pretrained`, but a checkpoint that does not hold exactly this network is refused.

        Pickled weights (`.bin`) are only read with `use_safetensors=False`.

        Raises:
            ValueError: naming the weights that are missing, unexpected or of another shape.
            OSError: there are no weights, or only pickled ones.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        with safe_weights(pretrained_model_name_or_path, kwargs):
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        wrong = {kind: keys for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if (keys := info[kind])}
        if wrong:
            found = "; ".join(f"{kind.replace('_', ' ')}: {_shortened(keys)}" for kind, keys in wrong.items())
            raise ValueError(f"The weights in {pretrained_model_name_or_path} do not fit their config.json: {found}.")
        return (model, info) if wants_info else model

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration under the name of `UNet2DModel`, so that both classes can load it."""
        write_config(self.to_json_string(), json_file_path, _class_name=UNet2DModel.__name__)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from x_t and t.

        Args:
            sample: x_t, [B, in_channels, H, W]; H and W divisible by 2 ** (number of levels - 1).
            timestep: one for all, or [B].
            class_labels: required if, and only if, the network is conditioned on them: LongTensor [B]; numbers [B] for
                class_embed_type "timestep"; [B, embed_dim] for "identity".
            return_dict: False for a tuple.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: for a shape that does not fit, or labels that are missing or too many.
        """
        self._check_input(sample, class_labels)
        x = 2 * sample - 1 if self.config["center_input_sample"] else sample
        emb = F.silu(self._embed(timestep, class_labels, x))

        if x.device.type == "cpu":  # whose convolutions are fastest so; on a GPU the weights' format decides
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        results = [x]
        for block in self.down_blocks:
            results += self._run(block, results[-1], emb)
        x = results[-1]
        if self.mid_block is not None:
            x = self._run(self.mid_block, x, emb)
        for block in self.up_blocks:
            x = self._run(block, x, [results.pop() for _ in block.resnets], emb)  # type: ignore[union-attr]
        x = self.conv_out(F.silu(self.conv_norm_out(x))).contiguous()
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:  # noqa: ANN401
        """Run a block; with gradient checkpointing, the backward pass computes its inner results again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _embed(self, timestep: Tensor | float | int, class_labels: Tensor | None, x: Tensor) -> Tensor:
        """Embed timesteps and, if the network is class-conditional, class labels: [B, embed_dim]."""
        t = torch.as_tensor(timestep, device=x.device).reshape(-1)
        if t.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"{t.shape[0]} timesteps for a batch of {x.shape[0]}: pass one, or one per sample.")
        emb = self.time_embedding(self._project(t.expand(x.shape[0])))
        if self.class_embedding is None or class_labels is None:
            return emb
        kind = self.config["class_embed_type"]
        embedded = self.class_embedding(self._project(class_labels) if kind == "timestep" else class_labels)
        return emb + embedded.to(emb.dtype)

    def _project(self, t: Tensor) -> Tensor:
        """The sinusoids of numbers, or their learned embedding: [B] -> [B, block_out_channels[0]]."""
        if self.config["time_embedding_type"] == "learned":
            if t.is_floating_point():
                raise ValueError(f"time_embedding_type='learned' has whole timesteps alone, not {t.dtype}.")
            return self.time_proj(t)
        width, flip = self.config["block_out_channels"][0], self.config["flip_sin_to_cos"]
        sinusoids = timestep_embedding(t, width, flip, self.config["freq_shift"])
        return sinusoids.to(self.time_embedding.linear_1.weight.dtype)

    def _check_input(self, sample: Tensor, class_labels: Tensor | None) -> None:
        channels, levels = self.config["in_channels"], len(self.config["block_out_channels"])
        factor = halvings(self.config["block_out_channels"])
        if sample.ndim != 4 or sample.shape[1] != channels or sample.shape[2] % factor or sample.shape[3] % factor:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}; this network takes [B, {channels}, H, W] with H and W "
                f"divisible by {factor}, since it halves the resolution {levels - 1} times."
            )
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "class_labels is missing: this network is class-conditional, pass a LongTensor [B]."
                if class_labels is None
                else "class_labels was passed, but this network is not class-conditional (num_class_embeds=None)."
            )
        of_each = (embed_dim(self.config),) if self.config["class_embed_type"] == "identity" else ()
        if class_labels is not None and tuple(class_labels.shape) != (sample.shape[0], *of_each):
            needed = f"{of_each[0]} numbers" if of_each else "one"
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)}; a batch of {len(sample)} needs {needed} each."
            )


def _shortened(keys: Sequence[object]) -> str:
    return ", ".join(map(str, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


class Guidance(NamedTuple):
    """Strength of classifier-free guidance, and the part of the chain in which it acts."""

    scale: float = 1.0  # 1: the conditional prediction as it is
    rescale: float = 0.0  # share of the rescaled prediction, 0 to 1
    interval: tuple[float, float] = (0.0, 1.0)  # of t / T, in which guidance acts

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed."""
        check_range("guidance_scale", self.scale, 0, float("inf"))
        check_range("guidance_rescale", self.rescale, 0, 1)
        interval = self.interval
        if not isinstance(interval, Sequence) or len(interval) != 2:
            raise ValueError(f"guidance_interval={interval!r} must be two numbers, 0 <= start <= stop <= 1.")
        check_range("guidance_interval", interval[0], 0, 1)
        check_range("guidance_interval", interval[1], interval[0], 1)

    def acts(self, time: float) -> bool:
        """Whether guidance changes the prediction at t / T = time."""
        return self.scale != 1 and self.interval[0] <= time <= self.interval[1]


class Condition(NamedTuple):
    """Labels of a batch and their guidance; labels_and_null serves one call of the network with and without labels."""

    labels: Tensor  # [B]
    labels_and_null: Tensor  # [2 B]
    guidance: Guidance


def guide(conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
    """Extrapolate from the unconditional to the conditional prediction. All are [B, C, H, W].

    Ho & Salimans eq. 6 with scale = 1 + w. The result is then mixed, with weight `rescale`, with itself rescaled to the
    standard deviation of the conditional prediction (Lin et al. eqs. 15-16). Epsilon, x_0 and v are linear in one
    another, so guidance may act on any of them.
    """
    guided = unconditional + guidance.scale * (conditional - unconditional)
    if guidance.rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guidance.rescale * ratio * guided + (1 - guidance.rescale) * guided


def null_label(num_class_embeds: int | None, id2label: Mapping[Any, str] | None = None) -> int | None:
    """The label that stands for no class: the last one, unless it has a name. None if the network has no such label."""
    if num_class_embeds is None or num_class_embeds - 1 in map(int, id2label or {}):  # JSON's keys are text
        return None
    return num_class_embeds - 1


def label_numbers(class_labels: Any, classes: int, id2label: Mapping[int, str] | None) -> Tensor:  # noqa: ANN401
    """Convert labels, given as numbers, names or a mixture of both, to a LongTensor [B].

    Raises:
        ValueError: a number outside 0..classes-1, an unknown name, or not a list.
    """
    labels = class_labels.tolist() if isinstance(class_labels, Tensor | np.ndarray) else class_labels
    if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
        raise ValueError(f"class_labels={class_labels!r} must be a list of whole numbers or names, one for each image.")
    numbers_of = {name: number for number, name in (id2label or {}).items()}
    for label in labels:
        if isinstance(label, str):
            if not numbers_of:
                raise ValueError(f"class_labels: {label!r} is a name, and this model has no names: pass numbers.")
            check_choice("class_labels", label, numbers_of)
        elif not (is_whole(label) and 0 <= label < classes):
            raise ValueError(
                f"class_labels={class_labels!r} must be a list of whole numbers from 0 to {classes - 1}, or names."
            )
    return torch.tensor([numbers_of[label] if isinstance(label, str) else int(label) for label in labels])


def condition_of(
    config: Mapping[str, Any],
    id2label: Mapping[int, str] | None,
    class_labels: Any,  # noqa: ANN401
    batch_size: int | None,
    guidance: Guidance,
    device: torch.device,
) -> tuple[Condition | None, int]:
    """What a call of a pipeline asks for, and how many images.

    Args:
        config: of the network.
        id2label: names of its classes.
        class_labels: for each image, as `label_numbers` takes them; None for the null label.
        batch_size: number of images; None for one for each label, or 1.
        guidance: towards the labels.
        device: of the labels.

    Returns:
        The condition, None if the network has no classes, and the batch size.

    Raises:
        ValueError: the network cannot do what is asked for.
    """
    guidance.check()
    classes, scale = config.get("num_class_embeds"), guidance.scale
    if (kind := config.get("class_embed_type")) is not None:
        raise ValueError(f"class_embed_type={kind!r} has no numbered classes: call the network itself.")
    if classes is None:
        if class_labels is not None:
            raise ValueError("class_labels was passed, but this network is not class-conditional.")
        if scale != 1:
            raise ValueError(f"guidance_scale={scale!r} needs a class-conditional network.")
        return None, 1 if batch_size is None else batch_size
    null = null_label(classes, id2label)
    if class_labels is None:
        if null is None:
            raise ValueError("class_labels is missing: each label of this network is a class, and none is null.")
        if scale != 1:
            raise ValueError(f"guidance_scale={scale!r} needs class_labels to follow.")
        count = 1 if batch_size is None else batch_size
        check_whole("batch_size", count)
        labels = torch.full((int(count),), null)
    else:
        labels = label_numbers(class_labels, classes, id2label)
    if scale != 1 and null is None:
        raise ValueError(f"guidance_scale={scale!r} needs a null label, and each label of this network is a class.")
    if batch_size not in (None, len(labels)):
        raise ValueError(f"batch_size={batch_size!r} differs from the number of class_labels, {len(labels)}.")
    labels = labels.to(device)
    none = labels if null is None else torch.full_like(labels, null)
    return Condition(labels, torch.cat([labels, none]), guidance), len(labels)


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What model_index.json holds beside the parts, where it is set, and its name there: of others stock DDPMPipeline warns.
SETTINGS = {"id2label": "id2label", "num_inference_steps": "_num_inference_steps"}
PICTURE_CHANNELS = (1, 3, 4)  # of which PIL makes gray, RGB and RGBA images
HUB_OPTIONS = ("cache_dir", "force_download", "token", "revision", "local_files_only")
# This folder, in the order in which it makes one file.
MODULES = (
    *("checks", "stock", "gaussian", "tensors", "schedules", "timesteps", "reverse_variance", "scheduler_config"),
    *("chain", "scheduler", "unet_config", "blocks", "unet", "guidance", "pipeline"),
)
MODULE_HEAD = '''"""ScratchDDPMPipeline of ddpm_from_scratch in one self-contained file, which `save_pretrained` writes.

Generated: change the package, not this file. SPDX-License-Identifier: Apache-2.0
"""
'''


def one_file(sources: Sequence[str]) -> str:
    """Join modules into one source: imports first, without those between the modules. A single source stays as is."""
    if len(sources) == 1:
        return sources[0]
    imports: set[str] = set()
    bodies = []
    for source in sources:
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports.update(ast.unparse(node) for node in nodes if not getattr(node, "level", 0))
        bodies.append("\n".join(source.splitlines()[max(node.end_lineno or 0 for node in nodes) :]).strip())
    return "\n\n\n".join([MODULE_HEAD + "\n" + "\n".join(sorted(imports)), *bodies]) + "\n"


def _sources() -> tuple[str, ...]:
    """The sources of MODULES. If this file was loaded as remote code, it holds all of them already."""
    here = Path(__file__)
    alone = ScratchDDPMScheduler.__module__ == __name__
    files = [here] if alone else [here.with_name(f"{module}.py") for module in MODULES]
    return tuple(file.read_text(encoding="utf-8") for file in files)


class Frame(NamedTuple):
    """One step of the chain, as images in the output type: the network's input and its prediction."""

    timestep: float  # t
    sample: Any  # x_t
    pred_original_sample: Any  # the x_0 predicted from it; None if the scheduler does not tell


@dataclass
class ScratchDDPMPipelineOutput(ImagePipelineOutput):
    """Images, and the requested frames of the chain in its order."""

    trajectory: list[Frame] | None = None


Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


class ScratchDDPMPipeline(DiffusionPipeline):
    """Unconditional or class-conditional image generation by DDPM (Ho et al. 2020, algorithm 2).

    Args:
        unet: a `UNet2DModel`. A stock one becomes a `ScratchUNet2DModel` around the same tensors.
        scheduler: any diffusers scheduler. A stock `DDPMScheduler` becomes a `ScratchDDPMScheduler`.
        id2label: names of the classes of a class-conditional network. The last of its num_class_embeds is the null
            label, which stands for no class, unless it has a name too.
        num_inference_steps: of a call that names none; None is every step of the training chain.

    Raises:
        ValueError: for a network with missing weights, or a configuration that one of the two classes refuses.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample", "pred_original_sample"]
    # Read on import: the file of a pipeline loaded as remote code may be another one's by the time of saving.
    _module_sources: ClassVar[tuple[str, ...]] = _sources()

    # Both classes are named, since `from_pipe` compares exact types with the annotation.
    def __init__(
        self,
        unet: UNet2DModel | ScratchUNet2DModel,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,  # JSON's keys are text
        num_inference_steps: int | None = None,
    ) -> None:
        super().__init__()
        missing = [name for name, weight in unet.named_parameters() if weight.is_meta]
        if missing:
            raise ValueError(
                f"{len(missing)} weights of the network are not loaded ({', '.join(missing[:3])} ...): the checkpoint "
                "is incomplete. Download it again."
            )
        if type(unet) is UNet2DModel:
            unet = ScratchUNet2DModel.from_stock(unet)
        if _becomes_ours(scheduler):
            scheduler = altered(scheduler, ScratchDDPMScheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            id2label=_check_names(id2label, unet.config.get("num_class_embeds")),
            num_inference_steps=self._check_steps(num_inference_steps) if num_inference_steps is not None else None,
        )

    # --- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        height: int | None = None,
        width: int | None = None,
        class_labels: Sequence[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        eta: float | None = None,
        return_trajectory: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ScratchDDPMPipelineOutput | tuple[Any, ...]:
        """Generate images.

        The chain is kept in at least float32, whatever the precision of the network.

        Args:
            batch_size: number of images; if left out, one for each class label, or 1.
            generator: of all the noise; with a list, one for each image, an image does not depend on the others.
            num_inference_steps: K; if left out, what the model names, or else every step of the training chain.
            output_type: "pil", a list of images of 1, 3 or 4 channels; "np", an array [B, H, W, C] in [0, 1]; "pt", a
                tensor [B, C, H, W] in [0, 1]; "latent", the chain's own end as a tensor [B, C, H, W]: in [-1, 1] where
                the scheduler clips, in the precision of the chain, with nothing cut off.
            return_dict: False for a tuple.
            height: of the images, in pixels; the network's sample_size if left out.
            width: as height. The network was trained at its own size; at others, images may fall apart.
            class_labels: for a class-conditional network, one for each image, as numbers or names; left out, the null
                label, which stands for none.
            guidance_scale: classifier-free guidance; 1 is none, above 1 samples follow their labels more closely. Each
                step then computes every image twice, in one call of the network.
            guidance_rescale: how far the guided prediction gets the contrast of the conditional one back, 0 to 1.
            guidance_interval: the share of the chain, t / T, in which guidance acts.
            eta: how much noise a step draws: 1 is DDPM, 0 is DDIM, `math.inf` the consistency sampler. The scheduler's
                own if left out.
            return_trajectory: how many frames of the chain to return, evenly spaced from its first step to its last.
            callback_on_step_end: called as callback(pipeline, step, t, tensors) after each step; it may return new
                values of the tensors, of which "sample" is used.
            callback_on_step_end_tensor_inputs: which tensors it is given: "sample" (x_s) and "pred_original_sample"
                (the predicted x_0; None if the scheduler does not tell).

        Returns:
            `ScratchDDPMPipelineOutput` with `images` and, if asked for, `trajectory`.

        Raises:
            ValueError: for an argument that does not fit, before any work.
        """
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        condition, batch_size = self._condition(class_labels, batch_size, guidance)
        shape = self._check_shape(batch_size, height, width)
        check_generator(generator, batch_size)
        self._check_output_type(output_type)
        _check_callback(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        steps = self._check_steps(num_inference_steps)
        if return_trajectory is not None and not (is_whole(return_trajectory) and 1 <= return_trajectory <= steps):
            raise ValueError(f"return_trajectory={return_trajectory!r} must be a number of frames, from 1 to {steps}.")
        step_options = self._set_chain(steps, eta, generator)
        kept = _kept_steps(return_trajectory, len(self.scheduler.timesteps))

        device = self._execution_device
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        x = randn_tensor(shape, generator=generator, device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        x, frames = self._denoise(
            x,
            self.scheduler.timesteps,
            condition,
            step_options,
            kept,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        self.maybe_free_model_hooks()
        return self._output(x, frames, output_type, return_dict)

    def _check_steps(self, num_inference_steps: int | None) -> int:
        """Check K, which is the model's own by default, or else T."""
        most = self.scheduler.config.num_train_timesteps
        default = self.config.get("num_inference_steps") or most
        steps = default if num_inference_steps is None else num_inference_steps
        if not (is_whole(steps) and 1 <= steps <= most):
            raise ValueError(f"num_inference_steps={steps!r} must be a whole number from 1 to {most}.")
        return steps

    def _set_chain(self, steps: int, eta: float | None, generator: Generators) -> dict[str, Any]:
        """Set the scheduler's timesteps; return the options to pass to each of its steps."""
        accepted = inspect.signature(self.scheduler.step).parameters
        own = isinstance(self.scheduler, ScratchDDPMScheduler)
        if eta is not None and not own and "eta" not in accepted:
            raise ValueError(f"eta={eta!r} was passed, but {type(self.scheduler).__name__} has no eta: leave it out.")
        if eta is not None:
            check_eta(eta, math.inf if own else 1)
        self.scheduler.set_timesteps(steps, **({"eta": eta} if own else {}))
        offered = {"generator": generator, "eta": eta} if eta is not None else {"generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    def _denoise(
        self,
        x: Tensor,
        timesteps: Tensor,
        condition: Condition | None,
        step_options: Mapping[str, Any],
        kept: Sequence[int] = (),
        callback: Callback | None = None,
        callback_tensors: Sequence[str] = ("sample",),
        scheduler: SchedulerMixin | None = None,
    ) -> tuple[Tensor, list[tuple[float, Tensor, Tensor | None]]]:
        """Algorithm 2 from x at the first timestep on: the final sample, and (t, x_t, x̂_0) of the kept steps.

        The steps are the pipeline's scheduler's, unless another one is given.

        Timesteps stay on the host, where the scheduler looks them up; the network gets copies that were made before the
        loop. So nothing in it waits for the device.
        """
        frames: list[tuple[float, Tensor, Tensor | None]] = []
        times, on_device = timesteps.tolist(), timesteps.to(x.device)
        for i, t in enumerate(self.progress_bar(timesteps)):
            output = self._predict(x, t, on_device[i], times[i], condition)
            result = (scheduler or self.scheduler).step(output, t, x, **step_options)
            prediction = getattr(result, "pred_original_sample", None)
            if i in kept:
                frames.append((times[i], x, prediction))
            x = result.prev_sample
            if callback is not None:
                tensors = {"sample": x, "pred_original_sample": prediction}
                asked = {name: tensors[name] for name in callback_tensors}
                x = (callback(self, i, t, asked) or {}).get("sample", x)
        return x, frames

    def _predict(self, x: Tensor, t: Tensor, t_on_device: Tensor, time: float, condition: Condition | None) -> Tensor:
        """The network's output for x_t, with guidance where it acts, in the precision of the chain."""
        model_input = self.scheduler.scale_model_input(x, t).to(self.unet.dtype)
        if condition is None:
            output = self.unet(model_input, t_on_device).sample.to(x.dtype)
        elif not condition.guidance.acts(time / self.scheduler.config.num_train_timesteps):
            output = self.unet(model_input, t_on_device, class_labels=condition.labels).sample.to(x.dtype)
        else:
            doubled = torch.cat([model_input] * 2)
            both = self.unet(doubled, t_on_device, class_labels=condition.labels_and_null).sample.to(x.dtype)
            output, unconditional = both.chunk(2)
            channels = x.shape[1]
            guided = guide(output[:, :channels], unconditional[:, :channels], condition.guidance)
            output = torch.cat([guided, output[:, channels:]], dim=1)  # a learned variance stays the conditional one
        # Only DDPM reads a learned variance; other schedulers take the prediction alone.
        return output if _reads_variance(self.scheduler) else output[:, : x.shape[1]]

    def _output(
        self, x: Tensor, frames: Sequence[tuple[float, Tensor, Tensor | None]], output_type: str, return_dict: bool
    ) -> ScratchDDPMPipelineOutput | tuple[Any, ...]:
        images = self._postprocess(x, output_type)
        if not frames:
            return ScratchDDPMPipelineOutput(images=images) if return_dict else (images,)
        trajectory = [
            Frame(t, self._postprocess(x_t, output_type), None if x_0 is None else self._postprocess(x_0, output_type))
            for t, x_t, x_0 in frames
        ]
        return ScratchDDPMPipelineOutput(images, trajectory) if return_dict else (images, trajectory)

    def _postprocess(self, x: Tensor, output_type: str) -> Any:  # noqa: ANN401
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _condition(self, labels: Any, batch_size: int | None, guidance: Guidance) -> tuple[Condition | None, int]:  # noqa: ANN401
        """Check labels and guidance; return the condition, None if the network has no classes, and the batch size."""
        names = self.config.get("id2label")
        return condition_of(self.unet.config, names, labels, batch_size, guidance, self._execution_device)

    def _check_output_type(self, output_type: str) -> None:
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "pil" and self.unet.config.in_channels not in PICTURE_CHANNELS:
            raise ValueError(
                f"output_type='pil' has no pictures of {self.unet.config.in_channels} channels: pass 'np' or 'pt'."
            )

    def _check_shape(self, batch_size: Any, height: int | None = None, width: int | None = None) -> tuple[int, ...]:  # noqa: ANN401
        """The shape of the samples, [B, C, H, W]."""
        check_whole("batch_size", batch_size)
        return (int(batch_size), self.unet.config.in_channels, *sample_sides(self.unet.config, height, width))

    # --- loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:  # noqa: ANN401
        """As in diffusers, but the network, which both pipelines share, keeps its precision unless told otherwise."""
        if not {"dtype", "torch_dtype"} & set(kwargs) and "unet" in pipeline.components:
            kwargs["dtype"] = pipeline.unet.dtype
            if type(pipeline.unet).__module__.startswith("diffusers_modules"):
                raise ValueError(
                    "This pipeline was loaded as remote code, whose classes are not this package's: load it with "
                    f"{cls.__name__}.from_pretrained."
                )
        return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # noqa: ANN401
        """As in diffusers, but pickled weights (`.bin`) are only read with `use_safetensors=False`.

        Raises:
            OSError: there is no such model, or only pickled weights of it.
        """
        with safe_weights(pretrained_model_name_or_path, kwargs):
            if "custom_pipeline" not in kwargs:
                hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
                with warnings.catch_warnings():  # diffusers passes huggingface_hub an argument that it has no more
                    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
                    index = super().load_config(pretrained_model_name_or_path, **hub)
                    if not isinstance(index["_class_name"], str):
                        return cls._from_parts(pretrained_model_name_or_path, index, hub, kwargs)
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_parts(cls, name: Any, index: dict[str, Any], hub: dict[str, Any], options: dict[str, Any]) -> Any:  # noqa: ANN401
        """Load what names a pipeline of its own, whose code diffusers would run, and whose network it may not know."""
        parts = {part: options.pop(part) for part in ("unet", "scheduler") if part in options}
        if "unet" not in parts:
            parts["unet"] = ScratchUNet2DModel.from_pretrained(name, subfolder="unet", **options)
        if "scheduler" not in parts:
            kind = getattr(diffusers, index["scheduler"][1])
            parts["scheduler"] = kind.from_pretrained(name, subfolder="scheduler", **hub)
        return cls(**parts, **{name: index.get(saved) for name, saved in SETTINGS.items()})

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # noqa: ANN401
        """As in diffusers, but this class is the one that loads, whichever the folder names: none of its code runs."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        """As in diffusers, with our settings by their names in files."""
        names = {saved: name for name, saved in SETTINGS.items()}
        return super().extract_init_dict({names.get(key, key): value for key, value in config_dict.items()}, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        """Write model_index.json in stock names, and this pipeline as one self-contained file beside it.

        `save_pretrained` and `push_to_hub` both pass here. Stock diffusers then loads the folder as a `DDPMPipeline`; a
        network that this cannot run, with classes or heads of several widths, names this pipeline instead.
        """
        os.makedirs(save_directory, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(one_file(self._module_sources), encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write model_index.json; see `save_config`."""
        stock = not takes_labels(self.unet.config) and isinstance(
            self.unet.config.get("attention_head_dim"), int | None
        )
        unset = [name for name in SETTINGS if self.config.get(name) is None]
        own = isinstance(self.scheduler, ScratchDDPMScheduler)
        names: dict[str, Any] = {
            "_class_name": DDPMPipeline.__name__ if stock else ["pipeline", ScratchDDPMPipeline.__name__],
            "unet": ["diffusers", UNet2DModel.__name__],
            "scheduler": ["diffusers", (stock_class(self.scheduler.config) if own else type(self.scheduler)).__name__],
        }
        write_config(self.to_json_string(), json_file_path, unset, SETTINGS, **names)


def _becomes_ours(scheduler: SchedulerMixin) -> bool:
    """Whether a stock scheduler is one that ours takes the place of: DDPM's, or what ours was saved as."""
    return type(scheduler) is DDPMScheduler or (
        type(scheduler) is LCMScheduler and scheduler.config.get(SAVED_AS["eta"]) is not None
    )


def _reads_variance(scheduler: SchedulerMixin) -> bool:
    learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
    return learned and isinstance(scheduler, ScratchDDPMScheduler | DDPMScheduler)


def _check_callback(asked: Sequence[str], offered: Sequence[str]) -> None:
    if isinstance(asked, str) or not set(asked) <= set(offered):
        raise ValueError(f"callback_on_step_end_tensor_inputs={asked!r} must be a list from {', '.join(offered)}.")


def _check_names(id2label: Mapping[Any, str] | None, classes: int | None) -> dict[int, str] | None:
    """Check the names of the classes, whose keys JSON makes text; return them by number."""
    if id2label is None:
        return None
    if classes is None:
        raise ValueError("id2label was passed, but this network is not class-conditional.")
    names = {int(number): name for number, name in id2label.items()}
    if len(set(names.values())) < len(names) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"id2label={id2label!r} must give each class a name of its own.")
    if not set(names) <= set(range(classes)):
        raise ValueError(f"id2label={id2label!r} must have keys from 0 to {classes - 1}, the labels of the network.")
    return names


def _kept_steps(frames: int | None, steps: int) -> list[int]:
    """The steps to keep as frames, the first and the last among them; for one frame, the last."""
    if frames is None:
        return []
    return [steps - 1] if frames == 1 else np.linspace(0, steps - 1, frames).round().astype(int).tolist()
