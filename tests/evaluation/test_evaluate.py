"""`ddpm evaluate`: its figures are those of the library; which models it takes; what it refuses, and writes."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMPipeline,
    PNDMScheduler,
    RePaintPipeline,
    RePaintScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
)
from PIL import Image
from torch import nn

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data.config import EMBEDDED_TEST_SET
from ddpm_from_scratch.evaluation import classifier, evaluate
from ddpm_from_scratch.evaluation import features as features
from ddpm_from_scratch.evaluation import measures as evaluation
from ddpm_from_scratch.evaluation import metrics as metrics
from ddpm_from_scratch.evaluation.figures import plot_bound
from ddpm_from_scratch.evaluation.likelihood import bits_per_dim
from ddpm_from_scratch.runtime import atomic_files
from ddpm_from_scratch.runtime import random_streams as draws
from ddpm_from_scratch.runtime import results as report
from ddpm_from_scratch.runtime.errors import told
from ddpm_from_scratch.sampling import generate as drawn_samples
from ddpm_from_scratch.sampling import models
from ddpm_from_scratch.sampling.generate import SampleSpec, generate
from helpers.evaluations import (
    BATCH,
    HELD_OUT,
    NAMES,
    NUM_BOUND,
    NUM_HELD_OUT,
    NUM_TRAINING,
    SIDE,
    STEPS,
    TRAINING,
    N,
    Rank,
    T,
    as_table,
    flags,
    images_in,
    names,
    own_model,
    run,
    strict,
    tiny,
)
from helpers.paths import ROOT

pytestmark = pytest.mark.usefixtures("fresh_process", "few_features")

SCRIPT = ROOT / "training" / "train.py"
PYTHONPATH = os.pathsep.join(str(ROOT / folder) for folder in ("src", "training", "tests"))


def pixels(path):
    return np.asarray(Image.open(path))


def assert_same_images(found, expected):
    """Up to a level: kernels for other memory layouts and batches round differently."""
    assert found.shape == expected.shape and abs(found.astype(int) - expected).max() <= 1


def assert_same_bound(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


# --- the figures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(whole):
    (samples,) = whole.results["evaluation"]["samples"]
    return samples


def test_what_else_is_in_the_results_stays(whole):
    assert set(whole.results) == {"final_loss", "evaluation"}
    assert whole.results["final_loss"] == 0.5
    found = whole.results["evaluation"]
    assert {name: found[name] for name in ("model", "revision", "pipeline", "precision", "num_processes")} == {
        "model": "model",
        "revision": None,
        "pipeline": "ScratchDDPMPipeline",
        "precision": "float32",
        "num_processes": 1,
    }
    assert set(found["seconds"]) == {"reference", "20 images, 3 steps", "measures, 3 steps", "bound"}
    assert found["images"]["training"]["name"] == "training.parquet"
    assert found["images"]["held_out"]["num_images"] == NUM_HELD_OUT
    assert names(whole.folder) == [
        *("bound.png", "model_index.json", "neighbors.png", "pipeline.py", "results.json"),
        *("samples.png", "scheduler", "unet"),
    ]


def test_each_image_has_its_own_seed(whole, samples):
    pipeline = ScratchDDPMPipeline.from_pretrained(whole.folder)
    pipeline.set_progress_bar_config(disable=True)
    assert whole.images.dtype == np.uint8 and whole.images.shape == (N, SIDE, SIDE, 1)
    assert len({image.tobytes() for image in whole.images}) == N
    for number in (0, N - 1):
        seed = draws.generator(0, "evaluation", number)
        image = pipeline(generator=seed, num_inference_steps=STEPS, output_type="np").images[0]
        np.testing.assert_allclose(image * 255, whole.images[number], atol=0.51)
    assert [samples[name] for name in ("num_inference_steps", "scheduler", "seed")] == [3, "ScratchDDPMScheduler", 0]
    assert "labels" not in samples


def test_distances_are_those_of_the_library(whole, samples):
    order = np.random.default_rng(draws.derived_seed(0, "reference")).permutation(NUM_TRAINING)
    others = HELD_OUT[np.linspace(0, NUM_HELD_OUT - 1, N).round().astype(int)]
    generated, reference, others = (
        features.efficientnet_lite0_features(images, 32) for images in (whole.images, TRAINING[order[:N]], others)
    )
    for found, values in {"generated": (samples, generated), "floor": (samples["floor"], others)}.values():
        expected = {
            "kernel_distance": metrics.kernel_distance(values, reference),
            "kernel_distance_error": metrics.kernel_distance_with_error(values, reference).error,
            "frechet_distance": metrics.frechet_distance(values, reference),
            **metrics.precision_recall(values, reference)._asdict(),
            **metrics.density_coverage(values, reference)._asdict(),
        }
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert samples["kernel_distance"] > samples["floor"]["kernel_distance"]
    assert samples["floor_of"] == "held-out images"
    assert [samples[name] for name in ("extractor", "size", "num_generated", "num_reference")] == [
        *("efficientnet-lite0", 32, N, N)
    ]
    assert len(samples["warnings"]) == 3 and "Fréchet distance from 20 images" in samples["warnings"][0]


def test_memorisation_is_that_of_the_library(whole, samples):
    flat = [images.reshape(len(images), -1) / 255 for images in (whole.images, TRAINING, HELD_OUT)]
    expected = metrics.memorization(*flat)._asdict()
    assert samples["memorization"] == {"space": "pixels", "num_training": NUM_TRAINING, **expected}
    assert samples["memorization"]["median_ratio"] > 1


def test_the_bound_is_that_of_the_library(whole):
    pipeline = ScratchDDPMPipeline.from_pretrained(whole.folder)
    images = HELD_OUT[np.linspace(0, NUM_HELD_OUT - 1, NUM_BOUND).round().astype(int)]
    bits = bits_per_dim(pipeline.unet, pipeline.scheduler, torch.from_numpy(images)[:, None], progress=False)
    bound = whole.results["evaluation"]["bound"]
    expected = {"bits_per_dim": bits.total.mean(), "prior": bits.prior.mean(), "error": bits.standard_error().total}
    assert {name: bound[name] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )
    assert bound["timesteps"] == list(range(T))
    assert bound["terms"] == pytest.approx(bits.terms.mean(0).tolist(), rel=1e-4)
    assert bound["terms_error"] == pytest.approx(bits.standard_error().terms.tolist(), rel=1e-4)
    assert bound["prior"] + sum(bound["terms"]) == pytest.approx(bound["bits_per_dim"], rel=1e-9)
    assert [bound[name] for name in ("num_images", "num_terms", "variance_type", "clip_sample", "seed")] == [
        *(NUM_BOUND, T, "fixed_small", True, 0)
    ]
    assert "labels" not in bound


def test_pictures(whole):
    grid = pixels(whole.folder / "samples.png")
    assert grid.shape == (2 * 4 * SIDE, 2 * 5 * SIDE)  # 5 columns, enlarged
    assert np.array_equal(grid[: 2 * SIDE : 2, : 2 * SIDE : 2], whole.images[0, ..., 0])
    assert pixels(whole.folder / "bound.png").std() > 0
    scale = 7
    strip = pixels(whole.folder / "neighbors.png")[::scale, ::scale]
    upper, lower = (np.stack(np.split(row, 16, axis=1)) for row in np.split(strip, 2, axis=0))
    distances = np.square(whole.images[..., 0].astype(float)[:, None] - TRAINING.astype(float)).sum((2, 3))
    order = distances.min(1).argsort(kind="stable")[:16]
    assert np.array_equal(upper, whole.images[order, ..., 0])
    assert np.array_equal(lower, TRAINING[distances[order].argmin(1)])


def test_copies_of_training_images_are_found(inputs, whole, tmp_path):
    copies = np.concatenate([TRAINING[: N - 2], 255 - TRAINING[:2]])  # the two last are no copies
    np.savez(tmp_path / "copies.npz", images=copies)
    found = run(whole.folder, flags(inputs, images=tmp_path / "copies.npz", output_dir=tmp_path))["evaluation"]
    (samples,) = found["samples"]
    assert samples["file"] == "copies.npz" and "num_inference_steps" not in samples
    assert samples["memorization"]["share_nearer"] == (N - 2) / N
    assert samples["memorization"]["median_ratio"] == 0
    strip = pixels(tmp_path / "neighbors.png")
    upper, lower = np.split(strip, 2, axis=0)
    assert np.array_equal(upper, lower) and np.array_equal(upper[::7, : 7 * SIDE : 7], TRAINING[0])


def test_the_nearest_is_found_in_parts(monkeypatch):
    images = np.random.default_rng(2).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    training = np.random.default_rng(3).integers(0, 256, (11, 4, 4, 3), dtype=np.uint8)
    training[9] = images[2]
    distances = np.sqrt(np.square((images[:, None] - training.astype(float)) / 255).sum((2, 3, 4)))
    for entries in (1, 3 * 48, 2**20):
        monkeypatch.setattr(evaluation, "ENTRIES", entries)
        near = evaluation.nearest(images, training)
        assert near.row.tolist() == distances.argmin(1).tolist()
        np.testing.assert_allclose(near.distance, distances.min(1), rtol=1e-12)
        assert near.distance[2] == 0


def test_saved_images_give_the_same_figures(inputs, whole, tmp_path):
    arguments = flags(inputs, images=whole.file, output_dir=tmp_path / "new")
    found, expected = run(whole.folder, arguments)["evaluation"], whole.results["evaluation"]
    assert found["samples"] == [{"file": "steps-3.npz", **expected["samples"][0]}]
    assert_same_bound(found["bound"], expected["bound"])
    assert names(tmp_path / "new") == ["bound.png", "neighbors.png", "results.json", "samples.png"]


def npy_file():
    """A single array, not an archive of them."""
    buffer = io.BytesIO()
    np.save(buffer, TRAINING)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: np.savez(path, images=np.zeros((N, 9, 9, 1), np.uint8)), r"holds uint8 \[20, 9, 9, 1\]"),
        (lambda path: np.savez(path, images=np.zeros((N, SIDE, SIDE, 3), np.uint8)), r"\[20, 8, 8, 3\]"),
        (lambda path: np.savez(path, images=np.zeros((N, SIDE, SIDE, 1))), "holds float64"),
        (lambda path: np.savez(path, images=np.zeros((19, SIDE, SIDE), np.uint8)), "N >= 20 is needed"),
        (lambda path: np.savez(path, images=np.array([{}] * N)), "cannot be read: Object arrays cannot be loaded"),
        (lambda path: np.savez(path, other=TRAINING), "cannot be read"),
        (lambda path: np.savez(path, images=TRAINING, facts=np.array("[1]")), "cannot be read"),
        (lambda path: path.write_bytes(b"no archive"), "cannot be read"),
        (lambda path: path.write_bytes(npy_file()), "cannot be read"),
    ],
)
def test_other_files_of_images_are_refused(inputs, whole, tmp_path, write, message):
    path = tmp_path / "images.npz"
    write(path)
    with pytest.raises(ValueError, match=message):
        evaluate.main([str(whole.folder), *flags(inputs, images=path, output_dir=tmp_path / "new")])
    assert names(tmp_path) == ["images.npz"]


# --- which models --------------------------------------------------------------------------------------------------


def stock_ddpm(folder):
    DDPMPipeline(tiny(), DDPMScheduler(num_train_timesteps=T)).save_pretrained(folder)


def stock_ddim(folder):
    DDIMPipeline(tiny(), DDIMScheduler(num_train_timesteps=T)).save_pretrained(folder)


def pndm(folder):
    PNDMPipeline(tiny(), PNDMScheduler(num_train_timesteps=T)).save_pretrained(folder)


def score_sde(folder):
    unet = tiny(in_channels=3, out_channels=3, time_embedding_type="fourier")
    ScoreSdeVePipeline(unet, ScoreSdeVeScheduler(T, sigma_max=10.0)).save_pretrained(folder)


def learned_variance(folder):
    scheduler = ScratchDDPMScheduler(num_train_timesteps=T, variance_type="learned_range")
    own_model(folder, scheduler, out_channels=2)


def optimal_variance(folder):
    moments = [(0, 0.01), (T - 1, 0.5)]
    own_model(folder, ScratchDDPMScheduler(num_train_timesteps=T, x_0_mse=moments, optimal_variance=True))


def deterministic(folder):
    own_model(folder, ScratchDDPMScheduler(num_train_timesteps=T, eta=0.0))


@pytest.mark.parametrize(
    ("build", "arguments", "pipeline", "scheduler", "bound"),
    [
        (stock_ddpm, [], "ScratchDDPMPipeline", "ScratchDDPMScheduler", "fixed_small"),
        (stock_ddpm, ["--stock"], "DDPMPipeline", "DDPMScheduler", "fixed_small"),
        (stock_ddim, [], "DDIMPipeline", "DDIMScheduler", "fixed_small"),
        (learned_variance, [], "ScratchDDPMPipeline", "ScratchDDPMScheduler", "learned_range"),
        (learned_variance, ["--stock"], "DDPMPipeline", "DDPMScheduler", "learned_range"),
        (optimal_variance, [], "ScratchDDPMPipeline", "ScratchDDPMScheduler", "optimal"),
        (pndm, ["--num_inference_steps", "6"], "PNDMPipeline", "PNDMScheduler", "fixed_small"),
        (score_sde, [], "ScoreSdeVePipeline", "ScoreSdeVeScheduler", "ScoreSdeVeScheduler is not on a discrete chain"),
        (deterministic, [], "ScratchDDPMPipeline", "ScratchDDPMScheduler", "infinite at eta=0"),
    ],
)
def test_unconditional_pixel_models(inputs, tmp_path, monkeypatch, build, arguments, pipeline, scheduler, bound):
    build(tmp_path / "model")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "bound.png").write_bytes(b"of an earlier evaluation")
    found = run(tmp_path / "model", [*flags(inputs, output_dir=tmp_path / "new"), *arguments])
    found = found["evaluation"]
    assert (found["pipeline"], found["samples"][0]["scheduler"]) == (pipeline, scheduler)
    assert found["samples"][0]["kernel_distance"] > 0
    if "left_out" in found["bound"]:
        assert bound in found["bound"]["left_out"]
        assert not (tmp_path / "new" / "bound.png").exists()
    else:
        assert found["bound"]["variance_type"] == bound and found["bound"]["bits_per_dim"] > 0
        assert pixels(tmp_path / "new" / "bound.png").ndim == 3


def test_stock_classes_draw_nearly_the_same_images(inputs, tmp_path):
    """Both are given the same seeds; of 5 steps, which divide the chain, they make the same."""
    stock_ddpm(tmp_path / "model")
    saved = {}
    for name in ("ours", "stock"):
        arguments = flags(inputs, num_inference_steps=5, images_dir=tmp_path / name, output_dir=tmp_path / name)
        run(tmp_path / "model", [*arguments, *(["--stock"] if name == "stock" else [])])
        saved[name] = images_in(tmp_path / name / "steps-5.npz").astype(int)
    assert abs(saved["ours"] - saved["stock"]).max() <= 1


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A class-conditional model, whose folder names its own pipeline; the code in it must not be run."""
    folder = own_model(tmp_path_factory.mktemp("conditional") / "model", id2label=NAMES, num_class_embeds=5)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == ["pipeline", "ScratchDDPMPipeline"]
    (folder / "pipeline.py").write_text("raise SystemExit('code of the folder was run')")
    return folder


