"""Any number of channels at any depth: arrays, deep pictures and TIFF of several bands, from the file to the sample."""

import io
import json
import logging
import struct
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from PIL import Image
from torch.nn import functional as F

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data import arrays, images
from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data.config import DataConfig
from ddpm_from_scratch.evaluation import calibrate, evaluate
from ddpm_from_scratch.evaluation import config as evaluate_config
from ddpm_from_scratch.evaluation.features import extract
from ddpm_from_scratch.runtime import random_streams
from ddpm_from_scratch.runtime.errors import BadImages
from ddpm_from_scratch.sampling import sample
from ddpm_from_scratch.sampling.editing import ScratchDDPMImg2ImgPipeline
from ddpm_from_scratch.sampling.previews import to_pil, write_gif
from ddpm_from_scratch.training import loop
from ddpm_from_scratch.training.arguments import parse
from ddpm_from_scratch.training.export import main as export
from helpers.networks import TINY_NETWORK, randomised
from helpers.runs import TINY, assert_equal, checkpoint_tensors, picture, run_main

SHAPE = (8, 12)
RANGES = {"uint8": (0, 255), "uint16": (0, 65535), "int8": (-128, 127), "int16": (-(2**15), 2**15 - 1)}
RANGES |= {"float16": (0, 1), "float32": (0, 1), "float64": (0, 1)}


def numbers(dtype, shape=SHAPE, seed=0):
    """Random numbers that fill the type's range, its ends among them."""
    low, high = RANGES[dtype]
    found = low + np.random.default_rng(seed).random(shape) * (high - low)
    found.flat[0], found.flat[-1] = low, high
    return found.astype(dtype)


def scaled(array, low, high):
    """[H, W] or [H, W, C] in [-1, 1], [C, H, W]."""
    array = array[..., None] if array.ndim == 2 else array
    return np.moveaxis((array.astype(np.float64) - low) / (high - low) * 2 - 1, -1, 0)


def write(folder, *images):
    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(images):
        np.save(folder / f"{index}.npy", array)
    return folder


def load(source, channels=None, size=None, **options):
    config = DataConfig(dataset_name=str(source), **options)
    config.validate()
    return data.load_data(config, channels, size)


# --- arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", RANGES)
def test_arrays_keep_their_depth(tmp_path, dtype, channels):
    shape = SHAPE if channels is None else (*SHAPE, channels)
    images = [numbers(dtype, shape, seed) for seed in range(3)]
    loaded = load(write(tmp_path / "set", *images))
    assert (loaded.channels, loaded.size) == (channels or 1, SHAPE)
    assert loaded.images.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    for image, array in zip(loaded.images, images, strict=True):
        np.testing.assert_allclose(loop.to_unit_range(image), scaled(array, *RANGES[dtype]), atol=2e-7)
    assert loop.to_unit_range(loaded.images).min() == -1 and loop.to_unit_range(loaded.images).max() == 1


def test_a_range_of_ones_own(tmp_path):
    images = [numbers("float32", (*SHAPE, 2), seed) * 300 - 100 for seed in range(2)]
    loaded = load(write(tmp_path / "set", *images), value_range=[-100, 200])
    np.testing.assert_allclose(loaded.images[1], scaled(images[1], -100, 200), atol=1e-6)
    assert loaded.describe(DataConfig())["value_range"] == [-100, 200]


def test_a_range_of_8_bit_values(tmp_path):
    dark = numbers("uint8") // 4
    Image.fromarray(dark).save(tmp_path / "dark.png")
    np.testing.assert_allclose(load(tmp_path, value_range=[0, 63]).images[0], scaled(dark, 0, 63), atol=1e-6)
    np.testing.assert_array_equal(load(tmp_path, value_range=[0, 255]).images[0, 0], dark)
    with pytest.raises(BadImages, match=r"dark.png\) cannot be read: its values are from 0 to 63, and 0 to 10 are"):
        load(tmp_path, value_range=[0, 10])


def test_wide_types_need_a_range(tmp_path):
    images = [numbers("uint16").astype("int32")]
    with pytest.raises(ValueError, match="int32 of 1 channels: say with --value_range LOW HIGH"):
        load(write(tmp_path / "set", *images))
    loaded = load(tmp_path / "set", value_range=[0, 65535])
    np.testing.assert_allclose(loaded.images[0], scaled(images[0], 0, 65535), atol=1e-7)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("wrong", [-0.01, 1.01, np.nan, np.inf])
