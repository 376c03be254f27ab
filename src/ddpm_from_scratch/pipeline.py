"""DDPM's sampling loop as a `DiffusionPipeline`: a plugin for every DDPM checkpoint, and the folder that it saves."""

import ast
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor

from .interchange import write_config
from .scheduler import Generators, ScratchDDPMScheduler
from .schedules import rescale_to_zero_terminal_snr
from .unet import ScratchUNet2DModel

OUTPUT_TYPES = ("pil", "np", "pt")
MODULE_HEAD = '''"""ScratchDDPMPipeline of ddpm_from_scratch in one self-contained file, which `save_pretrained` writes.

Generated: change the package, not this file. SPDX-License-Identifier: Apache-2.0
"""
'''


def one_file(sources: Sequence[str]) -> str:
    """The source of several modules as one: imports first, without those between the modules. One stays as it is."""
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
    """The files that this pipeline needs, itself last; loaded as remote code, all of it is in one file already."""
    parts = (write_config, rescale_to_zero_terminal_snr, ScratchDDPMScheduler, ScratchUNet2DModel)
    files = dict.fromkeys([*(inspect.getfile(part) for part in parts), __file__])
    return tuple(Path(file).read_text(encoding="utf-8") for file in files)


class ScratchDDPMPipeline(DiffusionPipeline):
    """Unconditional or class-conditional image generation by DDPM (Ho et al. 2020, algorithm 2).

    Args:
        unet: a `UNet2DModel`. A stock one becomes a `ScratchUNet2DModel` around the same tensors.
        scheduler: any diffusers scheduler. A stock `DDPMScheduler` becomes a `ScratchDDPMScheduler`.

    Raises:
        ValueError: for a network with missing weights, or a configuration that one of the two classes refuses.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["sample", "pred_original_sample"]
    # Read on import: the file of a pipeline loaded as remote code may be another one's by the time of saving.
    _module_sources: ClassVar[tuple[str, ...]] = _sources()

    # Both classes are named, since `from_pipe` compares exact types with the annotation.
    def __init__(self, unet: UNet2DModel | ScratchUNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        missing = [name for name, weight in unet.named_parameters() if weight.is_meta]
        if missing:
            raise ValueError(
                f"{len(missing)} weights of the network are not loaded ({', '.join(missing[:3])} ...): the checkpoint "
                "is incomplete. Download it again."
            )
        if type(unet) is UNet2DModel:
            unet = ScratchUNet2DModel.from_stock(unet)
        if type(scheduler) is DDPMScheduler:
            scheduler = ScratchDDPMScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)

    # --- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        class_labels: Sequence[int] | Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("sample",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        The chain is kept in at least float32, whatever the precision of the network.

        Args:
            batch_size: number of images; if left out, one for each class label, or 1.
            generator: of all the noise; with a list, one for each image, an image does not depend on the others.
            num_inference_steps: K; if left out, every step of the training chain.
            class_labels: for a class-conditional network, one for each image.
            output_type: "pil", a list of images; "np", an array [B, H, W, C] in [0, 1]; "pt", a tensor [B, C, H, W]
                in [0, 1].
            return_dict: False for a tuple.
            callback_on_step_end: called as callback(pipeline, step, t, tensors) after each step; it may return new
                values of the tensors, of which "sample" is used.
            callback_on_step_end_tensor_inputs: which tensors it is given: "sample" (x_s) and "pred_original_sample"
                (the predicted x_0; None if the scheduler does not tell).

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for an argument that does not fit, before any work.
        """
        labels, batch_size = self._check_labels(class_labels, batch_size)
        shape = self._check_shape(batch_size)
        _check_generator(generator, batch_size)
        _check_output(output_type, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        steps = num_inference_steps if num_inference_steps is not None else self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(steps)

        device = self._execution_device
        labels = None if labels is None else labels.to(device)
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        noise_kwargs = {"generator": generator} if _takes_generator(self.scheduler) else {}
        x = randn_tensor(shape, generator=generator, device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output = self._predict(x, t, labels)
            result = self.scheduler.step(output, t, x, **noise_kwargs)
            x = result.prev_sample
            if callback_on_step_end is not None:
                tensors = {"sample": x, "pred_original_sample": getattr(result, "pred_original_sample", None)}
                asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, i, t, asked) or {}).get("sample", x)
        self.maybe_free_model_hooks()
        images = self._postprocess(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output for x_t, in the precision of the chain."""
        model_input = self.scheduler.scale_model_input(x, t).to(self.unet.dtype)
        output = self.unet(model_input, t, class_labels=labels).sample.to(x.dtype)
        # Only DDPM reads a learned variance; other schedulers take the prediction alone.
        return output if _reads_variance(self.scheduler) else output[:, : x.shape[1]]

    def _postprocess(self, x: Tensor, output_type: str) -> Any:  # noqa: ANN401
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_labels(self, class_labels: Any, batch_size: Any) -> tuple[Tensor | None, int]:  # noqa: ANN401
        """Labels as a LongTensor [B], and B."""
        classes = self.unet.config.get("num_class_embeds")
        if (class_labels is None) != (classes is None):
            raise ValueError(
                f"class_labels is missing: this network is class-conditional, pass labels from 0 to {classes - 1}."
                if class_labels is None
                else "class_labels was passed, but this network is not class-conditional."
            )
        if class_labels is None:
            return None, 1 if batch_size is None else batch_size
        labels = np.asarray(class_labels.cpu() if isinstance(class_labels, Tensor) else class_labels)
        whole = labels.ndim == 1 and labels.size and np.issubdtype(labels.dtype, np.integer)
        if not whole or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"class_labels={class_labels!r} must be a list of whole numbers from 0 to {classes - 1}.")
        if batch_size not in (None, len(labels)):
            raise ValueError(f"batch_size={batch_size!r} differs from the number of class_labels, {len(labels)}.")
        return torch.from_numpy(labels.astype(np.int64)), len(labels)

    def _check_shape(self, batch_size: Any) -> tuple[int, ...]:  # noqa: ANN401
        """The shape of the samples, [B, C, H, W]."""
        if not isinstance(batch_size, int | np.integer) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1.")
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("The network's configuration has no sample_size: set it to the side of the images.")
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return (int(batch_size), self.unet.config.in_channels, *sides)

    # --- loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # noqa: ANN401
        """As in diffusers, but this class is the one that loads, whichever the folder names: none of its code runs."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:  # noqa: ANN401
        """As in diffusers, which would run a folder's own pipeline; from such a folder, only data are fetched."""
        hub = {
            k: kwargs[k]
            for k in ("cache_dir", "force_download", "token", "revision", "local_files_only")
            if k in kwargs
        }
        index = hf_hub_download(pretrained_model_name, cls.config_name, **hub)
        if isinstance(json.loads(Path(index).read_text(encoding="utf-8"))["_class_name"], str):
            return super().download(pretrained_model_name, **kwargs)
        return snapshot_download(pretrained_model_name, allow_patterns=["*.json", "*.safetensors"], **hub)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        """Write model_index.json in stock names, and this pipeline as one self-contained file beside it.

        `save_pretrained` and `push_to_hub` both pass here. Stock diffusers then loads the folder as a `DDPMPipeline`; a
        class-conditional network, which that cannot run, names this pipeline instead.
        """
        os.makedirs(save_directory, exist_ok=True)
        (Path(save_directory) / "pipeline.py").write_text(one_file(self._module_sources), encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write model_index.json; see `save_config`."""
        conditional = self.unet.config.get("num_class_embeds") is not None
        own = isinstance(self.scheduler, ScratchDDPMScheduler)
        names: dict[str, Any] = {
            "_class_name": ["pipeline", type(self).__name__] if conditional else DDPMPipeline.__name__,
            "unet": ["diffusers", UNet2DModel.__name__],
            "scheduler": ["diffusers", DDPMScheduler.__name__ if own else type(self.scheduler).__name__],
        }
        write_config(self.to_json_string(), json_file_path, **names)


def _takes_generator(scheduler: SchedulerMixin) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def _reads_variance(scheduler: SchedulerMixin) -> bool:
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    return learned and isinstance(scheduler, ScratchDDPMScheduler | DDPMScheduler)


def _check_generator(generator: Any, batch_size: int) -> None:  # noqa: ANN401
    each = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(g, torch.Generator) for g in each):
        raise ValueError(f"generator={generator!r} must be a torch.Generator, or a list of them.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} entries for {batch_size} images: pass one, or one each.")


def _check_output(output_type: str, asked: Sequence[str], offered: Sequence[str]) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not known. Allowed: {', '.join(OUTPUT_TYPES)}.")
    if isinstance(asked, str) or not set(asked) <= set(offered):
        raise ValueError(f"callback_on_step_end_tensor_inputs={asked!r} must be a list from {', '.join(offered)}.")
