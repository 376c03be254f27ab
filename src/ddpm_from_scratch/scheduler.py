r"""The mathematics of DDPM in the order of the paper, as a scheduler that diffusers can use.

References, cited below by name:

- DDPM: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239
- iDDPM: Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2102.09672
- v-prediction: Salimans, Ho 2022, "Progressive Distillation", https://arxiv.org/abs/2202.00512
- dynamic thresholding: Saharia et al. 2022, "Imagen", https://arxiv.org/abs/2205.11487

Conventions. Index t = 0 is the paper's t = 1, as in diffusers; x_{-1} is the data. ᾱ_{-1} = 1. Every transition is
written for a pair s < t, so that one formula serves adjacent and respaced steps. A timestep is an int, or a LongTensor
[B] with one entry per sample. Coefficients are computed on the host in float64 and cast where they meet a tensor: keep
batches of timesteps on the CPU and nothing waits for the device. Samples have any shape [B, ...]; 16-bit inputs are
computed in float32.
"""

import difflib
import itertools
import numbers
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .interchange import write_config
from .schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, rescale_to_zero_terminal_snr

Timestep = int | Tensor
Generators = torch.Generator | list[torch.Generator] | None
Coefficient = np.ndarray  # on the host in float64: a scalar, or [B]
Index = np.ndarray  # on the host, timesteps as whole numbers: a scalar, or [B]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class Gaussian(NamedTuple):
    """N(mean, exp(log_variance) I): the one type of every distribution here. log_variance broadcasts over mean."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: Generators = None, dtype: torch.dtype | None = None) -> Tensor:
        """Mean + standard deviation * noise, shaped like mean. The noise is drawn in `dtype`, or in the mean's."""
        if isinstance(generator, list) and len(generator) != len(self.mean):
            raise ValueError(
                f"{len(generator)} generators for a batch of {len(self.mean)}: pass one, or one per sample."
            )
        noise = randn_tensor(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=dtype or self.mean.dtype
        )
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

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


class Prediction(NamedTuple):
    """What a network's output says of x_t, in consistent pairs: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) epsilon.

    `variance_values` is the output's second half of channels as it came (v of iDDPM eq. 15 under "learned_range", the
    log-variance under "learned"); None if the network has no such half.
    """

    x_0: Tensor
    epsilon: Tensor
    variance_values: Tensor | None


# --- reverse variances ---------------------------------------------------------------------------------------------
# log σ² of p(x_s | x_t) from the log-variances of the posterior (small, β̃) and of the step (large, β), from where the
# chain ends (s = -1) and from the network's values. At the end β̃ is 0 and `small` is that of the next step up the
# chain; DDPM takes it for fixed_large there too.


