"""The command `ddpm`: its commands, the launcher's flags, and the processes that it starts."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

import ddpm_from_scratch
from ddpm_from_scratch import cli
from ddpm_from_scratch.runtime import processes
from ddpm_from_scratch.runtime.errors import CannotSave, Outcome
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


FLAGS_WITHOUT = """
import sys
from contextlib import suppress
for name in sys.argv[1:]:
    sys.modules[name] = None  # not installed
from ddpm_from_scratch.training.arguments import parse
for arguments in (["--help"], ["cifar10", "--print_config", "--max_train_minutes", "3", "--model.dropout", "0.1"]):
    with suppress(SystemExit):
        parse(arguments)
"""


def test_flags_are_read_without_the_extra_packages_of_jsonargparse():
    """Those of its `signatures`, which read classes that have no annotations."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", FLAGS_WITHOUT, *missing], env=environment, capture_output=True, text=True, check=True
        )
        for missing in ((), ("typeshed_client", "docstring_parser"))
    ]
    assert outputs[0].stdout == outputs[1].stdout != "" and outputs[1].stderr == ""
    assert "max_train_minutes: 3" in outputs[1].stdout and "dropout: 0.1\n" in outputs[1].stdout


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


WARNS = """
import sys, warnings
from ddpm_from_scratch.cli import main
def warn(arguments):
    warnings.warn("few images", stacklevel=2)
    warnings.warn("old", FutureWarning, stacklevel=2)
from ddpm_from_scratch.runtime import environment
environment.main = warn
sys.exit(main(["env"]))
"""


def test_a_warning_is_a_line_and_one_to_programmers_has_its_place():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", WARNS], env=environment, capture_output=True, text=True, check=True)
    first, second, *_ = done.stderr.splitlines()
    assert first == "warning: few images" and ".py:" in second and "FutureWarning: old" in second


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


@pytest.fixture
def machine(monkeypatch):
    """A machine with some GPUs and threads, on which nothing is started but noted: (processes, command, arguments)."""
    starts = []

    class Done:
        returncode = 3

    def launched(command, check):
        assert command[:4] == [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
        starts.append(("launcher", "", command[4:]))
        return Done

    def alone(name, arguments):
        starts.append((1, name, list(arguments)))
        return Outcome(3)

    def together(program, count):
        starts.append((count, *program.args))
        return Outcome(3)

    def make(gpus=0, threads=2):
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)  # --cpu sets it
        monkeypatch.setattr(cli.subprocess, "run", launched)
        monkeypatch.setattr(cli, "run_program", alone)
        monkeypatch.setattr(processes, "run_together", together)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

        def start(*arguments):
            assert cli.main(arguments) == 3
            return starts.pop()

        return start

    return make


def test_on_a_cpu_training_takes_as_many_processes_as_pay_and_the_same_batch(machine):
    flags = ["fashion_mnist_quick", "--train_batch_size=12"]
    assert machine(threads=1)("train", *flags) == (1, "train", flags)
    for asked in ([], ["--num_processes", "auto"], ["--cpu"]):
        assert machine(threads=2)("train", *flags, *asked) == (2, "train", [*flags, "--split_batches=true"])
    assert machine(gpus=8, threads=16)("train", "--cpu", *flags) == (3, "train", [*flags, "--split_batches=true"])


def test_processes_that_are_asked_for_have_a_batch_each(machine):
    assert machine(threads=1)("train", "fashion_mnist_quick", "--num_processes=2") == (
        2,
        "train",
        ["fashion_mnist_quick"],
    )
    assert machine()("train", "fashion_mnist_quick", "--num_processes=1") == (1, "train", ["fashion_mnist_quick"])
    assert machine()("evaluate", "--num_processes", "2", "model") == (2, "evaluate", ["model"])
    assert machine()("evaluate", "model") == (1, "evaluate", ["model"])


def test_one_gpu_needs_no_launcher_and_several_do(machine):
    assert machine(gpus=1)("train", "--seed=1") == (1, "train", ["--seed=1"])
    assert machine(gpus=2)("train", "--num_processes=1") == (1, "train", [])
    for asked in ([], ["--num_processes=auto"], ["--num_processes=2"], ["--multi_gpu"]):
        _, _, command = machine(gpus=2)("train", *asked, "--seed=1")
        assert {"--num_processes=2", "--multi_gpu", "--num_machines=1"} <= set(command)
        assert command[-2:] == [str(cli.TRAINING_SCRIPT), "--seed=1"]
    _, _, command = machine(gpus=2)("evaluate", "model")
    assert command[-3:] == ["-m", "ddpm_from_scratch.evaluation.evaluate", "model"]


def test_a_configuration_of_accelerates_is_left_to_it(machine):
    _, _, command = machine()("train", "--config_file", "gpus.yaml", "quick")
    assert command == ["--config_file=gpus.yaml", str(cli.TRAINING_SCRIPT), "quick"]


def test_an_interruption_is_a_line(machine, monkeypatch, capsys):
    def interrupted(name, count, arguments):
        raise KeyboardInterrupt

    machine()
    monkeypatch.setattr(cli, "split_over_cpu", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "ddpm train: interrupted\n"


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(count, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", f"--num_processes={count}"])
    assert f"'{count}' is neither auto nor a number from 1 on" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_refusal_is_the_last_that_is_said(command, tmp_path):
    """And not a traceback of the launcher."""
    arguments = [sys.executable, "-m", "ddpm_from_scratch.cli", command, "no-such-name"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "no-such-name" in done.stderr.strip().splitlines()[-1]