def test_values_beyond_the_range_are_refused_by_name(tmp_path, monkeypatch, wrong, lazy):
    if lazy:
        monkeypatch.setattr(data, "IN_MEMORY_BYTES", 0)
    images = [numbers("float32") for _ in range(2)]
    images[0][3, 4] = wrong
    fault = r"its values are from .* 0 to 1 are taken: .*--value_range .*"
    fault = fault if np.isfinite(wrong) else "some of its values are NaN or infinite: put numbers in their place"
    with pytest.raises(BadImages, match=rf"0.npy\) cannot be read: {fault}; mend it or .*--skip_bad_images$"):
        load(write(tmp_path / "set", *images))
    skipped = load(tmp_path / "set", skip_bad_images=True)
    assert len(data.ImageStream(skipped, 0, True, False, 0.0, True).__getitems__(range(4)).images) == 4


@pytest.mark.parametrize("wrong", [-0.01, 1.01, np.nan])
def test_values_beyond_the_range_are_refused_before_any_work(tmp_path, monkeypatch, wrong):
    """Of all arrays that are looked at, not only of the first."""
    found = [numbers("float32") for _ in range(4)]
    found[2][3, 4] = wrong
    monkeypatch.setattr(images, "to_tensor", lambda *_: pytest.fail("too late"))
    with pytest.raises(BadImages, match=r"2.npy\) cannot be read: .*; mend it or leave it out, or pass over such"):
        load(write(tmp_path / "set", *found))


def test_a_set_of_which_nothing_is_left(tmp_path):
    write(tmp_path, *(numbers("float32") + 2 for _ in range(3)))
    with pytest.raises(BadImages, match=r"none of 3 images can be read; the last: image 2 .*2.npy\) .* 0 to 1 are"):
        load(tmp_path, skip_bad_images=True)


@pytest.mark.parametrize(
    "wrong", [5, "01", [1, 0], [0, 0], [0, float("nan")], [0, float("inf")], [0], [0, 1, 2], [None, 1]]
)
def test_a_range_that_is_none(wrong):
    with pytest.raises(ValueError, match="value_range must be two finite numbers, the lower one first"):
        DataConfig(value_range=wrong).validate()


def test_the_range_as_a_flag_and_in_a_preset(tmp_path, capsys):
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump({**TINY, "value_range": [-1, 4095]}))
    by_flag = parse([str(preset), "--value_range", "-1", "4095"])[0]
    again = tmp_path / "again.yaml"
    again.write_text(by_flag.to_yaml())
    assert parse([str(preset)])[0] == by_flag == parse([str(again)])[0] and by_flag.value_range == [-1, 4095]
    assert parse([])[0].value_range is None
    assert evaluate.parse(["model", "--value_range", "-1", "4095"]).data.value_range == [-1, 4095]
    with pytest.raises(SystemExit):
        parse([str(preset), "--value_range", "1"])
    assert "expected 2 arguments" in capsys.readouterr().err


