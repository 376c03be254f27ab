"""Failure modes of a training run and their exit codes.

| code | what happened |
|---|---|
| 0 | the run is done |
| 1 | an error that is none of these |
| 2 | a wrong flag, preset, data set, checkpoint or token, or a folder that another run uses; nothing was done |
| 65 | an image could not be read while training, or too many were passed over |
| 70 | the loss was not finite for too many steps in a row; the last checkpoint is of before |
| 74 | a checkpoint, the model or its pictures could not be written; the checkpoints that were there are whole |
| 75 | SIGTERM or SIGINT; a checkpoint was written, and the same command goes on from there |
| 130 | SIGINT before there was anything to keep |

`accelerate launch` and `torchrun` turn every code but 0 into 1.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from safetensors import SafetensorError

INTERRUPTED = 130


class Fault(Exception):
    """A failure of a run that is not a mistake in the code."""

    code = 1


class Refused(Fault, ValueError):
    """A flag, preset, data set, checkpoint or token is wrong; nothing was done."""

    code = 2


class BadImages(Fault, ValueError):
    """Too many images cannot be read."""

    code = 65


class Diverged(Fault):
    """The loss was not finite for too many steps in a row."""

    code = 70


class CannotSave(Fault):
    """A checkpoint, the model or its pictures could not be written."""

    code = 74


class Stopped(Fault):
    """A signal stopped the run, after a checkpoint was written."""

    code = 75


@contextmanager
def refusing() -> Iterator[None]:
    """Turn ValueError and OSError into `Refused`, for checks before any work."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Turn the errors of a disk that is full or fails into `CannotSave`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CannotSave(
            f"{what} cannot be written: {error}. The checkpoints that are there are whole: make room and run the same "
            "command again."
        ) from error


class Outcome(NamedTuple):
    """How a command ended."""

    code: int  # of exit
    message: str | None = None  # what is wrong, if anything is


def outcome(main: Callable[[Sequence[str]], object], name: str, arguments: Sequence[str]) -> Outcome:
    """Run a command; its errors are messages."""
    try:
        main(arguments)
    except Fault as fault:
        return Outcome(fault.code, f"ddpm {name}: {fault}")
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return Outcome(2, f"ddpm {name}: error: {error}")
    except KeyboardInterrupt:
        return Outcome(INTERRUPTED, f"ddpm {name}: interrupted")
    return Outcome(0)


def tell(result: Outcome) -> int:
    """Print what is wrong, if anything is, and return the exit code."""
    if result.message is not None:
        print(result.message, file=sys.stderr)
    return result.code


def told(main: Callable[[Sequence[str]], object], name: str, arguments: Sequence[str]) -> int:
    """Run a command, print its error if it fails, and return its exit code."""
    return tell(outcome(main, name, arguments))
