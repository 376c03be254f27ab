"""Likelihoods of images, in bits per dimension: the variational bound, and the probability-flow ODE.

References, cited below by name:

- DDPM: Ho, Jain, Abbeel 2020, https://arxiv.org/abs/2006.11239
- iDDPM: Nichol, Dhariwal 2021, https://arxiv.org/abs/2102.09672
- score SDE: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations",
  https://arxiv.org/abs/2011.13456
- v-prediction: Salimans, Ho 2022, https://arxiv.org/abs/2202.00512

Images are 8-bit: the probability meant is that of the levels k / 127.5 - 1, k = 0..255. All random numbers of image i
follow from the seed and i, so neither the size of batches nor the number of processes changes more than rounding.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..diffusion.checks import check_range, check_whole, is_whole
from ..diffusion.guidance import label_numbers
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import make_alpha_bar
from ..diffusion.stock import altered
from ..runtime.random_streams import generator

BITS = 1 / math.log(2)  # in a nat
BIN = 2 / 255  # width of a level's bin
GRID_TOLERANCE = 1e-3  # in levels; float32 rounds to within 2e-5 of one, bfloat16 only to within 0.25


class BitsPerDim(NamedTuple):
    """The variational bound of images, in bits per dimension, float64 on the CPU.

    prior is L_T of DDPM eq. 5; column k of terms is the step down from timesteps[k], so that the first is L_0. NaN
    there means not evaluated: such entries have no part in the mean and the standard error over images.
    """

    total: Tensor  # [B]
    prior: Tensor  # [B]
    terms: Tensor  # [B, K]
    timesteps: Tensor  # [K], ascending

    def mean(self) -> "BitsPerDim":
        """The mean over images: total and prior become scalars, terms [K]."""
        return self._replace(total=self.total.mean(), prior=self.prior.mean(), terms=self.terms.nanmean(0))

    def standard_error(self) -> "BitsPerDim":
        """Standard error of each mean; NaN for a single image."""
        total, prior, terms = map(_standard_error, self[:3])
        return BitsPerDim(total, prior, terms, self.timesteps)


class OdeBitsPerDim(NamedTuple):
    """Bits per dimension by the probability-flow ODE, float64 on the CPU."""

    total: Tensor  # [B]: prior + divergence - log₂ of a bin's width
    prior: Tensor  # [B]: -log₂ N(x; 0, I) / d at the noisy end
    divergence: Tensor  # [B]: how the density changes on the way there
    evaluations: Tensor  # [B]: calls of the network that the image took

    def mean(self) -> "OdeBitsPerDim":
        """The mean over images: scalars."""
        return OdeBitsPerDim(*(values.mean(0) for values in self))

    def standard_error(self) -> "OdeBitsPerDim":
        """Standard error of each mean; NaN for a single image."""
        return OdeBitsPerDim(*map(_standard_error, self))


# --- the variational bound -----------------------------------------------------------------------------------------


@torch.no_grad()
def bits_per_dim(
    unet: Any,  # noqa: ANN401
    scheduler: ScratchDDPMScheduler,
    images: Tensor,
    *,
    class_labels: Sequence[int] | Tensor | None = None,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    num_terms: int | None = None,
    clip_sample: bool | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> BitsPerDim:
    """The variational bound on -log₂ p(x_0) / d, DDPM eq. 5, with one draw of x_t for each image and t.

    The chain is what `scheduler.set_timesteps` makes of the arguments, with the configuration's eta and the variance
    that it has for such a chain; without arguments, all T timesteps. L_T belongs to its first timestep and L_0, the
    decoder of DDPM eq. 13, to its last, whatever they are: every chain has a true bound.

    Args:
        unet: the trained network, called as unet(x_t, t) or unet(x_t, t, class_labels=...), t a LongTensor [B];
            `.sample` of what it returns is the output. x_t is float32, or float64 if images are, cast to `unet.dtype`.
        scheduler: whose process, prediction type and variance are meant; left as it is.
        images: uint8 [B, C, H, W], or float32 or float64 [B, ...] on the grid k / 127.5 - 1.
        class_labels: B whole numbers, for a class-conditional network; left out, the null label, its last.
        num_inference_steps: K, of a respaced chain (iDDPM section 4).
        timesteps: instead, those of a respaced chain, descending.
        num_terms: estimate the sum without bias from so many of the K terms, 2 to K: L_0, which varies most, and, drawn
            for each image, one in each of num_terms - 1 equal stretches of the others.
        clip_sample: clip the predicted x_0 (True), or neither clip nor threshold it (False); None: as configured. An
            optimal variance is right for the clipping that it was calibrated with.
        batch_size: images in a call of the network.
        seed: of all random numbers, at least 0.
        progress: show a bar.
        accelerator: shares the images out among its processes; each of them gets the whole result.

    Raises:
        ValueError: images off the grid, a network in training mode, a scheduler that is not ours or has eta = 0, where
            the bound is infinite, or a value that is not allowed, all before the network is called; or a NaN.
    """
    chain = _chain(scheduler, num_inference_steps, timesteps, clip_sample)
    strata = _strata(len(chain.timesteps), num_terms)
    unet = unet if accelerator is None else accelerator.unwrap_model(unet)
    network = _network(unet, images, class_labels, batch_size, seed)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    batches = _batches(range(rank, len(images), processes), batch_size)
    own = [torch.empty(0, 2 + len(chain.timesteps), dtype=torch.float64)]
    calls = len(batches) * len(strata)
    with tqdm(total=calls, desc="bound", unit="call", disable=not progress or rank > 0) as bar:
        for rows in batches:
            x_0 = _on_the_grid(images[list(rows)]).to(network.device)
            own.append(_bound(network, chain, strata, x_0, rows, seed, bar))
    total, prior, terms = _gather(torch.cat(own), len(images), accelerator).split([1, 1, len(chain.timesteps)], 1)
    return BitsPerDim(total[:, 0], prior[:, 0], terms, chain.timesteps.flip(0))


def _chain(
    scheduler: ScratchDDPMScheduler, count: int | None, timesteps: Sequence[int] | None, clip_sample: bool | None
) -> ScratchDDPMScheduler:
    """A copy of the scheduler, set to the chain to measure."""
    check_scheduler(scheduler)
    if scheduler.config["eta"] == 0:
        raise ValueError(
            "The bound is infinite at eta=0, where q(x_s | x_t, x_0) is a point: pass "
            "ScratchDDPMScheduler.from_config(scheduler.config, eta=1.0), or measure with ode_bits_per_dim."
        )
    if clip_sample not in (None, True, False):
        raise ValueError(f"clip_sample={clip_sample!r} must be True, False or None, which is as configured.")
    limits = {} if clip_sample is None else {"clip_sample": clip_sample, "thresholding": False}
    chain: ScratchDDPMScheduler = altered(scheduler, **limits)
    if count is None and timesteps is None:
        timesteps = range(len(chain))[::-1]  # T spaced ones could be pushed out of the range by an offset
    chain.set_timesteps(count, timesteps=None if timesteps is None else list(timesteps))
    return chain


def _strata(count: int, num_terms: int | None) -> list[np.ndarray]:
    """Split the positions 0..K-1 of the ascending chain into groups: 0 alone, then stretches as equal as possible."""
    num_terms = count if num_terms is None else num_terms
    least = min(2, count)
    if not (is_whole(num_terms) and least <= num_terms <= count):
        raise ValueError(
            f"num_terms={num_terms!r} must be a whole number from {least} to {count}, the terms of this chain: one is "
            "L_0, the others stand for the rest."
        )
    rest = np.array_split(np.arange(1, count), num_terms - 1) if count > 1 else []
    return [np.arange(1), *rest]


def _bound(
    network: "_Network",
    chain: ScratchDDPMScheduler,
    strata: list[np.ndarray],
    x_0: Tensor,
    rows: range,
    seed: int,
    bar: tqdm,
) -> Tensor:
    """Total, prior and terms of a batch, [B, 2 + K], read from the device in one transfer."""
    timesteps = chain.timesteps.flip(0)  # on the host, where the scheduler looks its coefficients up
    below = F.pad(timesteps[:-1], (1, 0), value=-1)
    first, size = (torch.tensor([of(stratum) for stratum in strata]) for of in (np.min, len))
    u = torch.stack([_draw(torch.rand, (len(strata),), seed, row, "place") for row in rows])
    places = first + torch.minimum((u * size).long(), size - 1)  # [B, strata]; the product may round up to size
    values = [chain.prior_kl(x_0, int(timesteps[-1]))]
    for place in places.unbind(1):
        t = timesteps[place]  # [B]
        named = zip(rows, t.tolist(), strict=True)
        noise = torch.stack([_draw(torch.randn, x_0.shape[1:], seed, row, "noise", at) for row, at in named])
        x_t = chain.add_noise(x_0, noise.to(x_0), t)
        values.append(chain.vlb_term(network(x_t, t, rows), x_0, x_t, t, below[place]))
        bar.update()
    bits = torch.stack(values, 1).cpu().double() * BITS
    prior, evaluated = bits[:, :1], bits[:, 1:]
    if evaluated.isnan().any():
        image, stratum = evaluated.isnan().nonzero()[0].tolist()
        at = int(timesteps[places[image, stratum]])
        raise ValueError(
            f"The bound of image {rows[image]} is NaN at t={at}: the network's output is not finite there."
        )
    terms = torch.full((len(rows), len(timesteps)), torch.nan, dtype=bits.dtype).scatter_(1, places, evaluated)
    return torch.cat([prior + evaluated @ size[:, None].double(), prior, terms], 1)


def _gather(own: Tensor, count: int, accelerator: Accelerator | None) -> Tensor:
    """Gather all rows in order. Process r of n has rows r, r + n, ...; the last processes may have one less."""
    if accelerator is None or accelerator.num_processes == 1:
        return own
    each = math.ceil(count / accelerator.num_processes)
    padded = F.pad(own, (0, 0, 0, each - len(own))).to(accelerator.device)
    by_process = accelerator.gather(padded).cpu().unflatten(0, (-1, each))
    return by_process.transpose(0, 1).flatten(0, 1)[:count]


# --- the probability-flow ODE --------------------------------------------------------------------------------------

# v̂ = cos φ ε̂ - sin φ x̂_0 of a network's output, at x = cos φ x̂_0 + sin φ ε̂.
VELOCITIES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda output, x, cosine, sine: (output - sine * x) / cosine,
    "sample": lambda output, x, cosine, sine: (cosine * x - output) / sine,
    "v_prediction": lambda output, x, cosine, sine: output,
}


@torch.no_grad()
def ode_bits_per_dim(
    unet: Any,  # noqa: ANN401
    scheduler: ScratchDDPMScheduler,
    images: Tensor,
    *,
    class_labels: Sequence[int] | Tensor | None = None,
    num_probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> OdeBitsPerDim:
    """-log₂ p(x_0) / d by the probability-flow ODE (score SDE, section 4.3 and appendix D.2).

    With angles, cos φ = √ᾱ and sin φ = √(1 - ᾱ), the ODE is dx/dφ = v̂ (v-prediction, appendix D), finite up to pure
    noise, and log p(x at φ_0) = log N(x at φ_{T-1}; 0, I) + ∫ div v̂ dφ. The divergence is estimated without bias by
    Rademacher vectors, the same all along (Hutchinson). Between whole timesteps the network gets fractional ones. The
    predicted x_0 is not clipped.

    Images get uniform noise over their bins, which makes this a bound on the levels' probability, and are taken for x
    at t = 0, the least noise that the network knows. So the model meant is one whose density is that of x at t = 0: no
    decoder removes its last noise, which costs bits where the data are finer than that noise (of 1.3 levels, in DDPM's
    schedule), as in areas of one colour.

    The solver, scipy's RK45, controls the error of a batch as a whole: its size matters within the tolerances.

    Args:
        unet: as in `bits_per_dim`, with t a float tensor [B]; not in 16 bits, which meet no tolerance.
        scheduler: whose process and prediction type are meant.
        images: as in `bits_per_dim`.
        class_labels: as in `bits_per_dim`.
        num_probes: Rademacher vectors of an image; each is a backward pass at every evaluation.
        rtol: relative tolerance, 1e-12 to 1, of x and of the log density in nats per dimension.
        atol: absolute tolerance of both, 0 to 1.
        batch_size: images that are integrated together.
        seed: of all random numbers, at least 0.
        progress: show a bar.

    Raises:
        ValueError: as in `bits_per_dim`, and for a 16-bit network, or T = 1.
        RuntimeError: if the solver gives up.
        ImportError: if scipy is not installed.
    """
    try:
        from scipy.integrate import solve_ivp
        from scipy.interpolate import PchipInterpolator
    except ImportError as error:
        raise ImportError('the ODE needs scipy: pip install "ddpm-from-scratch[metrics]"') from error
    check_scheduler(scheduler)
    check_whole("num_probes", num_probes)
    check_range("rtol", rtol, 1e-12, 1)
    check_range("atol", atol, 0, 1)
    network = _network(unet, images, class_labels, batch_size, seed)
    if network.dtype.itemsize < 4:
        raise ValueError(f"The network is in {network.dtype}, too coarse for the solver: pass unet.float().")
    alpha_bar = make_alpha_bar(scheduler.config)
    if len(alpha_bar) == 1:
        raise ValueError("num_train_timesteps=1 leaves the ODE no way to go: measure with bits_per_dim.")
    angles = np.arctan2(np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar))
    velocity, t_of = VELOCITIES[scheduler.config["prediction_type"]], PchipInterpolator(angles, np.arange(len(angles)))
    results = []
    for rows in tqdm(_batches(range(len(images)), batch_size), desc="ODE", unit="batch", disable=not progress):
        levels = _on_the_grid(images[list(rows)]).to(network.device)
        u = torch.stack([_draw(torch.rand, levels.shape[1:], seed, row, "bin") for row in rows])
        x = levels + BIN * (u.to(levels) - 0.5)
        flow = _flow(network, velocity, t_of, x, rows, _probes(x, rows, seed, num_probes))
        start = np.append(x.flatten().cpu().double(), np.zeros(len(rows)))
        solution = solve_ivp(flow, (angles[0], angles[-1]), start, rtol=rtol, atol=atol, t_eval=angles[-1:])
        if not solution.success:
            raise RuntimeError(f"The solver gave up on images {rows[0]} to {rows[-1]}: {solution.message}")
        end, integral = torch.from_numpy(solution.y[:, 0]).split([x.numel(), len(rows)])
        prior = (end.reshape(len(rows), -1).square().mean(1) + math.log(2 * math.pi)) / 2 * BITS
        calls = torch.full((len(rows),), float(solution.nfev), dtype=torch.float64)
        results.append((prior - integral * BITS - math.log2(BIN), prior, -integral * BITS, calls))
    return OdeBitsPerDim(*map(torch.cat, zip(*results, strict=True)))


def _probes(x: Tensor, rows: range, seed: int, count: int) -> list[Tensor]:
    """Draw probes of independent random signs, each shaped like x."""
    draws = [[_draw(torch.rand, x.shape[1:], seed, row, "probe", index) for row in rows] for index in range(count)]
    return [(torch.stack(u) - 0.5).sign().to(x) for u in draws]


def _flow(
    network: "_Network",
    velocity: Callable[[Tensor, Tensor, float, float], Tensor],
    t_of: Callable[[float], float],
    like: Tensor,
    rows: range,
    probes: list[Tensor],
) -> Callable[[float, np.ndarray], np.ndarray]:
    """The ODE of a batch as numpy has it: d/dφ of x, and of log density per dimension."""

    def flow(angle: float, state: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(state[: like.numel()]).reshape(like.shape).to(like)
        t = torch.full((len(x),), float(t_of(angle)), dtype=x.dtype)
        with torch.enable_grad():
            x.requires_grad_()
            output = network(x, t, rows)[:, : x.shape[1]]  # without the values of a learned variance
            v = velocity(output, x, math.cos(angle), math.sin(angle))
            traces = [(e * torch.autograd.grad(v, x, e, retain_graph=True)[0]).flatten(1).mean(1) for e in probes]
        change = torch.cat([v.detach().flatten(), torch.stack(traces).mean(0)]).cpu().double().numpy()
        if not np.isfinite(change).all():
            raise ValueError(f"The network's output, or its derivative, is not finite at t={t[0]:g}.")
        return change

    return flow


# --- what both share -----------------------------------------------------------------------------------------------


class _Network(NamedTuple):
    """A network together with the labels of all images."""

    unet: Any
    labels: Tensor | None
    device: torch.device
    dtype: torch.dtype

    def __call__(self, x: Tensor, t: Tensor, rows: range) -> Tensor:
        """The output at x [B, ...] and t [B] for the images in rows, in x's dtype."""
        labels = {} if self.labels is None else {"class_labels": self.labels[list(rows)].to(self.device)}
        return self.unet(x.to(self.dtype), t.to(self.device), **labels).sample.to(x.dtype)


