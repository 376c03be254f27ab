"""A model's network as an ONNX file, which runtimes other than PyTorch run, beside its scheduler's configuration."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..diffusion.pipeline import ScratchDDPMPipeline
from ..runtime.atomic_files import begin_folder, check_new, finish_folder
from ..runtime.errors import saving
from .models import image_form

OUTPUT = "out_sample"  # by diffusers' name of it
LAYOUT = "unet/model.onnx"  # as in diffusers' folders of ONNX models; weights lie in a file beside it


def export_onnx(pipeline: ScratchDDPMPipeline, folder: Path) -> None:
    """Write the network and the scheduler's configuration: `unet/` and `scheduler/`.

    The network takes `sample` [B, C, H, W] in its own precision, `timestep` [B] and, with classes, `class_labels` [B]
    as int64, for every B and the height and width of its configuration; it gives `out_sample`.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: the folder exists already, the size of the images is unknown, or classes are no numbers.
        CannotSave: the folder cannot be written; then it is not there.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX needs packages of its own: pip install "ddpm-from-scratch[onnx]"') from error
    check_new(folder)
    program, names = traced(pipeline)
    with saving("the model"):
        unfinished = begin_folder(folder)
        pipeline.unet.save_config(unfinished / "unet")
        pipeline.scheduler.save_pretrained(unfinished / "scheduler")
        with quiet():
            torch.onnx.export(
                program,
                (),
                unfinished / LAYOUT,
                input_names=names,
                output_names=[OUTPUT],
                external_data=True,
                verbose=False,
            )
        finish_folder(folder)


def traced(pipeline: ScratchDDPMPipeline) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The network's program for every batch, and the names of its inputs."""
    channels, size = image_form(pipeline)
    unet = pipeline.unet.eval()
    inputs = {
        "sample": torch.zeros(2, channels, *size, dtype=unet.dtype),
        "timestep": torch.zeros(2, dtype=torch.int64),
    }
    kind, classes = (unet.config[key] for key in ("class_embed_type", "num_class_embeds"))
    if kind is not None:
        raise ValueError(f"class_embed_type={kind!r} has no numbered classes: call torch.onnx.export by yourself.")
    if classes is not None:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64)
    batch = {0: torch.export.Dim("batch", min=1)}
    return torch.export.export(unet, (), inputs, dynamic_shapes=dict.fromkeys(inputs, batch)), list(inputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what PyTorch says of its own deprecated names, and of packages that it could use here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
