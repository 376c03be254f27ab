"""How each figure of docs/theory.md looks: functions of what they draw, with axes in the symbols of the papers."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.axes
import matplotlib.figure
import numpy as np
import torch
from cycler import cycler
from PIL import Image
from torch import Tensor

from ddpm_from_scratch import ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.pipeline import Frame
from ddpm_from_scratch.evaluation.likelihood import BitsPerDim
from pages import in_words

STYLE = {
    # Okabe and Ito's colours, told apart by colour-blind readers too.
    "axes.prop_cycle": cycler(color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]),
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.labelsize": 12,
    "mathtext.fontset": "cm",
}

Schedulers = Mapping[str, ScratchDDPMScheduler]  # by the name to show
Figure = matplotlib.figure.Figure
Axes = matplotlib.axes.Axes


class Drawn(NamedTuple):
    """A figure, and the numbers that a text about it may quote."""

    figure: Figure
    numbers: dict[str, Any]


# --- axes ----------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """In inches; draws without a display."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size, without the name of a version in it: the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def log_time(axis: Axes, last: int) -> None:
    """t on a logarithmic axis from 1 on, with a place for 0, so that the start of the chain can be seen."""
    axis.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks = [t for t in (0, 1, 10, 100, 1000) if t <= last]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set(xlabel="$t$", xlim=(-0.3, 1.3 * last))


def in_powers_of_10(value: float) -> str:
    """1.2e-09 as the papers have it."""
    digits, exponent = f"{value:.1e}".split("e")
    return rf"${digits} \cdot 10^{{{int(exponent)}}}$"


def show(axis: Axes, image: Tensor | np.ndarray, least: float = -1) -> None:
    """A gray image [H, W] with values from `least` to 1; what lies outside is cut off."""
    axis.imshow(image, cmap="gray", vmin=least, vmax=1)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def name_row(axis: Axes, name: str) -> None:
    """To the left of a row of pictures."""
    axis.set_ylabel(name, rotation=0, ha="right", va="center")


# --- the process ---------------------------------------------------------------------------------------------------


def all_times(scheduler: ScratchDDPMScheduler) -> tuple[Tensor, Tensor, Tensor]:
    """Every t, with zeros and ones in float64, one for each: samples that show the scheduler's coefficients."""
    t = torch.arange(len(scheduler))
    return t, torch.zeros(len(t), dtype=torch.float64), torch.ones(len(t), dtype=torch.float64)


def forward(x_0: Tensor, noise: Tensor, schedulers: Schedulers, times: Sequence[int]) -> Drawn:
    """x_t of one gray image [1, H, W] with one noise, at some times (columns), by schedule (rows)."""
    figure = new_figure(1 + len(times), 0.5 + 1.2 * len(schedulers))
    axes = figure.subplots(len(schedulers), len(times), squeeze=False)
    t, ones = torch.tensor(times), torch.ones(len(times), dtype=torch.float64)
    signal = {name: scheduler.q_marginal(ones, t).mean.tolist() for name, scheduler in schedulers.items()}
    for row, (name, scheduler) in zip(axes, schedulers.items(), strict=True):
        repeated = (len(times), *x_0.shape)
        x_t = scheduler.add_noise(x_0.expand(repeated), noise.expand(repeated), t)
        name_row(row[0], name)
        for axis, image, factor in zip(row, x_t, signal[name], strict=True):
            show(axis, image[0])
            axis.set_xlabel(f"{factor:.3f}", fontsize=9)
    for axis, at in zip(axes[0], times, strict=True):
        axis.set_title(f"$t = {at}$", fontsize=10)
    figure.supxlabel(
        r"$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon$, below each: "
        r"$\sqrt{\bar\alpha_t}$",
        fontsize=10,
    )
    return Drawn(figure, {"t": list(times), "signal": signal})


def schedules(schedulers: Schedulers) -> Drawn:
    """ᾱ_t and log SNR against t; a schedule's name after a comma is a variant of it, with its colour."""
    figure = new_figure(8, 3.8)
    left, right = figure.subplots(1, 2)
    families = list(dict.fromkeys(name.split(",")[0] for name in schedulers))
    numbers = {}
    for name, scheduler in schedulers.items():
        t, _, ones = all_times(scheduler)
        q = scheduler.q_marginal(ones, t)
        alpha_bar, log_snr = q.mean**2, 2 * q.mean.log() - q.log_variance
        line = {"color": f"C{families.index(name.split(',')[0])}", "linestyle": "--" if "," in name else "-"}
        left.plot(t, alpha_bar, **line)
        right.plot(t, log_snr, label=name, **line)
        numbers[name] = {
            "first_alpha_bar": alpha_bar[0].item(),
            "last_alpha_bar": alpha_bar[-1].item(),
            "first_log_snr": log_snr[0].item(),
            "last_log_snr": log_snr[-1].item() if alpha_bar[-1] > 0 else None,
            "first_t_with_more_noise_than_signal": int((log_snr < 0).nonzero()[0]),
        }
    left.set(xlabel="$t$", ylabel=r"$\bar\alpha_t$")
    right.set(xlabel="$t$", ylabel=r"$\log\ \mathrm{SNR} = \log\,(\bar\alpha_t / (1 - \bar\alpha_t))$")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return Drawn(figure, numbers)


