"""Fields of configurations: a default, an explanation that `--help` prints, and the values that are allowed."""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from ..diffusion.checks import suggestion

T = TypeVar("T")


class Allowed(NamedTuple):
    """The values that a field takes: a test, and the words for it."""

    words: str
    fits: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def at_least(least: float) -> Allowed:
    """Numbers from `least` on; NaN is none."""
    return Allowed(f"at least {least}", lambda value: value >= least)


def all_at_least(least: float) -> Allowed:
    """Lists of one number or more, all of them at least `least`."""
    return Allowed(f"at least {least}", lambda values: min(values, default=-math.inf) >= least)


def one_of(choices: Iterable[str]) -> Allowed:
    """The names in a table."""
    names = tuple(choices)
    return Allowed(f"one of {', '.join(names)}", lambda value: value in names, names)


POSITIVE = Allowed("above 0 and finite", lambda value: 0 < value < float("inf"))
FRACTION = Allowed("in [0, 1)", lambda value: 0 <= value < 1)


TWO_NUMBERS: dict[str, Any] = {"nargs": 2, "metavar": ("LOW", "HIGH")}  # how the flag of a range is read

# How a flag of a type is read, where not as the type alone: `--use_ema` means true, `--value_range 0 1` is two values.
FLAGS: dict[Any, dict[str, Any]] = {
    bool: {"type": bool, "nargs": "?", "const": True},
    bool | None: {"type": bool | None, "nargs": "?", "const": True},
    list[float] | None: {"type": float | None, **TWO_NUMBERS},
}


def knob(default: T, help: str, allowed: Allowed | None = None) -> T:
    """A dataclass field with its explanation and the values that it takes beside None."""
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed})


def check_fields(config: Any) -> None:  # noqa: ANN401
    """Raise ValueError unless every field of a configuration has a value that it takes."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata.get("allowed")
        if value is not None and allowed is not None and not allowed.fits(value):
            hint = suggestion(str(value), allowed.choices)
            raise ValueError(f"{field.name} must be {allowed.words}, got {value!r}{hint}")


def add_flags(parser: Any, config: type, names: Iterable[str] | None = None) -> None:  # noqa: ANN401
    """Add a flag for fields of a configuration, all of them if no names are given, to a parser or a group of one."""
    types = typing.get_type_hints(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in fields if names is None else names:
        field, allowed = fields[name], fields[name].metadata.get("allowed")
        choices = f" [{', '.join(allowed.choices)}]" if allowed and allowed.choices else ""
        how = FLAGS.get(types[name], {"type": types[name]})
        text = field.metadata["help"].replace("%", "%%") + choices
        parser.add_argument(f"--{name}", default=field.default, help=text, **how)
