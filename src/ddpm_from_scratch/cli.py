"""The `ddpm` command and its subcommands; each subcommand parses its own flags."""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .runtime.errors import told
from .runtime.shipped import shipped

PACKAGE = "ddpm_from_scratch"


class Command(NamedTuple):
    """A subcommand: a module whose `main` takes the arguments."""

    help: str
    module: str
    launched: tuple[str, ...] = ()  # what accelerate's launcher starts, in as many processes as are asked for


COMMANDS = {
    "train": Command(
        "train a model, or go on with a run that was stopped",
        f"{PACKAGE}.training.arguments",
        (str(shipped("training/train.py")),),
    ),
    "sample": Command("draw images with a model", f"{PACKAGE}.sampling.sample"),
    "evaluate": Command(
        "measure a model: its images, and its likelihood of others",
        f"{PACKAGE}.evaluation.evaluate",
        ("-m", f"{PACKAGE}.evaluation.evaluate"),
    ),
    "calibrate": Command("estimate what few-step sampling needs to know of a model", f"{PACKAGE}.evaluation.calibrate"),
    "export": Command("make a model folder of a run's checkpoint", f"{PACKAGE}.training.export"),
    "publish": Command("write a model's page, and push both to the Hub", f"{PACKAGE}.hub.publish"),
}

# Flags of the launcher that it gets from `ddpm train` and `ddpm evaluate`; all others are the command's own.
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
# Said explicitly, or the launcher would warn that it chose them.
QUIET = ("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


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
    """Separate the flags of accelerate's launcher from all other arguments, which keep their order."""
    parser = argparse.ArgumentParser(prog="ddpm", add_help=False, allow_abbrev=False)
    for name in LAUNCHER_FLAGS:
        parser.add_argument(f"--{name}")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_known_args(arguments)


def launch_command(flags: argparse.Namespace, program: Sequence[str], several_on_cpu: bool) -> list[str]:
    """The command line that starts a program in the processes that the flags ask for."""
    if several_on_cpu:  # where accelerate's launcher would start one process
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={flags.num_processes}", *program]
    given = [f"--{name}={getattr(flags, name)}" for name in LAUNCHER_FLAGS if getattr(flags, name) is not None]
    switches = [f"--{name}" for name in SWITCHES if getattr(flags, name)]
    quiet = () if flags.config_file else QUIET
    # With --quiet, what a command refuses is not followed by the launcher's own traceback.
    return [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *quiet, *given, *switches, *program]


def starts_several_on_cpu(flags: argparse.Namespace) -> bool:
    """Whether several processes are asked for and they are to compute on the CPU, by choice or for want of a GPU."""
    if flags.num_processes in (None, "1"):
        return False
    import torch  # here, since it takes seconds

    return bool(flags.cpu) or not torch.accelerator.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command's name and its flags; those of the process if left out.

    Returns:
        The exit code: 0 if it is done, 2 if it was asked for something impossible; of `ddpm train`, see
        `runtime/errors.py`.
    """
    # Read when torch is loaded: threads that spin while they wait hold up each other, and all else on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command = COMMANDS[build_parser().parse_args([name]).command]
    if not command.launched or {"-h", "--help"} & set(rest):
        return told(importlib.import_module(command.module).main, name, rest)
    flags, own = split_launcher_flags(rest)
    several_on_cpu = starts_several_on_cpu(flags)
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if several_on_cpu else {})}
    started = launch_command(flags, [*command.launched, *own], several_on_cpu)
    return subprocess.run(started, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