def test_deep_images_are_resized_in_full_depth(tmp_path):
    image = numbers("float32", (20, 36, 5))
    loaded = load(write(tmp_path / "set", image), size=(8, 12))
    assert loaded.images.shape == (1, 5, 8, 14)
    exact = torch.from_numpy(scaled(image, 0, 1))[None]
    expected = F.interpolate(exact, (8, 14), mode="bicubic", antialias=True).clamp(-1, 1)
    np.testing.assert_allclose(loaded.images, expected, atol=1e-5)
    channel = Image.fromarray(image[..., 0]).resize((14, 8), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(loaded.images[0, 0], (np.asarray(channel) * 2 - 1).clip(-1, 1), atol=1e-5)
    assert data.ImageStream(loaded, 0, False, True)[0].shape == (5, 8, 12)


def test_8_bit_arrays_are_resized_to_8_bits(tmp_path):
    image = numbers("uint8", (20, 36, 2))
    loaded = load(write(tmp_path / "set", image), size=10)
    assert loaded.images.dtype == torch.uint8
    channel = Image.fromarray(image[..., 1].copy()).resize((18, 10), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(loaded.images[0, 1].float(), np.asarray(channel).astype(float), atol=1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4), r"float64 \[4\]: numbers \[H, W\] or \[H, W, C\] are needed"),
        (np.zeros((1, 2, 3, 4)), r"\[1, 2, 3, 4\]"),
        (np.zeros((0, 4)), r"\[0, 4\]"),
        (np.zeros((4, 4), bool), "bool"),
        (np.zeros((4, 4), complex), "complex128"),
        (np.array([["a"]]), "<U1"),
        (np.array([[None]]), "Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "one.npy", array, allow_pickle=True)
    with pytest.raises(BadImages, match=rf"one.npy\) cannot be read: .*{message}"):
        load(tmp_path)


def test_damaged_arrays_are_refused_by_name(tmp_path):
    write(tmp_path, numbers("float32"))
    whole = (tmp_path / "0.npy").read_bytes()
    for length in (*range(6, len(whole), 37), len(whole) - 1):
        (tmp_path / "0.npy").write_bytes(whole[:length])
        with pytest.raises(BadImages, match=r"0.npy\) cannot be read"):
            load(tmp_path)


def test_mixed_sets_are_refused_with_two_names(tmp_path):
    write(tmp_path, numbers("float32"), numbers("float32", (*SHAPE, 3)))
    with pytest.raises(ValueError, match=r"0.npy\) is float32 of 1 channels, and .*1.npy\) is float32 of 3 channels"):
        load(tmp_path)
    write(tmp_path, numbers("uint16"), numbers("int16"))
    with pytest.raises(ValueError, match=r"0.npy\) is uint16 of 1 channels, and .*1.npy\) is int16 of 1 channels"):
        load(tmp_path)


def test_what_the_survey_did_not_see_is_refused_later(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_from_scratch.data.sources.SURVEYED_ROWS", 1)
    write(tmp_path, numbers("float32"), numbers("uint16"))
    with pytest.raises(BadImages, match=r"1.npy\) cannot be read: it is uint16 .* before are .*: convert it, or"):
        load(tmp_path)


def test_a_network_of_other_channels_is_refused(tmp_path):
    write(tmp_path, numbers("float32", (*SHAPE, 5)))
    assert load(tmp_path, 5).channels == 5
    fault = "the network takes 3 channels, and the images are float32 of 5 channels: write the images with as many, or"
    with pytest.raises(ValueError, match=fault):
        load(tmp_path, 3)


# --- where arrays are ----------------------------------------------------------------------------------------------


def test_archives_tables_and_classes_hold_arrays(tmp_path):
    images = [numbers("float32", seed=seed) for seed in range(4)]
    for index, array in enumerate(images):
        write(tmp_path / "folder" / "ab"[index % 2] / str(index), array)
        (tmp_path / "folder" / "ab"[index % 2] / str(index) / "0.npy").rename(
            tmp_path / "folder" / "ab"[index % 2] / f"{index}.npy"
        )
        (tmp_path / "folder" / "ab"[index % 2] / str(index)).rmdir()
    files = sorted((tmp_path / "folder").rglob("*.npy"))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(tmp_path / "folder"))
    lines = "".join(f"{file.relative_to(tmp_path)},{file.parent.name}\n" for file in files)
    (tmp_path / "set.csv").write_text(f"file_name,label\n{lines}")
    rows = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = pyarrow.table({"image": rows, "label": [file.parent.name for file in files]})
    pyarrow.parquet.write_table(table, tmp_path / "set.parquet")
    for name in ("folder", "set.zip", "set.csv", "set.parquet"):
        loaded = load(tmp_path / name, class_conditional=True)
        assert loaded.labels.names == ("a", "b") and loaded.labels.of_images.tolist() == [0, 0, 1, 1]
        for image, number in zip(loaded.images, (0, 2, 1, 3), strict=True):
            np.testing.assert_allclose(image, scaled(images[number], 0, 1), atol=2e-7)
    streamed = load(tmp_path / "set.parquet", streaming=True)
    np.testing.assert_allclose(streamed.images[3], scaled(images[3], 0, 1), atol=2e-7)


def test_arrays_beside_pictures_are_not_images(tmp_path, caplog):
    write(tmp_path, numbers("float32"))
    picture().save(tmp_path / "a.png")
    with caplog.at_level(logging.INFO):
        assert load(tmp_path).images.shape == (1, 1, 8, 8)
    assert "no images: 1 .npy" in caplog.text and "are left out" not in caplog.text
    write(tmp_path, *(numbers("float32") for _ in range(3)))
    assert load(tmp_path).images.shape == (1, 1, 8, 8)
    assert "3 .npy files in" in caplog.text and "such as" in caplog.text and "a.png: move these else" in caplog.text


def test_arrays_beside_a_table_that_names_none(tmp_path):
    write(tmp_path, *(numbers("float32") for _ in range(2)))
    (tmp_path / "notes.json").write_text('[{"n": 1}]')
    with pytest.raises(ValueError, match=r"holds images; .* 2 .npy files, such as 0.npy, pass it as --train_data_dir"):
        load(tmp_path)
    config = DataConfig(train_data_dir=str(tmp_path))
    assert data.load_data(config, None, None).images.shape == (2, 1, *SHAPE)


def test_metadata_of_arrays_are_a_table(tmp_path):
    write(tmp_path, numbers("float32"))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.npy,a\n")
    with pytest.raises(ValueError, match=r"holds arrays, of which .*metadata.csv is the table: pass it as --dataset_"):
        load(tmp_path)
    assert load(tmp_path / "metadata.csv").images.shape == (1, 1, *SHAPE)


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("png", "uint16"), ("tiff", "uint16"), ("pgm", "uint16"), ("tiff", "float32"), ("pfm", "float32")],
)
def test_deep_pictures_keep_their_depth(tmp_path, suffix, dtype):
    image = numbers(dtype)
    Image.fromarray(image).save(tmp_path / f"a.{suffix}", format="PPM" if suffix in ("pgm", "pfm") else None)
    loaded = load(tmp_path)
    np.testing.assert_allclose(loaded.images[0], scaled(image, *RANGES[dtype]), atol=2e-7)


