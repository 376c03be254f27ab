"""Make a model folder of a run's checkpoint: `ddpm export outputs/my-run/checkpoints/step_00001000 my-model`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.unet import ScratchUNet2DModel
from ..runtime.atomic_files import begin_folder, finish_folder
from ..runtime.errors import saving
from .checkpoint import MANIFEST, damage, read_state, read_tensors
from .config import TrainingConfig, config_with_header
from .model import build_scheduler


def export(checkpoint: Path, folder: Path) -> None:
    """Save the model that a checkpoint holds: the average of its weights, if there is one, and its scheduler.

    Raises FileNotFoundError if there is no such checkpoint; ValueError if it is damaged, or the folder exists already;
    CannotSave if the folder cannot be written; then it is not there.
    """
    if not (checkpoint / MANIFEST).is_file():
        raise FileNotFoundError(f"{checkpoint} is no checkpoint: it has no {MANIFEST}. They lie in RUN/checkpoints.")
    if (wrong := damage(checkpoint)) is not None:
        raise ValueError(f"{checkpoint} is damaged ({wrong}): take another one.")
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder.")
    config = TrainingConfig(**json.loads((checkpoint / MANIFEST).read_bytes())["config"])
    identity = read_state(checkpoint)["identity"]
    keys = {name.removeprefix("model."): value for name, value in identity.items() if name.startswith("model.")}
    unet = ScratchUNet2DModel(**keys)
    unet.load_state_dict(read_tensors(checkpoint, "ema" if config.use_ema else "unet"))
    names = dict(enumerate(identity["class_names"])) if config.class_conditional else None
    with saving("the model"):
        unfinished = begin_folder(folder)
        ScratchDDPMPipeline(unet.eval(), build_scheduler(config), names).save_pretrained(unfinished)
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
