"""The checkpoint of another run is refused, and what the message says to do instead works as it stands."""

import shlex

import pytest
import train as script

from ddpm_from_scratch.runtime.errors import Refused
from ddpm_from_scratch.training.checkpoint import list_checkpoints
from helpers.runs import STEPS, run_main

OTHER = ("--seed", "7")


def refused(inputs, folder, *flags):
    """The message without the settings that differ, line by line."""
    with pytest.raises(Refused, match="the checkpoint belongs to another run; it differs in\n  seed: 0") as raised:
        run_main(inputs, folder, *OTHER, *flags)
    return [line for line in str(raised.value).splitlines()[1:] if not line.startswith("  ")]


def test_another_runs_folder(inputs, tmp_path):
    folder = tmp_path / "my model"
    run_main(inputs, folder, "--checkpointing_steps", "5", "--max_train_steps", "5")
    (tmp_path / "my model-2").mkdir()
    anew, onward = refused(inputs, folder)
    flag, free = shlex.split(anew.partition(": ")[2])
    assert flag == "--output_dir" and free == str(tmp_path / "my model-3")
    assert run_main(inputs, free, *OTHER).as_posix() == free
    program, command, *arguments = shlex.split(onward.partition(": ")[2])
    assert (program, command) == ("ddpm", "train")
    assert script.main([*arguments, "--max_train_steps", str(STEPS)]) == folder
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_00000005", "step_00000010"]


def test_another_runs_checkpoint(inputs, whole_run, tmp_path):
    checkpoint = whole_run / "checkpoints" / "step_00000003"
    (line,) = refused(inputs, tmp_path / "new", "--resume_from_checkpoint", str(checkpoint))
    assert "--resume_from_checkpoint" in line
    assert run_main(inputs, tmp_path / "new", *OTHER) == tmp_path / "new"
