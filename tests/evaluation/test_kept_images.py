"""`sampling/kept_images.py`: drawn images are kept and serve again, but for nothing else than was asked for."""

import errno
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.evaluation import evaluate
from ddpm_from_scratch.sampling import generate as samples
from ddpm_from_scratch.sampling import kept_images
from helpers.evaluations import (
    BATCH,
    FEW,
    NAMES,
    SIDE,
    STEPS,
    N,
    Rank,
    T,
    flags,
    images_in,
    names,
    own_model,
    pictures,
    run,
    tiny,
)

pytestmark = pytest.mark.usefixtures("fresh_process", "few_features")

DRAWING = samples.SampleSpec(STEPS, N, batch_size=BATCH)
BATCHES = [(STEPS, 0), (STEPS, 8), (STEPS, 16)]  # the number of steps, and of the first image


def build(scheduler=None, id2label=None, **changes):
    """The same each time."""
    scheduler = scheduler or ScratchDDPMScheduler(num_train_timesteps=T)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = ScratchDDPMPipeline(tiny(**changes), scheduler, id2label)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def path(tmp_path):
    return tmp_path / "images" / "steps-3.npz"


@pytest.fixture
def drawn(monkeypatch):
    """The batches that are drawn."""
    found, draw_batch = [], samples.draw_batch

    def note(pipeline, spec, numbers):
        found.append((spec.num_inference_steps, numbers[0]))
        return draw_batch(pipeline, spec, numbers)

    monkeypatch.setattr(samples, "draw_batch", note)
    return found


@contextmanager
def stopped_at(batch):
    """SampleSpec is; what was drawn is kept at once."""
    draw_batch = samples.draw_batch

    def stop(pipeline, spec, numbers):
        if (spec.num_inference_steps, numbers[0]) == batch:
            raise KeyboardInterrupt
        return draw_batch(pipeline, spec, numbers)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept_images, "SAVE_SECONDS", 0)
        patch.setattr(samples, "draw_batch", stop)
        yield


def draw(pipeline, path, accelerator=None, **changes):
    accelerator = accelerator or Accelerator(cpu=True)
    return kept_images.generate_once(pipeline, replace(DRAWING, **changes), accelerator, path and path.parent)


# --- again, and more of them ---------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_stopped_evaluation_goes_on(inputs, whole, tmp_path, drawn):
    def arguments(name, **changes):
        return flags(inputs, num_inference_steps=(2, STEPS), output_dir=tmp_path / name, **changes)

    undisturbed = run(whole.folder, arguments("at once"))["evaluation"]
    drawn.clear()
    with stopped_at((STEPS, 16)), pytest.warns(UserWarning, match=FEW):
        evaluate.main([str(whole.folder), *arguments("new", images_dir=tmp_path / "images")])
    assert drawn == [(2, 0), (2, 8), (2, 16), *BATCHES[:2]]
    assert names(tmp_path) == ["at once", "images"] and names(tmp_path / "images") == ["steps-2.npz", "steps-3.npz"]
    assert np.array_equal(images_in(tmp_path / "images" / "steps-3.npz"), whole.images[:16])

    drawn.clear()
    found = run(whole.folder, arguments("new", images_dir=tmp_path / "images"))["evaluation"]
    assert drawn == BATCHES[2:]
    assert np.array_equal(images_in(tmp_path / "images" / "steps-3.npz"), whole.images)
    assert names(tmp_path / "images") == ["steps-2.npz", "steps-3.npz"]
    assert found.pop("seconds").keys() == undisturbed.pop("seconds").keys()
    assert found == undisturbed


