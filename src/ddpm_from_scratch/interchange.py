"""Configurations on disk in the name of the stock classes, so that diffusers alone can read what this package saves."""

import json
import os


def write_config(json_text: str, path: str | os.PathLike[str], **names: object) -> None:
    """Write a configuration with some of its entries replaced, and without the folder that it was loaded from."""
    config = json.loads(json_text) | names
    config.pop("_name_or_path", None)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