@pytest.mark.parametrize(
    ("arguments", "labels", "file"),
    [([], [4], "steps-3.npz"), (["--balanced_labels"], [0, 2, 3], "steps-3-classes.npz")],
)
def test_classes(inputs, conditional, tmp_path, arguments, labels, file):
    arguments = [*flags(inputs, images_dir=tmp_path / "images", output_dir=tmp_path), *arguments]
    found = run(conditional, arguments)["evaluation"]
    assert found["samples"][0]["labels"] == ("null" if labels == [4] else "balanced")
    assert found["bound"]["labels"] == "null" and found["bound"]["bits_per_dim"] > 0
    pipeline = ScratchDDPMPipeline.from_pretrained(conditional)
    pipeline.set_progress_bar_config(disable=True)
    images = images_in(tmp_path / "images" / file)
    for number in range(3):
        expected = pipeline(
            generator=draws.generator(0, "evaluation", number),
            class_labels=torch.tensor([labels[number % len(labels)]]),
            num_inference_steps=STEPS,
            output_type="np",
        ).images[0]
        np.testing.assert_allclose(expected * 255, images[number], atol=0.51)


def test_a_network_without_null_label_needs_balanced_ones(inputs, tmp_path):
    unet = tiny(num_class_embeds=4)
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(40)).save_pretrained(tmp_path / "theirs")
    own_model(tmp_path / "ours", id2label=dict(enumerate("abcde")), num_class_embeds=5)
    for name, reason in {"theirs": "not on a discrete chain of betas", "ours": "each label of the network"}.items():
        with pytest.raises(ValueError, match="each label of this model is a class"):
            evaluate.main([str(tmp_path / name), *flags(inputs)])
        found = run(tmp_path / name, [*flags(inputs), "--balanced_labels"])["evaluation"]
        assert found["samples"][0]["labels"] == "balanced"
        assert reason in found["bound"]["left_out"]


