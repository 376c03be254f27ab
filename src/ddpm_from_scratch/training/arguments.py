"""The flags of `ddpm train`: a preset, then flags that override it."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from ..data.fields import add_flags
from ..diffusion.checks import suggestion
from ..sampling.checkpoints import SCHEDULER_FLAGS
from .config import PRESETS, TrainingConfig
from .model import brings_scheduler

DEFAULT_PRESET, PRESET_OF_OWN_DATA = "fashion_mnist_quick", "own_images"
USAGE = "ddpm train [preset] [data] [--flag value ...]"
WHERE = (
    "Where it runs: --num_processes N, or auto, the default: on a CPU as many as pay, which share the batch; on GPUs "
    "one for each, by accelerate's launcher, whose --config_file, --multi_gpu, --gpu_ids, --num_machines and the like "
    "it takes. --cpu leaves GPUs alone."
)
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
        description=f"Train a DDPM. Presets: {', '.join(preset_names())}; without one, {DEFAULT_PRESET}, and "
        f"{PRESET_OF_OWN_DATA} for data of your own: a folder, archive, table or Hub data set (--dataset_name).",
        epilog=WHERE,
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


def is_preset(name: str) -> bool:
    """Whether an argument names a preset and not data: one of the package's, a YAML file, or nothing that is there."""
    if name in preset_names() or name.endswith((".yaml", ".yml")):
        return True
    return not Path(name).expanduser().exists() and not set("/*") & set(name)


def find_preset(name: str) -> Path:
    """A preset by its path, or one that comes with the package by its name, in whatever folder it is said to be.

    Raises FileNotFoundError if there is no such preset.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = PRESETS / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    if not shipped.is_file():
        names = preset_names()
        raise FileNotFoundError(
            f"no preset {name}{suggestion(shipped.stem, names)}; there are {', '.join(names)}. Nor is it a file or "
            f"folder of images; a Hub data set without an owner is named by --dataset_name"
        )
    return shipped


def flags_in(arguments: Sequence[str]) -> set[str]:
    """The names of the flags that are given."""
    return {argument.partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")}


def split_preset(argv: Sequence[str]) -> list[str]:
    """The arguments with the preset and the data, positional or default, as flags.

    Raises FileNotFoundError if there is no such preset; ValueError if presets or data are named twice.
    """
    arguments = list(argv)
    positional: list[str] = []
    while arguments and not arguments[0].startswith("-"):
        positional.append(arguments.pop(0))
    flags = flags_in(arguments)
    presets = [positional.pop(0)] if positional and is_preset(positional[0]) else []
    data_flags = flags & {"dataset_name", "train_data_dir"}
    check_named_once("preset", [*presets, *(["--preset"] if "preset" in flags else []), *filter(is_preset, positional)])
    check_named_once("data", [*positional, *(f"--{name}" for name in sorted(data_flags))])
    data = [word for name in positional for word in ("--dataset_name", name)]
    if "preset" in flags:
        return [*with_found_preset(arguments), *data]  # what comes later wins
    default = PRESET_OF_OWN_DATA if data or data_flags else DEFAULT_PRESET
    return ["--preset", str(find_preset(presets[0] if presets else default)), *arguments, *data]


def check_named_once(what: str, names: Sequence[str]) -> None:
    """Raise ValueError for several names of one thing."""
    if len(names) > 1 and not (what == "data" and set(names) <= {"--dataset_name", "--train_data_dir"}):
        raise ValueError(f"{' and '.join(names)} both name the {what}: give one (ddpm train [preset] [data] ...)")


def with_found_preset(arguments: list[str]) -> list[str]:
    """The arguments with the path of the preset that a flag among them names; FileNotFoundError if it is missing."""
    for index, argument in enumerate(arguments):
        flag, equals, name = argument.partition("=")
        place = index if equals else index + 1
        if flag == "--preset" and place < len(arguments):
            found = str(find_preset(name or arguments[place]))
            return [*arguments[:place], f"{flag}={found}" if equals else found, *arguments[place + 1 :]]
    return arguments


def unknown_name_hint(message: str) -> str:
    """The nearest name to the first unknown one in a parser's message, or where a preset goes."""
    if re.search(r"arguments: .*\.ya?ml", message):
        return "; a preset is the first argument, and there is one"
    known = [field.name for field in dataclasses.fields(TrainingConfig)] + list(OWN_FLAGS)
    names = [dashed or quoted for dashed, quoted in re.findall(r"--([\w-]+)|'(\w+)'", message)]
    return next((suggestion(name, known) for name in names if name not in known), "")


LENGTHS = ("num_epochs", "max_train_steps", "max_train_minutes")


def choose_length(options: dict[str, Any], flags: set[str]) -> None:
    """Let flags for the length of the run replace all that the preset says of it; ValueError if they contradict."""
    given = [name for name in LENGTHS if name in flags and options[name] is not None]
    if "num_epochs" in given and len(given) > 1:
        raise ValueError(f"--{' and --'.join(given)} both say how long the run is: give one of them")
    if given:
        options.update({name: None for name in LENGTHS[1:] if name not in given})


def leave_process_to_model(options: dict[str, Any], flags: set[str], presets: Sequence[Path]) -> None:
    """Let a model to fine-tune keep its process and sampler, all but what a flag says of them.

    A preset that names the model itself counts as a flag.
    """
    if not brings_scheduler(options["model_config_name_or_path"]):
        return
    of_preset = {key for preset in presets for key in yaml.safe_load(preset.read_text(encoding="utf-8")) or ()}
    said = flags | of_preset if "model_config_name_or_path" in of_preset - flags else flags
    options.update({name: None for name in SCHEDULER_FLAGS if name not in said})


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
        presets, flags = options.pop("preset"), flags_in(arguments)
        choose_length(options, flags)
        leave_process_to_model(options, flags, [Path(str(preset)) for preset in presets])
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
