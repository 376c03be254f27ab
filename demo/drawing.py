"""What the demo's page does, without the page: plain values in, images out, ValueErrors that say what is allowed."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.diffusion.checks import check_choice, check_range
from ddpm_from_scratch.diffusion.pipeline import Frame, ScratchDDPMPipelineOutput
from ddpm_from_scratch.diffusion.scheduler_config import jumps
from ddpm_from_scratch.diffusion.stock import altered
from ddpm_from_scratch.sampling import samplers
from ddpm_from_scratch.sampling.editing import ScratchDDPMInpaintPipeline
from ddpm_from_scratch.sampling.previews import strip

MOST_SEED = 2**32 - 1
MOST_IMAGES = 16
MOST_STEPS = 250
MOST_FRAMES = 24
MOST_RESAMPLINGS = 10
MOST_GUIDANCE = 8
ANY, EACH = "any", "one of each"
LARGE, SMALL = 336, 96  # pixels, the least side of a picture by itself and of one among many

# --- samplers and classes -------------------------------------------------------------------------------------------


def _ours(scheduler: SchedulerMixin, **changes: object) -> ScratchDDPMScheduler:
    """The scheduler as ours, from t = T - 1, where x_t is noise."""
    return altered(scheduler, ScratchDDPMScheduler, timestep_spacing="trailing", **changes)


# How the page calls the samplers of the package.
SAMPLERS = {
    "DDPM": "ddpm",
    "DDIM": "ddim",
    "DPM-Solver++": "dpmsolver++",
    "UniPC": "unipc",
    "Consistency": "consistency",
}
JUMPING = "Consistency"  # the sampler of networks that were tuned for few steps


def tuned_for_jumps(pipeline: ScratchDDPMPipeline) -> bool:
    """Whether the network was tuned to jump."""
    return bool(jumps(pipeline.scheduler.config))


def samplers_of(pipeline: ScratchDDPMPipeline) -> list[str]:
    """The samplers that suit a model, the best one first."""
    others = [name for name in SAMPLERS if name != JUMPING]
    return [JUMPING, *others] if tuned_for_jumps(pipeline) else others


def with_sampler(pipeline: ScratchDDPMPipeline, sampler: str) -> ScratchDDPMPipeline:
    """A pipeline around the same network with the scheduler of a sampler.

    Raises:
        ValueError: an unknown sampler.
    """
    check_choice("sampler", sampler, SAMPLERS)
    start = _ours(pipeline.scheduler, eta=1.0)
    scheduler = samplers.SAMPLERS[SAMPLERS[sampler]](start)
    return ScratchDDPMPipeline(pipeline.unet, scheduler, pipeline.config.get("id2label"))


def class_numbers(pipeline: ScratchDDPMPipeline) -> dict[str, int]:
    """The classes of a class-conditional network by name, the null label not among them; none of another network."""
    count, names = pipeline.unet.config.get("num_class_embeds") or 0, pipeline.config.get("id2label") or {}
    return {names.get(i, f"class {i}"): i for i in range(count) if i in names or i < count - 1}


def any_class(pipeline: ScratchDDPMPipeline) -> bool:
    """Whether images can be drawn without naming a class."""
    count, names = pipeline.unet.config.get("num_class_embeds") or 0, pipeline.config.get("id2label") or {}
    return count - 1 not in names


def choices(pipeline: ScratchDDPMPipeline) -> list[str]:
    """What may be asked for of one image."""
    return [ANY] * any_class(pipeline) + list(class_numbers(pipeline))


def labels(pipeline: ScratchDDPMPipeline, label: str, count: int) -> list[int] | None:
    """The numbers of the classes of so many images; None for any.

    Raises:
        ValueError: a class that the network does not have.
    """
    numbers = class_numbers(pipeline)
    check_choice("class", label, [*choices(pipeline), *([EACH] if numbers else [])])
    if label == ANY:
        return None
    each = list(numbers.values()) if label == EACH else [numbers[label]]
    return [each[image % len(each)] for image in range(count)]


# --- what the page does: plain values in, images out ----------------------------------------------------------------


def _whole(name: str, value: object, least: int, most: int) -> int:
    """The value as an int; pages hand numbers over as floats, and an empty field as None."""
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or value != value // 1
        or not least <= value <= most
    ):
        given = "empty" if value is None else value
        raise ValueError(f"{name} must be a whole number from {least} to {most}; it is {given}.")
    return int(value)


def most_steps(pipeline: ScratchDDPMPipeline) -> int:
    """The longest chain that the page draws."""
    return min(MOST_STEPS, len(pipeline.scheduler))


def _steps(pipeline: ScratchDDPMPipeline, steps: object) -> int:
    return _whole("Steps", steps, 1, most_steps(pipeline))


def _guidance(label: str, guidance: float) -> float:
    """Guidance needs a class to follow."""
    check_range("guidance scale", guidance, 0, MOST_GUIDANCE)
    return 1.0 if label == ANY else float(guidance)


def _sample(
    pipeline: ScratchDDPMPipeline,
    seed: float | None,
    count: float,
    steps: float,
    sampler: str,
    label: str,
    guidance: float,
    frames: int | None = None,
) -> ScratchDDPMPipelineOutput:
    """Each image has a seed of its own, so that the chain of any of them can be shown by itself."""
    first, number = _whole("The seed", seed, 0, MOST_SEED), _whole("The number of images", count, 1, MOST_IMAGES)
    whole_steps = _steps(pipeline, steps)
    sampling: Any = with_sampler(pipeline, sampler)
    return sampling(
        batch_size=number,
        generator=[torch.Generator().manual_seed(first + image) for image in range(number)],
        num_inference_steps=whole_steps,
        class_labels=labels(pipeline, label, number),
        guidance_scale=_guidance(label, guidance),
        return_trajectory=None if frames is None else min(frames, whole_steps),
    )


def generate(
    pipeline: ScratchDDPMPipeline,
    seed: float | None,
    count: float,
    steps: float,
    sampler: str = "DDPM",
    label: str = ANY,
    guidance: float = 1.0,
) -> list[Image.Image]:
    """Images, the first from the seed, the second from the one after it, and so on.

    Args:
        pipeline: the model.
        seed: a whole number.
        count: of the images.
        steps: K.
        sampler: one of SAMPLERS.
        label: a class by name, ANY, or EACH for all of them in turn.
        guidance: scale of classifier-free guidance, which acts only where a class is named.

    Raises:
        ValueError: for a value that is not allowed.
    """
    return _sample(pipeline, seed, count, steps, sampler, label, guidance).images


def chain(
    pipeline: ScratchDDPMPipeline,
    seed: float | None,
    steps: float,
    frames: float,
    sampler: str = "DDPM",
    label: str = ANY,
    guidance: float = 1.0,
) -> list[Frame]:
    """Frames of the chain of one image, the one that `generate` draws; the last one is the image itself, at t = -1.

    Args:
        pipeline: the model.
        seed: a whole number.
        steps: K.
        frames: how many of the steps to keep, evenly spaced; if there are fewer, all.
        sampler: one of SAMPLERS. The solvers of diffusers do not tell which x_0 they predict.
        label: a class by name, or ANY.
        guidance: see `generate`.

    Raises:
        ValueError: for a value that is not allowed.
    """
    kept = _whole("The number of frames", frames, 2, MOST_FRAMES)
    output = _sample(pipeline, seed, 1, steps, sampler, label, guidance, kept)
    trajectory = output.trajectory or []
    tells = trajectory[-1].pred_original_sample is not None
    return [*trajectory, Frame(-1, output.images, output.images if tells else None)]


def _needed(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ValueError("There is no image: upload one, or take the generated example.")
    return image


def noised(pipeline: ScratchDDPMPipeline, image: Image.Image | None, t: float, seed: float | None) -> Image.Image:
    """x_t of the forward process, from an image that `fitted` has made.

    Raises:
        ValueError: no image, a timestep outside of the chain, or a wrong seed.
    """
    given, step = _needed(image), _whole("t", t, 0, len(pipeline.scheduler) - 1)
    generator = torch.Generator().manual_seed(_whole("The seed", seed, 0, MOST_SEED))
    x_0 = torch.from_numpy(np.array(given)).float()[None] / 127.5 - 1
    noise = torch.randn(x_0.shape, generator=generator)
    x_t = _ours(pipeline.scheduler, eta=1.0).add_noise(x_0, noise, step)
    return pipeline.numpy_to_pil((x_t / 2 + 0.5).clamp(0, 1).numpy().reshape(1, given.height, given.width, -1))[0]


def signal_and_noise(pipeline: ScratchDDPMPipeline, t: float) -> tuple[float, float]:
    """ᾱ_t, and the signal-to-noise ratio.

    Raises:
        ValueError: a timestep outside of the chain.
    """
    step = _whole("t", t, 0, len(pipeline.scheduler) - 1)
    of_one = _ours(pipeline.scheduler, eta=1.0).q_marginal(torch.ones(1, dtype=torch.float64), step)
    signal, noise = of_one.mean.square().item(), of_one.log_variance.exp().item()
    return signal, signal / noise


def inpaint(
    pipeline: ScratchDDPMPipeline,
    image: Image.Image | None,
    mask: Image.Image | None,
    seed: float | None,
    steps: float,
    resamplings: float,
    label: str = ANY,
    guidance: float = 1.0,
) -> Image.Image:
    """The image with the white part of the mask drawn anew; the rest stays as it is.

    Args:
        pipeline: the model.
        image: one that `fitted` has made.
        mask: of the same size, black and white.
        seed: a whole number.
        steps: K.
        resamplings: how often each stretch of the chain is run through (RePaint); 1 is once.
        label: a class by name, or ANY.
        guidance: see `generate`.

    Raises:
        ValueError: no image, nothing painted, or a value that is not allowed.
    """
    given = _needed(image)
    if mask is None or mask.getbbox() is None:
        raise ValueError("Nothing is painted: paint over the part of the image that is to be drawn anew.")
    whole_steps = _steps(pipeline, steps)
    painter = ScratchDDPMInpaintPipeline.from_pipe(with_sampler(pipeline, "DDPM"))
    return painter(
        given,
        mask,
        generator=torch.Generator().manual_seed(_whole("The seed", seed, 0, MOST_SEED)),
        num_inference_steps=whole_steps,
        jump_length=min(10, whole_steps - 1),
        jump_n_sample=_whole("Resamplings", resamplings, 1, MOST_RESAMPLINGS),
        class_labels=labels(pipeline, label, 1),
        guidance_scale=_guidance(label, guidance),
    ).images[0]


# --- pictures -------------------------------------------------------------------------------------------------------


SETTINGS = ("seed", "images", "steps", "sampler", "class", "guidance")  # of the page's first tab, in a link to it


def link(settings: Mapping[str, object]) -> str:
    """What follows the page's address so that it opens with these settings."""
    return "?" + urlencode({name: settings[name] for name in SETTINGS if settings.get(name) is not None})


