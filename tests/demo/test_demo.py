"""demo/app.py: its functions on tiny networks, its command, and its page in a browser.

`PYTHONPATH=demo python tests/test_demo.py` makes docs/figures/demo.png, a picture of the page.
"""

import asyncio
import contextlib
import io
import itertools
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel, UniPCMultistepScheduler
from gradio_client import Client
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import app
import drawing
from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.sampling.editing import ScratchDDPMInpaintPipeline
from helpers.networks import TINY_NETWORK, randomised
from helpers.paths import ROOT

# Gradio changes tqdm's class; bars of earlier tests may be closed, as garbage, only after that.
tqdm.tqdm._progress = None

NAMES = {0: "Sneaker", 1: "Bag", 2: "Dress", 3: "T-shirt/top"}
STEPS = 4


def tiny_pipeline(scheduler=None, id2label=None, **changes):
    unet = randomised(UNet2DModel(**{**TINY_NETWORK, **changes})).eval()
    return ScratchDDPMPipeline(unet, scheduler or DDPMScheduler(num_train_timesteps=20), id2label=id2label)


def plain_pipeline():
    return tiny_pipeline()


def named_pipeline():
    return tiny_pipeline(num_class_embeds=5, id2label=NAMES)


def colour_pipeline():
    return tiny_pipeline(in_channels=3, out_channels=3)


def every_label_a_class():
    return tiny_pipeline(num_class_embeds=5, id2label={**NAMES, 4: "Coat"})


def config_of(pipeline):
    async def build():  # inside a running loop, since gradio would make loops that it does not close
        return app.build_app(pipeline, "model").get_config_file()

    return asyncio.run(build())


@pytest.fixture
def plain():
    return plain_pipeline()