def tiff(samples, bits, form, size, order):
    """A TIFF of one band by its tags alone: so many bits for a sample, whose format is 1 (unsigned) or 2 (signed)."""
    width, height = size
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: height}
    tags |= {279: len(samples), 339: form}
    found = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    found += b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return found + struct.pack(order + "I", 0) + samples


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32"])
def test_the_type_of_a_tiff_is_that_of_its_tags(tmp_path, dtype, order):
    if dtype == "uint32":
        pytest.importorskip("tifffile")  # PIL does not read them in the other order
    bounds = np.iinfo(dtype)
    image = np.random.default_rng(0).integers(bounds.min, bounds.max, SHAPE, dtype, endpoint=True)
    image.flat[:2] = bounds.min, bounds.max
    form = 1 if dtype.startswith("u") else 2
    samples = image.astype(image.dtype.newbyteorder(order)).tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(samples, bounds.bits, form, SHAPE[::-1], order))
    if bounds.bits == 32:
        with pytest.raises(ValueError, match=f"the images are {dtype} of 1 channels: say with --value_range LOW HIGH"):
            load(tmp_path)
    wanted = [bounds.min, bounds.max] if bounds.bits == 32 else None
    loaded = load(tmp_path, value_range=wanted)
    np.testing.assert_allclose(loaded.images[0], scaled(image, bounds.min, bounds.max), atol=2e-7)


