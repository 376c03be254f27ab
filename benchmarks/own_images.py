"""A folder of images, for the same time: `ddpm train FOLDER --resolution 32`, and diffusers' example with its defaults.

    python benchmarks/own_images.py FOLDER     # half an hour for each and an hour to measure, on 2 cores

FOLDER holds pictures, CIFAR-10 for instance. The example is that of diffusers for unconditional image generation,
rebuilt here of diffusers' own parts with its default values and stopped by the clock: as it is, it keeps nothing before
the end of its first epoch. Both models draw by the same sampler. Results go to docs/results/own_images.json, from which
`python docs/make_own_images.py` fills docs/your-images.md.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would hold up whatever else runs

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from few_steps import ROOT, distances, replace, replace_json
from PIL import Image

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.data.arrays import to_unit_range
from ddpm_from_scratch.data.config import DataConfig
from ddpm_from_scratch.data.dataset import load_data
from ddpm_from_scratch.evaluation.features import efficientnet_lite0_features
from ddpm_from_scratch.runtime.devices import capabilities, device_name, keep_freed_memory
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.generate import SampleSpec, generate
from ddpm_from_scratch.sampling.previews import image_grid, to_pil
from ddpm_from_scratch.sampling.samplers import SAMPLERS

SIDE, FEATURE_SIZE = 32, 112
SAMPLER, SHOWN, COLUMNS = "dpmsolver++", 40, 10
EPOCHS, BATCH, RATE, WARMUP = 100, 16, 1e-4, 500  # of the example
Numbers = dict[str, Any]


def batches(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Float images in [-1, 1], shuffled anew in every epoch."""
    while True:
        for rows in torch.randperm(len(images)).split(BATCH):
            yield to_unit_range(images[rows])


def train_example(images: torch.Tensor, minutes: float, folder: Path) -> Numbers:
    """Train as the example does, for some minutes; keep the model."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), RATE, betas=(0.95, 0.999), weight_decay=1e-6)
    total = EPOCHS * -(-len(images) // BATCH)
    rates = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=total)
    stream, steps, start = batches(images), 0, time.perf_counter()
    while time.perf_counter() - start < 60 * minutes:
        x_0 = next(stream)
        noise, t = torch.randn(x_0.shape), torch.randint(0, 1000, (len(x_0),))
        prediction = unet(scheduler.add_noise(x_0, noise, t), t).sample
        torch.nn.functional.mse_loss(prediction, noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        steps += 1
    seconds = time.perf_counter() - start
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return {"steps": steps, "images_seen": steps * BATCH, "seconds": seconds, "mixed_precision": "no"}


def train_ours(data: Path, minutes: float, folder: Path) -> Numbers:
    """`ddpm train FOLDER --resolution 32`, whose default is 20 minutes."""
    command = [sys.executable, "-m", "ddpm_from_scratch.cli", "train", str(data), "--resolution", str(SIDE)]
    subprocess.run([*command, f"--output_dir={folder}", f"--max_train_minutes={minutes}"], check=True)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {name: results[name] for name in ("steps", "images_seen", "seconds", "mixed_precision")}


def measure(
    folder: Path, reference: np.ndarray, spec: SampleSpec, dtype: torch.dtype = torch.float32
) -> tuple[Numbers, np.ndarray]:
    """Distances of a model's images, which SAMPLER draws, to real ones, and the images."""
    pipeline = ScratchDDPMPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.scheduler = SAMPLERS[SAMPLER](pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    images = generate(pipeline, spec, Accelerator(cpu=True))
    found = distances(efficientnet_lite0_features(images, FEATURE_SIZE), reference)
    return {"parameters": pipeline.unet.num_parameters(), **found}, images


def processor() -> str:
    """The CPU's name, and which bfloat16 instructions it has."""
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 bfloat16"}
    known = capabilities()
    found = [word for name, word in names.items() if known.get(name)] or ["no bfloat16 instructions"]
    return f"{known.get('cpu_name', 'unknown CPU')} with {', '.join(found)}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of pictures")
    parser.add_argument("--minutes", type=float, default=20, help="of training, for each")
    parser.add_argument("--num_images", type=int, default=1000, help="drawn by each, and real ones as reference")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true", help="draw in bfloat16")
    parser.add_argument("--models_dir", type=Path, default=ROOT / "outputs" / "own_images", help="of both models")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "own_images.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "figures" / "own_images.png")
    return parser.parse_args()


def main() -> None:
    """Train both, one after the other, draw and measure. Models that are there already are not trained again."""
    args = parse()
    keep_freed_memory()
    data = load_data(DataConfig(dataset_name=str(args.data)), 3, SIDE)
    pixels = torch.stack([data.images[index] for index in range(len(data.images))])
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[: 2 * args.num_images]
    real = pixels[chosen].permute(0, 2, 3, 1).numpy()
    reference, others = np.split(efficientnet_lite0_features(real, FEATURE_SIZE), 2)
    results: Numbers = {
        "minutes": args.minutes,
        "training_images": len(pixels),
        "num_images": args.num_images,
        "num_inference_steps": args.num_inference_steps,
        "sampler": SAMPLER,
        "real": dict(distances(others, reference)),
        "device": device_name(torch.device("cpu")),
        "processor": processor(),
        "bfloat16": args.bf16,
        "versions": versions(),
        "rows": [],
    }
    trainings = {
        "ddpm train FOLDER --resolution 32": partial(train_ours, args.data),
        "diffusers' example": partial(train_example, pixels),
    }
    pictures = []
    for name, train in trainings.items():
        folder = args.models_dir / name.replace(" ", "_").replace("'", "")
        facts = folder / "facts.json"
        if not facts.is_file():
            replace_json(facts, {"minutes": args.minutes, **train(args.minutes, folder)})
        if json.loads(facts.read_text(encoding="utf-8"))["minutes"] != args.minutes:
            raise ValueError(f"{folder} was trained for another time: choose another --models_dir")
        spec = SampleSpec(args.num_inference_steps, args.num_images)
        found, images = measure(folder, reference, spec, torch.bfloat16 if args.bf16 else torch.float32)
        results["rows"].append({"name": name, **json.loads(facts.read_text(encoding="utf-8")), **found})
        print(results["rows"][-1], flush=True)
        pictures.append(image_grid(to_pil(images[:SHOWN]), COLUMNS, scale=2))
    replace_json(args.results, results)
    gap = 12
    both = Image.new("RGB", (pictures[0].width, 2 * pictures[0].height + gap), "white")
    for number, picture in enumerate(pictures):
        both.paste(picture, (0, number * (picture.height + gap)))
    replace(args.picture, partial(both.save, format="PNG"))


if __name__ == "__main__":
    main()
