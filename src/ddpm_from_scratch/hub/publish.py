"""Publish a model: `ddpm publish FOLDER --hub_model_id owner/name [--space]`.

Writes the model's page (README.md), runs the code on it and shows what that prints and draws (usage.png), and pushes
the model, the page, results and pictures to the Hub in one commit. Checkpoints, logs and optimiser state stay here, and
so do the paths of this machine. Publishing again without a change makes no commit.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.stock import write_config
from ..runtime.privacy import as_yaml, looks_local, public_config
from ..runtime.results import merge_results, read_results
from ..runtime.shipped import EMBEDDED_DATASET, shipped
from .model_card import model_page
from .repository import MODEL_FILES, open_repository, push
from .space import publish_space

TEMPLATE = shipped("model_card.md")
CONFIG = "training_config.yaml"
WRITTEN = ("README.md", "usage.png", "pipeline.py")  # into the model's folder
FIRST_CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="ddpm publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="of a saved pipeline, as `ddpm train` leaves it")
    parser.add_argument("--hub_model_id", help="name on the Hub; the folder's name, at the token's owner, if left out")
    parser.add_argument("--hub_private_repo", action="store_true", help="create the repository as private")
    parser.add_argument("--hub_token", help="token for the Hub; that of the login if left out")
    parser.add_argument(
        "--license", help="of the weights, as the Hub names it; hub_license of the training if left out"
    )
    parser.add_argument(
        "--comparison", type=Path, help="results of benchmarks/time_to_quality.py, which the page is to show"
    )
    parser.add_argument("--space", action="store_true", help="also push a demo of the model, as a Space")
    parser.add_argument("--space_id", help="name of the Space; that of the model and -demo if left out")
    parser.add_argument("--page_only", action="store_true", help="write the page into the folder, push nothing")
    return parser.parse_args(arguments)


def check(args: argparse.Namespace) -> None:
    """Check the flags before anything is done.

    Raises ValueError for a name that is not allowed or flags that contradict each other; FileNotFoundError if there is
    no such model.
    """
    if not (args.folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{args.folder} has no model_index.json: pass the folder of a saved pipeline.")
    if args.page_only and args.space:
        raise ValueError("--page_only pushes nothing, --space does: give one.")
    if args.space_id and not args.space:
        raise ValueError(f"--space_id {args.space_id} needs --space.")
    if args.comparison and not read_results(args.comparison).get("points"):
        raise ValueError(f"--comparison {args.comparison} holds no results of benchmarks/time_to_quality.py.")
    for name in (args.hub_model_id, args.space_id):
        if name is not None:
            validate_repo_id(name)  # its error is a ValueError


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary copy of the files of a model that are to be pushed, without paths of this machine."""
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name, "model")
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=list(MODEL_FILES)):
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, stage / file)
        if (stage / CONFIG).is_file():
            make_public(stage / CONFIG)
        for path in stage.glob("*/*.json"):
            write_config(path.read_text(encoding="utf-8"), path)  # stock diffusers notes where a model was loaded from
        yield stage


def make_public(path: Path) -> None:
    """Rewrite a training configuration without what must not be published; its first comment, the versions, stays."""
    text = path.read_text(encoding="utf-8")
    header = text.partition("\n")[0] + "\n" if text.startswith("#") else ""
    values = public_config(yaml.safe_load(text) or {})
    path.write_text(header + as_yaml(values), encoding="utf-8")


def hub_datasets(config: Mapping[str, Any]) -> list[str]:
    """The data set that a training configuration names, if that is a name on the Hub; else nothing."""
    if "dataset_name" not in config or config.get("train_data_dir"):
        return []
    name = config["dataset_name"] or EMBEDDED_DATASET
    return [name] if is_on_hub(name) else []


def hub_base_model(config: Mapping[str, Any]) -> str | None:
    """The model that a training configuration fine-tunes, if that is a name on the Hub."""
    name = config.get("model_config_name_or_path") or ""
    return name if is_on_hub(name) else None


def is_on_hub(name: str) -> bool:
    """Whether a name is that of a repository on the Hub, and not a path."""
    return "/" in name and not looks_local(name) and not Path(name).exists()


def write_page(stage: Path, repository: str, license: str | None) -> None:
    """Write pipeline.py, the page and the picture that its first code draws into a copy of a model's folder.

    Raises ValueError if the model is incomplete or not one that our pipeline runs; RuntimeError if the page's code
    fails.
    """
    pipeline = ScratchDDPMPipeline.from_pretrained(stage)
    pipeline.save_config(stage)  # so that the code that is pushed, and run here, is this package's
    config = yaml.safe_load((stage / CONFIG).read_text(encoding="utf-8")) if (stage / CONFIG).is_file() else {}
    page = partial(
        model_page,
        pipeline,
        stage,
        repository,
        TEMPLATE,
        license=license or config.get("hub_license"),
        datasets=hub_datasets(config),
        base_model=hub_base_model(config),
    )
    printed = run_usage(str(page()), repository, stage)
    page(usage_output=printed).save(stage / "README.md")


def run_usage(page: str, repository: str, stage: Path) -> str:
    """Run the first code block of a page on the model in `stage` instead of the repository; return its output.

    Raises RuntimeError if it failed.
    """
    code = FIRST_CODE.findall(page)[0].replace(f'"{repository}"', repr(str(stage)))
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the code of the page failed, so nothing is published:\n{done.stderr[-2000:]}")
        shutil.copyfile(Path(folder, "usage.png"), stage / "usage.png")
    return done.stdout.strip()


@contextmanager
def documented(folder: Path, repository: str, license: str | None) -> Iterator[Path]:
    """A temporary copy to push, as of `staged`, with its page; the page is copied into the model's folder too."""
    with staged(folder) as stage:
        write_page(stage, repository, license)
        for file in WRITTEN:
            shutil.copyfile(stage / file, folder / file)
        yield stage


def publish(folder: Path, repository: str, *, token: str | None, license: str | None = None) -> str:
    """Write the page of a model and push the model; return the URL of the commit.

    Args:
        folder: the model's folder, into which the page is written too.
        repository: `owner/name`, as `open_repository` returns it.
        token: for the Hub; that of the login if left out.
        license: of the weights.

    Raises:
        ValueError, RuntimeError: see `write_page`; nothing is pushed.
        PermissionError, ConnectionError: see `push`; the repository is as it was.
    """
    with documented(folder, repository, license) as stage:
        return push(stage, repository, message="The trained model", token=token)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and push it with the model, as the flags say."""
    args = parse(arguments)
    check(args)
    if args.comparison:
        merge_results(args.folder / "results.json", "comparison", read_results(args.comparison))
    name = args.hub_model_id or args.folder.resolve().name
    if args.page_only:
        page_name = args.folder.as_posix() if args.folder.name else name
        with documented(args.folder, args.hub_model_id or page_name, args.license):
            print(args.folder / "README.md")
        return
    repository = open_repository(name, private=args.hub_private_repo, token=args.hub_token)
    print(publish(args.folder, repository, token=args.hub_token, license=args.license))
    if args.space:
        space = args.space_id or f"{repository}-demo"
        private = bool(HfApi(token=args.hub_token).repo_info(repository).private)
        print(publish_space(space, repository, private=private, token=args.hub_token))
        if private:
            print("The Space is private, as the model is: to load it, it needs a secret HF_TOKEN.", file=sys.stderr)