def test_only_what_is_missing_is_drawn(path, drawn):
    pipeline = build()
    images = draw(pipeline, path)
    assert drawn == BATCHES and len(images) == N
    assert np.array_equal(draw(pipeline, path), images)
    assert np.array_equal(draw(pipeline, path, num_images=9), images[:9])
    assert drawn == BATCHES and len(images_in(path)) == N  # fewer take nothing away
    more = draw(pipeline, path, num_images=28)
    assert drawn == [*BATCHES, (STEPS, 16), (STEPS, 24)]  # the batch that was not whole, and the next
    assert np.array_equal(more, draw(pipeline, None, num_images=28))
    assert np.array_equal(images_in(path), more) and np.array_equal(more[:N], images)


def test_more_processes_go_on_with_what_one_has_drawn(path, drawn):
    pipeline, parts = build(), {}
    expected = draw(pipeline, None)
    with stopped_at(BATCHES[1]):
        draw(pipeline, path)
    drawn.clear()
    draw(pipeline, path, Rank(1, 2, parts))
    assert len(images_in(path)) == BATCH  # the main process writes
    found = draw(pipeline, path, Rank(0, 2, parts))
    assert drawn == [BATCHES[2], BATCHES[1]]
    assert np.array_equal(found, expected) and np.array_equal(images_in(path), expected)


