"""Checks of arguments that several modules share; each raises a ValueError that names the value and what is allowed."""

import difflib
import math
import numbers
from collections.abc import Collection, Iterable
from typing import TypeGuard

import numpy as np
import torch


def suggestion(wrong: str, allowed: Collection[str]) -> str:
    """`; did you mean '...'?` with the nearest of the allowed names, or nothing if none is near."""
    nearest = difflib.get_close_matches(wrong, allowed, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Check that value is one of allowed; the error suggests the nearest one."""
    allowed = tuple(allowed)
    if value not in allowed:
        hint = suggestion(str(value), allowed)
        raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(allowed)}{hint}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether value is a real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_range(name: str, value: object, least: float, most: float) -> None:
    """Check that value is a finite number from least to most."""
    if not (is_number(value) and least <= value <= most and abs(value) < math.inf):
        span = f"lie in [{least:g}, {most:g}]" if most < math.inf else f"be at least {least:g} and finite"
        raise ValueError(f"{name}={value!r} must be a number and {span}.")


def check_eta(value: object, most: float = math.inf) -> None:
    """Check that value is a number from 0 to most, which may be infinity."""
    if not (is_number(value) and 0 <= value <= most):
        span = f"lie in [0, {most:g}]" if most < math.inf else "be at least 0; math.inf draws all noise afresh"
        raise ValueError(f"eta={value!r} must be a number and {span}.")


def check_positive(name: str, value: object) -> None:
    """Check that value is a finite number above 0."""
    if not (is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"{name}={value!r} must be a number, above 0 and finite.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether value is a whole number; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Check that value is a whole number, at least `least`."""
    if not (is_whole(value) and value >= least):
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}.")


def check_count(name: str, value: object, most: int) -> None:
    """Check that value is a whole number from 1 to most."""
    if not (is_whole(value) and 1 <= value <= most):
        raise ValueError(f"{name}={value!r} must be a whole number from 1 to {most}.")


def check_generator(generator: object, batch_size: int) -> None:
    """Check that generator is a torch.Generator, a list of one for each image, or None."""
    each = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(g, torch.Generator) for g in each):
        raise ValueError(f"generator={generator!r} must be a torch.Generator, or a list of them.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"generator has {len(generator)} entries for {batch_size} images: pass one, or one each.")