def _network(unet: Any, images: Tensor, class_labels: Any, batch_size: int, seed: int) -> _Network:  # noqa: ANN401
    """Check the arguments that both measures share; return the network with its labels."""
    check_not_training(unet)
    check_whole("batch_size", batch_size)
    check_whole("seed", seed, 0)
    _check_images(images)
    classes = getattr(unet, "config", {}).get("num_class_embeds")
    if classes is None and class_labels is not None:
        raise ValueError("class_labels was passed, but this network is not class-conditional.")
    labels = None
    if classes is not None:
        null = [classes - 1] * len(images)
        labels = label_numbers(null if class_labels is None else class_labels, classes, None)
        if len(labels) != len(images):
            raise ValueError(f"class_labels has {len(labels)} entries for {len(images)} images: pass one for each.")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    return _Network(unet, labels, getattr(unet, "device", images.device), getattr(unet, "dtype", dtype))


def check_scheduler(scheduler: object) -> None:
    """Raise ValueError unless it is a ScratchDDPMScheduler."""
    if not isinstance(scheduler, ScratchDDPMScheduler):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}: pass ScratchDDPMScheduler.from_config(scheduler.config)."
        )


def check_not_training(unet: Any) -> None:  # noqa: ANN401
    """Raise ValueError for a network in training mode."""
    if getattr(unet, "training", False):
        raise ValueError("The network is in training mode, with dropout: call unet.eval() first.")


