"""The wheel, outside the repository: every command runs as a process of its own, and the package is small."""

import os
import subprocess
import sys
import zipfile

import pytest
import yaml

from helpers.evaluations import as_table, pictures
from helpers.paths import ROOT
from helpers.runs import TINY

SIZE = 8


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "dist", ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def run(site, tmp_path_factory):
    """Run `ddpm`; its standard output."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "checkpointing_steps": 10, "num_epochs": 1}))
    as_table(pictures(60, 0)).to_parquet(folder / "train.parquet")
    as_table(pictures(24, 1)).to_parquet(folder / "test.parquet")
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}

    def ddpm(*arguments, code=0):
        command = [sys.executable, "-m", "ddpm_from_scratch.cli", *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr[-3000:]
        return done

    ddpm.folder = folder
    return ddpm


def test_it_holds_the_presets_and_no_data(site):
    package = site / "ddpm_from_scratch"
    names = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {"training/presets/fashion_mnist_quick.yaml", "shipped/model_card.md", "shipped/training/train.py"} <= names
    assert {"shipped/demo/app.py", "py.typed"} <= names
    assert not [name for name in names if name.endswith((".parquet", ".safetensors", ".png"))]


def test_every_command_runs(run):
    """Train, export, sample, calibrate, evaluate, and write the page."""
    done = run(
        "train", "tiny.yaml", "--dataset_name", "train.parquet", "--max_train_steps", "20", "--output_dir", "model"
    )
    assert done.stdout.splitlines()[-1] == "model"
    run("export", "model/checkpoints/step_00000010", "exported")
    run("sample", "exported", "--num_images", "4", "--num_inference_steps", "2", "--out", "grid.png")
    assert (run.folder / "grid.png").is_file()
    run("calibrate", "model", "--dataset_name", "train.parquet", "--num_images", "8", "--num_timesteps", "3")
    flags = ["--num_inference_steps", "2", "--num_images", "20", "--num_bound_images", "2", "--num_terms", "2"]
    run("evaluate", "model", "--dataset_name", "train.parquet", "--test_set", "test.parquet", *flags, "--no-compile")
    assert '"evaluation"' in (run.folder / "model" / "results.json").read_text()
    run("publish", "model", "--page_only")
    assert "kernel distance" in (run.folder / "model" / "README.md").read_text().lower()


@pytest.mark.full
def test_without_data_named_it_takes_the_original_from_the_hub(run):
    done = run("train", "tiny.yaml", "--output_dir", "nothing", code=2)  # there is no Hub here
    assert "zalando-datasets/fashion_mnist" in done.stderr
    assert not (run.folder / "nothing").exists()
