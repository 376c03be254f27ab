"""Make a model folder of a run's checkpoint, or an ONNX file of any DDPM model's network.

ddpm export outputs/my-run/checkpoints/step_00001000 my-model
ddpm export my-model my-model-onnx --format onnx
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..diffusion.pipeline import ScratchDDPMPipeline
from ..runtime.atomic_files import begin_folder, check_new, finish_folder
from ..runtime.errors import saving
from ..sampling.checkpoints import is_checkpoint, load_checkpoint, read_manifest
from ..sampling.onnx import export_onnx
from .config import TrainingConfig, config_with_header


def export(checkpoint: str, folder: Path) -> None:
    """Save the model that a checkpoint holds: the average of its weights, if there is one, and its scheduler.

    Raises FileNotFoundError if there is no such checkpoint; ValueError if it is damaged, or the folder exists already;
    CannotSave if the folder cannot be written; then it is not there.
    """
    pipeline = load_checkpoint(Path(checkpoint))
    check_new(folder)
    config = TrainingConfig(**read_manifest(Path(checkpoint))["config"])
    with saving("the model"):
        unfinished = begin_folder(folder)
        pipeline.save_pretrained(unfinished)
        (unfinished / "training_config.yaml").write_text(config_with_header(config), encoding="utf-8")
        finish_folder(folder)


def export_as_onnx(name: str, folder: Path) -> None:
    """Save the network of a model's folder, Hub name or checkpoint as ONNX. Raises as loading it and `export_onnx`."""
    check_new(folder)
    if is_checkpoint(Path(name)):
        export_onnx(load_checkpoint(Path(name)), folder)
    else:
        export_onnx(ScratchDDPMPipeline.from_pretrained(name, dtype=torch.float32), folder)


FORMATS = {"diffusers": export, "onnx": export_as_onnx}


def main(arguments: Sequence[str]) -> None:
    """Export; print the folder."""
    parser = argparse.ArgumentParser(
        prog="ddpm export",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of the checkpoint; for onnx also a model's folder or Hub name")
    parser.add_argument("folder", type=Path, help="which is made")
    parser.add_argument("--format", choices=FORMATS, default="diffusers", help="diffusers if left out")
    args = parser.parse_args(arguments)
    FORMATS[args.format](args.model, args.folder)
    print(args.folder)
