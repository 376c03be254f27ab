"""Images that are not square: read, cropped, trained on, measured, edited and drawn in their own shape."""

import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from PIL import Image, ImageOps, PngImagePlugin

import drawing
from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.data import dataset as data
from ddpm_from_scratch.data import images, sizes
from ddpm_from_scratch.data.config import DataConfig
from ddpm_from_scratch.evaluation import calibrate, evaluate
from ddpm_from_scratch.hub import model_card
from ddpm_from_scratch.runtime.errors import BadImages
from ddpm_from_scratch.runtime.random_streams import generator
from ddpm_from_scratch.sampling.editing import ScratchDDPMImg2ImgPipeline, ScratchDDPMInpaintPipeline
from ddpm_from_scratch.sampling.previews import image_grid
from ddpm_from_scratch.training import config, run
from ddpm_from_scratch.training.arguments import parse
from helpers.networks import TINY_NETWORK, randomised
from helpers.paths import ROOT
from helpers.runs import STEPS, TINY, assert_equal, checkpoint_tensors, picture, run_main, write_parquet

HEIGHT, WIDTH = 8, 16
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6


def load(path, resolution=None, **options):
    wanted = DataConfig(dataset_name=str(path), resolution=resolution, **options)
    wanted.validate()
    return data.load_data(wanted, None, wanted.size)


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [64, "64", (64, 64), [64, 64], "64x64"])
def test_a_square_by_all_its_names(given):
    assert sizes.as_size(given) == (64, 64) and sizes.resolution_of((64, 64)) == 64


@pytest.mark.parametrize("given", ["64x128", (64, 128), [64, 128], "[64,128]", "[64, 128]"])
def test_height_comes_before_width(given):
    assert sizes.as_size(given) == (64, 128) and sizes.resolution_of((64, 128)) == "64x128"


@pytest.mark.parametrize(
    "wrong", ["", "x", "64x", "64 x 128", "1x2x3", "0x8", 0, -8, 8.0, True, (8,) * 3, [8, "8"], ()]
)
def test_what_is_no_size_is_refused(wrong):
    with pytest.raises(ValueError, match="a side such as 64, or height x width such as 64x128"):
        sizes.as_size(wrong)
    assert not sizes.is_size(wrong)


@pytest.mark.parametrize("given", ["8x16", 8])
def test_the_flag_and_the_preset_say_the_same(tmp_path, given):
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump({**TINY, "resolution": given}))
    by_preset, by_flag = parse([str(preset)])[0], parse([str(preset), "--resolution", str(given)])[0]
    again = tmp_path / "again.yaml"
    again.write_text(by_flag.to_yaml())
    assert by_preset == by_flag == parse([str(again)])[0] and by_flag.resolution == given


# --- reading and cropping ------------------------------------------------------------------------------------------


