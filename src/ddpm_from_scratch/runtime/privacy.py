"""Remove secrets and paths of this machine from configurations before they are published."""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

FILES = "parquet|arrow|json|jsonl|ndjson|csv|tsv|zip|tar|tgz|gz|bz2|xz"  # suffixes of local files of data and networks


def as_yaml(values: Mapping[str, Any]) -> str:
    """Format a configuration as the YAML of a preset."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, width=120)
    return text


def looks_local(name: str) -> bool:
    """Whether the name of a data set or model can only be a path: Hub names are `name` or `owner/name`."""
    return bool(re.match(rf"[./~]|.*\*|.*\.({FILES})$", name)) or name.count("/") > 1


def public_name(name: str) -> str:
    """A Hub name unchanged, or the last part of a local path; the rest of a path is private."""
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve().name
    return PureWindowsPath(name).name if looks_local(name) or "\\" in name else name


def public_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Remove secrets and paths of this machine from a configuration."""
    shown = {key: value for key, value in values.items() if key not in NOT_SAVED}
    named = {key: public_name(shown[key]) for key in NAMES_OR_PATHS if shown.get(key)}
    return shown | named | {key: None for key in PLACES if shown.get(key, LATEST) != LATEST}


NOT_SAVED = ("hub_token",)  # a secret stays out of every file and log

NAMES_OR_PATHS = ("dataset_name", "train_data_dir", "model_config_name_or_path", "test_set", "output_dir")

PLACES = ("cache_dir", "resume_from_checkpoint")  # of no use on another machine, but for `latest`

LATEST = "latest"
