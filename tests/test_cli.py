"""The command `ddpm`: its commands, the launcher's flags, and the processes that it starts."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

import ddpm_from_scratch
from ddpm_from_scratch import cli
from ddpm_from_scratch.runtime.errors import CannotSave
from helpers.paths import ROOT


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([])
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in shown and command.help in shown
        assert callable(importlib.import_module(command.module).main)


def test_help_waits_for_nothing():
    """torch and diffusers take seconds to import; so does whatever needs them."""
    code = "import sys; from ddpm_from_scratch import cli; cli.build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ddpm_from_scratch.cli" in done.stdout.split()
    assert not {"torch", "diffusers", "numpy"} & set(done.stdout.split())


SEES = """
import os, sys

class Sees:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("policy", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)  # the rest takes seconds

sys.meta_path.insert(0, Sees())
"""
STARTS = {"ddpm": "from ddpm_from_scratch import cli; cli.main(['sample', 'nothing'])", "train.py": "import train"}


@pytest.mark.parametrize("user", [None, "ACTIVE"])
@pytest.mark.parametrize("start", STARTS)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(start, user):
    """libgomp reads the variable when torch is loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": user} if user else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "training")])
    command = [sys.executable, "-c", SEES + STARTS[start]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"policy {user or 'PASSIVE'}" in done.stdout


def test_public_names_are_imported_on_first_use():
    assert set(ddpm_from_scratch.__all__) <= set(dir(ddpm_from_scratch))
    for name in ddpm_from_scratch.__all__:
        assert getattr(ddpm_from_scratch, name) is getattr(ddpm_from_scratch.diffusion, name)
    with pytest.raises(AttributeError, match="'ddpm_from_scratch' has no attribute 'Scheduler'"):
        ddpm_from_scratch.Scheduler  # noqa: B018


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["trian"])
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert f"ddpm {name}" in capsys.readouterr().out


def test_what_a_command_refuses_is_told_in_a_line(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err.startswith("ddpm sample: error: ")


def test_a_fault_has_its_own_exit_code(monkeypatch, capsys):
    def fail(arguments):
        raise CannotSave("the disk is full")

    monkeypatch.setattr(importlib.import_module("ddpm_from_scratch.sampling.sample"), "main", fail)
    assert cli.main(["sample"]) == CannotSave.code
    assert capsys.readouterr().err == "ddpm sample: the disk is full\n"


FLAGS = [
    ([], ["quick", "--seed", "1"]),
    (["--num_processes=2"], ["quick"]),
    (["--num_processes", "2", "--multi_gpu"], ["quick", "--seed", "1"]),
    (["--config_file", "gpus.yaml"], ["quick"]),
]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("launcher", "own"), FLAGS)
def test_the_launchers_flags_are_split_off(launcher, own, before):
    flags, rest = cli.split_launcher_flags([*launcher, *own] if before else [*own, *launcher])
    assert rest == own
    assert flags.num_processes == ("2" if "2" in " ".join(launcher) else None)
    assert flags.multi_gpu == ("--multi_gpu" in launcher)


def started(monkeypatch, arguments, accelerator=False):
    """The command line and the environment of the process that a command starts."""
    calls = []

    class Done:
        returncode = 3

    def run(command, env, check):
        calls.append((command, env))
        return Done

    monkeypatch.setattr(cli.subprocess, "run", run)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert cli.main(arguments) == 3
    ((command, environment),) = calls
    assert command[:2] == [sys.executable, "-m"]
    return command[2:], environment


def test_one_process_is_launched_by_accelerate(monkeypatch):
    command, _ = started(monkeypatch, ["train", "quick", "--seed", "1"])
    assert command[0] == "accelerate.commands.launch"
    assert command[-3:] == ["quick", "--seed", "1"] and command[-4].endswith("train.py")


def test_several_processes_on_cpus_are_launched_by_torchrun(monkeypatch):
    """accelerate's launcher would start one."""
    command, environment = started(monkeypatch, ["evaluate", "--num_processes", "2", "model"])
    assert command == [
        "torch.distributed.run", "--nproc_per_node=2", "-m", "ddpm_from_scratch.evaluation.evaluate", "model",
    ]  # fmt: skip
    assert environment["ACCELERATE_USE_CPU"] == "true"


def test_several_gpus_are_accelerates(monkeypatch):
    command, _ = started(monkeypatch, ["train", "--num_processes=2"], accelerator=True)
    assert command[0] == "accelerate.commands.launch" and "--num_processes=2" in command


@pytest.mark.full
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_refusal_is_the_last_that_is_said(command, tmp_path):
    """And not a traceback of the launcher."""
    arguments = [sys.executable, "-m", "ddpm_from_scratch.cli", command, "no-such-name"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "no-such-name" in done.stderr.strip().splitlines()[-1]