@pytest.fixture
def named():
    return named_pipeline()


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def noise_image(pipeline, seed=0):
    shape = (8, 8) if pipeline.unet.config.in_channels == 1 else (8, 8, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def half_mask():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:4] = 255
    return Image.fromarray(mask)


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", drawing.SAMPLERS)
@pytest.mark.parametrize("make", [plain_pipeline, named_pipeline, colour_pipeline])
def test_the_same_seed_gives_the_same_images(make, sampler):
    pipeline = make()
    first, again, other = (pixels(drawing.generate(pipeline, seed, 3, STEPS, sampler)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert first.std() > 10 and (first != other).any()
    # An image by itself is that of its own seed; batches of other sizes may round differently.
    assert np.abs(first[1:].astype(int) - other[:2]).max() <= 1


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("DDPM", ScratchDDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing")),
        ("DDIM", ScratchDDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing", eta=0.0)),
        ("DPM-Solver++", DPMSolverMultistepScheduler(num_train_timesteps=20, timestep_spacing="trailing")),
        ("UniPC", UniPCMultistepScheduler(num_train_timesteps=20, timestep_spacing="trailing")),
    ],
)
def test_images_are_those_of_the_pipeline(named, sampler, scheduler):
    images = drawing.generate(named, 7, 2, STEPS, sampler, "Bag", 2.0)
    pipeline = ScratchDDPMPipeline(named.unet, scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = pipeline(2, generators, STEPS, class_labels=[1, 1], guidance_scale=2.0).images
    assert np.abs(pixels(images).astype(int) - pixels(expected)).max() <= 1


def test_the_pipeline_stays_as_it_is(plain):
    scheduler = plain.scheduler
    drawing.generate(plain, 0, 1, STEPS, "UniPC")
    drawing.chain(plain, 0, STEPS, 2, "DDIM")
    drawing.inpaint(plain, noise_image(plain), half_mask(), 0, STEPS, 1)
    assert plain.scheduler is scheduler and scheduler.num_inference_steps is None


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", drawing.SAMPLERS)
def test_every_sampler_runs_on_every_schedule(schedule, sampler):
    pipeline = tiny_pipeline(ScratchDDPMScheduler(20, beta_schedule=schedule))
    assert pixels(drawing.generate(pipeline, 0, 1, STEPS, sampler)).std() > 10


def jumping_pipeline():
    like = named_pipeline()
    scheduler = ScratchDDPMScheduler(20, timestep_spacing="trailing", prediction_type="v_prediction", eta=math.inf)
    return ScratchDDPMPipeline(like.unet, scheduler, like.config.id2label, num_inference_steps=2)


def test_a_network_that_jumps_does_so(plain):
    jumping = jumping_pipeline()
    assert drawing.samplers_of(plain) == ["DDPM", "DDIM", "DPM-Solver++", "UniPC"]
    assert drawing.samplers_of(jumping) == ["Consistency", "DDPM", "DDIM", "DPM-Solver++", "UniPC"]
    images = drawing.generate(jumping, 7, 2, 1, "Consistency")
    expected = jumping(2, [torch.Generator().manual_seed(seed) for seed in (7, 8)], 1).images
    np.testing.assert_array_equal(pixels(images), pixels(expected))


@pytest.mark.parametrize(
    ("make", "steps", "guidance", "draws_at_once"),
    [(named_pipeline, 20, 2.0, False), (jumping_pipeline, 2, 1.0, True)],
)
def test_the_page_of_a_network_that_jumps_draws_few_steps_as_its_fields_change(make, steps, guidance, draws_at_once):
    config = config_of(make())
    values = {part["props"].get("label"): part["props"].get("value") for part in reversed(config["components"])}
    assert (values["Steps"], values["Guidance scale"]) == (steps, guidance)
    events = {target[1] for dependency in config["dependencies"] for target in dependency["targets"]}
    assert ("release" in events) is draws_at_once


def test_classes(named, plain):
    assert drawing.choices(named) == ["any", *NAMES.values()] and drawing.choices(plain) == ["any"]
    assert drawing.labels(named, drawing.EACH, 6) == [0, 1, 2, 3, 0, 1]
    assert drawing.labels(named, "Dress", 2) == [2, 2] and drawing.labels(named, drawing.ANY, 2) is None
    assert drawing.captions(named, 3, drawing.EACH, 2) == ["Sneaker, seed 3", "Bag, seed 4"]
    assert drawing.captions(plain, 3, drawing.ANY, 1) == ["seed 3"]


def test_without_names_classes_have_numbers():
    unnamed = tiny_pipeline(num_class_embeds=5)
    assert drawing.choices(unnamed) == ["any", "class 0", "class 1", "class 2", "class 3"]
    assert len(drawing.generate(unnamed, 0, 2, STEPS, label=drawing.EACH, guidance=3.0)) == 2


def test_without_a_null_label_there_is_always_a_class():
    pipeline = every_label_a_class()
    assert drawing.choices(pipeline) == [*NAMES.values(), "Coat"]
    assert len(drawing.generate(pipeline, 0, 1, STEPS, label="Coat")) == 1
    with pytest.raises(ValueError, match="class='any' is not known"):
        drawing.generate(pipeline, 0, 1, STEPS)


def test_guidance_acts_on_named_classes_only(named):
    any_class = [pixels(drawing.generate(named, 0, 1, STEPS, guidance=scale)) for scale in (1.0, 8.0)]
    np.testing.assert_array_equal(*any_class)
    bag = [pixels(drawing.generate(named, 0, 1, STEPS, label="Bag", guidance=scale)) for scale in (1.0, 8.0)]
    assert (bag[0] != bag[1]).any()


# --- the chain ------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_pipeline(named):
    frames = drawing.chain(named, 3, 6, 4, "DDIM", "Dress", 2.0)
    scheduler = ScratchDDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing", eta=0.0)
    pipeline = ScratchDDPMPipeline(named.unet, scheduler)
    output = pipeline(
        generator=[torch.Generator().manual_seed(3)],
        num_inference_steps=6,
        class_labels=[2],
        guidance_scale=2.0,
        return_trajectory=4,
    )
    assert [frame.timestep for frame in frames] == [frame.timestep for frame in output.trajectory] + [-1]
    for frame, expected in zip(frames, output.trajectory, strict=False):
        np.testing.assert_array_equal(pixels(frame.sample), pixels(expected.sample))
        np.testing.assert_array_equal(pixels(frame.pred_original_sample), pixels(expected.pred_original_sample))
    np.testing.assert_array_equal(pixels(frames[-1].sample), pixels(output.images))
    np.testing.assert_array_equal(pixels(frames[-2].pred_original_sample), pixels(output.images))


def test_the_chain_leads_to_the_image(plain):
    frames = drawing.chain(plain, 9, STEPS, 24)
    assert len(frames) == STEPS + 1
    np.testing.assert_array_equal(pixels(frames[-1].sample), pixels(drawing.generate(plain, 9, 1, STEPS)))


@pytest.mark.parametrize(("sampler", "rows"), [("DDPM", 2), ("UniPC", 1)])
def test_the_strip(sampler, rows):
    strip = drawing.chain_strip(drawing.chain(colour_pipeline(), 0, STEPS, 3, sampler))
    assert strip.size == (4 * 96, rows * (96 + 8) + 24) and strip.mode == "RGB"
    assert np.asarray(strip)[-24:].min() < 50  # the timesteps are written there


# --- forward process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain_pipeline, colour_pipeline])
@pytest.mark.parametrize("t", [0, 7, 19])
def test_noised_is_a_draw_from_the_marginal(make, t):
    pipeline = make()
    image = noise_image(pipeline)
    array = np.asarray(image).reshape(1, 8, 8, -1)
    q = pipeline.scheduler.q_marginal(torch.from_numpy(array / 127.5 - 1), t)
    noise = torch.randn(array.shape if array.shape[-1] == 3 else (1, 8, 8), generator=torch.Generator().manual_seed(4))
    x_t = q.mean + (0.5 * q.log_variance).exp() * noise.reshape(array.shape)
    expected = (127.5 * (x_t + 1)).clamp(0, 255).numpy()[0]
    given = np.asarray(drawing.noised(pipeline, image, t, 4)).reshape(expected.shape)
    assert np.abs(given - expected).max() <= 0.51


@pytest.mark.parametrize("t", [0, 7, 19])
def test_signal_and_noise(plain, t):
    alpha_bar, ratio = drawing.signal_and_noise(plain, float(t))
    assert alpha_bar == pytest.approx(plain.scheduler.alphas_cumprod[t].item())
    assert ratio == pytest.approx(alpha_bar / (1 - alpha_bar))


# --- inpainting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [plain_pipeline, named_pipeline, colour_pipeline])
def test_inpainting_keeps_the_known_pixels(make):
    pipeline = make()
    image = noise_image(pipeline)
    label = drawing.choices(pipeline)[-1]
    first, again = (drawing.inpaint(pipeline, image, half_mask(), 1, STEPS, 2, label, 1.5) for _ in range(2))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    np.testing.assert_array_equal(np.asarray(first)[4:], np.asarray(image)[4:])
    assert (np.asarray(first)[:4] != np.asarray(image)[:4]).mean() > 0.5


def test_inpainting_is_that_of_the_pipeline(plain):
    scheduler = ScratchDDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing")
    pipeline = ScratchDDPMInpaintPipeline(plain.unet, scheduler)
    image, generator = noise_image(plain), torch.Generator().manual_seed(2)
    (expected,) = pipeline(image, half_mask(), generator, 12, jump_length=10, jump_n_sample=3).images
    given = drawing.inpaint(plain, image, half_mask(), 2, 12, 3)
    np.testing.assert_array_equal(np.asarray(given), np.asarray(expected))


def test_what_is_painted_becomes_the_mask():
    layer = np.zeros((80, 80, 4), dtype=np.uint8)
    layer[:, :40] = (255, 127, 14, 255)
    layer[:4, 40:, 3] = 255  # less than half of a pixel of the image
    layers = [Image.new("RGBA", (80, 80)), Image.fromarray(layer)]
    mask = np.asarray(drawing.painted(layers, (8, 8)))
    assert (mask[:, :4] == 255).all() and (mask[:, 4:] == 0).all()
    assert drawing.painted([], (8, 8)) is None


# --- pictures -------------------------------------------------------------------------------------------------------


def test_uploaded_images_are_cropped_and_resized(tmp_path):
    wide = np.zeros((40, 120, 3), dtype=np.uint8)
    wide[:, 40:80] = (0, 200, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    colour = np.asarray(drawing.opened(colour_pipeline(), tmp_path / "wide.png"))
    assert colour.shape == (8, 8, 3) and np.abs(colour - [0, 200, 0]).max() < 20
    assert drawing.opened(plain_pipeline(), tmp_path / "wide.png").mode == "L"


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_images_of_every_mode_are_taken(plain, mode, tmp_path):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new(mode, (20, 30)).save(path)
    assert drawing.opened(plain, path).size == (8, 8)


def test_small_images_are_enlarged_without_smoothing(plain):
    image = noise_image(plain)
    large = drawing.enlarged(image)
    assert large.size == (336, 336)
    np.testing.assert_array_equal(np.asarray(large)[::42, ::42], np.asarray(image))
    assert drawing.enlarged(large) is not None and drawing.enlarged(large).size == (336, 336)


# --- wrong input ----------------------------------------------------------------------------------------------------

WRONG = {
    "The seed must be a whole number from 0 to 4294967295; it is empty.": lambda p: drawing.generate(p, None, 1, STEPS),
    "The seed must be a whole number from 0 to 4294967295; it is -1.": lambda p: drawing.chain(p, -1, STEPS, 2),
    "The seed must be a whole number from 0 to 4294967295; it is 1.5.": lambda p: drawing.generate(p, 1.5, 1, STEPS),
    "The seed must be a whole number from 0 to 4294967295; it is nan.": lambda p: drawing.generate(p, np.nan, 1, STEPS),
    "The number of images must be a whole number from 1 to 16; it is 17.": lambda p: drawing.generate(p, 0, 17, STEPS),
    "Steps must be a whole number from 1 to 20; it is 21.": lambda p: drawing.generate(p, 0, 1, 21),
    "Steps must be a whole number from 1 to 20; it is 0.": lambda p: drawing.inpaint(
        p, noise_image(p), half_mask(), 0, 0, 1
    ),
    "The number of frames must be a whole number from 2 to 24; it is 1.": lambda p: drawing.chain(p, 0, STEPS, 1),
    "sampler='PLMS' is not known; allowed: DDPM, DDIM, DPM-Solver++, UniPC, Consistency": (
        lambda p: drawing.generate(p, 0, 1, STEPS, "PLMS")
    ),
    "class='Bag' is not known; allowed: any": lambda p: drawing.generate(p, 0, 1, STEPS, label="Bag"),
    "guidance scale=9 must be a number and lie in [0, 8].": lambda p: drawing.generate(p, 0, 1, STEPS, guidance=9),
    "t must be a whole number from 0 to 19; it is 20.": lambda p: drawing.noised(p, noise_image(p), 20, 0),
    "There is no image: upload one, or take the generated example.": lambda p: drawing.noised(p, None, 1, 0),
    "Nothing is painted: paint over the part of the image that is to be drawn anew.": (
        lambda p: drawing.inpaint(p, noise_image(p), Image.new("L", (8, 8)), 0, STEPS, 1)
    ),
    "Resamplings must be a whole number from 1 to 10; it is 0.": (
        lambda p: drawing.inpaint(p, noise_image(p), half_mask(), 0, STEPS, 0)
    ),
    "test_demo.py cannot be read as an image: PNG, JPEG, WebP or GIF is needed.": lambda p: drawing.opened(p, __file__),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(plain, message):
    with pytest.raises(ValueError) as caught:
        WRONG[message](plain)
    assert str(caught.value) == message


# --- the page and the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (plain_pipeline, {"Class": False, "Guidance scale": False}),
        (named_pipeline, {"Class": True, "Guidance scale": True}),
        (every_label_a_class, {"Class": True, "Guidance scale": False}),
    ],
)
def test_only_what_the_model_has_is_shown(make, shown):
    config = config_of(make())
    parts = [part["props"] for part in config["components"] if part["props"].get("label") in shown]
    assert len(parts) == 6  # in three tabs
    assert all(part["visible"] is shown[part["label"]] for part in parts)


def test_programs_get_two_endpoints_by_name(named):
    public = [one["api_name"] for one in config_of(named)["dependencies"] if one["api_visibility"] == "public"]
    assert public == ["generate", "chain"]


def test_the_queue_is_bounded(named, monkeypatch):
    asked, queue = [], app.gr.Blocks.queue
    monkeypatch.setattr(app.gr.Blocks, "queue", lambda self, **how: asked.append(how) or queue(self, **how))
    config_of(named)
    assert asked[-1] == {"max_size": app.MOST_WAITING}


def query_of(link):
    return dict(urllib.parse.parse_qsl(link.removeprefix("?")))


@pytest.mark.parametrize(("make", "count"), [(plain_pipeline, 2), (named_pipeline, 4), (jumping_pipeline, 3)])
def test_suggestions_are_links_that_the_page_takes(make, count):
    pipeline = make()
    found = drawing.suggestions(pipeline)
    assert len(found) == count
    for link in found.values():
        settings = drawing.linked(pipeline, query_of(link))
        assert settings and drawing.link(settings).replace(".0", "") == link
        asked = {
            "images": 2,
            "steps": 2,
            "sampler": "DDPM",
            "class": drawing.ANY,
            "guidance": 1.0,
            **settings,
            "seed": 3,
        }
        images = drawing.generate(pipeline, *(asked[name] for name in drawing.SETTINGS))
        assert len(images) == asked["images"]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"seed": "-1"}, "the link's seed=-1.0 must be a number and lie in"),
        ({"steps": "many"}, "the link's steps must be a number, not 'many'"),
        ({"images": "99"}, "the link's images=99.0 must"),
        ({"class": "Hat"}, "class='Hat' is not known"),
        ({"sampler": "PLMS"}, "sampler='PLMS' is not known"),
        ({"guidance": "nan"}, "the link's guidance=nan must"),
    ],
)
def test_wrong_links(named, query, message):
    with pytest.raises(ValueError, match=message):
        drawing.linked(named, query)
    assert drawing.linked(named, {"another": "1"}) == {}


