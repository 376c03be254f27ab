"""A page that draws with a DDPM model and shows how it does: `python demo/app.py MODEL`.

As a Hugging Face Space the file runs without arguments. Beside it then lie the package's folder, ddpm_from_scratch, and
model_id.txt with the model's name on the Hub in its first line and, if wanted, a revision of it in the second.
"""

import argparse
import functools
import html
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before gradio and torch are imported, which read them.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait hold up the whole machine

import gradio as gr
import torch
from diffusers.utils import logging
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.diffusion.pipeline import Frame
from drawing import (
    ANY,
    EACH,
    MOST_FRAMES,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_RESAMPLINGS,
    MOST_SEED,
    SETTINGS,
    any_class,
    captions,
    chain,
    chain_strip,
    choices,
    class_numbers,
    describe,
    enlarged,
    example,
    generate,
    image_size,
    inpaint,
    link,
    linked,
    most_steps,
    noised,
    opened,
    painted,
    samplers_of,
    signal_and_noise,
    suggestions,
    tuned_for_jumps,
    when,
)

MODEL_ID = Path(__file__).with_name("model_id.txt")

# --- the page -------------------------------------------------------------------------------------------------------

FONTS = ("system-ui", "sans-serif")
THEME = gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))  # none that a browser would fetch
CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
.pixels img { image-rendering: pixelated; }
.pixels .caption-label { right: 0; bottom: 0; max-width: 100%; padding: 0 6px; font-size: 11px; }
@media (max-width: 640px) { .pixels .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; } }
"""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
AT_ONCE: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
INSIDE: dict[str, Any] = {"api_visibility": "private"}  # no endpoint for programs
MOST_WAITING = 20  # requests in the queue; the page refuses more
PIXELS: dict[str, Any] = {"format": "png", "elem_classes": "pixels"}
PICTURE: dict[str, Any] = {**PIXELS, "type": "pil", "interactive": False, "buttons": ["download"], "height": 400}
LAUNCH: dict[str, Any] = {
    "theme": THEME,
    "css": CSS,
    "show_error": True,
    "quiet": True,  # what gradio would say is for those who write pages with it
    "prevent_thread_lock": True,
    "ssr_mode": False,
    "footer_links": [],
    "max_file_size": "20mb",
}


def _reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose ValueErrors the page shows."""

    @functools.wraps(function)
    def reporting(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return reporting


def _seconds(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"


def _seed_field() -> gr.Number:
    random = gr.Button("Random", render=False)
    seed = gr.Number(0, label="Seed", info="The same seed gives the same noise.", buttons=[random])
    random.click(lambda: secrets.randbelow(MOST_SEED + 1), None, seed, show_progress="hidden", **INSIDE)
    return seed


def _steps_slider(pipeline: ScratchDDPMPipeline, value: int) -> gr.Slider:
    most = most_steps(pipeline)
    value = pipeline.config.get("num_inference_steps") or value
    return gr.Slider(1, most, min(value, most), step=1, label="Steps", info="More take longer and are finer.")


def _class_fields(pipeline: ScratchDDPMPipeline, extra: Sequence[str] = ()) -> tuple[gr.Dropdown, gr.Slider]:
    """The class and the guidance scale, shown only for networks that have them."""
    conditional = bool(class_numbers(pipeline))
    allowed = [*(extra if conditional else ()), *choices(pipeline)]
    guided = conditional and any_class(pipeline)
    label = gr.Dropdown(allowed, value=allowed[0], label="Class", visible=conditional)
    guidance = gr.Slider(
        0,
        MOST_GUIDANCE,
        2.0 if guided and not tuned_for_jumps(pipeline) else 1.0,
        step=0.1,
        label="Guidance scale",
        info="How closely images follow their class; 1 is no guidance.",
        visible=guided,
        interactive=allowed[0] != ANY,
    )
    label.change(
        lambda chosen: gr.update(interactive=chosen != ANY),
        label,
        guidance,
        show_progress="hidden",
        queue=False,
        **INSIDE,
    )
    return label, guidance


def _generate_tab(pipeline: ScratchDDPMPipeline, app: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            seed = _seed_field()
            count = gr.Slider(1, MOST_IMAGES, 10, step=1, label="Number of images")
            label, guidance = _class_fields(pipeline, extra=[EACH])
            steps = _steps_slider(pipeline, 20)
            sampler = gr.Dropdown(samplers_of(pipeline), label="Sampler")
            button = gr.Button("Generate", variant="primary")
            gr.Markdown(
                "Try: " + " · ".join(f"[{title}]({address})" for title, address in suggestions(pipeline).items())
            )
        with gr.Column(scale=3):
            gallery = gr.Gallery(
                show_label=False, columns=5, height="auto", object_fit="contain", buttons=["download"], **PIXELS
            )
            done = gr.Markdown("The images appear here.")

    @_reported
    def draw(
        seed: float | None,
        count: float,
        steps: float,
        sampler: str,
        label: str,
        guidance: float,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> tuple[list[tuple[Image.Image, str]], str]:
        start = time.perf_counter()
        images = generate(pipeline, seed, count, steps, sampler, label, guidance)
        address = link(dict(zip(SETTINGS, (seed, count, steps, sampler, label, guidance), strict=True)))
        text = f"{len(images)} images in {_seconds(start)}, each from the seed under it. [Link to them]({address})"
        return list(zip(map(enlarged, images), captions(pipeline, seed, label, len(images)), strict=True)), text

    fields = [seed, count, steps, sampler, label, guidance]

    @_reported
    def opened_by_link(request: gr.Request) -> list[Any]:
        asked = linked(pipeline, dict(request.query_params))
        return [gr.update(value=asked[name]) if name in asked else gr.update() for name in SETTINGS]

    # A network that jumps is quick enough to draw while the fields are changed.
    at_once = [steps.release, count.release, guidance.release, label.input] if tuned_for_jumps(pipeline) else []
    gr.on(
        [button.click, *at_once],
        draw,
        fields,
        [gallery, done],
        show_progress_on=gallery,
        api_name="generate",
        **ONE_AT_A_TIME,
    )
    app.load(opened_by_link, None, fields, **INSIDE)


def _views(frames: list[Frame], place: float) -> tuple[Any, Any]:
    """The two images of a frame, enlarged."""
    frame = frames[int(place) - 1]
    x_t, x_0 = frame.sample[0], frame.pred_original_sample
    return (
        gr.update(value=enlarged(x_t), label=f"xₜ, what the network sees: {when(frame)}", visible=True),
        gr.update(value=x_0 and enlarged(x_0[0]), visible=x_0 is not None),
    )


def _chain_tab(pipeline: ScratchDDPMPipeline) -> None:
    frames = gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            seed = _seed_field()
            label, guidance = _class_fields(pipeline)
            steps = _steps_slider(pipeline, 50)
            sampler = gr.Dropdown(samplers_of(pipeline), label="Sampler")
            count = gr.Slider(2, MOST_FRAMES, 10, step=1, label="Frames", info="Evenly spaced among the steps.")
            button = gr.Button("Show the chain", variant="primary")
        with gr.Column(scale=3):
            done = gr.Markdown("The chain from noise to image appears here.")
            overview = gr.Image(
                show_label=False, interactive=False, format="png", type="pil", buttons=[], visible=False
            )
            place = gr.Slider(1, 2, 1, step=1, label="Frame", visible=False)
            with gr.Row():
                sample = gr.Image(visible=False, **PICTURE)
                prediction = gr.Image(label="x̂₀, the image that it predicts", visible=False, **PICTURE)

    @_reported
    def draw(*settings: Any, progress: gr.Progress = gr.Progress(track_tqdm=True)) -> tuple[Any, ...]:  # noqa: ANN401, B008
        start = time.perf_counter()
        new = chain(pipeline, *settings)
        middle = (len(new) + 1) // 2
        slider = gr.update(maximum=len(new), value=middle, visible=True)
        tells = new[-1].pred_original_sample is not None
        lower = "Lower row: x̂₀, the image that it predicts." if tells else "This sampler does not tell x̂₀."
        text = f"Upper row: xₜ, what the network sees. {lower} Drawn in {_seconds(start)}."
        return new, text, gr.update(value=chain_strip(new), visible=True), slider, *_views(new, middle)

    settings = [seed, steps, count, sampler, label, guidance]
    button.click(
        draw,
        settings,
        [frames, done, overview, place, sample, prediction],
        show_progress_on=done,
        api_name="chain",
        **ONE_AT_A_TIME,
    )
    place.input(_views, [frames, place], [sample, prediction], **AT_ONCE, **INSIDE)


def _source(pipeline: ScratchDDPMPipeline, first: Image.Image, view: gr.Image | gr.ImageEditor) -> gr.State:
    """The image to work on, which the view shows: the example, or an uploaded one."""
    picture = gr.State(first)
    with gr.Row():
        upload = gr.UploadButton("Upload an image", file_types=["image"], size="sm", min_width=120)
        back = gr.Button("Generated example", size="sm", min_width=120)

    @_reported
    def use(path: str) -> tuple[Image.Image, Image.Image]:
        image = opened(pipeline, path)
        return image, enlarged(image)

    upload.upload(use, upload, [picture, view], show_progress="hidden", **INSIDE)
    back.click(lambda: (first, enlarged(first)), None, [picture, view], show_progress="hidden", **INSIDE)
    return picture


def _forward_tab(pipeline: ScratchDDPMPipeline, first: Image.Image) -> None:
    last = len(pipeline.scheduler) - 1

    @_reported
    def show(image: Image.Image, t: float, seed: float | None) -> tuple[Image.Image, str]:
        alpha_bar, ratio = signal_and_noise(pipeline, t)
        text = f"ᾱₜ = {alpha_bar:.4g}\n\nsignal-to-noise ratio = {ratio:.4g}"
        return enlarged(noised(pipeline, image, t, seed)), text

    noisy, text = show(first, last // 3, 0)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            seed = _seed_field()
            t = gr.Slider(
                0, last, last // 3, step=1, label="t", info="At 0 there is next to no noise, at the end little else."
            )
            numbers = gr.Markdown(text)
        with gr.Column(scale=3), gr.Row():
            with gr.Column():
                view = gr.Image(enlarged(first), label="x₀, the image", **PICTURE)
                picture = _source(pipeline, first, view)
            with gr.Column():
                result = gr.Image(noisy, label="xₜ, the image with noise", **PICTURE)

    gr.on([t.change, seed.change, picture.change], show, [picture, t, seed], [result, numbers], **AT_ONCE, **INSIDE)


def _editor(first: Image.Image) -> gr.ImageEditor:
    return gr.ImageEditor(
        enlarged(first),
        label="Paint over what is to be drawn anew",
        type="pil",
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(default_size=40, colors=["#ff7f0e"], color_mode="fixed"),
        canvas_size=enlarged(first).size,
        fixed_canvas=True,
        buttons=[],
        height=400,
        **PIXELS,
    )


def _inpaint_tab(pipeline: ScratchDDPMPipeline, first: Image.Image) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            seed = _seed_field()
            label, guidance = _class_fields(pipeline)
            steps = _steps_slider(pipeline, 50)
            again = gr.Slider(
                1, MOST_RESAMPLINGS, 3, step=1, label="Resamplings", info="More make the parts fit together better."
            )
            button = gr.Button("Inpaint", variant="primary")
        with gr.Column(scale=2, min_width=500):  # what the editor needs
            editor = _editor(first)
            picture = _source(pipeline, first, editor)
        with gr.Column(scale=1, min_width=260):
            result = gr.Image(label="The result", **PICTURE)
            done = gr.Markdown("Paint over a part of the image, then press Inpaint.")

    @_reported
    def draw(
        image: Image.Image,
        drawing: dict[str, Any] | None,
        *settings: Any,  # noqa: ANN401
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> tuple[Image.Image, str]:
        start = time.perf_counter()
        mask = painted((drawing or {}).get("layers", []), image_size(pipeline))
        result = inpaint(pipeline, image, mask, *settings)
        return enlarged(result), f"Drawn in {_seconds(start)}. What was not painted is as it was."

    settings = [picture, editor, seed, steps, again, label, guidance]
    button.click(draw, settings, [result, done], show_progress_on=result, **INSIDE, **ONE_AT_A_TIME)


def build_app(pipeline: ScratchDDPMPipeline, title: str) -> gr.Blocks:
    """The page of a model."""
    image = example(pipeline)
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as app:
        gr.Markdown(f"# {html.escape(title)}\n{describe(pipeline)}")
        with gr.Tab("Generate"):
            _generate_tab(pipeline, app)
        with gr.Tab("The chain"):
            _chain_tab(pipeline)
        with gr.Tab("Forward process"):
            _forward_tab(pipeline, image)
        with gr.Tab("Inpaint"):
            _inpaint_tab(pipeline, image)
    return app.queue(max_size=MOST_WAITING)


# --- the command ----------------------------------------------------------------------------------------------------


def published() -> tuple[str, str | None] | None:
    """The model's name and revision in model_id.txt; None without that file."""
    lines = MODEL_ID.read_text(encoding="utf-8").split() if MODEL_ID.exists() else []
    return (lines[0], lines[1] if len(lines) > 1 else None) if lines else None


def load(model: str, revision: str | None) -> ScratchDDPMPipeline:
    """The model, on a GPU if there is one, Apple's included.

    Raises:
        ValueError: it cannot be loaded, for whatever reason.
    """
    try:
        logging.disable_progress_bar()  # of loading
        pipeline = ScratchDDPMPipeline.from_pretrained(model, revision=revision)
    except Exception as error:
        raise ValueError(
            f"{model} cannot be loaded as a DDPM model. It must be the folder of one, or its name on the Hub. "
            f"{type(error).__name__}: {error}"
        ) from error
    if pipeline.unet.config.in_channels not in (1, 3):
        raise ValueError(f"{model} draws images of {pipeline.unet.config.in_channels} channels; the page shows 1 or 3.")
    return pipeline.to(torch.accelerator.current_accelerator() or "cpu")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page."""
    parser = argparse.ArgumentParser(description="A page in the browser that draws with a DDPM model.")
    parser.add_argument("model", nargs="?", help="folder or Hub name; by default the one that model_id.txt names")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument("--host", help="by default 127.0.0.1: this machine only")
    parser.add_argument(
        "--share", action="store_true", help="also by a link of gradio's, for three days, to anybody who has it"
    )
    args = parser.parse_args(arguments)
    named = (args.model, None) if args.model else published()
    if named is None:
        parser.error(f"no model is named: give its folder or Hub name, or write the name into {MODEL_ID.name} here")
    model, revision = named
    try:
        pipeline = load(model, args.revision or revision)
        app = build_app(pipeline, Path(model).resolve().name)
    except ValueError as error:
        parser.error(str(error))
    try:
        _, address, shared = app.launch(server_name=args.host, server_port=args.port, share=args.share, **LAUNCH)
    except OSError as error:
        parser.error(f"the page cannot be served: {error}")
    more = f" and, for all, at {shared}" if shared else ""
    print(f"the page is at {address}{more}; Ctrl-C ends it", flush=True)
    app.block_thread()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the page was there
        sys.exit("interrupted")