def test_tiff_of_12_bits_has_the_range_of_12_bits(tmp_path):
    image = np.random.default_rng(0).integers(0, 2**12, SHAPE)
    image.flat[:2] = 0, 4095
    bits = "".join(f"{value:012b}" for value in image.ravel())
    samples = int(bits, 2).to_bytes(len(bits) // 8, "big")
    (tmp_path / "a.tif").write_bytes(tiff(samples, 12, 1, SHAPE[::-1], "<"))
    loaded = load(tmp_path)
    np.testing.assert_allclose(loaded.images[0], scaled(image, 0, 4095), atol=2e-7)
    assert loaded.value_range == (0, 4095)


def test_deep_pictures_have_no_transparent_colour(tmp_path, caplog):
    Image.fromarray(numbers("uint16")).save(tmp_path / "a.png", transparency=5)
    with Image.open(tmp_path / "a.png") as image:
        assert image.has_transparency_data
    with caplog.at_level(logging.INFO):
        load(tmp_path)
    assert "1 images" in caplog.text and "transparent" not in caplog.text


def test_rgba_as_four_channels_where_the_network_asks_for_it(tmp_path, caplog):
    array = numbers("uint8", (*SHAPE, 4))
    Image.fromarray(array).save(tmp_path / "a.png")
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(load(tmp_path, 4).images[0].permute(1, 2, 0), array)
    assert "which become" not in caplog.text and load(tmp_path).channels == 3
    with pytest.raises(
        ValueError, match="network takes 2 channels, pictures have 1 or 3, or 4 with their transparency"
    ):
        load(tmp_path, 2)


def test_a_run_on_rgba(tmp_path, inputs):
    for seed in range(22):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(numbers("uint8", (8, 8, 4), seed)).save(tmp_path / "set" / f"{seed}.png")
    flags = ("--dataset_name", tmp_path / "set", "--model.in_channels", 4, "--max_train_steps", 2)
    run_main(inputs, tmp_path / "model", *flags, "--eval_steps", 2, "--eval_num_images", 20)
    results = json.loads((tmp_path / "model" / "results.json").read_text())
    assert results["dataset"]["channels"] == 4 and results["evaluations"][0]["kernel_distance"] > 0
    own = ScratchDDPMPipeline.from_pretrained(tmp_path / "model")
    own.set_progress_bar_config(disable=True)
    flags = ["--num_images", "3", "--num_inference_steps", "2", "--mixed_precision", "no"]
    sample.main([str(tmp_path / "model"), *flags, "--out", str(tmp_path / "a.png")])
    how = {"generator": [random_streams.generator(0, "sample", number) for number in range(3)]}
    images = own(3, num_inference_steps=2, **how).images
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.mode == "RGBA" and grid.size == (32, 32)
        for number, image in enumerate(images):
            left, top = number % 2 * 16, number // 2 * 16
            part = grid.crop((left, top, left + 16, top + 16)).resize((8, 8), Image.Resampling.NEAREST)
            np.testing.assert_array_equal(np.asarray(part), np.asarray(image))
    with pytest.raises(ValueError, match="JPEG has no transparency"):
        sample.main([str(tmp_path / "model"), "--out", str(tmp_path / "a.jpg")])


# --- TIFF of several bands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("how", ["contig", "separate"])
@pytest.mark.parametrize("bands", [2, 5])
def test_bands_of_a_tiff_are_channels(tmp_path, dtype, how, bands):
    tifffile = pytest.importorskip("tifffile")
    image = numbers(dtype, (*SHAPE, bands))
    written = image if how == "contig" else np.ascontiguousarray(np.moveaxis(image, -1, 0))
    tifffile.imwrite(tmp_path / "a.tif", written, photometric="minisblack", planarconfig=how)
    loaded = load(tmp_path)
    expected = scaled(image, *RANGES[dtype])
    np.testing.assert_allclose(loop.to_unit_range(loaded.images[0]), expected, atol=2e-7)


def test_signed_tiff_of_one_band(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    image = numbers("int16")
    tifffile.imwrite(tmp_path / "a.tif", image)
    np.testing.assert_allclose(load(tmp_path).images[0], scaled(image, *RANGES["int16"]), atol=2e-7)


def test_pages_of_a_deep_tiff_are_no_channels(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", numbers("float32", (5, *SHAPE)))
    with pytest.raises(BadImages, match=r"a.tif\) cannot be read: its axes are QYX \[5, 8, 12\]: it must be one page"):
        load(tmp_path)


@pytest.mark.parametrize("extra", [1, 2])
def test_bands_that_pil_leaves_out_are_told(tmp_path, caplog, extra):
    tifffile = pytest.importorskip("tifffile")
    image = numbers("uint8", (*SHAPE, 3 + extra))
    options = {"photometric": "rgb", "planarconfig": "contig", "extrasamples": [0] * extra}
    tifffile.imwrite(tmp_path / "a.tif", image, **options)
    np.testing.assert_array_equal(load(tmp_path).images[0].permute(1, 2, 0), image[..., :3])
    assert "1 of 1 images looked at have more bands than the colours that are read: write them as .npy" in caplog.text


@pytest.mark.parametrize(("other", "told"), [((5, 7), True), ((4, 6), False)], ids=["another image", "an overview"])
def test_pages_of_other_shapes_are_told(tmp_path, caplog, other, told):
    tifffile = pytest.importorskip("tifffile")
    image = numbers("float32", (*SHAPE, 5))
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for pixels in (image, numbers("float32", (*other, 5))):
            file.write(pixels, photometric="minisblack", planarconfig="contig", metadata=None)
    np.testing.assert_allclose(load(tmp_path).images[0], scaled(image, 0, 1), atol=2e-7)
    words = "1 of 1 images looked at have several frames or pages, of which the first is taken"
    assert (words in caplog.text) is told


def test_without_tifffile_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + bytes(60))
    with pytest.raises(BadImages, match=r'a.tif\) cannot be read: .*pip install "ddpm-from-scratch\[train\]"'):
        load(tmp_path)
    with pytest.raises(BadImages, match=r"none of 1 images can be read; the last: .*a.tif\)"):
        load(tmp_path, skip_bad_images=True)


@pytest.mark.filterwarnings("ignore")  # PIL's, of files that end early
def test_damaged_tiff_is_refused_by_name(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, numbers("float32", (*SHAPE, 5)), photometric="minisblack", planarconfig="contig")
    whole = buffer.getvalue()
    for length in range(4, len(whole), 97):
        (tmp_path / "a.tif").write_bytes(whole[:length])
        with pytest.raises(BadImages, match=r"a.tif\) cannot be read"):
            load(tmp_path)


# --- from the file to the sample -----------------------------------------------------------------------------------

DOWN, UP = ["DownBlock2D"] * 3, ["UpBlock2D"] * 3
WIDE = {"block_out_channels": [8] * 3, "down_block_types": DOWN, "up_block_types": UP, "add_attention": False}


@pytest.fixture(scope="module", params=[1, 5])
def deep_run(request, tmp_path_factory, inputs):
    """A set of 64 x 128 float arrays, and a run on it: the folder, the flags and the channels."""
    folder = tmp_path_factory.mktemp("deep")
    shape = (64, 128) if request.param == 1 else (64, 128, request.param)
    for name, seeds in {"set": range(24), "other": range(24, 46)}.items():
        write(folder / name, *(numbers("float32", shape, seed) ** (1 + seed % 3) for seed in seeds))
    preset = folder / "deep.yaml"
    options = {"dataset_name": str(folder / "set"), "max_train_steps": 4, "checkpointing_steps": 2, "log_steps": 1}
    model = {**TINY["model"], **WIDE}
    preset.write_text(yaml.safe_dump({**TINY, **options, "model": model, "lr_scheduler": "constant"}))
    run_main(type(inputs)(preset=str(preset)), folder / "model")
    return type(inputs)(folder=folder, preset=str(preset), model=folder / "model", channels=request.param)


def test_a_run_goes_on_bit_for_bit(deep_run, tmp_path):
    run_main(deep_run, tmp_path / "parts", "--max_train_steps", 2)
    run_main(deep_run, tmp_path / "parts")
    assert_equal(checkpoint_tensors(tmp_path / "parts", 4), checkpoint_tensors(deep_run.model, 4))
    described = json.loads((deep_run.model / "results.json").read_text())["dataset"]
    assert (described["channels"], described["resolution"]) == (deep_run.channels, "64x128")
    with Image.open(deep_run.model / "samples.png") as grid:
        assert grid.mode == "L" and grid.size == ((256, 128) if deep_run.channels == 1 else (640, 256))


def test_another_range_is_another_run(deep_run, tmp_path):
    run_main(deep_run, tmp_path / "parts", "--max_train_steps", 2)
    with pytest.raises(ValueError, match="value_range"):
        run_main(deep_run, tmp_path / "parts", "--value_range", 0, 2)


def test_the_bound_is_not_trained_on_other_values(deep_run, tmp_path):
    flags = ("--loss", "vlb", "--ddpm_variance_type", "learned_range")
    with pytest.raises(ValueError, match="loss 'vlb' is the variational bound of the 256 levels of 8-bit images"):
        run_main(deep_run, tmp_path / "model", *flags)
    assert not (tmp_path / "model").exists()


def test_the_range_of_the_training_is_that_of_the_evaluation(deep_run, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    trained = {"dataset": {"value_range": [0, 4]}}
    (tmp_path / "model" / "results.json").write_text(json.dumps(trained))
    flags = ["--dataset_name", str(deep_run.folder / "set")]
    message = r"0 to 4 became -1 to 1 when .* was trained, .* 0 to 1 would: pass --value_range 0 4 for"

    def real(*more):
        config = evaluate.parse([str(tmp_path / "model"), *flags, *more])
        return evaluate.real_images(config, deep_run.channels, (64, 128), []).training

    with pytest.raises(ValueError, match=message):
        real()
    whole = real("--value_range", "0", "1")  # which the user knows better
    np.testing.assert_allclose(real("--value_range", "0", "4"), whole / 4, atol=0.51)
    arguments = calibrate.parse([str(tmp_path / "model"), *flags, "--num_images", "4"])
    with pytest.raises(ValueError, match=message):
        calibrate.training_images(arguments, calibrate.data_config(arguments), deep_run.channels, (64, 128), [])
    of_checkpoint = evaluate_config.trained_range(str(deep_run.model / "checkpoints" / "step_00000004"))
    assert of_checkpoint is None and evaluate_config.trained_range(str(deep_run.model)) == (0, 1)


def test_held_out_images_have_the_range_of_the_training_images(deep_run, tmp_path):
    write(tmp_path / "deeper", *(numbers("uint16", (64, 128, deep_run.channels), seed) for seed in range(20)))
    flags = ["--dataset_name", str(deep_run.folder / "set"), "--test_set", str(tmp_path / "deeper")]
    message = "0 to 1 of the training images become -1 to 1, and 0 to 65535 of the held-out images: say with"
    with pytest.raises(ValueError, match=message):
        evaluate.real_images(evaluate.parse(["model", *flags]), deep_run.channels, (64, 128), [])
    flags = ("--eval_steps", 4, "--eval_num_images", 20, "--test_set", tmp_path / "deeper")
    with pytest.raises(ValueError, match=message):
        run_main(deep_run, tmp_path / "model", *flags)


def test_it_is_evaluated_but_for_the_bound(deep_run, tmp_path, monkeypatch):
    flags = {"dataset_name": deep_run.folder / "set", "test_set": deep_run.folder / "other", "num_images": 20}
    flags |= {"num_inference_steps": 1, "output_dir": tmp_path, "cache_dir": tmp_path / "cache", "size": 32}
    given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with pytest.warns(UserWarning):
        path = evaluate.main([str(deep_run.model), *given, "--no-compile"])
    found = json.loads(path.read_text())["evaluation"]
    assert found["samples"][0]["kernel_distance"] > 0 and "not 8-bit" in found["bound"]["left_out"]
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "neighbors.png").is_file()


def test_stock_diffusers_draws_from_it(deep_run, tmp_path):
    export([str(deep_run.model / "checkpoints" / "step_00000004"), str(tmp_path / "exported")])
    drawn = []
    for options in ({}, {"custom_pipeline": str(tmp_path / "exported"), "trust_remote_code": True}):
        pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "exported"), **options)
        pipeline.set_progress_bar_config(disable=True)
        how = {"batch_size": 2, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        drawn.append(pipeline(output_type="np", **how).images)
        assert drawn[-1].shape == (2, 64, 128, deep_run.channels)
    assert type(DiffusionPipeline.from_pretrained(str(tmp_path / "exported"))) is DDPMPipeline
    own = ScratchDDPMPipeline.from_pretrained(tmp_path / "exported")
    how["generator"].manual_seed(0)
    np.testing.assert_array_equal(own(output_type="np", **how).images, drawn[1])


def test_the_command_draws_channels_side_by_side(deep_run, tmp_path):
    flags = ["--num_images", "2", "--num_inference_steps", "1", "--out", str(tmp_path / "grid.png")]
    sample.main([str(deep_run.model), *flags])
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "L" and grid.size == (128 * deep_run.channels, 128)


def test_an_evaluation_on_the_way_leaves_out_the_bound(deep_run, tmp_path, caplog):
    flags = ("--eval_steps", 4, "--eval_num_images", 20, "--test_set", deep_run.folder / "other")
    run_main(deep_run, tmp_path / "model", "--ddpm_num_inference_steps", 1, *flags)
    (figures,) = json.loads((tmp_path / "model" / "results.json").read_text())["evaluations"]
    assert figures["kernel_distance"] > 0 and "bits_per_dim" not in figures
    assert "the bound of the held-out images is left out: the images are not 8-bit" in caplog.text


def test_calibration_takes_the_full_depth(deep_run, monkeypatch):
    kept = {}
    monkeypatch.setattr(
        calibrate, "calibrate", lambda unet, scheduler, images, **_: kept.update(images=images) or scheduler
    )
    options = ["--dataset_name", str(deep_run.folder / "set"), "--num_images", "24"]
    calibrate.main([str(deep_run.model), *options])
    assert torch.equal(kept["images"], load(deep_run.folder / "set").images)


# --- pipelines, features, previews ---------------------------------------------------------------------------------


def small(channels):
    form = {"in_channels": channels, "out_channels": channels}
    pipeline = ScratchDDPMPipeline(
        randomised(UNet2DModel(**{**TINY_NETWORK, **form})).eval(), ScratchDDPMScheduler(num_train_timesteps=4)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_frames_with_transparent_pixels_do_not_show_those_before(tmp_path):
    frames = [np.zeros((8, 16, 4), np.uint8) for _ in range(3)]
    for number, frame in enumerate(frames):
        frame[:, 4 * number : 4 * number + 4] = (255, 0, 0, 255)
    write_gif([SimpleNamespace(sample=[Image.fromarray(frame)]) for frame in frames], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        for number, frame in enumerate(frames):
            gif.seek(number)
            np.testing.assert_array_equal(np.asarray(gif.convert("RGBA"))[..., 3], frame[..., 3])


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_output_types_for_any_number_of_channels(channels, monkeypatch):
    pipeline = small(channels)
    draw = lambda kind: pipeline(2, torch.Generator().manual_seed(0), output_type=kind).images  # noqa: E731
    as_array, as_tensor = draw("np"), draw("pt")
    assert as_array.shape == (2, 8, 8, channels)
    np.testing.assert_array_equal(as_array, as_tensor.permute(0, 2, 3, 1))
    if channels in (1, 3, 4):
        assert [image.mode for image in draw("pil")] == [{1: "L", 3: "RGB", 4: "RGBA"}[channels]] * 2
        return
    monkeypatch.setattr(pipeline.scheduler, "set_timesteps", lambda *_, **__: pytest.fail("too late"))
    message = f"output_type='pil' has no pictures of {channels} channels: pass 'np' or 'pt'"
    with pytest.raises(ValueError, match=message):
        draw("pil")
    editor = ScratchDDPMImg2ImgPipeline.from_pipe(pipeline)
    with pytest.raises(ValueError, match=message):
        editor(np.zeros((8, 8, channels), np.uint8))


def test_editing_of_any_number_of_channels():
    image = np.random.default_rng(0).random((2, 8, 8, 5), np.float32)
    edited = ScratchDDPMImg2ImgPipeline.from_pipe(small(5))(image, 0.5, output_type="np").images
    assert edited.shape == image.shape and not np.allclose(edited, image)
    rgba = Image.fromarray(numbers("uint8", (8, 8, 4)))
    assert ScratchDDPMImg2ImgPipeline.from_pipe(small(4))(rgba, 0.5).images[0].mode == "RGBA"


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_features_of_other_channels_are_those_of_each(channels):
    images = numbers("uint8", (3, 8, 8, channels))
    found = extract(images, size=32)
    each = [extract(np.ascontiguousarray(images[..., c]), size=32).values for c in range(channels)]
    np.testing.assert_allclose(found.values, np.concatenate(each, axis=1), atol=1e-5)
    assert found.values.shape == (3, 1280 * channels) and found.size == 32


def test_pictures_of_any_number_of_channels():
    for channels in (1, 2, 3, 4, 5):
        images = numbers("uint8", (2, 8, 12, channels))
        pictures = to_pil(images)
        if channels in (2, 5):
            expected = np.concatenate([images[1, :, :, c] for c in range(channels)], axis=1)
        else:
            expected = images[1, :, :, 0] if channels == 1 else images[1]
        np.testing.assert_array_equal(np.asarray(pictures[1]), expected)


def test_rounding_to_8_bits():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(arrays.to_8_bits(loop.to_unit_range(levels)), levels)
    assert torch.equal(arrays.to_8_bits(levels), levels)
    assert arrays.to_8_bits(torch.tensor([-1.0, 1.0, 0.0])).tolist() == [0, 255, 128]


def test_arrays_with_channels_first_are_refused_with_the_remedy(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.zeros((5, 32, 32), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"0\.npy.*\[5, 32, 32\].*as if the channels stood first.*numpy\.moveaxis"):
        data.load_data(DataConfig(train_data_dir=str(tmp_path)), None, None)
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.zeros((32, 32, 5), dtype=np.uint8))
    assert data.load_data(DataConfig(train_data_dir=str(tmp_path)), None, None).channels == 5


def as_png(pixels):
    Image.fromarray(pixels.squeeze()).save(buffer := io.BytesIO(), "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_several_columns_are_the_channels_of_one_image(tmp_path):
    rng = np.random.default_rng(0)
    sets = {name: rng.integers(0, 256, (6, 8, 8, count), dtype=np.uint8) for name, count in (("rgb", 3), ("nir", 1))}
    table = {name: [as_png(image) for image in pixels] for name, pixels in sets.items()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "bands.parquet")

    def load(columns, **options):
        config = DataConfig(dataset_name=str(tmp_path / "bands.parquet"), image_column=columns, **options)
        return data.load_data(config, None, None)

    loaded = load("rgb, nir")
    expected = np.concatenate([sets["rgb"], sets["nir"]], axis=3)
    assert loaded.channels == 4
    np.testing.assert_array_equal(torch.stack([*loaded.images]).permute(0, 2, 3, 1).numpy(), expected)
    with pytest.raises(ValueError, match="no image_column 'nr'; did you mean 'nir'"):
        load("rgb,nr")
    with pytest.raises(ValueError, match="several columns are not streamed"):
        load("rgb,nir", streaming=True)


def test_columns_of_different_sizes_are_no_image(tmp_path):
    table = {name: [as_png(np.zeros((side, side), np.uint8))] * 3 for name, side in {"a": 8, "b": 16}.items()}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "bands.parquet")
    config = DataConfig(dataset_name=str(tmp_path / "bands.parquet"), image_column="a,b")
    with pytest.raises(BadImages, match="image 0 cannot be read: its columns differ in type or size: uint8 8x8, uint8"):
        data.load_data(config, None, None)