def test_one_of_each_needs_classes(plain):
    with pytest.raises(ValueError, match="class='one of each' is not known; allowed: any"):
        drawing.linked(plain, {"class": drawing.EACH})


def test_sharing_is_asked_for(tmp_path, monkeypatch, capsys):
    named_pipeline().save_pretrained(tmp_path / "model")
    launched = []

    def launch(_, **options):
        launched.append(options["share"])
        return None, "http://here", "https://there" if options["share"] else None

    monkeypatch.setattr(app.gr.Blocks, "launch", launch)
    monkeypatch.setattr(app.gr.Blocks, "block_thread", lambda _: launched.append("waits"))

    async def run(*more):  # as above
        app.main([str(tmp_path / "model"), *more])

    asyncio.run(run("--share"))
    asyncio.run(run())
    assert launched == [True, "waits", False, "waits"]
    first, second = capsys.readouterr().out.splitlines()
    assert first == "the page is at http://here and, for all, at https://there; Ctrl-C ends it"
    assert second == "the page is at http://here; Ctrl-C ends it"


def test_the_model_is_described(named):
    assert drawing.describe(named).startswith(
        "Draws grey images of 8 × 8 pixels of 4 classes in a chain of T = 20 steps"
    )
    assert drawing.describe(colour_pipeline()).startswith("Draws RGB images of 8 × 8 pixels in a chain of T = 20 steps")


