"""Sets of images, and an evaluated model."""

from types import SimpleNamespace

import pytest

from ddpm_from_scratch.evaluation import features as features
from ddpm_from_scratch.evaluation import metrics as metrics
from ddpm_from_scratch.sampling import generate as drawn_samples
from helpers.evaluations import (
    HELD_OUT,
    TRAINING,
    as_table,
    few_features,
    flags,
    images_in,
    names,
    own_model,
    reset_accelerate,
    run,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Training and held-out images, and a cache for their features."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, images in {"training": TRAINING, "tests": HELD_OUT}.items():
        as_table(images).to_parquet(folder / f"{name}.parquet")
    return SimpleNamespace(training=f"{folder}/training.parquet", tests=f"{folder}/tests.parquet", cache=folder / "c")


@pytest.fixture
def fresh_process(monkeypatch):
    """To accelerate, every test is a process of its own."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="module", name="few_features")
def some_features():
    with few_features():
        yield


@pytest.fixture(scope="module")
def whole(inputs, few_features, tmp_path_factory):
    """A run in the folder of the model, where an earlier one left results."""
    folder = own_model(tmp_path_factory.mktemp("whole") / "model")
    (folder / "results.json").write_text('{"final_loss": 0.5, "evaluation": {"old": 1}}')
    file = folder.parent / "new" / "images" / "steps-3.npz"
    results = run(folder, flags(inputs, images_dir=file.parent))
    assert names(file.parent) == [file.name]
    return SimpleNamespace(folder=folder, results=results, file=file, images=images_in(file))


@pytest.fixture
def nothing_drawn(monkeypatch):
    def draw(*arguments, **options):
        raise AssertionError("images were drawn")

    monkeypatch.setattr(drawn_samples, "draw_batch", draw)