def posterior(schedulers: Schedulers) -> Drawn:
    """What q(x_{t-1} | x_t, x_0) takes of x_0 and of x_t, and how its variance compares with β_t."""
    figure = new_figure(8, 3.8)
    left, right = figure.subplots(1, 2)
    numbers = {}
    for style, (name, scheduler) in zip(("-", "--", ":"), schedulers.items(), strict=False):
        t, zeros, ones = all_times(scheduler)
        on_x_0 = scheduler.q_posterior(ones, zeros, t).mean
        on_x_t = scheduler.q_posterior(zeros, ones, t).mean
        # At t = 0, β̃ is 0, and the scheduler's log-variance that of t = 1 (DDPM's and iDDPM's code).
        small = scheduler.q_posterior(ones, ones, t).log_variance[1:]
        large = scheduler.q_transition(ones, t, t - 1).log_variance[1:]
        ratio = (small - large).exp()
        dots = {"marker": ".", "markevery": slice(10)}  # where single steps can be told apart
        left.plot(t, on_x_0, f"C0{style}", label=f"of $x_0$, {name}", **dots)
        left.plot(t, on_x_t, f"C1{style}", label=f"of $x_t$, {name}", **dots)
        right.plot(t[1:], ratio, f"C2{style}", label=name, **dots)
        numbers[name] = {
            "at_t_0": [on_x_0[0].item(), on_x_t[0].item()],
            "at_t_1": [on_x_0[1].item(), on_x_t[1].item()],
            "first_t_where_x_t_weighs_more": int((on_x_t > on_x_0).nonzero()[0]),
            "variance_ratio": {str(at): ratio[at - 1].item() for at in (1, 10, 100) if at < len(t)},
        }
    for axis in (left, right):
        log_time(axis, len(t))
        axis.legend(fontsize=9)
    left.set_ylabel(r"factor in $\tilde\mu_t(x_t, x_0)$")
    right.set_ylabel(r"$\tilde\beta_t / \beta_t$")
    right.set_ylim(0, 1.05)
    return Drawn(figure, numbers)


# --- the network ---------------------------------------------------------------------------------------------------


def loss(errors: Mapping[str, Tensor], times: Sequence[int]) -> Drawn:
    """Mean squared errors [K, N] over N images against t, each with a band of two standard errors to both sides."""
    figure = new_figure(8, 4.2)
    axis = figure.subplots()
    symbols = {"epsilon": r"\epsilon", "x_0": "x_0", "v": "v"}
    styles = {"v": "--"}  # which lies upon the other two at the ends of the chain
    numbers: dict[str, Any] = {"t": list(times)}
    for name, of_images in errors.items():
        mean, error = of_images.mean(1), of_images.std(1) / of_images.shape[1] ** 0.5
        (line,) = axis.plot(
            times,
            mean,
            styles.get(name, "-"),
            marker=".",
            label=rf"$\Vert {symbols[name]} - \hat {symbols[name]} \Vert^2 / d$",
        )
        axis.fill_between(times, mean - 2 * error, mean + 2 * error, color=line.get_color(), alpha=0.3, linewidth=0)
        numbers[name] = {"mean": mean.tolist(), "standard_error": error.tolist()}
    count = next(iter(errors.values())).shape[1]
    axis.set(xlabel="$t$", ylabel="mean squared error", yscale="log")
    axis.set_ylim(bottom=1e-6)  # where nothing but noise is left, ε is known to any number of digits
    axis.legend(title=f"of one network, {count} test images")
    return Drawn(figure, {"num_images": count, **numbers})


