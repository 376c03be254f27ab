"""Measure the editing of images by a trained model: inversion, interpolation, inpainting and img2img.

    python benchmarks/editing.py MODEL [--num_images 100]

The images are those of the embedded test set; a class-conditional model gets the null label. The results are written
after each part, the pictures at the end, and `python docs/make_sampling_pages.py` makes docs/editing.md of them.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import torch
from few_steps import BATCH, ROOT, describe, replace, replace_json
from PIL import Image
from tqdm import tqdm

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.data.config import EMBEDDED_TEST_SET
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.diffusion.pipeline import Frame
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.editing import (
    ScratchDDPMImg2ImgPipeline,
    ScratchDDPMInpaintPipeline,
    ScratchDDPMInterpolationPipeline,
)
from ddpm_from_scratch.sampling.previews import write_gif
from ddpm_from_scratch.training.config import TrainingConfig

LEAST = 4  # images, of which the figure and the interpolations are made

INVERSION_STEPS = (10, 20, 50, 100)
NUM_ITERATIONS = (1, 2, 3, 5)

PAIRS = 10  # interpolations
NUM_FRAMES = 9
INTERPOLATION_STEPS = 50

INPAINTED = 20  # images
INPAINTING_STEPS = 50
JUMP_LENGTH = 5
JUMP_N_SAMPLES = (1, 5)

STRENGTHS = (0.2, 0.4, 0.6, 0.8)
IMG2IMG_STEPS = 100

FILLINGS = 4  # of the figure
CHAIN_IMAGES = 4
CHAIN_STEPS = 100
CHAIN_FRAMES = 25
SHADES = 32
Numbers = dict[str, Any]


class Pipelines(NamedTuple):
    """One model, in every use."""

    generate: ScratchDDPMPipeline
    interpolate: ScratchDDPMInterpolationPipeline
    inpaint: ScratchDDPMInpaintPipeline
    img2img: ScratchDDPMImg2ImgPipeline


def pipelines(pipeline: ScratchDDPMPipeline) -> Pipelines:
    """All around the same network."""
    kinds = (ScratchDDPMInterpolationPipeline, ScratchDDPMInpaintPipeline, ScratchDDPMImg2ImgPipeline)
    made = Pipelines(pipeline, *(kind.from_pipe(pipeline) for kind in kinds))
    for one in made:
        one.set_progress_bar_config(disable=True)
    return made


# --- images --------------------------------------------------------------------------------------------------------


def seeded(numbers: Sequence[int]) -> list[torch.Generator]:
    """One generator for each image, seeded by its number."""
    return [torch.Generator().manual_seed(number) for number in numbers]


def levels(images: Sequence[Image.Image]) -> np.ndarray:
    """PIL images as uint8 [N, H, W, C]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return pixels[..., None] if pixels.ndim == 3 else pixels


