"""Edit images with a model that was trained to generate them. Make each pipeline from another with `from_pipe`.

References: SDEdit (Meng et al. 2022, https://arxiv.org/abs/2108.01073); RePaint (Lugmayr et al. 2022,
https://arxiv.org/abs/2201.09865); DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502), sections 4.3, 5.3 and 5.4
on inversion and interpolation; Salimans, Ho 2022 (https://arxiv.org/abs/2202.00512), appendix D, on DDIM as a rotation.
"""

import itertools
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..diffusion.checks import check_generator, check_range, check_whole
from ..diffusion.gaussian import Generators
from ..diffusion.guidance import Condition, Guidance, null_label
from ..diffusion.pipeline import ScratchDDPMPipeline, ScratchDDPMPipelineOutput
from ..diffusion.scheduler import Prediction, ScratchDDPMScheduler
from ..diffusion.scheduler_config import JUMPS, jumps, make_alpha_bar
from ..diffusion.stock import altered


class SamplingOptions(TypedDict, total=False):
    """The options of `ScratchDDPMPipeline` that the editing pipelines take too, with one label for each image."""

    class_labels: Sequence[int | str] | Tensor | None
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    eta: float | None


ImageInput = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor


def image_tensor(name: str, image: Any, channels: int, size: tuple[int, int]) -> Tensor:  # noqa: ANN401
    """Convert images in any form to float32 [B, C, H, W] in [0, 1].

    Args:
        name: of the argument, for messages.
        image: a PIL image or a list of them; an array [H, W, C] or [B, H, W, C] of uint8, or of floats in [0, 1]; or a
            tensor [C, H, W] or [B, C, H, W] of such values. [H, W] will do for one channel.
        channels: C, as the network has it. Gray PIL images become colour ones; the other way round nothing is dropped.
        size: (H, W).

    Raises:
        ValueError: another type, shape, mode or range.
    """
    if isinstance(image, Image.Image):
        image = [image]
    if isinstance(image, Sequence) and image and all(isinstance(one, Image.Image) for one in image):
        image = np.stack([_array(name, one, channels) for one in image])
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image, order="C"))  # a copy: arrays of PIL images are read-only
        image = image.movedim(-1, -3) if image.ndim in (3, 4) else image  # [..., H, W, C] -> [..., C, H, W]
    if not isinstance(image, Tensor):
        raise ValueError(f"{name} must be PIL images, an array or a tensor, not {type(image).__name__}.")
    image = image[None] if image.ndim == 2 and channels == 1 else image
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or tuple(image.shape[1:]) != (channels, *size):
        raise ValueError(
            f"{name} has shape {tuple(image.shape)} as [B, C, H, W]; the network needs {(channels, *size)} each: "
            "resize or crop it first."
        )
    if len(image) == 0:
        raise ValueError(f"{name} holds no image: pass at least one.")
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    if not bool((pixels >= 0).all() and (pixels <= 1).all()):
        raise ValueError(f"{name} has values from {pixels.min()} to {pixels.max()}: pass uint8, or floats in [0, 1].")
    return pixels


def _array(name: str, image: Image.Image, channels: int) -> np.ndarray:
    """Convert a PIL image to a uint8 array [H, W, C]; ValueError for a mode that does not fit."""
    allowed = {1: ("L", "1"), 3: ("L", "1", "RGB"), 4: ("L", "1", "RGB", "RGBA")}.get(channels, ())
    if image.mode not in allowed:
        raise ValueError(
            f"{name} is of mode {image.mode}; {channels} channels are made of {' or '.join(allowed) or 'no mode'}: "
            "convert it first."
        )
    return np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])).reshape(
        image.height, image.width, channels
    )


class _EditingPipeline(ScratchDDPMPipeline):
    """Base class of the editing pipelines."""

    def _images(self, name: str, image: Any, channels: int | None = None) -> Tensor:  # noqa: ANN401
        """Convert an argument to [B, C, H, W] in [0, 1], in the chain's precision and on the device."""
        _, own_channels, *size = self._check_shape(1)
        pixels = image_tensor(name, image, channels or own_channels, (size[0], size[1]))
        return pixels.to(self._execution_device, torch.promote_types(self.unet.dtype, torch.float32))

    def _own_scheduler(self) -> ScratchDDPMScheduler:
        if not isinstance(self.scheduler, ScratchDDPMScheduler):
            raise ValueError(
                f"{type(self).__name__} needs a ScratchDDPMScheduler, not {type(self.scheduler).__name__}: set "
                "pipeline.scheduler = ScratchDDPMScheduler.from_config(pipeline.scheduler.config)."
            )
        return self.scheduler

    def _prepare(
        self, count: int, steps: int, generator: Generators, options: SamplingOptions
    ) -> tuple[Condition | None, dict[str, Any]]:
        """Set the chain; return the labels of `count` images with their guidance, and the options of each step."""
        if unknown := set(options) - set(SamplingOptions.__annotations__):
            raise TypeError(f"{type(self).__name__} takes no {', '.join(sorted(unknown))}.")
        names = {"scale": "guidance_scale", "rescale": "guidance_rescale", "interval": "guidance_interval"}
        guidance = Guidance(**{key: options[name] for key, name in names.items() if name in options})  # type: ignore
        condition, _ = self._condition(options.get("class_labels"), count, guidance)
        check_generator(generator, count)
        return condition, self._set_chain(steps, options.get("eta"), generator)


