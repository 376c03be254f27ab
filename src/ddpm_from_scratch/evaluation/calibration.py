"""Statistics of a trained network that make few steps good: the optimal variance of the reverse process.

References: Analytic-DPM (Bao, Li, Zhu, Zhang 2022, https://arxiv.org/abs/2201.06503); Bao et al. 2022, "Estimating the
Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models" (https://arxiv.org/abs/2206.07309).

The variance of p(x_s | x_t) that minimises the variational bound is λ² + c² E‖x_0 - x̂_0(x_t)‖² / d, with λ² the
variance of q(x_s | x_t, x_0) and c the factor of x_0 in its mean. For an exact network that error is the variance of
x_0 given x_t, (1 - ᾱ_t) / ᾱ_t (1 - E‖ε̂‖² / d) in the form of Analytic-DPM. The error itself is estimated here: it is
right for an inexact network and a clipped x̂_0 too, and finite where ᾱ_t is 0.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.checks import check_whole
from ..diffusion.guidance import null_label
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.scheduler_config import make_alpha_bar
from ..diffusion.stock import altered
from ..diffusion.timesteps import evenly_in_log_snr
from .likelihood import check_not_training, check_scheduler


def moment_timesteps(scheduler: ScratchDDPMScheduler, count: int) -> list[int]:
    """At most `count` timesteps from 0 to T - 1, evenly spaced in log SNR, along which the moments are smooth."""
    alpha_bar = make_alpha_bar(scheduler.config)
    return evenly_in_log_snr(alpha_bar, None, min(count, len(alpha_bar))).tolist()


@torch.no_grad()
def x_0_mse(
    unet: Any,  # noqa: ANN401
    scheduler: ScratchDDPMScheduler,
    images: Tensor | Iterable[Tensor],
    *,
    num_timesteps: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    class_labels: Tensor | None = None,
) -> list[tuple[int, float]]:
    """Estimate E‖x_0 - x̂_0(x_t)‖² / d at some timesteps, in one pass over a data set.

    x_t ~ q(x_t | x_0) with the same noise of an image at every t, so that the curve is smooth; x̂_0 as the scheduler
    predicts it, clipped if it does. A class-conditional network gets the null label, or that of each image.

    Args:
        unet: the trained network, called as unet(x_t, t) or unet(x_t, t, class_labels=...); `.sample` of what it
            returns is the output.
        scheduler: whose process, prediction type and clipping are meant.
        images: [N, C, H, W] in [-1, 1], or batches of them.
        num_timesteps: how many timesteps, at least 2.
        batch_size: of calls of the network, where images is one tensor.
        seed: of the noise.
        progress: show a bar.
        class_labels: [N], of images that are one tensor, for a network without a null label.

    Returns:
        Pairs (t, value) in ascending order, four digits each.

    Raises:
        ValueError: no images, images out of [-1, 1], a network in training mode, a scheduler that is not ours, or a
            number that is not allowed.
    """
    check_scheduler(scheduler)
    check_not_training(unet)
    check_whole("num_timesteps", num_timesteps, 2)
    check_whole("batch_size", batch_size)
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    labels = itertools.repeat(None) if class_labels is None else class_labels.to(unet.device).split(batch_size)
    timesteps = moment_timesteps(scheduler, num_timesteps)
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(len(timesteps), dtype=torch.float64)
    count = 0
    bar = tqdm(batches, desc="calibrating", unit="batch", disable=not progress)
    for batch, of_batch in zip(bar, labels, strict=False):
        _check_images(batch)
        noise = torch.randn(batch.shape, generator=generator).to(unet.device)  # float32, the same on every device
        x_0 = batch.to(unet.device, torch.float32)
        totals += torch.stack([_error(unet, scheduler, x_0, noise, t, of_batch) for t in timesteps]).double().cpu()
        count += batch.numel()
    if count == 0:
        raise ValueError("images is empty: pass at least one image, better some hundreds.")
    return [(t, float(f"{total / count:.4g}")) for t, total in zip(timesteps, totals.tolist(), strict=True)]


def calibrate(
    unet: Any,  # noqa: ANN401
    scheduler: ScratchDDPMScheduler,
    images: Tensor | Iterable[Tensor],
    **options: Any,  # noqa: ANN401
) -> ScratchDDPMScheduler:
    """Return the scheduler with the network's `x_0_mse` in its configuration. `options` are those of `x_0_mse`."""
    moments = x_0_mse(unet, scheduler, images, **options)
    calibrated: ScratchDDPMScheduler = altered(scheduler, x_0_mse=moments)
    return calibrated


def _error(
    unet: Any,  # noqa: ANN401
    scheduler: ScratchDDPMScheduler,
    x_0: Tensor,
    noise: Tensor,
    t: int,
    labels: Tensor | None,
) -> Tensor:
    """The sum of (x_0 - x̂_0)² over a batch at one t."""
    x_t = scheduler.add_noise(x_0, noise, t)
    null = null_label(unet.config.get("num_class_embeds"))
    if labels is None and null is not None:
        labels = torch.full((len(x_t),), null, device=x_t.device)
    given = {} if labels is None else {"class_labels": labels}
    output = unet(x_t.to(unet.dtype), torch.tensor(t, device=x_t.device), **given).sample.to(x_t.dtype)
    return ((x_0 - scheduler.predict(output, x_t, t).x_0) ** 2).sum()


def _check_images(batch: Tensor) -> None:
    if batch.numel() and (not batch.is_floating_point() or batch.ndim < 2 or not batch.abs().max() <= 1 + 1e-6):
        raise ValueError(
            f"images of dtype {batch.dtype}, shape {tuple(batch.shape)}, from {batch.min()} to {batch.max()}: pass "
            "floats [N, C, H, W] in [-1, 1], such as uint8 / 127.5 - 1."
        )