@pytest.mark.parametrize(("seconds", "times"), [(kept_images.SAVE_SECONDS, [20]), (0, [8, 16, 20])])
def test_images_are_kept_now_and_then(path, monkeypatch, seconds, times):
    kept, keep = [], kept_images.keep

    def note(path, drawn, origin):
        kept.append(len(drawn.images))
        keep(path, drawn, origin)

    monkeypatch.setattr(kept_images, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(kept_images, "keep", note)
    draw(build(), path)
    assert kept == times


@pytest.mark.parametrize("broken", ["savez_compressed", "replace"])
def test_a_failed_write_leaves_what_was_there(path, monkeypatch, broken):
    pipeline = build()
    images = draw(pipeline, path)

    def fail(file, *arguments, **arrays):
        if broken == "savez_compressed":
            file.write(b"PK")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr({"savez_compressed": np, "replace": os}[broken], broken, fail)
    with pytest.raises(OSError, match="no space"):
        draw(pipeline, path, num_images=28)
    assert names(path.parent) == [path.name] and np.array_equal(images_in(path), images)


def test_images_of_classes_have_a_file_of_their_own(path):
    pipeline = build(id2label=NAMES, num_class_embeds=5)
    found = [draw(pipeline, path, balanced_labels=balanced) for balanced in (False, True)]
    assert names(path.parent) == ["steps-3-classes.npz", "steps-3.npz"]
    assert not (found[0] == found[1]).all((1, 2, 3)).any()
    assert np.array_equal(found[0], draw(pipeline, path)) and np.array_equal(images_in(path), found[0])


# --- other images --------------------------------------------------------------------------------------------------


def with_other_weights():
    pipeline = build()
    torch.nn.init.zeros_(pipeline.unet.conv_out.bias)
    return pipeline


def in_16_bits():
    pipeline = build()
    pipeline.unet.to(torch.bfloat16)
    return pipeline


OTHERS = {
    "weights": (with_other_weights, {}, "another model"),
    "configuration of the network": (lambda: build(norm_num_groups=2), {}, "another model"),
    "size of the images": (lambda: build(sample_size=2 * SIDE), {}, "another model"),
    "configuration of the scheduler": (
        lambda: build(ScratchDDPMScheduler(num_train_timesteps=T, beta_end=0.05)),
        {},
        "another model",
    ),
    "scheduler": (lambda: build(DDIMScheduler(num_train_timesteps=T)), {}, "another scheduler, another model"),
    "precision": (in_16_bits, {}, "another precision, another model"),
    "seed": (build, {"seed": 1}, "another seed"),
    "batch size": (build, {"batch_size": 4}, "another batch_size"),
    "seed and batch size": (build, {"seed": 1, "batch_size": 4}, "another seed, another batch_size"),
}


@pytest.mark.parametrize(("other", "changes", "differing"), OTHERS.values(), ids=OTHERS)
def test_images_of_something_else_are_refused(path, request, other, changes, differing):
    images = draw(build(), path)
    before = path.read_bytes()
    request.getfixturevalue("nothing_drawn")
    assert np.array_equal(draw(build(), path), images)
    message = f"{path} holds other images than are asked for ({differing}): name another folder"
    for num_images in (9, N, 28):
        with pytest.raises(ValueError, match=re.escape(message)):
            draw(other(), path, num_images=num_images, **changes)
    assert names(path.parent) == [path.name] and path.read_bytes() == before


def test_images_of_other_classes_are_refused(path):
    for _ in range(2):
        draw(build(id2label=NAMES, num_class_embeds=5), path, balanced_labels=True)
    with pytest.raises(ValueError, match=r"steps-3-classes\.npz holds other images .* \(another model\)"):
        draw(build(id2label={0: "shoe", 1: "coat"}, num_class_embeds=5), path, balanced_labels=True)


def test_an_evaluation_refuses_images_of_something_else(inputs, whole, tmp_path, nothing_drawn):
    """Also those of later steps, before it draws anything."""
    steps = {"num_inference_steps": (STEPS + 1, STEPS)}
    arguments = flags(inputs, seed=1, **steps, images_dir=whole.file.parent, output_dir=tmp_path / "new")
    with pytest.raises(ValueError, match=rf"{re.escape(str(whole.file))} holds other images .* \(another seed\)"):
        evaluate.main([str(whole.folder), *arguments])
    assert names(tmp_path) == [] and np.array_equal(images_in(whole.file), whole.images)


def test_a_model_is_the_same_in_every_place_and_process(tmp_path):
    """Beside a configuration diffusers notes where it is from and, in the order of a set, what it left to defaults."""
    own_model(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (ScratchDDPMPipeline.from_pretrained(tmp_path / name) for name in ("here", "there"))
    defaults = here.scheduler.config["_use_default_values"]
    assert len(defaults) > 1
    there.scheduler.register_to_config(_use_default_values=defaults[::-1])
    assert there.scheduler.config != here.scheduler.config and there.unet.config != here.unet.config
    assert kept_images.digest(there) == kept_images.digest(here)


def flipped(content):
    """Bytes of which one, in the images, is another."""
    place = len(content) // 3
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


IMAGES = pictures(N, 0)[..., None]
DAMAGED = {
    "an empty file": (lambda path: path.write_bytes(b""), "cannot be read"),
    "half a file": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "cannot be read"),
    "a flipped byte": (lambda path: path.write_bytes(flipped(path.read_bytes())), "cannot be read"),
    "objects": (lambda path: np.savez(path, images=np.array([{}] * N)), "cannot be read"),
    "no images": (lambda path: np.savez(path, others=IMAGES), "cannot be read"),
    "an origin that is no JSON": (lambda path: np.savez(path, images=IMAGES, origin=np.array("{")), "cannot be read"),
    "an origin without names": (lambda path: np.savez(path, images=IMAGES, origin=np.array("[1]")), "cannot be read"),
    "images from elsewhere": (lambda path: np.savez(path, images=IMAGES), "holds other images"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_files_of_something_else_are_refused(path, request, damage, message):
    draw(build(), path)
    damage(path)
    before = path.read_bytes()
    request.getfixturevalue("nothing_drawn")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {message}"):
        draw(build(), path)
    assert names(path.parent) == [path.name] and path.read_bytes() == before


# --- pixels --------------------------------------------------------------------------------------------------------


def test_pixels_from_minus_one_to_one():
    images = np.zeros((1, 2, 3, 3), dtype=np.uint8)
    images[0, 1, 2] = [255, 51, 0]
    found = samples.to_unit_range(images)
    assert found.shape == (1, 3, 2, 3) and found.dtype == torch.float32
    np.testing.assert_allclose(found[0, :, 1, 2], [1, -0.6, -1], atol=1e-6)
    assert (found[0, :, 0] == -1).all()