class ScratchDDPMImg2ImgPipeline(_EditingPipeline):
    """Vary images (SDEdit): add noise up to some timestep, and let the chain remove it again."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: ImageInput,
        strength: float = 0.5,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> ScratchDDPMPipelineOutput | tuple[Any, ...]:
        """Vary images.

        Args:
            image: see `image_tensor`.
            strength: how much of the chain is run, up to 1: near 0 the image stays, at 1 next to nothing of it does.
            num_inference_steps: K of the whole chain, of which int(K * strength) steps are taken.
            generator: as in `ScratchDDPMPipeline`, as the other arguments are.
            output_type: as there.
            return_dict: as there.
            options: as there.

        Raises:
            ValueError: for an argument that does not fit, before any work.
        """
        check_range("strength", strength, 0, 1)
        self._check_output_type(output_type)
        steps = self._check_steps(num_inference_steps)
        if int(steps * strength) < 1:
            raise ValueError(f"strength={strength!r} of {steps} steps is less than one step: raise one of the two.")
        x_0 = 2 * self._images("image", image) - 1
        condition, step_options = self._prepare(len(x_0), steps, generator, options)
        start = (steps - int(steps * strength)) * self.scheduler.order
        timesteps = self.scheduler.timesteps[start:]
        if hasattr(self.scheduler, "set_begin_index"):  # schedulers that count their steps
            self.scheduler.set_begin_index(start)
        noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        x = self.scheduler.add_noise(x_0, noise, timesteps[:1].repeat(len(x_0)))
        x, _ = self._denoise(x, timesteps, condition, step_options)
        self.maybe_free_model_hooks()
        return self._output(x, [], output_type, return_dict)


def resampling_path(steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """RePaint's path, as the number of steps left at each point: from `steps` down to 0, with jumps back up.

    At every jump_length-th point, jump_length steps are undone and taken again, jump_n_sample - 1 times (RePaint,
    appendix B).
    """
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), jump_n_sample - 1)
    path = [steps]
    while path[-1] > 0:
        left = path[-1] - 1
        path.append(left)
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            path.append(left + jump_length)
    return path


class ScratchDDPMInpaintPipeline(_EditingPipeline):
    """Inpaint images (RePaint): after every step, the part to keep is put back with the right amount of noise.

    Adding noise again and repeating steps makes the painted part fit the rest.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: ImageInput,
        mask_image: ImageInput,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> ScratchDDPMPipelineOutput | tuple[Any, ...]:
        """Inpaint images. Pixels that are not painted are returned unchanged.

        Args:
            image: see `image_tensor`.
            mask_image: one channel, one for all images or one each: white (at least one half) is painted, black kept.
            num_inference_steps: K; if left out, 250 as in the paper, or T if that is less.
            jump_length: how many steps are undone at a time.
            jump_n_sample: how often each stretch is run through; 1 is no resampling.
            generator: as in `ScratchDDPMPipeline`, as the other arguments are.
            output_type: as there.
            return_dict: as there.
            options: as there.

        Raises:
            ValueError: for an argument that does not fit, before any work.
        """
        scheduler = self._own_scheduler()
        self._check_output_type(output_type)
        check_whole("jump_length", jump_length)
        check_whole("jump_n_sample", jump_n_sample)
        paper = min(250, self.scheduler.config.num_train_timesteps)
        steps = self._check_steps(paper if num_inference_steps is None else num_inference_steps)
        if jump_n_sample > 1 and jump_length >= steps:
            raise ValueError(
                f"jump_length={jump_length!r} leaves no room for resampling in {steps} steps: take a shorter one, or "
                "jump_n_sample=1."
            )
        given = self._images("image", image)
        paint = self._painted(mask_image, len(given))
        condition, step_options = self._prepare(len(given), steps, generator, options)

        x_0, timesteps = 2 * given - 1, scheduler.timesteps.tolist()
        on_device = scheduler.timesteps.to(x_0.device)
        times = [*timesteps, -1]
        x = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        path = resampling_path(len(timesteps), jump_length, jump_n_sample)
        for before, after in self.progress_bar(list(itertools.pairwise(path))):
            i, j = len(timesteps) - before, len(timesteps) - after
            if after > before:
                x = scheduler.q_transition(x, times[j], times[i]).sample(generator)
                continue
            output = self._predict(x, scheduler.timesteps[i], on_device[i], times[i], condition)
            painted, _ = scheduler.step(output, times[i], x, return_dict=False, **step_options)
            known = x_0 if times[j] < 0 else scheduler.q_marginal(x_0, times[j]).sample(generator)
            x = torch.where(paint, painted, known)
        self.maybe_free_model_hooks()
        x = torch.where(paint, x, x_0)
        return self._output(x, [], output_type, return_dict)

    def _painted(self, mask_image: ImageInput, count: int) -> Tensor:
        """The pixels to paint: bool [1 or count, 1, H, W]."""
        masks = [mask_image] if isinstance(mask_image, Image.Image) else mask_image
        if isinstance(masks, Sequence) and all(isinstance(mask, Image.Image) for mask in masks):
            masks = [mask.convert("L") for mask in masks]
        paint = self._images("mask_image", masks, channels=1) >= 0.5
        if len(paint) not in (1, count):
            raise ValueError(f"mask_image has {len(paint)} masks for {count} images: pass one, or one each.")
        return paint


