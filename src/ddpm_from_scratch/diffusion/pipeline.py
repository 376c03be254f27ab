"""DDPM's sampling loop as a `DiffusionPipeline`: a plugin for every DDPM checkpoint, and the folder that it saves."""

import ast
import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    LCMScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import check_choice, check_eta, check_generator, check_whole, is_whole
from .gaussian import Generators
from .guidance import Condition, Guidance, condition_of, guide
from .reverse_variance import LEARNED_VARIANCES
from .scheduler import ScratchDDPMScheduler
from .scheduler_config import SAVED_AS, stock_class
from .stock import altered, safe_weights, write_config
from .unet import ScratchUNet2DModel
from .unet_config import sample_sides, takes_labels

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