def exits_with(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        app.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_without_a_model_the_command_says_what_it_needs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MODEL_ID", tmp_path / "model_id.txt")
    assert "no model is named: give its folder or Hub name" in exits_with([], capsys)
    (tmp_path / "model_id.txt").write_text("\n")
    assert "no model is named" in exits_with([], capsys)


def test_a_model_whose_images_are_no_pictures(capsys, tmp_path):
    tiny_pipeline(in_channels=5, out_channels=5).save_pretrained(tmp_path)
    assert f"{tmp_path} draws images of 5 channels; the page shows 1 or 3" in exits_with([str(tmp_path)], capsys)


def test_a_model_that_cannot_be_loaded(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    assert f"{tmp_path} cannot be loaded as a DDPM model" in exits_with([str(tmp_path)], capsys)
    assert "no/such-model cannot be loaded as a DDPM model" in exits_with(["no/such-model"], capsys)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("owner/model\n", [], ("owner/model", None)),
        ("owner/model\n0123abc\n", [], ("owner/model", "0123abc")),
        ("owner/model\n0123abc\n", ["--revision", "main"], ("owner/model", "main")),
        ("owner/model\n0123abc\n", ["another/model"], ("another/model", None)),
    ],
)
def test_a_space_names_its_model_in_a_file(text, arguments, expected, capsys, tmp_path, monkeypatch):
    (tmp_path / "model_id.txt").write_text(text)
    monkeypatch.setattr(app, "MODEL_ID", tmp_path / "model_id.txt")
    asked = []

    def load(*names):
        asked.append(names)
        raise ValueError("stop")

    monkeypatch.setattr(app, "load", load)
    assert "stop" in exits_with(arguments, capsys)
    assert asked == [expected]