def linked(pipeline: ScratchDDPMPipeline, query: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a link asks for; none for what it does not say.

    Raises:
        ValueError: for a value that the page does not take.
    """
    numbers = {
        "seed": (0, MOST_SEED),
        "images": (1, MOST_IMAGES),
        "steps": (1, most_steps(pipeline)),
        "guidance": (0, MOST_GUIDANCE),
    }
    each = [EACH] if class_numbers(pipeline) else []
    names = {"sampler": samplers_of(pipeline), "class": [*each, *choices(pipeline)]}
    found: dict[str, Any] = {}
    for name in SETTINGS:
        if name in query and name in names:
            check_choice(name, query[name], names[name])
            found[name] = query[name]
        elif name in query:
            least, most = numbers[name]
            try:
                found[name] = float(query[name])
            except ValueError:
                raise ValueError(f"the link's {name} must be a number, not {query[name]!r}.") from None
            check_range(f"the link's {name}", found[name], least, most)
    return found


def suggestions(pipeline: ScratchDDPMPipeline) -> dict[str, str]:
    """Links to settings worth a look, by what they show."""
    few = 2 if tuned_for_jumps(pipeline) else min(5, len(pipeline.scheduler))
    shown: dict[str, dict[str, object]] = {f"{few} steps": {"images": 10, "steps": few}}
    if not tuned_for_jumps(pipeline):
        shown[f"{few} steps of a solver"] = {"images": 10, "steps": few, "sampler": "UniPC"}
    if names := class_numbers(pipeline):
        first = next(iter(names))
        shown |= {
            "one of each class": {"images": min(len(names), MOST_IMAGES), "class": EACH},
            f"nine of one class, guided: {first}": {"images": 9, "class": first, "guidance": 4},
        }
    return {title: link(settings) for title, settings in shown.items()}


def image_size(pipeline: ScratchDDPMPipeline) -> tuple[int, int]:
    """(width, height) of the model's images."""
    size = pipeline.unet.config.sample_size
    return (size, size) if isinstance(size, int) else (size[1], size[0])


def example(pipeline: ScratchDDPMPipeline) -> Image.Image:
    """An image to work on, always the same one."""
    return generate(pipeline, 0, 1, min(20, len(pipeline.scheduler)), "DPM-Solver++", choices(pipeline)[-1])[0]


def fitted(pipeline: ScratchDDPMPipeline, image: Image.Image) -> Image.Image:
    """The middle of an image in the size and the channels of the model's."""
    upright = ImageOps.exif_transpose(image).convert("L" if pipeline.unet.config.in_channels == 1 else "RGB")
    return ImageOps.fit(upright, image_size(pipeline), Image.Resampling.LANCZOS)


def opened(pipeline: ScratchDDPMPipeline, path: str | os.PathLike[str]) -> Image.Image:
    """An image file as an image that the model can work on.

    Raises:
        ValueError: another file.
    """
    try:
        with Image.open(path) as image:
            return fitted(pipeline, image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{Path(path).name} cannot be read as an image: PNG, JPEG, WebP or GIF is needed.") from error


def enlarged(image: Image.Image, least: int = LARGE) -> Image.Image:
    """By a whole factor and without smoothing, so that no side is shorter than `least`."""
    factor = max(1, -(-least // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def painted(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """What is painted on transparent layers as a mask of the given size; None if there are no layers."""
    if not layers:
        return None
    alpha = functools.reduce(ImageChops.lighter, [layer.getchannel("A") for layer in layers])
    return alpha.resize(size, Image.Resampling.BOX).point(lambda level: 255 * (level >= 128))


def chain_strip(frames: Sequence[Frame]) -> Image.Image:
    """x_t in the upper row, the predicted x_0, where it is known, in the lower one, and t under them."""
    parts = ["sample"] + ["pred_original_sample"] * (frames[-1].pred_original_sample is not None)
    rows = [enlarged(strip(frames, part), SMALL) for part in parts]
    width, height = rows[0].size
    line, gap = SMALL // 4, SMALL // 12
    sheet = Image.new("RGB", (width, len(rows) * (height + gap) + line), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * (height + gap)))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(0.7 * line)
    for number, frame in enumerate(frames):
        middle = (number + 0.5) * width / len(frames)
        pen.text((middle, sheet.height), when(frame), "black", font, anchor="md")
    return sheet


def when(frame: Frame) -> str:
    """The name of a frame."""
    return f"t = {frame.timestep:g}" if frame.timestep >= 0 else "image"


# --- words ----------------------------------------------------------------------------------------------------------


def captions(pipeline: ScratchDDPMPipeline, seed: float | None, label: str, count: int) -> list[str]:
    """The seed of each image, and its class where it has one."""
    names = {number: f"{name}, " for name, number in class_numbers(pipeline).items()}
    numbers = labels(pipeline, label, count) or [-1] * count
    return [f"{names.get(number, '')}seed {int(seed or 0) + image}" for image, number in enumerate(numbers)]


def describe(pipeline: ScratchDDPMPipeline) -> str:
    """The model in a line."""
    width, height = image_size(pipeline)
    channels, classes = pipeline.unet.config.in_channels, len(class_numbers(pipeline))
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    parts = [
        f"Draws {kind} images of {width} × {height} pixels",
        *([f"of {classes} classes"] if classes else []),
        f"in a chain of T = {len(pipeline.scheduler)} steps",
    ]
    return f"{' '.join(parts)}, with {pipeline.unet.num_parameters():,} parameters, on {pipeline.device.type}."