def bound(bits: BitsPerDim) -> Drawn:
    """The terms of the bound against t, and their sum from L_0 up, in bits per dimension."""
    mean, error, count = bits.mean(), bits.standard_error(), len(bits.total)
    t, terms, prior = mean.timesteps.tolist(), mean.terms, mean.prior.item()
    top = t[-1] + 1  # where L_T stands
    total = terms.cumsum(0)
    figure = new_figure(8, 4)
    left, right = figure.subplots(1, 2)
    left.plot(t, terms, label="$L_t$")
    left.plot(t[0], terms[0], "C1o", label=f"$L_0$ = {terms[0]:.2f}")
    left.plot(top, prior, "C2s", label=f"$L_T$ = {in_powers_of_10(prior)}")
    left.set(yscale="log", ylabel="bits per dimension")
    right.plot(t, total)
    right.plot(t[0], total[0], "C1o")
    right.plot(top, total[-1] + prior, "C2s")
    right.set(ylabel="sum of the terms up to $t$", ylim=(0, 1.1 * mean.total.item()))
    right.set_title(f"{mean.total:.2f} ± {error.total:.2f} bits per dimension, {count} test images", fontsize=10)
    left.set_title("each term", fontsize=10)
    left.legend()
    for axis in (left, right):
        log_time(axis, top)
    numbers = {
        "num_images": count,
        "bits_per_dim": mean.total.item(),
        "error": error.total.item(),
        "L_0": terms[0].item(),
        "L_1_to_10": terms[1:11].sum().item(),
        "L_11_to_100": terms[11:101].sum().item(),
        "L_101_and_above": terms[101:].sum().item(),
        "L_T": prior,
    }
    return Drawn(figure, numbers)


def chain(frames: Sequence[Frame]) -> Drawn:
    """x_t and the x_0 predicted from it, as arrays [B, H, W, 1] in [0, 1], down a chain (columns)."""
    count = len(frames[0].sample)
    figure = new_figure(0.7 + 0.9 * len(frames), 0.3 + 0.9 * 2 * count)
    axes = figure.subplots(2 * count, len(frames), squeeze=False)
    for column, frame in zip(axes.T, frames, strict=True):
        column[0].set_title(f"$t = {frame.timestep:g}$", fontsize=10)
        pictures = np.stack([frame.sample, frame.pred_original_sample], 1).reshape(2 * count, *frame.sample.shape[1:])
        for axis, picture in zip(column, pictures, strict=True):
            show(axis, picture[..., 0], least=0)
    for axis, name in zip(axes[:, 0], ("$x_t$", r"$\hat x_0(x_t)$") * count, strict=True):
        name_row(axis, name)
    last = frames[-1].pred_original_sample
    apart = [float(np.sqrt(np.mean((frame.pred_original_sample - last) ** 2))) for frame in frames]
    return Drawn(figure, {"t": [frame.timestep for frame in frames], "x_0_to_last_x_0": apart})


def points(forward: Mapping[int, Tensor], reverse: Mapping[int, Tensor]) -> Drawn:
    """Clouds [N, 2] by t, -1 being the data: those of q above those of the chain. Colour: how high a point is at -1."""
    figure = new_figure(8, 3.5)
    axes = figure.subplots(2, len(forward), sharex=True, sharey=True, squeeze=False)
    for row, clouds in zip(axes, (forward, reverse), strict=True):
        for axis, cloud in zip(row, clouds.values(), strict=True):
            axis.scatter(*cloud.T, s=2, c=clouds[-1][:, 1], cmap="cividis", linewidths=0)
            axis.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), xticks=[], yticks=[], aspect="equal")
    for axis, t in zip(axes[0], forward, strict=True):
        axis.set_title("$x_0$" if t < 0 else f"$t = {t}$", fontsize=10)
    axes[0, 0].set_ylabel(r"$q(x_t)\ \rightarrow$")
    axes[1, 0].set_ylabel(r"$\leftarrow\ p_\theta(x_t)$")
    return Drawn(figure, {"num_points": len(forward[-1]), "t": list(forward)})


def jumps(rows: Mapping[str, Mapping[int, Tensor]], data: Tensor) -> Drawn:
    """Clouds [N, 2] by the number of steps they were drawn in (columns), in rows by name, before the data in grey."""
    count = len(next(iter(rows.values())))
    figure = new_figure(1.8 * count, 2.7 * len(rows))
    axes = figure.subplots(len(rows), count, sharex=True, sharey=True, squeeze=False)
    for row, (name, clouds) in zip(axes, rows.items(), strict=True):
        for axis, (steps, cloud) in zip(row, clouds.items(), strict=True):
            axis.scatter(*data.T, s=2, color="0.8", linewidths=0)
            axis.scatter(*cloud.T, s=2, color="C0", linewidths=0)
            axis.set(xlim=(-1.6, 1.6), ylim=(-2.3, 2.3), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"{name}, {in_words(steps)}", fontsize=9)
    return Drawn(figure, {"num_points": len(data), "steps": list(next(iter(rows.values())))})
