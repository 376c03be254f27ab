"""Configurations on disk in the name of the stock classes, so that diffusers alone can read what this package saves."""

import json
import os
from collections.abc import Collection


def write_config(json_text: str, path: str | os.PathLike[str], without: Collection[str] = (), **names: object) -> None:
    """Write a configuration with some entries replaced, some left out, and not the folder that it was loaded from."""
    config = json.loads(json_text) | names
    for name in ("_name_or_path", *without):
        config.pop(name, None)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