def _small(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Coefficient:
    return small


def _large(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Coefficient:
    return np.where(last, small, large)


def _learned(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Tensor:
    return values


def _learned_range(small: Coefficient, large: Coefficient, last: np.ndarray, values: Tensor) -> Tensor:
    """iDDPM eq. 15: v in [-1, 1] spans log β̃ to log β."""
    fraction = (values + 1) / 2
    return fraction * _broadcast(large, values) + (1 - fraction) * _broadcast(small, values)


REVERSE_LOG_VARIANCES: dict[str, Callable[..., Coefficient | Tensor]] = {
    "fixed_small": _small,
    "fixed_small_log": _small,
    "fixed_large": _large,
    "fixed_large_log": _large,
    "learned": _learned,
    "learned_range": _learned_range,
}
LEARNED_VARIANCES = ("learned", "learned_range")


# --- helpers -------------------------------------------------------------------------------------------------------


def _check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless value is one of allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={value!r} is not known. Allowed: {', '.join(allowed)}.{hint}")


def _upcast(x: Tensor) -> Tensor:
    """16-bit floats as float32; float32 and float64 as they are."""
    if not x.is_floating_point():
        raise ValueError(f"A tensor of dtype {x.dtype} is not allowed: pass floats (scale images to [-1, 1] first).")
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _broadcast(value: Coefficient, x: Tensor) -> float | Tensor:
    """A host coefficient so that it multiplies x: a float, or a tensor [B, 1, ...] of x's dtype and device."""
    if np.ndim(value) == 0:
        return float(value)
    if len(value) != x.shape[0]:
        raise ValueError(f"{len(value)} timesteps for a batch of {x.shape[0]}: pass one, or one per sample.")
    tensor = torch.as_tensor(value, dtype=x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return tensor.to(x.device, non_blocking=True)


def _tensor(value: Coefficient | Tensor, x: Tensor) -> Tensor:
    """A coefficient, or a tensor, as a tensor that broadcasts over x. A scalar stays on the host, which is free."""
    return value if isinstance(value, Tensor) else torch.as_tensor(_broadcast(value, x), dtype=x.dtype)


def _check_shapes(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ValueError unless tensor has the shape of x: broadcasting would share one noise among samples."""
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have that of the samples, {tuple(x.shape)}.")


def _log_ndtr(z: Tensor) -> Tensor:
    """log Φ(z), as `torch.special.log_ndtr`, whose gradient loses its digits in the far left tail, and at last is 0."""
    left = z.clamp(max=0)
    tail = torch.log(torch.special.erfcx(-left * 0.5**0.5) / 2) - left**2 / 2
    return torch.where(z < 0, tail, torch.special.log_ndtr(z.clamp(min=0)))


def _mean_of_sample(x: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return x.flatten(1).mean(1) if x.ndim > 1 else x


class ScratchDDPMScheduler(SchedulerMixin, ConfigMixin):
    r"""DDPM's forward process, posterior, bound, losses and sampler, with the surface of `diffusers.DDPMScheduler`.

    It never calls the network: tensors in, tensors out. Configuration keys, their defaults and their meaning are those
    of `diffusers.DDPMScheduler`, with which configurations can be exchanged in both directions. Where the two differ,
    `docs/differences.md` says why.

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
        sample_max_value: upper bound of the threshold, at least 1.
        timestep_spacing: "leading", "linspace" or "trailing", of K < T steps.
        steps_offset: added to the timesteps of the leading spacing.
        rescale_betas_zero_snr: rescale so that ᾱ of the last step is 0.

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
    ) -> None:
        self.variance_type = variance_type or "fixed_small"
        _check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        _check_choice("variance_type", self.variance_type, REVERSE_LOG_VARIANCES)
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        self._check_numbers()

        betas = self._make_betas()
        alpha_bar = np.cumprod(1 - betas)
        if alpha_bar[-1] == 0 and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' cannot be used with a zero terminal SNR (rescale_betas_zero_snr=True): at "
                "the last timestep x_t is all noise, and x_0 would be a division by 0. Use 'v_prediction' or 'sample'."
            )
        # float32 copies for other code to read; the formulas below use the float64 table.
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1 - betas).float()
        self.alphas_cumprod = torch.from_numpy(alpha_bar).float()
        # ᾱ_t at index t; pure noise above the chain, 0, at T; the data, 1, at the end, where index -1 finds it.
        self._alpha_bar = np.concatenate([alpha_bar, [0.0, 1.0]])

        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.custom_timesteps = False
        self._set_chain(np.arange(num_train_timesteps)[::-1])

    def _check_numbers(self) -> None:
        c = self.config
        whole = {"num_train_timesteps": 1, "steps_offset": 0}
        for name, least in whole.items():
            if not isinstance(c[name], int) or isinstance(c[name], bool) or c[name] < least:
                raise ValueError(f"{name}={c[name]!r} must be a whole number, at least {least}.")
        fraction: tuple[str, Callable[[float], bool]] = ("lie between 0 and 1", lambda x: 0 < x < 1)
        ranges = {} if c["trained_betas"] is not None else {"beta_start": fraction, "beta_end": fraction}
        ranges |= {
            "dynamic_thresholding_ratio": ("lie in (0, 1]", lambda x: 0 < x <= 1),
            "sample_max_value": ("be at least 1", lambda x: x >= 1),
            "clip_sample_range": ("be positive", lambda x: x > 0),
        }
        for name, (allowed, fits) in ranges.items():
            if not isinstance(c[name], numbers.Real) or isinstance(c[name], bool) or not fits(c[name]):
                raise ValueError(f"{name}={c[name]!r} must be a number and {allowed}.")
        if c["rescale_betas_zero_snr"] and c["num_train_timesteps"] == 1:
            raise ValueError("rescale_betas_zero_snr=True needs num_train_timesteps of at least 2.")

    def _make_betas(self) -> np.ndarray:
        """[T] betas in float64, checked."""
        c = self.config
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
        if np.any(np.diff(np.cumprod(1 - betas), prepend=1.0) >= 0):
            raise ValueError(
                f"{source}: ᾱ must fall at every step; betas this small or large leave it as it is in float64."
            )
        return betas

    def __len__(self) -> int:
        """T."""
        return int(self.config["num_train_timesteps"])

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration under the name of the stock class, whose keys these are: either class loads it."""
        write_config(self.to_json_string(), json_file_path, _class_name=DDPMScheduler.__name__)

    # --- forward process (DDPM section 2) ---------------------------------------------------------------------------

    def q_marginal(self, x_0: Tensor, t: Timestep) -> Gaussian:
        """q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I): DDPM eq. 4. x_0: [B, ...]."""
        x_0 = _upcast(x_0)
        alpha_bar = self._alpha_bar[self._index(t)]
        return Gaussian(_broadcast(np.sqrt(alpha_bar), x_0) * x_0, _tensor(np.log(1 - alpha_bar), x_0))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) noise, a draw from DDPM eq. 4, in the dtype of original_samples."""
        _check_shapes("noise", noise, original_samples)
        x_0 = _upcast(original_samples)
        signal, sigma = self._signal_and_sigma(timesteps, x_0)
        return (signal * x_0 + sigma * _upcast(noise)).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timestep) -> Tensor:
        """v = √ᾱ_t noise - √(1 - ᾱ_t) x_0 (Salimans & Ho 2022, section 4), in the dtype of sample, which is x_0."""
        _check_shapes("noise", noise, sample)
        x_0 = _upcast(sample)
        signal, sigma = self._signal_and_sigma(timesteps, x_0)
        return (signal * _upcast(noise) - sigma * x_0).to(sample.dtype)

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep | None = None) -> Gaussian:
        """q(x_s | x_t, x_0): DDPM eqs. 6-7, for any -1 <= s < t.

        With s left out the chain is the full one, s = t - 1; with s given it is that of `set_timesteps`. The mean is
        exact for s = -1 too (it is x_0); the log-variance there is not -∞ but that of the next step up the chain, as in
        the implementations of DDPM and iDDPM.
        """
        _check_shapes("x_0", x_0, x_t)
        return self._posterior(_upcast(x_0), _upcast(x_t), *self._pair(t, s))

    # --- reverse process (DDPM section 3.2) -------------------------------------------------------------------------

    def predict(self, model_output: Tensor, x_t: Tensor, t: Timestep) -> Prediction:
        """x_0 and epsilon from the network's output, whatever it predicts: DDPM eq. 15 and its like.

        x_0 is clipped or thresholded as configured, and epsilon then follows from it.

        Args:
            model_output: [B, C, ...], or [B, 2 C, ...] with the values of the variance in the second half.
            x_t: [B, C, ...].
            t: one timestep, or one per sample.
        """
        output, variance_values = self._split(model_output, x_t)
        x_t = _upcast(x_t)
        signal, sigma = self._signal_and_sigma(t, x_t)
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            x_0, epsilon = (x_t - sigma * output) / signal, output
        elif kind == "sample":
            x_0, epsilon = output, (x_t - signal * output) / sigma
        else:
            x_0, epsilon = signal * x_t - sigma * output, signal * output + sigma * x_t
        if self.config["thresholding"] or self.config["clip_sample"]:
            x_0 = self._limit(x_0)
            epsilon = (x_t - signal * x_0) / sigma
        return Prediction(x_0, epsilon, variance_values)

    def p_reverse(self, model_output: Tensor, x_t: Tensor, t: Timestep, s: Timestep | None = None) -> Gaussian:
        """p(x_s | x_t), DDPM eq. 1: the posterior's mean at the predicted x_0, with the variance of `variance_type`.

        s is understood as in `q_posterior`.
        """
        return self._reverse(self.predict(model_output, x_t, t), _upcast(x_t), *self._pair(t, s))

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step of DDPM algorithm 2: draw x_s from p(x_s | x_t), s being next in `timesteps`; no noise at s = -1.

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
        t = self._one_timestep(timestep)
        s = self.previous_timestep(t)
        prediction = self.predict(model_output, sample, t)
        reverse = self._reverse(prediction, _upcast(sample), *self._pair(t, s))
        x_s = reverse.mean if s < 0 else reverse.sample(generator, dtype=sample.dtype)
        x_s, x_0 = x_s.to(sample.dtype), prediction.x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The sample as it is: the network of DDPM takes x_t itself."""
        return sample

    # --- objectives (DDPM section 3) --------------------------------------------------------------------------------

    def training_target(self, x_0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """What the network regresses on: noise, x_0 or v, by `prediction_type`."""
        if self.config["prediction_type"] == "epsilon":
            return noise
        if self.config["prediction_type"] == "sample":
            return x_0
        return self.get_velocity(x_0, noise, t)

    def simple_loss(self, model_output: Tensor, x_0: Tensor, noise: Tensor, t: Timestep) -> Tensor:
        """L_simple, DDPM eq. 14: [B], the squared error of the training target, mean over the dimensions."""
        _check_shapes("noise", noise, x_0)
        output, _ = self._split(model_output, x_0)
        target = _upcast(self.training_target(_upcast(x_0), _upcast(noise), t))
        return _mean_of_sample((output - target) ** 2)

    def vlb_term(
        self, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: Timestep, s: Timestep | None = None
    ) -> Tensor:
        """A term of the variational bound, DDPM eq. 5: [B], in nats per dimension.

        KL(q(x_s | x_t, x_0) || p(x_s | x_t)), the L_{t-1} of the paper, for s >= 0; -log p(x_0 | x_t) by the discrete
        decoder of eq. 13, its L_0, for s = -1. x_0 lies on the grid k / 127.5 - 1. s as in `q_posterior`.
        """
        _check_shapes("x_0", x_0, x_t)
        index, lower, upper = self._pair(t, s)
        x_0, x_t = _upcast(x_0), _upcast(x_t)
        reverse = self._reverse(self.predict(model_output, x_t, t), x_t, index, lower, upper)
        kl = self._posterior(x_0, x_t, index, lower, upper).kl(reverse)
        decoder = -reverse.discretized_log_prob(x_0)
        last = torch.as_tensor(lower < 0).reshape(-1, *(1,) * (x_0.ndim - 1)).to(x_0.device)
        return _mean_of_sample(torch.where(last, decoder, kl))

    def prior_kl(self, x_0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)), DDPM eq. 5: [B], in nats per dimension."""
        q = self.q_marginal(x_0, len(self) - 1)
        return _mean_of_sample(q.kl(Gaussian(torch.zeros_like(q.mean), torch.zeros_like(q.log_variance))))

    # --- the chain --------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps of the sampling chain: K spaced ones, or a strictly descending list.

        Raises:
            ValueError: for both or neither, K outside 1..T, a list that is not descending or leaves 0..T-1, or an
                offset that pushes the first timestep out of range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either num_inference_steps or timesteps (a descending list), one of the two.")
        chain = self._spaced(num_inference_steps) if timesteps is None else self._listed(timesteps)
        self.num_inference_steps = len(chain)
        self.custom_timesteps = timesteps is not None
        self._set_chain(chain, device)

    def previous_timestep(self, timestep: Timestep) -> int:
        """The s that follows t in `timesteps`; -1 after the last one. ValueError if t is not there."""
        t = self._one_timestep(timestep)
        if t not in self._next:
            raise ValueError(
                f"timestep {t} is not one of the {len(self._next)} in `timesteps`. Pass one of them, or choose others "
                "with set_timesteps."
            )
        return self._next[t]

    def _spaced(self, count: int | None) -> np.ndarray:
        steps, offset = len(self), self.config["steps_offset"]
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or not 1 <= count <= steps:
            raise ValueError(f"num_inference_steps={count!r} must be a whole number from 1 to {steps}.")
        spacing = self.config["timestep_spacing"]
        chain = TIMESTEP_SPACINGS[spacing](steps, int(count)) + (offset if spacing == "leading" else 0)
        if chain[-1] >= steps:
            raise ValueError(
                f"steps_offset={offset} with num_inference_steps={count} starts at timestep {int(chain[-1])}; the last "
                f"one is {steps - 1}. Take fewer steps, steps_offset=0 or timestep_spacing='trailing'."
            )
        return chain[::-1].astype(np.int64)

    def _listed(self, timesteps: list[int]) -> np.ndarray:
        chain = np.asarray(timesteps)
        if chain.ndim != 1 or len(chain) == 0 or not np.issubdtype(chain.dtype, np.integer):
            raise ValueError(f"timesteps={timesteps!r} must be a non-empty list of whole numbers.")
        if np.any(np.diff(chain) >= 0) or chain[0] >= len(self) or chain[-1] < 0:
            raise ValueError(f"timesteps={timesteps!r} must descend strictly within {len(self) - 1}..0.")
        return chain.astype(np.int64)

    def _set_chain(self, chain: np.ndarray, device: str | torch.device | None = None) -> None:
        """The chain, kept once as pairs: t -> s on the way down, t -> u on the way up."""
        self.timesteps = torch.from_numpy(chain.copy()).to(device)
        down = [*chain.tolist(), -1]
        self._next = dict(itertools.pairwise(down))
        self._above = np.full(len(self), len(self))  # T, pure noise, above the top
        self._above[chain[1:]] = chain[:-1]

    # --- inner workings: tensors upcast, timesteps as host indices ---------------------------------------------------

    def _posterior(self, x_0: Tensor, x_t: Tensor, t: Index, s: Index, u: Index) -> Gaussian:
        log_variance = self._posterior_log_variance(t, s, u)
        return Gaussian(self._posterior_mean(x_0, x_t, t, s), _tensor(log_variance, x_0))

    def _posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Index, s: Index) -> Tensor:
        a_t, a_s = self._alpha_bar[t], self._alpha_bar[s]
        alpha = a_t / a_s
        on_x_0 = _broadcast(np.sqrt(a_s) * (1 - alpha) / (1 - a_t), x_0)
        on_x_t = _broadcast(np.sqrt(alpha) * (1 - a_s) / (1 - a_t), x_t)
        return on_x_0 * x_0 + on_x_t * x_t

    def _posterior_log_variance(self, t: Index, s: Index, u: Index) -> Coefficient:
        """Log β̃ of t -> s; where s = -1, and β̃ is 0, that of u -> t, one step up the chain."""
        a_t = self._alpha_bar[np.where(s < 0, u, t)]
        a_s = self._alpha_bar[np.where(s < 0, t, s)]
        # α is 0 where ᾱ_s is: pure noise (zero terminal SNR) stays pure noise.
        alpha = np.divide(a_t, a_s, out=np.zeros_like(a_t), where=a_s > 0)
        return np.log((1 - a_s) / (1 - a_t) * (1 - alpha))

    def _reverse(self, prediction: Prediction, x_t: Tensor, t: Index, s: Index, u: Index) -> Gaussian:
        learned = self.variance_type in LEARNED_VARIANCES
        if learned and prediction.variance_values is None:
            raise ValueError(
                f"variance_type={self.variance_type!r} needs a network with twice the channels of its input, half of "
                "them for the variance. Use such a network, or variance_type='fixed_small' or 'fixed_large'."
            )
        small = self._posterior_log_variance(t, s, u)
        large = np.log(1 - self._alpha_bar[t] / self._alpha_bar[s])
        log_variance = REVERSE_LOG_VARIANCES[self.variance_type](small, large, s < 0, prediction.variance_values)
        return Gaussian(self._posterior_mean(prediction.x_0, x_t, t, s), _tensor(log_variance, x_t))

    def _limit(self, x_0: Tensor) -> Tensor:
        """Clipped to ±clip_sample_range, or dynamically thresholded (Imagen section 2.3)."""
        if not self.config["thresholding"]:
            limit = self.config["clip_sample_range"]
            return x_0.clamp(-limit, limit)
        level = torch.quantile(x_0.reshape(len(x_0), -1).abs(), self.config["dynamic_thresholding_ratio"], dim=1)
        level = level.clamp(1, self.config["sample_max_value"]).reshape(-1, *(1,) * (x_0.ndim - 1))
        return torch.maximum(torch.minimum(x_0, level), -level) / level

    def _split(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the second half of the channels if there is one."""
        if model_output.shape == x.shape:
            return _upcast(model_output), None
        if x.ndim > 1 and model_output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
            output, variance_values = _upcast(model_output).split(x.shape[1], dim=1)
            return output, variance_values
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}; a sample of shape {tuple(x.shape)} needs the same "
            "shape, or twice its channels for a learned variance."
        )

    def _signal_and_sigma(self, t: Timestep, x: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), to multiply x, which is upcast."""
        alpha_bar = self._alpha_bar[self._index(t)]
        return _broadcast(np.sqrt(alpha_bar), x), _broadcast(np.sqrt(1 - alpha_bar), x)

    def _pair(self, t: Timestep, s: Timestep | None) -> tuple[Index, Index, Index]:
        """Indices of t, of s < t, and of u, the timestep above t in the same chain (see `q_posterior`)."""
        at = self._index(t)
        if s is None:
            return at, at - 1, at + 1
        below = self._index(s, least=-1)
        if np.any(below >= at):
            raise ValueError(f"s={s} must be smaller than t={t}: a reverse step goes from t down to s.")
        return at, below, self._above[at]

    def _index(self, t: Timestep, least: int = 0) -> Index:
        """Timesteps on the host; ValueError outside least..T-1."""
        index = np.asarray(t.cpu() if isinstance(t, Tensor) else t)
        whole = np.issubdtype(index.dtype, np.integer)
        if not whole or index.size == 0 or index.min() < least or index.max() >= len(self):
            raise ValueError(f"timestep {t!r} is not allowed: whole numbers from {least} to {len(self) - 1} are.")
        return index.reshape(()) if index.size == 1 else index.reshape(-1)

    def _one_timestep(self, t: Timestep) -> int:
        index = self._index(t)
        if np.ndim(index):
            raise ValueError(f"step takes one timestep for the whole batch, not {len(index)}.")
        return int(index)