class ScratchDDPMInterpolationPipeline(_EditingPipeline):
    """Invert images to the noise from which DDIM makes them, and interpolate between two images.

    Everything is deterministic (eta = 0). Predictions are neither clipped nor thresholded, since that could not be
    undone. A class-conditional network gets the null label.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: ImageInput,
        other_image: ImageInput,
        num_frames: int = 9,
        num_inference_steps: int = 50,
        num_iterations: int = 3,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ScratchDDPMPipelineOutput | tuple[Any, ...]:
        """Interpolate between two images.

        Their noises are found by inversion and interpolated on the sphere (DDIM eq. 67). What the inversion loses of
        the two images is added back in proportion, so that the first frame is the one and the last frame the other.

        Args:
            image: one image, see `image_tensor`.
            other_image: another one.
            num_frames: how many images to return, including the two.
            num_inference_steps: K.
            num_iterations: see `invert`.
            output_type: see `ScratchDDPMPipeline`.
            return_dict: see there.

        Raises:
            ValueError: for an argument that does not fit, before any work.
        """
        self._check_output_type(output_type)
        check_whole("num_frames", num_frames, 2)
        check_whole("num_iterations", num_iterations)
        ends = {"image": self._images("image", image), "other_image": self._images("other_image", other_image)}
        for name, end in ends.items():
            if len(end) != 1:
                raise ValueError(f"{name} holds {len(end)} images: pass one.")
        x_0 = 2 * torch.cat([*ends.values()]) - 1
        chain = self._chain(num_inference_steps)
        noise = self._invert(x_0, chain, num_iterations)
        lost = x_0 - self._generate(noise, chain)
        share = torch.linspace(0, 1, num_frames, device=x_0.device, dtype=x_0.dtype).reshape(-1, 1, 1, 1)
        x = self._generate(slerp(noise[:1], noise[1:], share), chain)
        x = x + (1 - share) * lost[:1] + share * lost[1:]
        self.maybe_free_model_hooks()
        return self._output(x, [], output_type, return_dict)

    @torch.no_grad()
    def invert(self, image: ImageInput, num_inference_steps: int = 50, num_iterations: int = 3) -> Tensor:
        """Find the noise x_T, [B, C, H, W], from which `generate` makes the images.

        Args:
            image: see `image_tensor`.
            num_inference_steps: K.
            num_iterations: calls of the network per step. With 1 the cleaner end of a step stands for its noisier end
                when the network is asked; each further one corrects that by fixed-point iteration, which converges
                where steps are short enough for the network. Networks that predict epsilon are hard to invert near
                pure noise: keep to 1 there.

        Raises:
            ValueError: for an argument that does not fit, or if the iteration diverged.
        """
        check_whole("num_iterations", num_iterations)
        x_0 = 2 * self._images("image", image) - 1
        noise = self._invert(x_0, self._chain(num_inference_steps), num_iterations)
        self.maybe_free_model_hooks()
        return noise

    @torch.no_grad()
    def generate(
        self, noise: Tensor, num_inference_steps: int = 50, output_type: str = "pil", return_dict: bool = True
    ) -> ScratchDDPMPipelineOutput | tuple[Any, ...]:
        """Generate images from noise x_T, [B, C, H, W], by the deterministic chain.

        Raises:
            ValueError: for an argument that does not fit.
        """
        self._check_output_type(output_type)
        shape = self._check_shape(1)[1:]
        if not isinstance(noise, Tensor) or noise.ndim != 4 or tuple(noise.shape[1:]) != shape:
            raise ValueError(f"noise must be a tensor [B, {', '.join(map(str, shape))}], such as `invert` returns.")
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        x = self._generate(noise.to(self._execution_device, dtype), self._chain(num_inference_steps))
        self.maybe_free_model_hooks()
        return self._output(x, [], output_type, return_dict)

    def _chain(self, num_inference_steps: int) -> ScratchDDPMScheduler:
        """A deterministic scheduler that does not clip or threshold its predictions."""
        own = self._own_scheduler()
        if jumps(own.config):
            raise ValueError(f"{JUMPS}, which the inversion of DDIM needs. Take the model that it was tuned from.")
        plain = {"clip_sample": False, "thresholding": False, "optimal_variance": False}
        scheduler: ScratchDDPMScheduler = altered(own, **plain)
        scheduler.set_timesteps(self._check_steps(num_inference_steps), eta=0.0)
        return scheduler

    def _invert(self, x_0: Tensor, scheduler: ScratchDDPMScheduler, num_iterations: int) -> Tensor:
        condition = self._null_condition(len(x_0))
        times, on_device = scheduler.timesteps.tolist(), scheduler.timesteps.to(x_0.device)
        alpha_bar, x_s = make_alpha_bar(scheduler.config), x_0
        for i in self.progress_bar(range(len(times) - 1, -1, -1)):
            x_t, s = x_s, int(scheduler.previous_timestep(times[i]))
            for _ in range(num_iterations):
                output = self._predict(x_t, scheduler.timesteps[i], on_device[i], times[i], condition)
                x_t = undo_ddim(alpha_bar, scheduler.predict(output, x_t, times[i]), x_s, times[i], s)
            x_s = x_t
        if not bool(x_s.isfinite().all()):
            raise ValueError("The inversion diverged: take more steps, or num_iterations=1.")
        return x_s

    def _generate(self, x: Tensor, scheduler: ScratchDDPMScheduler) -> Tensor:
        condition = self._null_condition(len(x))
        return self._denoise(x, scheduler.timesteps, condition, {}, scheduler=scheduler)[0]

    def _null_condition(self, batch_size: int) -> Condition | None:
        classes = self.unet.config.get("num_class_embeds")
        if classes is not None and null_label(classes, self.config.get("id2label")) is None:
            raise ValueError("Inversion needs a null label, and each label of this network is a class.")
        return self._condition(None, batch_size, Guidance())[0]


def undo_ddim(alpha_bar: np.ndarray, prediction: Prediction, x_s: Tensor, t: int, s: int) -> Tensor:
    """Undo DDIM's step at eta = 0: the x_t that it maps to x_s, given the network's prediction at that x_t.

    With angles φ, tan φ = √((1-ᾱ)/ᾱ), the step is a rotation by δ = φ_t - φ_s, x_s = cos δ x_t - sin δ v (Salimans & Ho
    2022, appendix D). For networks that predict v it is well conditioned from the data to pure noise.

    Args:
        alpha_bar: [T], of the process.
        prediction: x_0 and epsilon, shaped like x_s.
        x_s: in float32 or float64.
        t: the timestep to find x_t at.
        s: that of x_s, -1 for data.

    Raises:
        ValueError: for a step from pure noise to data, of which nothing can be undone.
    """
    a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
    signal_t, sigma_t, signal_s, sigma_s = (float(np.sqrt(a)) for a in (a_t, 1 - a_t, a_s, 1 - a_s))
    v = signal_t * prediction.epsilon - sigma_t * prediction.x_0
    sine, cosine = sigma_t * signal_s - signal_t * sigma_s, signal_t * signal_s + sigma_t * sigma_s
    if abs(cosine) < 1e-6:
        raise ValueError(f"The step from t={t} to s={s} goes from noise to data at once: take more steps.")
    return (x_s + sine * v) / cosine


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation from a to b, [1, ...] each, at shares [N, 1, ...] in [0, 1]: [N, ...]."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = torch.arccos(cosine).reshape(-1, *(1,) * (a.ndim - 1))
    # Parallel vectors have no arc between them: a straight line then.
    weights = torch.sin((1 - share) * angle), torch.sin(share * angle)
    arc = (weights[0] * a + weights[1] * b) / torch.sin(angle).clamp(min=1e-6)
    return torch.where(torch.sin(angle) > 1e-3, arc, (1 - share) * a + share * b)
