"""Exchange of configurations and weights with diffusers: in memory from class to class, and on disk.

Files carry the names of diffusers' classes, so that diffusers alone can read what this package saves.
"""

import inspect
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from diffusers import ConfigMixin

# How diffusers says that a model has no such weights.
NO_SAFETENSORS = re.compile(r"(no|have a) file named \S+\.safetensors|necessary `safetensors` weights")


def altered(part: ConfigMixin, kind: type[ConfigMixin] | None = None, /, **changes: object) -> Any:  # noqa: ANN401
    """A new scheduler or network with the configuration of part and some changes, of class `kind` or that of part.

    Like `kind.from_config(part.config, **changes)`, except that arguments which were passed by position are kept:
    `from_config` takes them for left out and drops their values, so that it makes 1000 steps of DDPMScheduler(12).
    Arguments that were really left out count as left out in the new object too.
    """
    config, parameters = part.config, inspect.signature(type(part).__init__).parameters
    # The value of an argument that was left out is the very object in the signature.
    left_out = [name for name in config.get("_use_default_values", ()) if config[name] is parameters[name].default]
    return (kind or type(part)).from_config({**config, "_use_default_values": left_out}, **changes)


@contextmanager
def safe_weights(name: str | os.PathLike[str], options: dict[str, Any]) -> Iterator[None]:
    """Set `use_safetensors=True` in options unless they say otherwise: unpickling can run code. Explain a failure."""
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


def write_config(
    json_text: str,
    path: str | os.PathLike[str],
    without: Collection[str] = (),
    saved_as: Mapping[str, str] = MappingProxyType({}),
    **names: object,
) -> None:
    """Write a configuration with `names` replaced, leaving out `without` and the folder that it was loaded from.

    Keys in `saved_as` are written under the names that it gives them.
    """
    config = json.loads(json_text) | names
    for name in ("_name_or_path", *without):
        config.pop(name, None)
    config = {saved_as.get(name, name): value for name, value in config.items()}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
