"""The command line: a preset, then flags that override it."""

import argparse
import dataclasses
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ActionConfigFile, ArgumentParser

from ..diffusion.checks import suggestion
from .config import CHOICES, PRESETS, TrainingConfig

DEFAULT_PRESET = PRESETS / "fashion_mnist_quick.yaml"
USAGE = "train.py [preset.yaml] [--flag value ...]"


def build_parser() -> ArgumentParser:
    """A flag for every field of TrainingConfig, under its own name; abbreviations are errors."""
    parser = ArgumentParser(
        prog="train.py",
        usage=USAGE,
        description=f"Train a DDPM. Without a preset: {DEFAULT_PRESET.name}. Others in presets/.",
        print_config=None,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--preset", action=ActionConfigFile, help="the YAML preset, also accepted as the first argument"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what the run would be and take, write nothing")
    parser.add_argument("--print_config", action="store_true", help="print the configuration as a preset")
    types = typing.get_type_hints(TrainingConfig)
    for field in dataclasses.fields(TrainingConfig):
        choices = f" [{', '.join(CHOICES[field.name])}]" if field.name in CHOICES else ""
        switch = {"nargs": "?", "const": True} if types[field.name] is bool else {}  # `--use_ema` means true
        parser.add_argument(
            f"--{field.name}",
            type=types[field.name],
            default=field.default,
            help=field.metadata["help"].replace("%", "%%") + choices,
            **switch,
        )
    return parser


def unknown_name_hint(message: str) -> str:
    """What a parser's message does not say: the nearest name to the first unknown one, or where a preset goes."""
    if re.search(r"arguments: .*\.ya?ml", message):
        return "; a preset is the first argument, and there is one"
    known = [field.name for field in dataclasses.fields(TrainingConfig)] + ["dry_run", "print_config", "preset"]
    names = [dashed or quoted for dashed, quoted in re.findall(r"--([\w-]+)|'(\w+)'", message)]
    return next((suggestion(name, known) for name in names if name not in known), "")


def split_preset(argv: Sequence[str]) -> list[str]:
    """The arguments with the preset, positional or default, as a flag in front.

    Raises:
        FileNotFoundError: there is no such preset.
    """
    arguments = list(argv)
    if any(argument.split("=")[0] == "--preset" for argument in arguments):
        return arguments
    preset = DEFAULT_PRESET
    if arguments and not arguments[0].startswith("-"):
        preset = Path(arguments.pop(0))
    if not preset.is_file():
        shipped = [str(path.relative_to(PRESETS.parent)) for path in sorted(PRESETS.glob("*.yaml"))]
        raise FileNotFoundError(f"no preset {preset}{suggestion(str(preset), shipped)}; shipped: {', '.join(shipped)}")
    return ["--preset", str(preset), *arguments]


def parse(argv: Sequence[str] | None = None) -> tuple[TrainingConfig, bool]:
    """Read the command line into a checked configuration.

    Args:
        argv: the arguments after the script's name; those of the process if left out.

    Returns:
        The configuration, and whether only a dry run is wanted.

    Raises:
        SystemExit: code 2 after a wrong flag, key or value (explained on standard error), 0 after `--help` and
            `--print_config`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    try:
        options = parser.parse_args(split_preset(arguments)).as_dict()
        dry_run, print_config = options.pop("dry_run"), options.pop("print_config")
        options.pop("preset")
        config = TrainingConfig(**options)
        if config.model_config_name_or_path is not None:
            if any(argument.startswith("--model.") for argument in arguments):
                raise ValueError("--model.* describes a new network, --model_config_name_or_path names one: give one")
            config = dataclasses.replace(config, model=None)
        config.validate()
    except (argparse.ArgumentError, ValueError, FileNotFoundError) as error:
        hint = unknown_name_hint(str(error)) if isinstance(error, argparse.ArgumentError) else ""
        parser.exit(2, f"usage: {USAGE}\ntrain.py: error: {error}{hint}\n")
    if print_config:
        print(config.to_yaml(), end="")
        parser.exit(0)
    return config, dry_run