# --- in a browser ---------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def served(model, folder):
    """The address of the app, which runs in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(ROOT / "demo" / "app.py"), str(model), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "GRADIO_TEMP_DIR": str(folder / "gradio")}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "log.txt").read_text()
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(address, timeout=10).close()
                break
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def opened_page(executable, address):
    """The page in a browser, and the addresses elsewhere that it asked for, which it does not get."""
    elsewhere = []

    def route(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=list(BROWSER_OPTIONS))
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(20_000)
        page.route("**/*", route)
        page.goto(address)
        yield page, elsewhere
        browser.close()


class Tab:
    """One of the page's tabs, and what a reader does on it."""

    def __init__(self, page, name):
        page.get_by_role("tab", name=name).click()
        self.page, self.panel = page, page.get_by_role("tabpanel").filter(visible=True)

    def press(self, name):
        self.panel.get_by_role("button", name=name, exact=True).click()

    def fill(self, label, value):
        field = self.panel.get_by_label(label, exact=True)
        field.fill(str(value))
        field.dispatch_event("change")
        self.page.get_by_role("heading", level=1).click()  # the field loses the focus

    def shows(self, text):
        expect(self.panel.get_by_text(text).first).to_be_visible(timeout=20_000)

    def fails(self, message):
        error = self.page.get_by_test_id("toast-body").get_by_text(message)
        expect(error).to_be_visible(timeout=20_000)
        self.page.get_by_test_id("toast-close").click()
        expect(error).to_have_count(0)

    def upload(self, path):
        with self.page.expect_file_chooser() as chooser:
            self.press("Upload an image")
        chooser.value.set_files(path)

    def picture(self, number):
        """An image that is shown, in the model's size."""
        source = self.panel.locator("img[src*='/file=']").nth(number).get_attribute("src")
        with Image.open(io.BytesIO(self.page.request.get(source).body())) as image:
            return np.asarray(image.convert("L"))[21::42, 21::42].astype(int)

    def paint_two_rows(self):
        """A stroke, 80 wide, through an image of 8 by 8, enlarged to 336, in the middle of the canvas."""
        box = self.panel.locator("canvas").first.bounding_box()
        left, y = box["x"] + box["width"] / 2 - 168, box["y"] + box["height"] / 2 - 168 + 42
        self.page.mouse.move(left + 4, y)
        self.page.mouse.down()
        self.page.mouse.move(left + 332, y, steps=6)
        self.page.mouse.up()