def _check_images(images: Tensor) -> None:
    allowed = "pass uint8 [B, C, H, W], or float32 or float64 [B, ...] on the grid k / 127.5 - 1, k = 0..255, B >= 1."
    least_ndim = {torch.uint8: 4, torch.float32: 2, torch.float64: 2}
    if not isinstance(images, Tensor):
        raise ValueError(f"images is a {type(images).__name__}: {allowed}")
    ndim = least_ndim.get(images.dtype, math.inf)
    if images.numel() == 0 or images.ndim < ndim or (images.dtype == torch.uint8 and images.ndim > ndim):
        raise ValueError(f"images of dtype {images.dtype} and shape {tuple(images.shape)} are not allowed: {allowed}")
    for chunk in images.split(1024) if images.is_floating_point() else ():
        distance = float((chunk - _on_the_grid(chunk)).abs().max()) * 127.5
        if not distance <= GRID_TOLERANCE:  # NaN is not
            raise ValueError(
                f"images are not 8-bit: a value lies {distance:.3g} levels beside the grid. Those that were resized, "
                f"augmented, cast to 16 bits or scaled to another range have no bits per dimension: {allowed}"
            )


def _on_the_grid(images: Tensor) -> Tensor:
    """Convert uint8 or float images to exact levels in [-1, 1]: float32, or float64 if images are."""
    levels = images.float() if images.dtype == torch.uint8 else ((images + 1) * 127.5).round().clamp(0, 255)
    return levels / 127.5 - 1


def _batches(rows: range, batch_size: int) -> list[range]:
    return [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]


def _draw(kind: Callable[..., Tensor], shape: Sequence[int], seed: int, *names: str | int) -> Tensor:
    """Draw float32 numbers on the CPU; they follow from the seed and the names, such as an image's row."""
    return kind(shape, generator=generator(seed, *names), dtype=torch.float32)


def _standard_error(x: Tensor) -> Tensor:
    """The standard error of the mean over the first dimension, NaN left out: [B, ...] -> [...]."""
    count = (~x.isnan()).sum(0)
    return ((x - x.nanmean(0)).square().nansum(0) / (count - 1) / count).sqrt()
