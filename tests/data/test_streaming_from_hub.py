"""A data set that is streamed from the Hub: real processes, and a stand-in for the Hub."""

import json
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file

from helpers.hub_runs import run
from helpers.hub_server import Hub
from helpers.paths import ROOT
from helpers.runs import TINY, assert_equal, encode, picture, run_main
from helpers.shards import write_shards

STEPS, STOP = 8, 4
NAME = "user/images"
WEIGHTS = f"checkpoints/step_{STEPS:08d}/unet.safetensors"
PUSH = f"""
import sys, huggingface_hub as hub
api, kind = hub.HfApi(), {{"repo_id": "{NAME}", "repo_type": "dataset"}}
api.create_repo(**kind, private=True, exist_ok=True)
api.upload_folder(folder_path=sys.argv[1], path_in_repo="data", **kind)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a private set of three Parquet files, which were changed in the meantime."""
    root = tmp_path_factory.mktemp("streamed")
    shards = write_shards(root / "shards")
    values = {**TINY, "max_train_steps": STEPS, "checkpointing_steps": STOP, "class_conditional": True}
    (root / "tiny.yaml").write_text(yaml.safe_dump({**values, "streaming": True, "shuffle_window_mb": 1}))
    with Hub({"hf_user": ("user", True)}) as server:
        run(server, root, "-c", PUSH, shards, token="hf_user")
        revision = server.repositories["datasets", NAME].commits[-1].oid
        shutil.copytree(shards, root / "changed")
        (root / "changed" / "train-00002-of-00003.parquet").unlink()
        run(
            server,
            root,
            "-c",
            PUSH.replace("path_in_repo", "delete_patterns='*', path_in_repo"),
            root / "changed",
            token="hf_user",
        )
        yield SimpleNamespace(server=server, root=root, shards=shards, revision=revision, preset=root / "tiny.yaml")


def command(hub, output, *flags):
    data = ("--dataset_name", NAME, "--dataset_revision", hub.revision)
    return [ROOT / "training" / "train.py", hub.preset, "--output_dir", output, *data, *flags]


@pytest.mark.full
def test_it_trains_as_the_same_files_do_here_and_leaves_no_copy(hub, tmp_path):
    run(hub.server, tmp_path, *command(hub, tmp_path / "model", "--dataloader_num_workers", 2), token="hf_user")
    assert hub.server.unknown == []
    here = ("--dataset_name", hub.shards, "--cache_dir", tmp_path / "cache")
    local = run_main(SimpleNamespace(preset=str(hub.preset)), tmp_path / "local", *here)
    assert_equal(load_file(tmp_path / "model" / WEIGHTS), load_file(local / WEIGHTS))
    home = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "cache")]
    assert [path for path in home if path.suffix in (".parquet", ".arrow")] == []
    largest = max(
        (path for path in home if "model" not in path.parts and "local" not in path.parts),
        default=None,
        key=lambda path: path.stat().st_size,
    )
    assert largest is None or largest.stat().st_size < 1500, largest  # less than a row group

    shutil.rmtree(tmp_path / "model" / "checkpoints" / f"step_{STEPS:08d}")
    (tmp_path / "other_home").mkdir()
    run(hub.server, tmp_path / "other_home", *command(hub, tmp_path / "model"), token="hf_user")
    assert_equal(load_file(tmp_path / "model" / WEIGHTS), load_file(local / WEIGHTS))


@pytest.mark.full
def test_a_private_set_needs_a_token(hub, tmp_path):
    environment = hub.server.environment(tmp_path, OMP_NUM_THREADS="1")
    arguments = [sys.executable, *map(str, command(hub, tmp_path / "model"))]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and NAME in done.stderr, done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.full
def test_a_set_of_zips_is_all_its_pictures(hub, tmp_path):
    for name, seeds in {"first": range(6), "second": range(6, 12)}.items():
        (tmp_path / "zips").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "zips" / f"{name}.zip", "w") as archive:
            for seed in seeds:
                archive.writestr(f"{seed}.png", encode(picture(seed=seed)))
    run(hub.server, tmp_path, "-c", PUSH.replace(NAME, "user/zips"), tmp_path / "zips", token="hf_user")
    flags = ("--dataset_name", "user/zips", "--streaming", "false", "--class_conditional", "false")
    output = tmp_path / "model"
    run(
        hub.server,
        tmp_path,
        ROOT / "training" / "train.py",
        hub.preset,
        "--output_dir",
        output,
        *flags,
        token="hf_user",
    )
    assert json.loads((output / "results.json").read_text())["dataset"]["num_images"] == 12
