"""Make a model folder of a run's checkpoint: `ddpm export outputs/my-run/checkpoints/step_00001000 my-model`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..runtime.atomic_files import begin_folder, finish_folder
from ..runtime.errors import saving
from ..sampling.checkpoints import load_checkpoint, read_manifest
from .config import TrainingConfig, config_with_header


def export(checkpoint: Path, folder: Path) -> None:
    """Save the model that a checkpoint holds: the average of its weights, if there is one, and its scheduler.

    Raises FileNotFoundError if there is no such checkpoint; ValueError if it is damaged, or the folder exists already;
    CannotSave if the folder cannot be written; then it is not there.
    """
    pipeline = load_checkpoint(checkpoint)
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder.")
    config = TrainingConfig(**read_manifest(checkpoint)["config"])
    with saving("the model"):
        unfinished = begin_folder(folder)
        pipeline.save_pretrained(unfinished)
        (unfinished / "training_config.yaml").write_text(config_with_header(config), encoding="utf-8")
        finish_folder(folder)


def main(arguments: Sequence[str]) -> None:
    """Export; print the folder."""
    parser = argparse.ArgumentParser(prog="ddpm export", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("folder", type=Path, help="of the model, which is made")
    args = parser.parse_args(arguments)
    export(args.checkpoint, args.folder)
    print(args.folder)
