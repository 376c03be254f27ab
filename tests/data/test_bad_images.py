"""Images that cannot be read: named, or passed over and counted, the same way in memory, on demand and in workers."""

import io
import struct
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data import sources
from ddpm_from_scratch.evaluation import calibrate, evaluate
from ddpm_from_scratch.runtime.errors import BadImages
from ddpm_from_scratch.sampling import checkpoints
from ddpm_from_scratch.training.config import TrainingConfig
from helpers.runs import STEPS, assert_equal, encode, picture, run_main, write_parquet

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NUM = 12


def huge_header():
    """A PNG that says it has 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def colour():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "truncated": lambda: encode(picture(seed=1))[:60],
    "text": lambda: b"this is no image",
    "empty": lambda: b"",
    "huge header": huge_header,
}


@pytest.fixture(params=BAD)
def spoilt(request, tmp_path):
    """A set of 12 images of which rows 3 and 7 cannot be read."""
    images = [picture(seed=seed) for seed in range(NUM)]
    for row in (3, 7):
        images[row] = BAD[request.param]()
    return str(write_parquet(tmp_path / "spoilt.parquet", images))


def load(path, **options):
    return data.load_data(TrainingConfig(dataset_name=path, **options), 1, 8)


@pytest.mark.parametrize("on_demand", [False, True])
def test_without_being_told_to_pass_over_them_they_are_named(spoilt, monkeypatch, on_demand):
    if on_demand:
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    with pytest.raises(BadImages, match="image 3 cannot be read"):
        loaded = load(spoilt)
        data.ImageStream(loaded, 0, True, False).__getitems__(range(NUM))


def test_in_memory_they_are_left_out(spoilt, caplog):
    loaded = load(spoilt, skip_bad_images=True, class_conditional=True)
    assert len(loaded.images) == 10 == len(loaded.labels.of_images)
    assert loaded.labels.of_images.tolist() == [row for row in range(NUM) if row not in (3, 7)]
    assert torch.equal(loaded.images[3], load(spoilt, skip_bad_images=True).images[3])
    assert [message.split(" cannot")[0] for message in loaded.unreadable] == ["image 3", "image 7"]
    assert caplog.text.count("left out: image 3 cannot be read") == 2


def test_on_demand_the_next_one_takes_their_place(spoilt, monkeypatch):
    whole = load(spoilt, skip_bad_images=True, class_conditional=True)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    loaded = load(spoilt, skip_bad_images=True, class_conditional=True)
    assert len(loaded.images) == NUM
    stream = data.ImageStream(loaded, 0, True, False, 0.0, skip_bad_images=True)
    batch = stream.__getitems__(range(NUM))
    order = [data.image_index(0, position, NUM) for position in range(NUM)]
    expected = [{3: 4, 7: 8}.get(index, index) for index in order]
    assert batch.labels.tolist() == expected
    by_label = dict(zip(whole.labels.of_images.tolist(), whole.images, strict=True))
    assert all(torch.equal(image, by_label[index]) for image, index in zip(batch.images, expected, strict=True))
    assert sorted(message.split(" cannot")[0] for message in batch.unreadable) == ["image 3", "image 7"]


def test_the_last_image_gives_way_to_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    images = [picture(seed=seed) for seed in range(3)]
    path = str(write_parquet(tmp_path / "set.parquet", [*images, b"no image"]))
    stream = data.ImageStream(load(path, skip_bad_images=True), 0, True, False, skip_bad_images=True)
    position = next(position for position in range(4) if data.image_index(0, position, 4) == 3)
    assert stream.load(position)[1] == 0


@pytest.mark.full
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_demand", [False, True])
def test_a_run_passes_over_them_and_resumes_exactly(inputs, spoilt, tmp_path, monkeypatch, on_demand, workers):
    if on_demand:
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    flags = ("--dataset_name", spoilt, "--skip_bad_images", "--dataloader_num_workers", workers)
    whole = run_main(inputs, tmp_path / "whole", *flags, "--checkpointing_steps", "5")
    progress = checkpoints.read_state(whole / "checkpoints" / f"step_{STEPS:08d}")["progress"]
    assert sorted(message.split(" cannot")[0] for message in progress["bad_images"]) == ["image 3", "image 7"]
    start = whole / "checkpoints" / "step_00000005"
    resumed = run_main(inputs, tmp_path / "resumed", *flags, "--resume_from_checkpoint", start)
    assert_equal(load_file(resumed / WEIGHTS), load_file(whole / WEIGHTS))
    assert '"bad_images": 2' in (whole / "results.json").read_text()


@pytest.mark.parametrize("on_demand", [False, True])
def test_too_many_end_the_run(inputs, spoilt, tmp_path, monkeypatch, on_demand):
    if on_demand:
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    flags = ("--dataset_name", spoilt, "--skip_bad_images", "--max_bad_images", "1")
    with pytest.raises((BadImages, ValueError), match="2 images cannot be read, and max_bad_images is 1"):
        run_main(inputs, tmp_path / "model", *flags)


def test_none_that_can_be_read(tmp_path):
    path = str(write_parquet(tmp_path / "set.parquet", [b"", b"no"]))
    with pytest.raises(BadImages, match="none of 2 images can be read"):
        load(path, skip_bad_images=True)


@pytest.mark.parametrize("place", [f"ddpm_from_scratch.data.images.{name}" for name in ("Image.open", "to_tensor")])
@pytest.mark.parametrize("error", [MemoryError(), KeyError("a mistake")])
@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_no_fault_of_the_image_is_not_passed_over(tmp_path, monkeypatch, place, error, lazy):
    """Too little memory anywhere; our own mistakes, but for those that look like PIL's."""
    if lazy:
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    path = str(write_parquet(tmp_path / "set.parquet", [picture(seed=seed) for seed in range(2)]))
    options = {"skip_bad_images": True, "value_range": [0, 256]}
    loaded = load(path, **options) if lazy else None

    def fail(*_):
        raise error

    monkeypatch.setattr(place, fail)
    expected = BadImages if isinstance(error, KeyError) and place.endswith("open") else type(error)
    message = "none of 2 images can be read; .*: KeyError: 'a mistake'" if expected is BadImages else None
    with pytest.raises(expected, match=message):
        data.ImageStream(loaded, 0, True, False, skip_bad_images=True).load(0) if lazy else load(path, **options)


