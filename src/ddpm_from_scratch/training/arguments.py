"""The flags of `ddpm train`: a preset, then flags that override it."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from ..data.fields import add_flags
from ..diffusion.checks import suggestion
from .config import PRESETS, TrainingConfig

DEFAULT_PRESET = "fashion_mnist_quick"
USAGE = "ddpm train [preset] [--flag value ...]"
OWN_FLAGS = ("preset", "dry_run", "print_config")

# The flags by group, in the order of `--help`; each group goes on where the next one's first field begins.
FIRST = (
    *("dataset_name", "train_data_dir", "resolution", "class_conditional", "train_batch_size", "max_train_steps"),
    *("learning_rate", "mixed_precision", "output_dir", "push_to_hub"),
)
GROUPS = {
    "dataset_name": "data",
    "model": "network",
    "ddpm_num_steps": "diffusion process",
    "loss": "objective",
    "train_batch_size": "optimisation",
    "use_ema": "average of the weights",
    "eval_batch_size": "sample grids",
    "eval_steps": "evaluation on the way",
    "output_dir": "output",
    "push_to_hub": "the Hub",
}


def build_parser() -> ArgumentParser:
    """A flag for every field of TrainingConfig, under its own name, in groups; abbreviations are errors."""
    parser = ArgumentParser(
        prog="ddpm train",
        usage=USAGE,
        description=f"Train a DDPM. Presets: {', '.join(preset_names())}; without one, {DEFAULT_PRESET}.",
        print_config=None,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--preset", action=ActionConfigFile, help="a preset, also accepted as the first argument")
    parser.add_argument("--dry_run", action="store_true", help="print what the run would be and take, write nothing")
    parser.add_argument("--print_config", action="store_true", help="print the configuration as a preset")
    add_flags(parser.add_argument_group("first of all"), TrainingConfig, FIRST)
    for title, names in grouped_fields().items():
        add_flags(parser.add_argument_group(title), TrainingConfig, [name for name in names if name not in FIRST])
    return parser


def grouped_fields() -> dict[str, list[str]]:
    """The fields of TrainingConfig by the title of their group."""
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(TrainingConfig):
        if field.name in GROUPS:
            groups[title := GROUPS[field.name]] = []
        groups[title].append(field.name)
    return groups


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_preset(name: str) -> Path:
    """A preset by its path, or one that comes with the package by its name, in whatever folder it is said to be.

    Raises FileNotFoundError if there is no such preset.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = PRESETS / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if not shipped.is_file():
        names = preset_names()
        raise FileNotFoundError(f"no preset {name}{suggestion(shipped.stem, names)}; there are {', '.join(names)}")
    return shipped


def split_preset(argv: Sequence[str]) -> list[str]:
    """The arguments with the preset, positional or default, as a flag in front; FileNotFoundError if it is missing."""
    arguments = list(argv)
    for index, argument in enumerate(arguments):
        flag, equals, name = argument.partition("=")
        if flag == "--preset":
            place = index if equals else index + 1
            if place < len(arguments):
                arguments[place] = f"{flag}{equals}" * bool(equals) + str(find_preset(name or arguments[place]))
            return arguments
    named = arguments and not arguments[0].startswith("-")
    return ["--preset", str(find_preset(arguments.pop(0) if named else DEFAULT_PRESET)), *arguments]


def unknown_name_hint(message: str) -> str:
    """The nearest name to the first unknown one in a parser's message, or where a preset goes."""
    if re.search(r"arguments: .*\.ya?ml", message):
        return "; a preset is the first argument, and there is one"
    known = [field.name for field in dataclasses.fields(TrainingConfig)] + list(OWN_FLAGS)
    names = [dashed or quoted for dashed, quoted in re.findall(r"--([\w-]+)|'(\w+)'", message)]
    return next((suggestion(name, known) for name in names if name not in known), "")


def choose_length(options: dict[str, Any], arguments: Sequence[str]) -> None:
    """Let a flag for the length of the run replace the preset's other one; ValueError for two flags."""
    flags = {argument.partition("=")[0] for argument in arguments}
    if "--num_epochs" not in flags:
        return
    if "--max_train_steps" in flags and options["max_train_steps"] is not None:
        raise ValueError("--num_epochs and --max_train_steps both say how long the run is: give one of them")
    options["max_train_steps"] = None


def parse(argv: Sequence[str] | None = None) -> tuple[TrainingConfig, bool]:
    """Read the command line into a checked configuration.

    Args:
        argv: the arguments after the command's name; those of the process if left out.

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
        choose_length(options, arguments)
        config = TrainingConfig(**options)
        if config.model_config_name_or_path is not None:
            if any(argument.startswith("--model.") for argument in arguments):
                raise ValueError("--model.* describes a new network, --model_config_name_or_path names one: give one")
            config = dataclasses.replace(config, model=None)
        config.validate()
    except (argparse.ArgumentError, ValueError, FileNotFoundError) as error:
        hint = unknown_name_hint(str(error)) if isinstance(error, argparse.ArgumentError) else ""
        parser.exit(2, f"usage: {USAGE}\nddpm train: error: {error}{hint}\n")
    if print_config:
        print(config.to_yaml(), end="")
        parser.exit(0)
    return config, dry_run


def main(arguments: Sequence[str]) -> None:
    """Print the help, or what is wrong with the flags."""
    parse(arguments)