def test_images_of_one_size_are_taken_in_it(tmp_path):
    images = [picture("RGB", (WIDTH, HEIGHT), seed) for seed in range(3)]
    loaded = load(write_parquet(tmp_path / "wide.parquet", images))
    assert loaded.size == (HEIGHT, WIDTH) and loaded.resolution == "8x16"
    for index, image in enumerate(images):
        stream = data.ImageStream(loaded, 0, False, False)
        np.testing.assert_array_equal(stream.data.images[index].permute(1, 2, 0).numpy(), np.asarray(image))
    assert loaded.describe(DataConfig())["resolution"] == "8x16"


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_images_that_lie_on_a_side_are_taken_upright(tmp_path, kind):
    picture("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"a.{kind.lower()}", exif=SIDEWAYS)
    with Image.open(tmp_path / f"a.{kind.lower()}") as image:
        upright = ImageOps.exif_transpose(image)
    assert upright.size == (HEIGHT, WIDTH)
    loaded = load(tmp_path)
    assert loaded.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(loaded.images[0].permute(1, 2, 0).numpy(), np.asarray(upright))


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TEXT = PngImagePlugin.PngInfo()
TEXT.add_itxt("XML:com.adobe.xmp", XMP)
RAW = PngImagePlugin.PngInfo()
RAW.add_text("Raw profile type exif", f"\nexif\n{len(SIDEWAYS.tobytes())}\n{SIDEWAYS.tobytes().hex()}\n", zip=True)
ORIENTED = {
    "XMP in JPEG": ("JPEG", {"xmp": XMP.encode()}),
    "XMP in WebP": ("WEBP", {"xmp": XMP.encode()}),
    "XMP in TIFF": ("TIFF", {"tiffinfo": {700: XMP.encode()}}),
    "XMP in PNG": ("PNG", {"pnginfo": TEXT}),
    "EXIF as text of PNG": ("PNG", {"pnginfo": RAW}),
}


@pytest.mark.parametrize("name", ORIENTED)
def test_orientations_outside_of_exif_are_surveyed_too(tmp_path, name):
    kind, options = ORIENTED[name]
    picture("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"a.{kind.lower()}", **options)
    with Image.open(tmp_path / f"a.{kind.lower()}") as image:
        upright = ImageOps.exif_transpose(image)
    assert upright.size == (HEIGHT, WIDTH)
    loaded = load(tmp_path)
    assert loaded.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(loaded.images[0].permute(1, 2, 0).numpy(), np.asarray(upright))


@pytest.mark.parametrize("array", [False, True])
def test_images_that_would_be_too_large_are_refused(tmp_path, monkeypatch, array):
    """A line of one pixel that is to cover 512 x 8 pixels would have 33 million columns."""
    line = np.zeros((1, 2**16 - 1), np.uint8)
    np.save(tmp_path / "a.npy", line) if array else Image.fromarray(line).save(tmp_path / "a.png")
    message = "an image of 1x65535 pixels .* is to cover 512x8 becomes 512x33553920, more than 178,956,970 pixels: crop"
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", lambda *_: pytest.fail("too late"))
        with pytest.raises(ValueError, match=f"^{message}"):
            load(tmp_path, "512x8")
    loaded = load(tmp_path, "512x8", skip_bad_images=True)
    with pytest.raises(BadImages, match=f"none of 1 images can be read; the last: image 0 .* be read: {message}"):
        data.ImageStream(loaded, 0, True, False, skip_bad_images=True).load(0)
    assert load(tmp_path, "1x8").images.shape == (1, 1, 1, 2**16 - 1)


@pytest.mark.parametrize("target", ["8x16", "16x8", "8x8", "24x8", 16])
@pytest.mark.parametrize("own", [(16, 32), (31, 17), (9, 40)])
def test_an_image_covers_the_target_and_no_more(tmp_path, target, own):
    image = picture("RGB", own[::-1])
    loaded = load(write_parquet(tmp_path / "one.parquet", [image]), target)
    height, width = loaded.images.shape[2:]
    assert height >= loaded.size[0] and width >= loaded.size[1]
    assert height == loaded.size[0] or width == loaded.size[1]
    assert abs(height / width - own[0] / own[1]) < 0.13 * own[0] / own[1]  # its shape, but for whole pixels
    expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(loaded.images[0].permute(1, 2, 0).numpy(), expected)


def square_crop(image, seed, position, size, center, flip):
    """The crop of a square and its flip, as version 0.1 had them."""
    top, left, mirror = torch.rand(3, generator=generator(seed, "augment", position)).tolist()
    if center:
        top = left = 0.5
    top, left = (int(u * (side - size + 1)) for u, side in zip((top, left), image.shape[1:], strict=True))
    image = image[:, top : top + size, left : left + size]
    return image.flip(2) if flip and mirror < 0.5 else image


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_crops_of_squares_are_what_they_were(tmp_path, center, flip):
    images = [picture(size=size, seed=size[0]) for size in ((8, 8), (16, 12), (9, 30))]
    loaded = load(write_parquet(tmp_path / "mixed.parquet", images), 8)
    for decoded, image in zip(loaded.images, images, strict=True):
        scale = 8 / min(image.size)
        width, height = (max(8, round(side * scale)) for side in image.size)
        resized = image if min(image.size) == 8 else image.resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(decoded[0].numpy(), np.asarray(resized))
    stream = data.ImageStream(loaded, 3, center, flip)
    for position in range(12):
        image = loaded.images[loaded.index_at(3, position)]
        assert torch.equal(stream[position], square_crop(image, 3, position, 8, center, flip))


def test_random_crops_reach_every_place_and_centred_ones_the_middle(tmp_path):
    columns = np.broadcast_to(np.arange(24, dtype=np.uint8) * 10, (8, 24))
    loaded = load(write_parquet(tmp_path / "one.parquet", [Image.fromarray(columns)]), "8x16")
    random = data.ImageStream(loaded, 0, False, False)
    assert {int(random[position][0, 0, 0]) // 10 for position in range(300)} == set(range(9))
    assert int(data.ImageStream(loaded, 0, True, False)[0][0, 0, 0]) // 10 == 4
    assert torch.equal(sizes.center_crop(loaded.images[0], (8, 16)), loaded.images[0][:, :, 4:20])


# --- training ------------------------------------------------------------------------------------------------------


def flags_of(parquet, **more):
    options = {"dataset_name": parquet, "checkpointing_steps": 5, "eval_batch_size": 3, **more}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    images = [picture("L", (WIDTH, HEIGHT), seed) for seed in range(24)]
    return str(write_parquet(folder / "wide.parquet", images))


@pytest.fixture(scope="module")
def trained(wide, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    run_main(inputs, folder, *flags_of(wide))
    return folder


def test_a_run_on_them_goes_on_bit_for_bit(wide, inputs, trained, tmp_path):
    run_main(inputs, tmp_path / "parts", *flags_of(wide, max_train_steps=5, lr_scheduler="constant"))
    whole = tmp_path / "whole"
    run_main(inputs, whole, *flags_of(wide, lr_scheduler="constant"))
    run_main(inputs, tmp_path / "parts", *flags_of(wide, lr_scheduler="constant"))
    assert_equal(checkpoint_tensors(tmp_path / "parts"), checkpoint_tensors(whole))
    assert json.loads((whole / "results.json").read_text())["dataset"]["resolution"] == "8x16"


def test_stock_diffusers_draws_them(trained):
    assert json.loads((trained / "unet" / "config.json").read_text())["sample_size"] == [HEIGHT, WIDTH]
    for options in ({}, {"custom_pipeline": str(trained), "trust_remote_code": True}):
        pipeline = DiffusionPipeline.from_pretrained(str(trained), **options)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
        assert [image.size for image in images] == [(WIDTH, HEIGHT)] * 2
    assert type(DiffusionPipeline.from_pretrained(str(trained))) is DDPMPipeline


def test_the_grid_is_nearly_square_and_shows_them_whole(trained):
    with Image.open(trained / "samples.png") as grid:
        assert grid.size == (2 * WIDTH * 2, 2 * HEIGHT * 2)  # 3 images in two columns, enlarged
    for count, columns in {1: 1, 8: 2, 9: 3, 64: 6}.items():
        grid = image_grid([Image.new("L", (200, 100))] * count)
        assert grid.size == (200 * columns, 100 * -(-count // columns))
    assert image_grid([Image.new("L", (100, 200))]).size == (100, 200)  # without an empty column
    assert image_grid([Image.new("L", (10, 80))] * 3).size == (30, 80)


def test_a_dry_run_says_their_shape(wide, inputs, tmp_path, capsys):
    run_main(inputs, tmp_path / "none", "--dry_run", *flags_of(wide))
    assert "image: 1 x 8 x 16\n" in capsys.readouterr().out


def test_a_trained_model_goes_on_in_another_shape(wide, inputs, trained, tmp_path):
    flags = flags_of(wide, model_config_name_or_path=trained, resolution="16x16", max_train_steps=2)
    run_main(inputs, tmp_path / "finer", *flags)
    assert ScratchDDPMPipeline.from_pretrained(tmp_path / "finer").unet.config.sample_size == 16


def test_an_evaluation_on_the_way(wide, inputs, tmp_path):
    flags = flags_of(wide, eval_steps=STEPS, eval_num_images=20, test_set=wide)
    run_main(inputs, tmp_path / "model", *flags)
    (figures,) = json.loads((tmp_path / "model" / "results.json").read_text())["evaluations"]
    assert figures["kernel_distance"] > 0 and figures["bits_per_dim"] > 0


def test_a_side_that_the_network_cannot_halve(wide):
    odd = config.TrainingConfig(**{**TINY, "dataset_name": wide, "resolution": "8x10"})
    odd.validate()  # 10 is even, which is enough for two levels
    deep = {**TINY["model"], "block_out_channels": [8, 8, 8], "down_block_types": ["DownBlock2D"] * 3}
    with pytest.raises(ValueError, match="resolution 8x10 does not allow: it must be a multiple of 4"):
        config.TrainingConfig(**{**TINY, "model": deep, "dataset_name": wide, "resolution": "8x10"}).validate()
    deep["up_block_types"] = ["UpBlock2D"] * 3
    narrow = config.TrainingConfig(**{**TINY, "model": {**deep, "sample_size": [8, 12]}, "dataset_name": wide})
    narrow.validate()
    assert run.build_inputs(narrow, run.build_accelerator(narrow))[-1].size == (8, 12)


# --- measuring -----------------------------------------------------------------------------------------------------


def test_an_evaluation(wide, trained, tmp_path):
    flags = ["--dataset_name", wide, "--test_set", wide, "--num_images", "20", "--num_inference_steps", "2"]
    flags += ["--num_bound_images", "2", "--num_terms", "2", "--output_dir", str(tmp_path), "--no-compile"]
    flags += ["--cache_dir", str(tmp_path / "cache"), "--images_dir", str(tmp_path / "images")]
    with pytest.raises(ValueError, match="half of the held-out images are in the training set"):
        evaluate.main([str(trained), *flags])
    other = write_parquet(tmp_path / "other.parquet", [picture(size=(WIDTH, HEIGHT), seed=s) for s in range(99, 120)])
    flags[flags.index("--test_set") + 1] = str(other)
    with pytest.warns(UserWarning):
        found = json.loads(evaluate.main([str(trained), *flags]).read_text())["evaluation"]
    assert found["samples"][0]["kernel_distance"] > 0 and found["bound"]["bits_per_dim"] > 0
    assert found["images"]["training"]["resolution"] == "8x16"
    with np.load(tmp_path / "images" / "steps-2.npz") as kept:
        assert kept["images"].shape == (20, HEIGHT, WIDTH, 1)
    with Image.open(tmp_path / "neighbors.png") as pairs:
        assert pairs.width / pairs.height == 16 * WIDTH / (2 * HEIGHT)


def test_calibration(wide, trained, tmp_path):
    model = tmp_path / "model"
    ScratchDDPMPipeline.from_pretrained(trained).save_pretrained(model)
    calibrate.main([str(model), "--dataset_name", wide, "--num_images", "4", "--num_timesteps", "3"])
    assert len(ScratchDDPMPipeline.from_pretrained(model).scheduler.config.x_0_mse) == 3


# --- pipelines -----------------------------------------------------------------------------------------------------


def small(**changes):
    unet = randomised(UNet2DModel(**{**TINY_NETWORK, **changes})).eval()
    pipeline = ScratchDDPMPipeline(unet, ScratchDDPMScheduler(num_train_timesteps=4))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, **options):
    return pipeline(generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


def test_height_and_width_of_a_call_are_those_of_such_a_network():
    expected = drawn(small(sample_size=(12, 20)))
    assert expected.shape == (1, 1, 12, 20)
    assert torch.equal(drawn(small(), height=12, width=20), expected)
    assert torch.equal(drawn(small(sample_size=None), height=12, width=20), expected)
    assert drawn(small(), width=12).shape == (1, 1, 8, 12) and drawn(small(), height=12).shape == (1, 1, 12, 8)


@pytest.mark.parametrize("wrong", [9, 0, -8, 8.0, "8", True])
@pytest.mark.parametrize("name", ["height", "width"])
def test_sides_that_cannot_be_drawn_are_refused_before_any_work(name, wrong, monkeypatch):
    pipeline = small()
    monkeypatch.setattr(pipeline.scheduler, "set_timesteps", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(ValueError, match=f"{name}={wrong!r} must be a multiple of 2: .* halves its input 1 times"):
        pipeline(**{name: wrong})


def test_editing():
    base = small(sample_size=(HEIGHT, WIDTH))
    image = picture(size=(WIDTH, HEIGHT))
    assert ScratchDDPMImg2ImgPipeline.from_pipe(base)(image, 0.5).images[0].size == (WIDTH, HEIGHT)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, WIDTH // 2 :] = 255
    painter = ScratchDDPMInpaintPipeline.from_pipe(base)
    painted = painter(image, Image.fromarray(mask), jump_length=1, jump_n_sample=1, num_inference_steps=4).images[0]
    same = np.asarray(painted) == np.asarray(image)
    assert same[:, : WIDTH // 2].all() and not same[:, WIDTH // 2 :].all()


def test_a_network_without_a_size_says_what_to_do():
    base, words = (
        small(sample_size=None),
        "has no sample_size: set it to the side of the images or to .height, width., or",
    )
    for pipeline, arguments in ((base, ()), (ScratchDDPMImg2ImgPipeline.from_pipe(base), (picture(), 0.5))):
        with pytest.raises(ValueError, match=f"{words} pass height and width where the pipeline takes them"):
            pipeline(*arguments)


def test_the_page_and_the_demo_say_their_shape(trained, tmp_path):
    pipeline = ScratchDDPMPipeline.from_pretrained(trained)
    page = model_card.model_page(pipeline, trained, "user/wide", ROOT / "model_card.md").content
    assert "of 8 × 16 grey images" in page and "24 images, 8 × 16, 1 channel" in page
    assert "resize=112" not in page  # which would make squares of them
    pipeline.set_progress_bar_config(disable=True)
    assert "grey images of 16 × 8 pixels" in drawing.describe(pipeline)
    assert drawing.fitted(pipeline, picture("RGB", (50, 50))).size == drawing.example(pipeline).size == (WIDTH, HEIGHT)


LARGE = "pixels large (height x width); they are resized until they just cover"
BEYOND = "what lies beyond it, up to {}% of an image, is cropped"
SMALLER = "images of 1 of the 3 sizes are smaller than that and are enlarged"


@pytest.mark.parametrize(
    ("found", "target", "words"),
    [
        ({(64, 64)}, (64, 64), None),
        ({(128, 128)}, (64, 64), f"the images are 128 {LARGE} 64x64"),
        ({(100, 200)}, (50, 50), f"the images are 100x200 {LARGE} 50x50; {BEYOND.format(50)}"),
        (
            {(32, 32), (64, 64), (64, 96)},
            (64, 64),
            f"the images are from 32 to 64x96 {LARGE} 64x64; {BEYOND.format(33)}; {SMALLER}",
        ),
    ],
)
def test_what_becomes_of_the_images_is_said(found, target, words):
    assert sizes.describe_fit(found, target) == words