def found_browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None and os.environ.get("CI") == "true":
        pytest.fail("no Chromium was found")
    if executable is None:
        pytest.skip("no Chromium was found: apt-get install chromium")
    return executable


def opens_by_a_link(page, address):
    page.goto(f"{address}/?seed=5&images=2&class=Bag&steps=3")
    tab = Tab(page, "Generate")
    expect(tab.panel.get_by_label("Seed", exact=True)).to_have_value("5")
    tab.press("Generate")
    tab.shows("Bag, seed 6")
    href = tab.panel.get_by_role("link", name="Link to them").get_attribute("href")
    assert query_of(href) == {
        "seed": "5",
        "images": "2",
        "steps": "3",
        "sampler": "DDPM",
        "class": "Bag",
        "guidance": "2",
    }
    with page.expect_download() as download:
        tab.panel.get_by_role("button", name="Thumbnail 1 of 2").click()
        tab.panel.get_by_label("Download").first.click()
    with Image.open(download.value.path()) as image:
        assert image.size == (drawing.LARGE, drawing.LARGE)
    page.goto(address)


def serves_programs(address):
    client = Client(address, verbose=False, analytics_enabled=False)
    images, text = client.predict(7, 2, 3, "DDPM", "Bag", 2.0, api_name="/generate")
    assert [image["caption"] for image in images] == ["Bag, seed 7", "Bag, seed 8"] and text.startswith("2 images in")


def generates(page):
    tab = Tab(page, "Generate")
    tab.fill("number input for Number of images", 5)
    tab.press("Generate")
    tab.shows(re.compile(r"^5 images in \d"))
    for caption in ("Sneaker, seed 0", "T-shirt/top, seed 3", "Sneaker, seed 4"):
        tab.shows(caption)
    fits_a_phone(page)


