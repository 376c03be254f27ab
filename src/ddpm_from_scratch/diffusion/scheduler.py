r"""The mathematics of DDPM in the order of the paper, as a scheduler that diffusers can use.

References, cited below by name:

- DDPM: Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2006.11239
- DDIM: Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models", https://arxiv.org/abs/2010.02502
- iDDPM: Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", https://arxiv.org/abs/2102.09672
- v-prediction: Salimans, Ho 2022, "Progressive Distillation", https://arxiv.org/abs/2202.00512
- Analytic-DPM: Bao et al. 2022, https://arxiv.org/abs/2201.06503; with an imperfect mean, arXiv 2206.07309
- dynamic thresholding: Saharia et al. 2022, "Imagen", https://arxiv.org/abs/2205.11487

Conventions. Index t = 0 is the paper's t = 1, as in diffusers; x_{-1} is the data, ᾱ_{-1} = 1. Every transition is
written for a pair s < t, so that one formula serves adjacent and respaced steps. A timestep is an int, or a LongTensor
[B] with one entry per sample: on the CPU, so that nothing waits for the device. Coefficients are float64 on the host,
cast where they meet a tensor. Samples have any shape [B, ...]; 16-bit inputs are computed in float32.
"""

import math
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from .chain import (
    Chain,
    StepPlan,
    Timestep,
    Transition,
    listed_timesteps,
    log_square,
    posterior_coefficients,
    posterior_log_variance,
    spaced_timesteps,
    to_index,
)
from .checks import check_count, check_eta
from .gaussian import Gaussian, Generators, noise_like
from .reverse_variance import LEARNED_VARIANCES, REVERSE_LOG_VARIANCES, check_variance_values
from .scheduler_config import (
    SAVED_AS,
    check_config,
    limit_x_0,
    limits_x_0,
    make_betas,
    make_x_0_variance,
    of_stock_class,
    with_argument_names,
)
from .stock import write_config
from .tensors import Coefficient, as_tensor, broadcast, check_shapes, mean_of_sample, plus, split_channels, upcast

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