def test_of_unnamed_classes_ours_has_a_null_label():
    unet = tiny(num_class_embeds=5)
    ours = ScratchDDPMPipeline(unet, DDPMScheduler())
    theirs = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(40))
    assert models.classes(ours) == [0, 1, 2, 3] and models.has_null_label(ours)
    assert models.classes(theirs) == [0, 1, 2, 3, 4] and not models.has_null_label(theirs)
    assert models.classes(ScratchDDPMPipeline(tiny(), DDPMScheduler())) == []
    assert models.class_names(ours) == ["0", "1", "2", "3"]
    assert models.class_names(ScratchDDPMPipeline(unet, DDPMScheduler(), NAMES)) == ["shoe", "coat", "bag"]


LATENT = {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"], "unet": ["diffusers", "UNet2DModel"]}
TEXT = {
    "_class_name": "StableDiffusionPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def test_a_folder_without_an_index_is_no_model(inputs, whole):
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        evaluate.main([str(whole.folder / "unet"), *flags(inputs)])


@pytest.mark.parametrize("index", [LATENT, TEXT])
def test_other_pipelines_are_refused_by_their_index_alone(inputs, tmp_path, index):
    """Nothing else is in the folder, so it was not looked for."""
    index = {**index, "_diffusers_version": "0.42.0", "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"is a {index['_class_name']} of .*: only pipelines that draw pixels"):
        evaluate.main([str(tmp_path), *flags(inputs)])
    assert names(tmp_path) == ["model_index.json"]


def test_a_pipeline_that_needs_an_image_is_refused(inputs, tmp_path):
    RePaintPipeline(tiny(), RePaintScheduler(num_train_timesteps=T)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is a RePaintPipeline, which takes image, mask_image"):
        evaluate.main([str(tmp_path / "model"), *flags(inputs)])
    assert not (tmp_path / "model" / "results.json").exists()


def test_code_of_a_folder_is_not_run(inputs, conditional):
    with pytest.raises(ValueError, match="trust_remote_code"):
        evaluate.main([str(conditional), *flags(inputs), "--stock"])


def test_only_our_pipeline_takes_16_bits(inputs, tmp_path):
    stock_ddpm(tmp_path / "model")
    arguments = flags(inputs, output_dir=tmp_path / "new", mixed_precision="bf16")
    with pytest.raises(ValueError, match="bf16 is for ScratchDDPMPipeline"):
        evaluate.main([str(tmp_path / "model"), *arguments, "--stock"])
    assert run(tmp_path / "model", arguments)["evaluation"]["precision"] == "bfloat16"
    auto = flags(inputs, output_dir=tmp_path / "new", mixed_precision=None)
    assert run(tmp_path / "model", [*auto, "--stock"])["evaluation"]["precision"] == "float32"


def test_images_that_are_not_finite_are_refused(inputs, tmp_path):
    own_model(tmp_path / "model")
    pipeline = ScratchDDPMPipeline.from_pretrained(tmp_path / "model")
    nn.init.constant_(pipeline.unet.conv_out.bias, torch.nan)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="images that are not finite, in 3 steps"):
        evaluate.main([str(tmp_path / "model"), *flags(inputs)])
    assert not (tmp_path / "model" / "results.json").exists()


# --- processes, and N ----------------------------------------------------------------------------------------------


def as_hub_model(folder, cache):
    """A cache of the Hub that holds the folder as user/model."""
    repository, commit = cache / "models--user--model", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("*.png", "results.json"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def run_process(command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.full
def test_two_processes_find_the_same_with_a_model_of_the_hub(inputs, whole, tmp_path, nothing_drawn):
    """What they drew serves a single process with the same model of a folder."""
    as_hub_model(whole.folder, tmp_path / "hub")
    script = tmp_path / "evaluate_with_few_features.py"
    script.write_text(
        "import sys\n"
        "from ddpm_from_scratch.evaluation import evaluate\n"
        "from helpers.evaluations import use_few_features\n"
        "use_few_features()\n"
        "evaluate.main(sys.argv[1:])\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script, "user/model"]
    arguments = flags(inputs, images_dir=tmp_path / "images", output_dir=tmp_path / "two")
    environment = {"ACCELERATE_USE_CPU": "true", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = run_process([*torchrun, *arguments], **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "two" / "results.json")]
    assert names(tmp_path / "images") == ["steps-3.npz"]
    assert_same_images(images_in(tmp_path / "images" / "steps-3.npz"), whole.images)
    found, expected = strict(tmp_path / "two" / "results.json")["evaluation"], whole.results["evaluation"]
    assert (found["model"], found["num_processes"]) == ("user/model", 2)
    arguments = flags(inputs, images_dir=tmp_path / "images", output_dir=tmp_path / "one")
    assert run(whole.folder, arguments)["evaluation"]["samples"] == found["samples"]
    assert_same_bound(found["bound"], expected["bound"])


@pytest.mark.parametrize(("num_processes", "batch"), [(2, 3), (3, 16), (2, 32)])  # 7 batches; 2, for 3; 1, for 2
def test_every_image_is_drawn_by_one_process(whole, num_processes, batch):
    pipeline = ScratchDDPMPipeline.from_pretrained(whole.folder)
    pipeline.set_progress_bar_config(disable=True)
    spec, parts = SampleSpec(STEPS, N, batch_size=batch), {}
    expected = generate(pipeline, spec, Rank(0, 1, {}), progress=False)
    assert_same_images(expected, whole.images)
    for rank in range(num_processes):
        generate(pipeline, spec, Rank(rank, num_processes, parts), progress=False)
    drawn = sum(int(part.flatten(1).any(1).sum()) for part in parts.values())
    assert drawn == -(-N // batch) * batch  # no batch twice
    found = generate(pipeline, spec, Rank(1, num_processes, parts), progress=False)
    assert np.array_equal(found, expected)


def test_images_do_not_depend_on_their_number(whole):
    pipeline = ScratchDDPMPipeline.from_pretrained(whole.folder)
    pipeline.set_progress_bar_config(disable=True)
    more = generate(pipeline, SampleSpec(STEPS, N + 7, batch_size=BATCH), Accelerator(cpu=True))
    assert len(more) == N + 7
    assert_same_images(more[:N], whole.images)


# --- real images ---------------------------------------------------------------------------------------------------


def write_folder(path):
    for split, images in {"train": TRAINING, "test": HELD_OUT}.items():
        (path / split / "shoes").mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(path / split / "shoes" / f"{number:03}.png")


def write_dictionary(path):
    datasets.DatasetDict(train=as_table(TRAINING), test=as_table(HELD_OUT)).save_to_disk(path)


@pytest.mark.parametrize(
    ("write", "flag"),
    [(write_folder, "train_data_dir"), (write_folder, "dataset_name"), (write_dictionary, "dataset_name")],
)
def test_held_out_images_are_a_split(inputs, whole, tmp_path, monkeypatch, write, flag):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    write(tmp_path / "set")
    named = {"dataset_name": None, "test_set": None, flag: tmp_path / "set"}
    arguments = flags(inputs, **named, test_split="test", output_dir=tmp_path / "new")
    found = run(whole.folder, arguments)["evaluation"]
    assert found["images"]["held_out"]["split"] == "test"
    assert found["images"]["training"]["name"] == found["images"]["held_out"]["name"] == "set"
    assert found["images"]["held_out"]["num_images"] == NUM_HELD_OUT
    assert found["samples"][0]["floor_of"] == "held-out images"
    expected = whole.results["evaluation"]  # of the same images by another way
    assert_same_bound(found["bound"], expected["bound"])
    near, expected_near = (of["samples"][0]["memorization"] for of in (found, expected))
    assert near["median_ratio"] == pytest.approx(expected_near["median_ratio"], rel=0.01)


def test_splits_that_are_not_there(inputs, whole, tmp_path):
    write_dictionary(tmp_path / "set")
    as_table(TRAINING).save_to_disk(tmp_path / "single")
    splits = {tmp_path / "set": "train, test", tmp_path / "single": "train", inputs.training: "train"}
    for dataset, there in splits.items():
        arguments = flags(inputs, dataset_name=dataset, test_set=None, test_split="validation")
        with pytest.raises(ValueError, match=f"has no split 'validation'; it has {there}"):
            evaluate.main([str(whole.folder), *arguments])


def test_without_held_out_images(inputs, tmp_path):
    folder = own_model(tmp_path / "model")
    found = run(folder, flags(inputs, test_set=None))["evaluation"]
    assert "name them with --test_set or --test_split" in found["bound"]["left_out"]
    (samples,) = found["samples"]
    assert samples["floor_of"] == "other training images"
    assert "memorization" not in samples and "held_out" not in found["images"]
    order = np.random.default_rng(draws.derived_seed(0, "reference")).permutation(NUM_TRAINING)
    reference, others = (features.extract(TRAINING[rows], size=32).values for rows in (order[:N], order[N : 2 * N]))
    assert samples["floor"]["frechet_distance"] == pytest.approx(metrics.frechet_distance(others, reference), rel=1e-6)
    assert names(folder) == [
        *("model_index.json", "neighbors.png", "pipeline.py", "results.json", "samples.png", "scheduler", "unet")
    ]


def test_few_held_out_images_leave_the_floor_to_training_images(inputs, whole, tmp_path):
    as_table(HELD_OUT[:12]).to_parquet(tmp_path / "few.parquet")
    arguments = flags(inputs, test_set=tmp_path / "few.parquet", output_dir=tmp_path)
    found = run(whole.folder, arguments)["evaluation"]
    assert found["samples"][0]["floor_of"] == "other training images"
    assert found["bound"]["num_images"] == NUM_BOUND


def test_the_embedded_data_have_held_out_images(monkeypatch):
    asked = []

    def load(config, channels, size, split=None, remedy=None):
        asked.append((config.dataset_name, split))
        images = torch.from_numpy(TRAINING if config.dataset_name is None else HELD_OUT)[:, None]
        assert not config.class_conditional
        describe = lambda config: {"name": Path(config.dataset_name or "own").name}  # noqa: E731
        return SimpleNamespace(images=images, labels=None, value_range=None, describe=describe)

    monkeypatch.setattr(evaluate, "load_data", load)
    real = evaluate.real_images(evaluate.parse(["model"]), 1, (SIDE, SIDE), [])
    assert asked == [(None, None), (str(EMBEDDED_TEST_SET), "train")]
    assert Path(asked[1][0]).is_file()
    assert np.array_equal(real.held_out[..., 0], HELD_OUT)
    assert real.facts == {"training": {"name": "own"}, "held_out": {"name": "fashion_mnist_test.parquet"}}
    evaluate.real_images(evaluate.parse(["model", "--test_set", "user/other"]), 1, (SIDE, SIDE), [])
    assert asked[2:] == [(None, None), ("user/other", None)]


def test_of_too_large_sets_evenly_spaced_images_are_taken(monkeypatch):
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 6, 4)
    monkeypatch.setattr(evaluation, "MOST_IMAGES", 4)
    assert evaluation.to_array(images, (4, 4))[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    monkeypatch.setattr(evaluation, "MOST_BYTES", 3 * 3 * 4**2)
    array = evaluation.to_array(images, (4, 4))
    assert array.shape == (3, 4, 4, 3) and array[:, 0, 0, 0].tolist() == [0, 4, 9]


def test_training_images_are_not_held_out(inputs, whole, tmp_path, nothing_drawn):
    with pytest.raises(ValueError, match="half of the held-out images are in the training set"):
        evaluate.main([str(whole.folder), *flags(inputs, test_set=inputs.training, output_dir=tmp_path / "new")])
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("num_images", "test_set", "most"), [(26, None, 25), (26, "tests", 25), (51, "many", 50), (50, "many", None)]
)
def test_too_few_training_images(num_images, test_set, most):
    held_out = {None: None, "tests": HELD_OUT, "many": np.concatenate([HELD_OUT] * 3)}[test_set]
    real = evaluation.RealImages(TRAINING, held_out, {})
    if most is None:
        evaluation.check_enough(real, num_images)
        return
    with pytest.raises(ValueError, match=f"there are 50 training images: take at most {most} images"):
        evaluation.check_enough(real, num_images)


# --- options -------------------------------------------------------------------------------------------------------


def test_several_numbers_of_steps(inputs, whole, tmp_path):
    cache = tmp_path / "cache"
    both = run(whole.folder, flags(inputs, num_inference_steps=(5, STEPS), output_dir=tmp_path / "2", cache_dir=cache))
    one = run(whole.folder, flags(inputs, images=whole.file, output_dir=tmp_path / "1", cache_dir=cache))
    found = both["evaluation"]["samples"]
    assert [entry["num_inference_steps"] for entry in found] == [5, STEPS]
    (alone,) = one["evaluation"]["samples"]
    assert found[1]["kernel_distance"] == pytest.approx(alone["kernel_distance"], rel=0.01)
    assert found[0]["kernel_distance"] != found[1]["kernel_distance"]
    assert found[0]["floor"] == found[1]["floor"]
    # The pictures are of the first number.
    assert not np.array_equal(pixels(tmp_path / "2" / "samples.png"), pixels(tmp_path / "1" / "samples.png"))


@pytest.mark.full
def test_several_numbers_of_images_and_sizes(inputs, whole, tmp_path, monkeypatch):
    """An entry for each number of steps and each size, as a run of its own finds it; every floor is computed once."""
    calls, frechet_distance = [], metrics.frechet_distance

    def count(a, b):
        calls.append(len(a))
        return frechet_distance(a, b)

    monkeypatch.setattr(metrics, "frechet_distance", count)

    def entries(**changes):
        arguments = {"images_dir": tmp_path / "images", "num_bound_images": 0, "output_dir": tmp_path / "new"}
        return run(whole.folder, flags(inputs, **arguments, **changes))["evaluation"]["samples"]

    found = entries(num_inference_steps=(5, 2, STEPS), num_images=(22, N, N), size=(40, 32))
    assert sorted(calls) == [N] * 6 + [22] * 4
    kinds = [tuple(entry[name] for name in ("num_inference_steps", "num_generated", "size")) for entry in found]
    assert kinds == [(5, 22, 40), (5, 22, 32), (2, N, 40), (2, N, 32), (STEPS, N, 40), (STEPS, N, 32)]
    for entry, (steps, count, size) in zip(found, kinds, strict=True):
        assert entries(num_inference_steps=steps, num_images=count, size=size) == [entry]
    assert len({entry["floor"]["kernel_distance"] for entry in found}) == 4
    assert names(tmp_path / "images") == ["steps-2.npz", "steps-3.npz", "steps-5.npz"]


def test_a_streamed_training_set(inputs, whole, tmp_path):
    cache = tmp_path / "cache"
    arguments = flags(inputs, images=whole.file, streaming=(), output_dir=tmp_path, cache_dir=cache)
    ours, expected = run(whole.folder, arguments)["evaluation"], whole.results["evaluation"]
    assert ours["samples"][0]["kernel_distance"] == pytest.approx(expected["samples"][0]["kernel_distance"], rel=1e-3)
    assert ours["samples"][0]["memorization"] == expected["samples"][0]["memorization"]


def test_some_terms_of_the_bound(inputs, whole, tmp_path):
    arguments = flags(inputs, num_terms=4, num_bound_images=2, output_dir=tmp_path)
    bound = run(whole.folder, arguments)["evaluation"]["bound"]
    assert (bound["num_terms"], bound["num_images"]) == (4, 2) and bound["timesteps"] == list(range(T))
    known = [term for term in bound["terms"] if term is not None]
    assert 4 <= len(known) <= 7 and bound["terms"][0] is not None
    assert pixels(tmp_path / "bound.png").ndim == 3


def test_without_the_bound(inputs, tmp_path):
    folder = own_model(tmp_path / "model")
    found = run(folder, flags(inputs, num_bound_images=0))["evaluation"]
    assert "bound" not in found and "bound" not in found["seconds"] and not (folder / "bound.png").exists()


def test_an_infinite_bound_can_be_drawn(tmp_path):
    bound = {"timesteps": [0, 1, 2], "terms": [3.0, None, 0.5], "bits_per_dim": None, "error": None, "num_images": 1}
    plot_bound(bound, tmp_path / "bound.png")
    assert pixels(tmp_path / "bound.png").std() > 0


def test_the_seed_changes_everything_random(inputs, whole, tmp_path):
    arguments = flags(inputs, seed=1, images_dir=tmp_path / "images", output_dir=tmp_path)
    found = run(whole.folder, arguments)["evaluation"]
    assert not (images_in(tmp_path / "images" / "steps-3.npz") == whole.images).all((1, 2, 3)).any()
    assert found["samples"][0]["seed"] == found["bound"]["seed"] == 1
    assert found["bound"]["bits_per_dim"] != whole.results["evaluation"]["bound"]["bits_per_dim"]


WRONG = [
    ({"num_images": 19}, "num_images must be at least 20, got [19]"),
    ({"num_inference_steps": (3, 0)}, "num_inference_steps must be at least 1"),
    ({"num_inference_steps": (3, T + 1)}, "21 steps were asked for, and the chain of this model has 20"),
    ({"num_bound_images": -1}, "num_bound_images must be at least 0, got -1"),
    ({"num_terms": 1}, "num_terms must be at least 2, got 1"),
    ({"num_terms": T + 1}, "21 terms of the bound were asked for, and there are 20"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"size": (32, 0)}, "size must be at least 1"),
    ({"num_class_images": -1}, "num_class_images must be at least 0, got -1"),
    ({"num_images": 26, "test_set": None}, "take at most 25 images"),
    ({"num_inference_steps": (3, 5), "num_images": (20, 26), "test_set": None}, "take at most 25 images"),
    ({"num_inference_steps": (3, 5), "images": SCRIPT}, "give one number"),
    ({"images_dir": SCRIPT}, "train.py is a file"),
    ({"images_dir": "images", "images": SCRIPT}, "--images holds some: give one"),
    ({"images": "no.npz"}, "no file no.npz"),
    ({"num_class_images": 20}, "images of the classes were asked for, but this model has no classes"),
    ({"label_column": "label"}, "give --num_class_images"),
    ({"test_split": "test"}, "--test_set and --test_split"),
    ({"train_data_dir": "."}, "both name the training data"),
    ({"dataset_name": None, "train_data_dir": "no_folder"}, "no folder no_folder"),
    ({"dataset_name": None, "dataset_config_name": "small"}, "dataset_config_name needs dataset_name"),
    ({"dataset_name": None, "test_set": None, "test_split": "test"}, "give one of them"),
    ({"dataset_name": "no/such/set.parquet"}, "dataset_name: no file or folder no/such/set.parquet"),
    ({"test_set": "./no_set"}, "test_set: no file or folder ./no_set"),
    ({"revision": "main"}, "is a folder: leave it out"),
    ({"mixed_precision": "fp16"}, "fp16 needs a CUDA device"),
    ({"extractor": "inceptio"}, "invalid choice: 'inceptio'"),
    ({"num_image": 30}, "unrecognized arguments: --num_image 30"),  # no abbreviations
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[" ".join(map(str, c.items())) for c, _ in WRONG])
def test_wrong_calls_say_what_is_wrong_and_write_nothing(
    inputs, whole, tmp_path, monkeypatch, capsys, nothing_drawn, changes, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as raised:
        evaluate.main([str(whole.folder), *flags(inputs, output_dir="new", **changes)])
    assert message in (capsys.readouterr().err if raised.type is SystemExit else str(raised.value))
    assert names(tmp_path) == []


@pytest.mark.parametrize("counts", [(20, 21), (20, 21, 22, 23)])
def test_numbers_of_images_fit_those_of_steps_before_anything_is_loaded(inputs, tmp_path, monkeypatch, counts):
    def load(*arguments):
        raise AssertionError("something was loaded")

    for name in ("load_pipeline", "load_data"):
        monkeypatch.setattr(evaluate, name, load)
    arguments = flags(inputs, num_inference_steps=(3, 4, 5), num_images=counts, output_dir=tmp_path / "new")
    with pytest.raises(ValueError, match=f"--num_images has {len(counts)} numbers, --num_inference_steps 3: give one"):
        evaluate.main(["user/model", *arguments])
    assert names(tmp_path) == []


def test_balanced_labels_are_of_drawn_images_of_classes(inputs, whole, tmp_path, nothing_drawn):
    for arguments, message in {
        ("--balanced_labels",): "this model has no classes",
        ("--balanced_labels", "--images", str(whole.file)): "for images that are to be drawn",
    }.items():
        with pytest.raises(ValueError, match=message):
            evaluate.main([str(whole.folder), *flags(inputs, output_dir=tmp_path / "new"), *arguments])
    assert names(tmp_path) == []


def test_a_failed_script_ends_with_2_and_one_line(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert told(evaluate.main, "evaluate", ["user/missing", *flags(inputs)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("ddpm evaluate: error: user/missing is no folder, nor a pipeline that the Hub gives")
    assert names(tmp_path) == []


# --- classes -------------------------------------------------------------------------------------------------------

KINDS = ["shoe", "coat", "bag"]
HELD_OUT_LABELS = (np.arange(NUM_HELD_OUT) % 3 + (np.arange(NUM_HELD_OUT) < 6)) % 3  # a quarter of them is wrong


def shades(kinds, seed):
    """Images of one gray for each of the kinds 0 to 2, with noise: uint8 [N, SIDE, SIDE]."""
    noise = np.random.default_rng(seed).integers(0, 32, (len(kinds), SIDE, SIDE))
    return (90 * np.asarray(kinds)[:, None, None] + noise).astype(np.uint8)


def with_classes(images, labels, names=KINDS, **columns):
    """A table of images with their classes, and columns of other labels."""
    kind = datasets.ClassLabel(names=names)
    table = as_table(images).add_column("kind", [int(label) for label in labels], feature=kind)
    for name, values in columns.items():
        table = table.add_column(name, values, feature=kind)
    return table


@pytest.fixture(scope="module")
def classed(tmp_path_factory):
    """Images of three kinds: for the command line, and for a cache of their features."""
    folder = tmp_path_factory.mktemp("classed")
    kinds = np.arange(NUM_TRAINING) % 3
    with_classes(shades(kinds, 0), kinds).to_parquet(folder / "training.parquet")
    with_classes(shades(np.arange(NUM_HELD_OUT) % 3, 1), HELD_OUT_LABELS).to_parquet(folder / "tests.parquet")
    return SimpleNamespace(training=f"{folder}/training.parquet", tests=f"{folder}/tests.parquet", cache=folder / "c")


@pytest.fixture(scope="module")
def of_kinds(tmp_path_factory):
    """A model of these kinds, with a null label."""
    return own_model(tmp_path_factory.mktemp("kinds") / "model", id2label=dict(enumerate(KINDS)), num_class_embeds=4)


@pytest.fixture
def shown(monkeypatch):
    """What the model shows for each of its labels, instead of spec; and the batches that were asked for."""
    shown, batches = {}, []

    def draw(pipeline, spec, numbers):
        batches.append((spec.balanced_labels, numbers[0]))
        of = drawn_samples.labels_of(models.classes(pipeline), numbers)
        kinds = [shown[label] if spec.balanced_labels else 0 for label in of]
        return torch.from_numpy(shades(kinds, numbers[0]))[..., None]

    monkeypatch.setattr(drawn_samples, "draw_batch", draw)
    monkeypatch.setattr(classifier, "EPOCHS", 40)
    return SimpleNamespace(kinds=shown, batches=batches)


def judge(model, inputs, tmp_path, *arguments, **changes):
    changes = {"num_class_images": N, "num_bound_images": 0, "output_dir": tmp_path / "new", **changes}
    return run(model, [*flags(inputs, **changes), *arguments])["evaluation"]


def share(value, count):
    return {"accuracy": value, "accuracy_error": pytest.approx((value * (1 - value) / count) ** 0.5)}


@pytest.mark.parametrize(
    ("kinds", "by_class"),
    [((0, 1, 2), (1.0, 1.0, 1.0)), ((0, 2, 2), (1.0, 0.0, 1.0)), ((1, 2, 0), (0.0, 0.0, 0.0))],
)
def test_a_classifier_judges_images_of_the_classes(classed, of_kinds, tmp_path, shown, kinds, by_class):
    shown.kinds.update(enumerate(kinds))
    found = judge(of_kinds, classed, tmp_path, num_inference_steps=(STEPS, 5))
    rightly = sum(by_class[number % 3] for number in range(N)) / N
    assert found["classes"] == {
        "num_inference_steps": STEPS,
        "scheduler": "ScratchDDPMScheduler",
        "labels": "balanced",
        "seed": 0,
        "num_generated": N,
        **share(rightly, N),
        "by_class": dict(zip(KINDS, by_class, strict=True)),
        "classifier": {"num_training": NUM_TRAINING, "num_held_out": NUM_HELD_OUT, **share(0.75, NUM_HELD_OUT)},
    }
    assert [entry["labels"] for entry in found["samples"]] == ["null", "null"]
    assert list(found["seconds"])[-2:] == ["20 images of the classes", "classifier"]
    assert found["images"]["training"]["class_names"] == found["images"]["held_out"]["class_names"] == KINDS


def test_classes_that_are_not_counted_from_0(classed, conditional, tmp_path, shown):
    """Labels 0, 2 and 3 of the model are the classes 0, 1 and 2 of the data."""
    shown.kinds.update({0: 0, 2: 1, 3: 1})
    found = judge(conditional, classed, tmp_path)["classes"]
    assert found["by_class"] == {"shoe": 1.0, "coat": 1.0, "bag": 0.0} and found["accuracy"] == 14 / N


def test_images_of_the_classes_are_drawn_once(classed, of_kinds, tmp_path, shown):
    """Those that are measured with balanced labels are the first that a classifier judges."""
    shown.kinds.update(enumerate((0, 1, 2)))
    given = {"num_class_images": 28, "images_dir": tmp_path / "images"}
    found = judge(of_kinds, classed, tmp_path, "--balanced_labels", **given)
    assert shown.batches == [(True, first) for first in (0, 8, 16, 16, 24)]
    assert found["samples"][0]["labels"] == "balanced" and found["samples"][0]["num_generated"] == N
    assert (found["classes"]["num_generated"], found["classes"]["accuracy"]) == (28, 1)
    assert judge(of_kinds, classed, tmp_path, **given)["classes"] == found["classes"]
    assert shown.batches[5:] == [(False, first) for first in (0, 8, 16)]
    assert names(tmp_path / "images") == ["steps-3-classes.npz", "steps-3.npz"]


def test_images_of_the_classes_are_drawn_beside_given_ones(classed, of_kinds, tmp_path, shown):
    shown.kinds.update(enumerate((0, 1, 2)))
    np.savez(tmp_path / "given.npz", images=shades(np.zeros(N), 2))
    found = judge(of_kinds, classed, tmp_path, images=tmp_path / "given.npz")
    assert shown.batches == [(True, first) for first in (0, 8, 16)]
    assert found["samples"][0]["file"] == "given.npz" and found["classes"]["by_class"]["bag"] == 1


def test_the_column_of_labels(classed, of_kinds, tmp_path, shown):
    shown.kinds.update(enumerate((0, 1, 2)))
    kinds = np.arange(NUM_TRAINING) % 3
    with_classes(shades(kinds, 0), kinds, shelf=[0] * NUM_TRAINING).to_parquet(tmp_path / "training.parquet")
    arguments = {"dataset_name": tmp_path / "training.parquet", "test_set": None}
    with pytest.raises(ValueError, match="kind, shelf all hold labels: choose one with --label_column"):
        evaluate.main([str(of_kinds), *flags(classed, **arguments, num_class_images=N, output_dir=tmp_path / "new")])
    assert names(tmp_path) == ["training.parquet"] and shown.batches == []
    found = judge(of_kinds, classed, tmp_path, **arguments, label_column="kind")["classes"]
    assert found["accuracy"] == 1 and found["classifier"] == {"num_training": NUM_TRAINING}  # nothing is held out
    shelf = judge(of_kinds, classed, tmp_path, **arguments, label_column="shelf")["classes"]
    assert shelf["by_class"] == {"shoe": 1.0, "coat": 0.0, "bag": 0.0}


def test_classes_that_cannot_be_judged_are_refused(inputs, classed, of_kinds, tmp_path, nothing_drawn):
    kinds = np.arange(NUM_HELD_OUT) % 3
    with_classes(shades(kinds, 0), kinds, names=["bag", "coat", "shoe"]).to_parquet(tmp_path / "others.parquet")
    others = r"the classes of the images are bag, coat, shoe; those of the model shoe, coat, bag"
    for changes, message in (
        ({"dataset_name": inputs.training, "test_set": inputs.tests}, "no column of the data set holds labels"),
        ({"test_set": inputs.tests}, "no column of the data set holds labels"),
        ({"dataset_name": tmp_path / "others.parquet"}, others),
        ({"test_set": tmp_path / "others.parquet"}, others),
    ):
        arguments = flags(classed, num_class_images=N, output_dir=tmp_path / "new", **changes)
        with pytest.raises(ValueError, match=message):
            evaluate.main([str(of_kinds), *arguments])
    assert names(tmp_path) == ["others.parquet"]


# --- what is written -----------------------------------------------------------------------------------------------


def test_where_results_go(tmp_path):
    def folder(*arguments):
        return evaluate.parse(arguments).folder

    assert folder("user/model") == Path("outputs", "evaluation", "user", "model")
    assert folder(str(tmp_path)) == tmp_path
    assert folder("user/model", "--output_dir", "other") == Path("other")


def test_a_failed_write_leaves_the_old_results(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    report.merge_results(path, "evaluation", {"bits": 1})

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(atomic_files, "write_file", fail)
    with pytest.raises(OSError, match="no space"):
        report.merge_results(path, "evaluation", {"bits": 2})
    assert strict(path) == {"evaluation": {"bits": 1}}
    assert names(tmp_path) == ["results.json"]


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[]", "does not hold results by name")])
def test_damaged_results_are_told_before_the_work(inputs, whole, tmp_path, nothing_drawn, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluate.main([str(whole.folder), *flags(inputs, output_dir=tmp_path)])
    assert (tmp_path / "results.json").read_text() == text


def test_drawn_images_are_saved_before_anything_can_fail(inputs, whole, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluation, "compare", fail)
    arguments = flags(inputs, images_dir=tmp_path / "images", output_dir=tmp_path / "new")
    with pytest.raises(OSError, match="no space"):
        evaluate.main([str(whole.folder), *arguments])
    with np.load(tmp_path / "images" / "steps-3.npz") as archive:
        assert_same_images(archive["images"], whole.images)
        assert json.loads(str(archive["facts"]))["num_inference_steps"] == STEPS
    assert names(tmp_path) == ["images"]


def test_features_of_real_images_are_kept(inputs, whole, tmp_path, monkeypatch):
    arguments = flags(inputs, images=whole.file, cache_dir=tmp_path / "cache", output_dir=tmp_path / "new")
    first = run(whole.folder, arguments)
    assert len(names(tmp_path / "cache")) == 2

    def fail(*arguments, **options):
        raise AssertionError("features were computed again")

    with monkeypatch.context() as patch:
        patch.setattr(features, "extract", fail)  # as cached_features finds it; that of generated images is another
        second = run(whole.folder, arguments)
    assert second["evaluation"]["samples"] == first["evaluation"]["samples"]


def test_no_local_path_is_in_the_results(inputs, whole, tmp_path, monkeypatch):
    """Not of the data, the images, the model or a damaged file of the cache either, which a warning names."""
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    inside = Path("~", tmp_path.name)
    shutil.copy(inputs.training, tmp_path / "mine.parquet")
    arguments = {"dataset_name": inside / "mine.parquet", "images": whole.file, "output_dir": tmp_path / "new"}
    arguments = flags(inputs, **arguments, cache_dir=tmp_path / "cache")
    run(whole.folder, arguments)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"cache.* cannot be read"):
        found = run(whole.folder, arguments)["evaluation"]
    assert found["images"]["training"]["name"] == "mine.parquet" and found["model"] == "model"
    assert len(found["samples"][0]["warnings"]) == 3
    text = (tmp_path / "new" / "results.json").read_text(encoding="utf-8")
    assert [place for place in ("~", *map(str, (*tmp_path.parents[:-1], ROOT))) if place in text] == []