def fits_a_phone(page):
    """Nothing that was drawn makes a tab wider than the screen, on which a phone would make all letters smaller."""
    wide = page.viewport_size
    page.set_viewport_size({"width": 390, "height": 820})
    page.wait_for_function("[document.documentElement.scrollWidth, innerWidth].every(width => width === 390)")
    page.set_viewport_size(wide)


def survives_wrong_seeds(page):
    tab = Tab(page, "Generate")
    for seed, given in (("", "empty"), ("-1", "-1")):
        tab.fill("Seed", seed)
        tab.press("Generate")
        tab.fails(f"The seed must be a whole number from 0 to 4294967295; it is {given}.")
    tab.fill("Seed", 7)
    tab.press("Generate")
    tab.shows("Sneaker, seed 7")


def shows_the_chain(page, pipeline):
    tab = Tab(page, "The chain")
    tab.press("Show the chain")
    tab.shows(re.compile("Lower row: x̂₀"))
    tab.shows(f"xₜ, what the network sees: t = {drawing.chain(pipeline, 0, 20, 10)[5].timestep}")  # the middle one
    tab.fill("number input for Frame", 1)
    tab.shows("xₜ, what the network sees: t = 19")
    tab.fill("number input for Frame", 11)
    tab.shows("xₜ, what the network sees: image")
    fits_a_phone(page)


def adds_noise(page, pipeline):
    tab = Tab(page, "Forward process")
    for t in (19, 3):
        tab.fill("number input for t", t)
        alpha_bar, ratio = drawing.signal_and_noise(pipeline, t)
        tab.shows(f"ᾱₜ = {alpha_bar:.4g}")
        tab.shows(f"signal-to-noise ratio = {ratio:.4g}")
    before = tab.picture(1)
    tab.fill("Seed", 1)
    deadline = time.monotonic() + 20
    while (tab.picture(1) == before).all():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    return tab.picture(0)


def inpaints(page, example, folder):
    tab = Tab(page, "Inpaint")
    tab.press("Inpaint")
    tab.fails("Nothing is painted: paint over the part of the image that is to be drawn anew.")
    (folder / "text.png").write_text("not an image")
    tab.upload(folder / "text.png")
    tab.fails("text.png cannot be read as an image: PNG, JPEG, WebP or GIF is needed.")
    tab.paint_two_rows()
    tab.press("Inpaint")
    tab.shows(re.compile("What was not painted is as it was"))
    result = tab.picture(0)
    np.testing.assert_array_equal(result[3:], example[3:])
    assert (result[:2] != example[:2]).mean() > 0.8
    fits_a_phone(page)


@pytest.mark.full
def test_the_page_in_a_browser(tmp_path):
    executable = found_browser()
    pipeline = named_pipeline()
    pipeline.save_pretrained(tmp_path / "tiny-model")
    with served(tmp_path / "tiny-model", tmp_path) as address, opened_page(executable, address) as (page, elsewhere):
        expect(page.get_by_role("heading", name="tiny-model")).to_be_visible()
        opens_by_a_link(page, address)
        serves_programs(address)
        generates(page)
        survives_wrong_seeds(page)
        shows_the_chain(page, pipeline)
        example = adds_noise(page, pipeline)
        np.testing.assert_array_equal(example, np.asarray(drawing.example(pipeline)))
        inpaints(page, example, tmp_path)
        assert elsewhere == []


SCREENS = {"": (1300, 820), "_narrow": (390, 820)}  # width and height in pixels


def take_pictures(model, path, folder, schemes=("light",), screens=SCREENS):
    """The first tab with images drawn, as files."""
    with served(model, folder) as address, opened_page(found_browser(), address) as (page, _):
        for (name, (width, height)), scheme in itertools.product(screens.items(), schemes):
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme=scheme)
            page.goto(f"{address}/?__theme={scheme}")
            tab = Tab(page, "Generate")
            tab.press("Generate")
            tab.shows(re.compile(r"images in \d"))
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # the images are loaded
            dark = "_dark" if scheme == "dark" else ""
            page.screenshot(path=path.with_stem(f"{path.stem}{name}{dark}"), full_page=bool(name))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        picture = ROOT / "docs" / "figures" / "demo.png"
        take_pictures(ROOT / "models" / "ddpm-fashion-mnist", picture, Path(folder), screens={"": SCREENS[""]})