def test_a_missing_file_is_named_with_the_words_of_the_system(tmp_path):
    (tmp_path / "set.csv").write_text("image\nno.png\n")
    with pytest.raises(BadImages, match=r"no.png\) cannot be read: \[Errno 2\] No such file or directory"):
        load(str(tmp_path / "set.csv"))


def test_only_commands_with_the_flag_name_it(tmp_path):
    path = str(write_parquet(tmp_path / "set.parquet", [picture(), b"no image"]))
    flags = ["--dataset_name", path]
    with pytest.raises(BadImages, match=r"image 1 cannot be read: it is no image file; mend it or leave it out$"):
        evaluate.real_images(evaluate.parse(["model", *flags]), 1, (8, 8), [])
    arguments = calibrate.parse(["model", *flags])
    with pytest.raises(BadImages, match=r"it is no image file; mend it or leave it out$"):
        calibrate.training_images(arguments, calibrate.data_config(arguments), 1, (8, 8), [])
    with pytest.raises(BadImages, match=r"mend it or leave it out, or pass over such images with --skip_bad_images$"):
        load(path)


def test_colours_where_the_network_takes_none_are_named(tmp_path, monkeypatch):
    """More rows than are looked at beforehand, so that it is found in training."""
    monkeypatch.setattr(sources, "SURVEYED_ROWS", 2)
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    path = str(write_parquet(tmp_path / "set.parquet", [picture(), picture(), colour(), picture(), picture()]))
    stream = data.ImageStream(load(path), 0, True, False)
    with pytest.raises(BadImages, match=r"image 2 cannot be read: it is of mode RGB"):
        stream.__getitems__(range(5))