def psnr(images: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of images in [0, 1], [N, H, W, C], in dB: [N]. It ends at 120, float32's rounding."""
    squared_error = np.square(images.astype(np.float64) - given).mean(axis=(1, 2, 3))
    return -10 * np.log10(squared_error.clip(min=1e-12))


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """With the standard error of the mean."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def lower_half(height: int, width: int) -> np.ndarray:
    """The mask whose lower half is to be painted: uint8 [H, W, 1]."""
    mask = np.zeros((height, width, 1), dtype=np.uint8)
    mask[height // 2 :] = 255
    return mask


# --- measurements --------------------------------------------------------------------------------------------------
# Each takes images uint8 [N, H, W, C].


def measure_inversion(pipeline: ScratchDDPMInterpolationPipeline, images: np.ndarray) -> list[Numbers]:
    """How near to images that were inverted the images are that their noise makes."""
    rows = []
    for steps, iterations in tqdm(list(itertools.product(INVERSION_STEPS, NUM_ITERATIONS)), desc="inversion"):
        start, found = time.perf_counter(), []
        for first in range(0, len(images), BATCH):
            noise = pipeline.invert(images[first : first + BATCH], steps, iterations)
            made, *_ = pipeline.generate(noise, steps, output_type="np", return_dict=False)
            found.append(made)
        ratios = psnr(np.concatenate(found), images / 255)
        row = {"steps": steps, "num_iterations": iterations, "psnr": float(ratios.mean()), "worst": float(ratios.min())}
        rows.append({**row, "seconds": time.perf_counter() - start})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_interpolation(pipeline: ScratchDDPMInterpolationPipeline, images: np.ndarray) -> Numbers:
    """How far the first and last frames are from the two images, in 8-bit levels: 0 is as it should be."""
    pairs = min(PAIRS, len(images) // 2)
    largest = 0
    for first in tqdm(range(0, 2 * pairs, 2), desc="interpolation"):
        ends = images[first], images[first + 1]
        frames, *_ = pipeline(*ends, NUM_FRAMES, INTERPOLATION_STEPS, return_dict=False)
        differences = levels([frames[0], frames[-1]]).astype(int) - np.stack(ends)
        largest = max(largest, int(np.abs(differences).max()))
    return {"pairs": pairs, "num_frames": NUM_FRAMES, "steps": INTERPOLATION_STEPS, "largest_difference": largest}


def measure_inpainting(pipeline: ScratchDDPMInpaintPipeline, images: np.ndarray) -> Numbers:
    """Of lower halves that were painted: pixels of the upper halves that changed, and the error of the lower ones."""
    images, half = images[:INPAINTED], images.shape[1] // 2
    truth = images[:, half:] / 255

    def error(painted: np.ndarray) -> Numbers:
        return dict(
            zip(
                ("squared_error", "squared_error_error"),
                mean_and_error(np.square(painted - truth).mean(axis=(1, 2, 3))),
                strict=True,
            )
        )

    rows = []
    for times in tqdm(JUMP_N_SAMPLES, desc="inpainting"):
        start = time.perf_counter()
        made, *_ = pipeline(
            images,
            lower_half(*images.shape[1:3]),
            seeded(range(len(images))),
            INPAINTING_STEPS,
            JUMP_LENGTH,
            times,
            return_dict=False,
        )
        pixels = levels(made)
        changed = int((pixels != images)[:, :half].any(axis=3).sum())
        row = {"jump_n_sample": times, "changed_pixels": changed, **error(pixels[:, half:] / 255)}
        rows.append({**row, "seconds": time.perf_counter() - start})
    # The lower half of another image, for comparison.
    return {
        "num_images": len(images),
        "steps": INPAINTING_STEPS,
        "jump_length": JUMP_LENGTH,
        "other_image": error(np.roll(truth, 1, axis=0)),
        "rows": rows,
    }


def measure_img2img(pipeline: ScratchDDPMImg2ImgPipeline, images: np.ndarray) -> Numbers:
    """How near to the images their variations are."""
    rows = []
    for strength in tqdm(STRENGTHS, desc="img2img"):
        start, found = time.perf_counter(), []
        for first in range(0, len(images), BATCH):
            batch = images[first : first + BATCH]
            generators = seeded(range(first, first + len(batch)))
            made, *_ = pipeline(batch, strength, generators, IMG2IMG_STEPS, output_type="np", return_dict=False)
            found.append(made)
        ratio, error = mean_and_error(psnr(np.concatenate(found), images / 255))
        row = {"strength": strength, "psnr": ratio, "psnr_error": error}
        rows.append({**row, "seconds": time.perf_counter() - start})
    return {"steps": IMG2IMG_STEPS, "rows": rows}


# --- pictures ------------------------------------------------------------------------------------------------------

Rows = dict[str, list[tuple[str, np.ndarray]]]  # by title: pictures uint8 [H, W, C] with their captions


def pictures(made: Pipelines, images: np.ndarray) -> Rows:
    """What the figure shows, of the first images."""
    frames, *_ = made.interpolate(images[0], images[1], NUM_FRAMES, INTERPOLATION_STEPS, return_dict=False)
    captions = ["one image", *[""] * (NUM_FRAMES - 2), "another"]

    given, mask = images[1], lower_half(*images.shape[1:3])
    copies = np.stack([given] * FILLINGS)
    filled, *_ = made.inpaint(
        copies, mask, seeded(range(FILLINGS)), INPAINTING_STEPS, JUMP_LENGTH, JUMP_N_SAMPLES[-1], return_dict=False
    )
    hole = np.where(mask > 0, np.uint8(128), given)

    varied = [
        levels(made.img2img(images[0], strength, seeded([0]), IMG2IMG_STEPS, return_dict=False)[0])[0]
        for strength in STRENGTHS
    ]
    return {
        "interpolation": list(zip(captions, levels(frames), strict=True)),
        "inpainting": [
            ("image", given),
            ("given", hole),
            *((f"seed {seed}", one) for seed, one in enumerate(levels(filled))),
        ],
        "img2img": [
            ("image", images[0]),
            *((f"strength {s:g}", one) for s, one in zip(STRENGTHS, varied, strict=True)),
        ],
    }


def draw(rows: Rows, path: Path) -> None:
    """A row for each pipeline."""
    columns = max(map(len, rows.values()))
    figure = matplotlib.figure.Figure(figsize=(columns, 1.35 * len(rows)), layout="constrained")
    for part, (title, row) in zip(figure.subfigures(len(rows), squeeze=False)[:, 0], rows.items(), strict=True):
        part.suptitle(title, fontsize=10, x=0.01, ha="left")
        places = part.subplots(1, columns)
        for axes in places:
            axes.axis("off")
        for axes, (caption, picture) in zip(places, row, strict=False):
            axes.set_title(caption, fontsize=8)
            axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255)
    replace(path, partial(figure.savefig, format="png", dpi=100))


def few_levels(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1] in so few shades that noise takes little room in a file."""
    return np.round(images * (SHADES - 1)) / (SHADES - 1)


def write_chain(pipeline: ScratchDDPMPipeline, path: Path) -> None:
    """A chain as an animation: x_t above, the x_0 predicted from it below."""
    _, trajectory = pipeline(
        CHAIN_IMAGES,
        seeded(range(CHAIN_IMAGES)),
        CHAIN_STEPS,
        output_type="np",
        return_dict=False,
        return_trajectory=CHAIN_FRAMES,
    )
    both = [Frame(t, few_levels(np.concatenate([x_t, x_0], axis=1)), None) for t, x_t, x_0 in trajectory]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    write_gif(both, unfinished, scale=2, milliseconds=120)
    unfinished.replace(path)


# --- the run -------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a saved pipeline")
    parser.add_argument("--num_images", type=int, default=100, help="of the embedded test images, the first ones")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "editing.json")
    parser.add_argument("--figures_dir", type=Path, default=ROOT / "docs" / "figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one part after another, and draw."""
    args = parse(arguments)
    if not (args.model / "model_index.json").is_file():
        raise FileNotFoundError(f"{args.model} has no model_index.json: pass the folder of a saved pipeline.")
    pipeline = ScratchDDPMPipeline.from_pretrained(args.model)
    unet = pipeline.unet
    data = load_data(
        TrainingConfig(dataset_name=str(EMBEDDED_TEST_SET)), unet.config.in_channels, unet.config.sample_size
    )
    if not LEAST <= args.num_images <= len(data.images):
        raise ValueError(f"--num_images {args.num_images}: from {LEAST} to {len(data.images)} are allowed.")
    images = torch.stack([data.images[index] for index in range(args.num_images)]).permute(0, 2, 3, 1).numpy()

    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    unet.to(memory_format=torch.channels_last)
    made = pipelines(pipeline)
    results: Numbers = {
        "num_images": args.num_images,
        "device": device_name(pipeline.device),
        "precision": "float32",
        "versions": versions(),
        "model": describe(args.model, pipeline),
    }
    results["interpolation"] = measure_interpolation(made.interpolate, images)
    replace_json(args.results, results)
    results["inpainting"] = measure_inpainting(made.inpaint, images)
    replace_json(args.results, results)
    results["img2img"] = measure_img2img(made.img2img, images)
    replace_json(args.results, results)
    draw(pictures(made, images), args.figures_dir / "editing.png")
    write_chain(pipeline, args.figures_dir / "chain.gif")
    results["inversion"] = measure_inversion(made.interpolate, images)  # last, since it takes longest
    replace_json(args.results, results)


if __name__ == "__main__":
    main()
