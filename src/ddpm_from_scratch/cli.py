"""The `ddpm` command and its subcommands; each subcommand parses its own flags."""

import argparse
import importlib
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from .runtime.errors import INTERRUPTED, Outcome, outcome, tell, told
from .runtime.shipped import shipped

format_warning = warnings.formatwarning
PACKAGE = "ddpm_from_scratch"
TRAINING_SCRIPT = shipped("training/train.py")


class Command(NamedTuple):
    """A subcommand: a module whose `main` takes the arguments."""

    help: str
    module: str
    launched: tuple[str, ...] = ()  # what accelerate's launcher starts, where several processes can take part


COMMANDS = {
    "train": Command(
        "train a model, or go on with a run that was stopped",
        f"{PACKAGE}.training.arguments",
        (str(TRAINING_SCRIPT),),
    ),
    "sample": Command("draw images with a model", f"{PACKAGE}.sampling.sample"),
    "evaluate": Command(
        "measure a model: its images, and its likelihood of others",
        f"{PACKAGE}.evaluation.evaluate",
        ("-m", f"{PACKAGE}.evaluation.evaluate"),
    ),
    "calibrate": Command("estimate what few-step sampling needs to know of a model", f"{PACKAGE}.evaluation.calibrate"),
    "export": Command("make a model folder of a run's checkpoint, or an ONNX file", f"{PACKAGE}.training.export"),
    "convert": Command("make a model folder of OpenAI's or Ho et al.'s checkpoint", f"{PACKAGE}.sampling.convert"),
    "publish": Command("write a model's page, and push both to the Hub", f"{PACKAGE}.hub.publish"),
    "env": Command("show the system and the versions, for a bug report", f"{PACKAGE}.runtime.environment"),
}

# Flags of `ddpm train` and `ddpm evaluate` that say where they run; all others are the command's own.
SWITCHES = ("multi_gpu", "cpu", "use_mps_device")
LAUNCHER_FLAGS = (
    "config_file",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
    "num_cpu_threads_per_process",
)
AUTO = "auto"  # as many processes as pay: what is done where nothing is said
OWN_LAUNCHER_FLAGS = ("num_processes", "cpu")  # which need no launcher by themselves
# Said explicitly, or the launcher would warn that it chose them.
QUIET = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the subcommand's name; the subcommand parses its own flags."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="ddpm",
        usage="ddpm COMMAND [arguments]",
        description=f"commands:\n{listed}\n\n`ddpm COMMAND --help` lists the flags of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


def split_launcher_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the flags that say where a command runs from all other arguments, which keep their order."""
    parser = argparse.ArgumentParser(prog="ddpm", add_help=False, allow_abbrev=False)
    for name in LAUNCHER_FLAGS:
        parser.add_argument(f"--{name}", type=number_of_processes if name == "num_processes" else str)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_known_args(arguments)


def number_of_processes(value: str) -> str | None:
    """The value of --num_processes: a number from 1 on, or None for auto."""
    if value == AUTO:
        return None
    if not (value.isdecimal() and int(value)):
        raise argparse.ArgumentTypeError(f"{value!r} is neither {AUTO} nor a number from 1 on")
    return value


def launch_command(flags: argparse.Namespace, program: Sequence[str], gpus: int) -> list[str]:
    """The command line by which accelerate's launcher starts a program in the processes that the flags ask for."""
    given = {name: value for name in LAUNCHER_FLAGS if (value := getattr(flags, name)) is not None}
    if not flags.config_file:
        given = {**QUIET, "num_processes": str(max(1, gpus)), **given}
    switches = [f"--{name}" for name in SWITCHES if getattr(flags, name)]
    if gpus > 1 and not flags.config_file and given["num_processes"] != "1" and "--multi_gpu" not in switches:
        switches.append("--multi_gpu")
    # With --quiet, what a command refuses is not followed by the launcher's own traceback.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    return [*launcher, *(f"--{name}={value}" for name, value in given.items()), *switches, *program]


def run_program(name: str, arguments: Sequence[str]) -> Outcome:
    """Run a command that can be launched, in this process."""
    if name == "train":
        return outcome(runpy.run_path(str(TRAINING_SCRIPT))["main"], name, arguments)
    return outcome(importlib.import_module(COMMANDS[name].module).main, name, arguments)


def split_over_cpu(name: str, count: str | None, arguments: list[str]) -> tuple[int, list[str]]:
    """The number of processes on a CPU, and the command's arguments then.

    If nothing is said, a training run has as many as pay, which share the batch; SystemExit if its flags are wrong.
    """
    if count is not None:
        return int(count), arguments
    if name != "train":
        return 1, arguments
    import torch

    from .runtime.processes import processes_that_pay
    from .training.arguments import parse

    config, _ = parse(arguments)
    found = processes_that_pay(torch.get_num_threads(), config.train_batch_size)
    return found, [*arguments, "--split_batches=true"] if found > 1 else arguments


def launch(name: str, arguments: Sequence[str]) -> int:
    """Run a command in as many processes as its flags ask for; the exit code."""
    flags, own = split_launcher_flags(arguments)
    if flags.cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch  # here, since it takes seconds

    from .runtime.devices import computes_on_cpu
    from .runtime.processes import run_together

    gpus = 0 if computes_on_cpu() else torch.accelerator.device_count()
    several = gpus and int(flags.num_processes or gpus) > 1
    others = [flag for flag in (*LAUNCHER_FLAGS, *SWITCHES) if flag not in OWN_LAUNCHER_FLAGS and getattr(flags, flag)]
    if several or others:
        return subprocess.run(launch_command(flags, [*COMMANDS[name].launched, *own], gpus), check=False).returncode
    count, own = (1, own) if gpus else split_over_cpu(name, flags.num_processes, own)
    program = partial(run_program, name, own)
    return tell(program() if count == 1 else run_together(program, count))


def warning_in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning to whoever gives commands, who has no use for the line of code that it comes from; others have it."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return format_warning(message, category, filename, lineno, line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command's name and its flags; those of the process if left out.

    Returns:
        The exit code: 0 if it is done, 2 if it was asked for something impossible, 130 if it was interrupted; of
        `ddpm train`, see `runtime/errors.py`.
    """
    # Read when torch is loaded: threads that spin while they wait hold up each other, and all else on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = warning_in_a_line
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = COMMANDS[build_parser().parse_args([name]).command]
    if not command.launched or {"-h", "--help"} & set(rest):
        return told(importlib.import_module(command.module).main, name, rest)
    try:
        return launch(name, rest)
    except KeyboardInterrupt:  # before the command itself has begun
        return tell(Outcome(INTERRUPTED, f"ddpm {name}: interrupted"))


if __name__ == "__main__":
    sys.exit(main())
