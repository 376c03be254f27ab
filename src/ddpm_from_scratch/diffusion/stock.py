"""Configurations and weights between this package and diffusers: rebuilt in another class, with changes, on disk.

On disk they bear the names of the stock classes, so that diffusers alone can read what this package saves.
"""

import inspect
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ConfigMixin

# How diffusers says that a model has no such weights.
NO_SAFETENSORS = re.compile(r"(no|have a) file named \S+\.safetensors|necessary `safetensors` weights")


def altered(part: ConfigMixin, kind: type[ConfigMixin] | None = None, /, **changes: object) -> Any:  # noqa: ANN401
    """A new scheduler or network with the configuration of part and some changes, of its class or of `kind`.

    It is `kind.from_config(part.config, **changes)`, but that takes arguments that were passed by position for left out
    and drops their values: `from_config` of DDPMScheduler(12) has 1000 steps. Here they stay. What was really left out
    counts so in the new one too.
    """
    config, parameters = part.config, inspect.signature(type(part).__init__).parameters
    # The value of an argument that was left out is the very object in the signature.
    left_out = [name for name in config.get("_use_default_values", ()) if config[name] is parameters[name].default]
    return (kind or type(part)).from_config({**config, "_use_default_values": left_out}, **changes)


@contextmanager
def safe_weights(name: str | os.PathLike[str], options: dict[str, Any]) -> Iterator[None]:
    """Load a model by `options`, which get `use_safetensors=True` unless they say otherwise: a pickle can run code."""
    asked = options.get("use_safetensors") is not None
    options["use_safetensors"] = options["use_safetensors"] if asked else True
    try:
        yield
    except OSError as error:
        if asked or not NO_SAFETENSORS.search(str(error)):
            raise
        raise OSError(
            f"{name} has no weights in safetensors under the name that was looked for. A variant is chosen with "
            "variant='...'. Pickled weights (.bin), which can run code as they are read, are only read with "
            f"use_safetensors=False. ({error})"
        ) from error


def write_config(json_text: str, path: str | os.PathLike[str], without: Collection[str] = (), **names: object) -> None:
    """Write a configuration with some entries replaced, some left out, and not the folder that it was loaded from."""
    config = json.loads(json_text) | names
    for name in ("_name_or_path", *without):
        config.pop(name, None)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
