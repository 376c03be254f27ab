"""The parts of `gpu.py`."""

import itertools
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from gpu_timing import Recorder, kernels
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.diffusion import blocks
from ddpm_from_scratch.runtime import philox
from ddpm_from_scratch.runtime.devices import compile_mode, device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.sampling.generate import SampleSpec, generate
from ddpm_from_scratch.sampling.samplers import SAMPLERS
from ddpm_from_scratch.training.arguments import parse
from ddpm_from_scratch.training.config import PRESETS
from ddpm_from_scratch.training.loop import Pass, advance, passes_from
from ddpm_from_scratch.training.optimizer import forget_gradients
from ddpm_from_scratch.training.plan import synchronize
from ddpm_from_scratch.training.run import Run, build, load, save

FORMS = {"fashion_mnist": (28, 1), "cifar10": (32, 3)}  # side and channels of the pictures
PROFILED = 10  # steps
SCRATCH = tempfile.TemporaryDirectory()  # pictures and runs, until the process ends
# In small: few channels, few images.
SMALL = [
    *("--model.block_out_channels", "[8,8,8]", "--model.norm_num_groups", "4", "--model.attention_head_dim", "8"),
    *("--model.layers_per_block", "1", "--train_batch_size", "4", "--dataloader_num_workers", "0"),
    *("--model.down_block_types", "[DownBlock2D,AttnDownBlock2D,DownBlock2D]"),
    *("--model.up_block_types", "[UpBlock2D,AttnUpBlock2D,UpBlock2D]"),
]


# --- runs ------------------------------------------------------------------------------------------------------------


def new_run(record: Recorder, preset: str, *flags: str) -> Run:
    """A training run of a preset, on random pictures unless the flags name others."""
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    data = random_pictures(Path(folder, "pictures"), *FORMS[preset], 64 if record.smoke else 1024)
    here = ["--dataset_name", data, "--output_dir", f"{folder}/run", "--resume_from_checkpoint", "null"]
    small = SMALL if record.smoke else []
    config, _ = parse([preset, *here, "--logger", "none", "--noise", "philox", *small, *flags])
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)
    run = build(config)
    run.unet.train()
    return run


def random_pictures(folder: Path, side: int, channels: int, count: int) -> str:
    """A folder of pictures of noise in two classes, which are as much work as others."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
        path = folder / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return str(folder)


def steps_of(run: Run) -> Callable[[], Tensor]:
    """A function that does the next step of a run."""
    return partial(advance, run, passes_from(run, run.progress.step))


def weights_after(run: Run, steps: int) -> Tensor:
    """All weights in one row, after so many steps."""
    step = steps_of(run)
    for _ in range(steps):
        step()
    return torch.cat([weight.detach().flatten() for weight in run.weights])


def network_pass(run: Run, one: Pass) -> Callable[[], None]:
    """A function that does the forward and backward pass of the network alone."""
    device = run.accelerator.device
    x = torch.randn(one.batch.noise.shape, device=device)
    labels = None if one.batch.labels is None else one.batch.labels.to(device)
    t = one.t.to(device)

    def call() -> None:
        run.accelerator.backward(run.network(x, t, class_labels=labels).sample.float().square().mean())
        forget_gradients(run.weights)

    return call


def training(record: Recorder, preset: str) -> None:
    """A network's training step, compiled and not, the network's part of it, and a profile."""
    run = new_run(record, preset, "--compile", "false")
    images = run.global_batch_size
    record.time("eager", steps_of(run), images, batch=images)
    run = new_run(record, preset, "--compile", compiling(record))
    step = steps_of(run)
    record.time("compiled", step, images, batch=images, parameters=run.trained_unet.num_parameters())
    record.add("compiled, profile", **kernels(step, record.device, record.count(PROFILED)))
    one = next(passes_from(run, run.progress.step))
    record.time("compiled, network alone", network_pass(run, one), images)
    loading = replace(run, config=replace(run.config, noise="generator"))
    record.time("compiled, by the loader", steps_of(loading), images)


def compiling(record: Recorder) -> str:
    """The value of --compile: on a CPU it would take too long."""
    return str(not record.smoke).lower()


def with_norm_before(record: Recorder, preset: str) -> None:
    """The compiled step with PyTorch's own group normalisation."""
    with mock.patch.object(blocks.GroupNorm, "forward", nn.GroupNorm.forward):
        run = new_run(record, preset, "--compile", compiling(record))
        record.time("compiled, group norm of PyTorch", steps_of(run), run.global_batch_size)


def stock(record: Recorder, preset: str, batch: int, compiled: bool) -> None:
    """The training step of diffusers' example in bfloat16, on one batch that lies on the device."""
    keys = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text(encoding="utf-8"))["model"]
    size, channels = FORMS[preset]
    if record.smoke:
        batch, narrow = 2, {"block_out_channels": [32] * len(keys["block_out_channels"]), "attention_head_dim": 8}
        keys = {**keys, **narrow}
    torch.compiler.reset()
    torch.manual_seed(0)
    unet = UNet2DModel(**{**keys, "sample_size": size, "in_channels": channels, "out_channels": channels})
    unet.to(record.device).train()
    average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    scheduler = DDPMScheduler()
    network = torch.compile(unet) if compiled and not record.smoke else unet
    x_0 = torch.rand(batch, channels, size, size, device=record.device) * 2 - 1

    def step() -> None:
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (batch,), device=record.device)
        with torch.autocast(record.device.type, torch.bfloat16):
            output = network(scheduler.add_noise(x_0, noise, t), t).sample
        F.mse_loss(output.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())

    record.time(f"stock, {'compiled' if compiled else 'eager'}", step, batch)


# --- parts -----------------------------------------------------------------------------------------------------------


def about(record: Recorder) -> None:
    """What is measured on, and how fast it copies and multiplies."""
    device = record.device
    record.add("versions", device=device_name(device), versions=versions(), cuda=torch.version.cuda)
    if device.type == "cuda":
        query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit"
        said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True)
        record.add("nvidia-smi", **{query: said.stdout.decode().strip()})
    a = torch.ones(2**20 if record.smoke else 2**30, device=device)
    record.time("copy", partial(torch.empty_like(a).copy_, a), 1, num_bytes=8 * len(a))
    side = 256 if record.smoke else 8192
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    record.time("bfloat16 product", partial(torch.matmul, x, x.clone()), 1, operations=2 * side**3)


def shipped(record: Recorder) -> None:
    """The shipped model's network, 3.8M weights."""
    stock(record, "fashion_mnist", 256, compiled=False)
    training(record, "fashion_mnist")
    with_norm_before(record, "fashion_mnist")


def cifar10(record: Recorder) -> None:
    """Ho et al.'s network for CIFAR-10, 35.7M weights."""
    stock(record, "cifar10", 128, compiled=False)
    training(record, "cifar10")
    stock(record, "cifar10", 128, compiled=True)


def right(record: Recorder) -> None:
    """What only a GPU can show to be right."""
    for name, check in CHECKS.items():
        start = time.perf_counter()
        with record.trying(name):
            record.add(name, **check(record), seconds=time.perf_counter() - start)


def counters(record: Recorder) -> dict[str, Any]:
    """Words and noise on the device, eager and compiled, against those on the CPU: how many differ."""
    positions = torch.arange(2**33, 2**33 + 64)
    shape = (3, 32, 32)

    def draw(where: Tensor, look_up: philox.Tables) -> Tensor:
        return philox.standard_normal(7, where, shape, look_up)

    count = math.prod(shape)
    expected = draw(positions, philox.tables(torch.device("cpu"), count))
    there, table = positions.to(record.device), philox.tables(record.device, count)
    compiled = torch.compile(draw)
    return {
        "eager": int((draw(there, table).cpu() != expected).sum()),
        "compiled": int((compiled(there, table).cpu() != expected).sum()),
        "of": expected.numel(),
    }


def waiting(record: Recorder) -> dict[str, Any]:
    """Steps in which a wait of the host would be an error."""
    done = {}
    for noise in ("philox", "generator"):
        run = new_run(record, "fashion_mnist", "--noise", noise, "--compile", "false", "--max_train_steps", "40")
        step = steps_of(run)
        for _ in range(5):
            step()
        synchronize(record.device)
        if record.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                step()
        finally:
            if record.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        done[noise] = "5 steps without a wait"
    return done


def accumulation(record: Recorder) -> dict[str, Any]:
    """Weights after steps of two passes, compiled against eager, in float32: the largest difference."""
    flags = [*SMALL, "--gradient_accumulation_steps", "2", "--mixed_precision", "no", "--learning_rate", "1e-4"]
    eager, compiled = (
        weights_after(new_run(record, "fashion_mnist", *flags, "--compile", value), 3)
        for value in ("false", compiling(record))
    )
    return {"largest": float((eager - compiled).abs().max()), "rate": 1e-4}


def resuming(record: Recorder) -> dict[str, Any]:
    """Whether a run that stops after 5 steps ends with the weights of one that does not, and of itself again."""
    flags = [*SMALL, "--compile", compiling(record), "--max_train_steps", "1000"]
    first, again = (weights_after(new_run(record, "fashion_mnist", *flags), 10) for _ in range(2))
    stopped = new_run(record, "fashion_mnist", *flags)
    weights_after(stopped, 5)
    save(stopped)
    resumed = new_run(record, "fashion_mnist", *flags)
    load(resumed, Path(stopped.config.output_dir, "checkpoints", "step_00000005"))
    end = weights_after(resumed, 5)
    return {"again": int((first != again).sum()), "resumed": int((first != end).sum()), "of": len(first)}


def half_precision(record: Recorder) -> dict[str, Any]:
    """Training in float16 with a scaler: the loss falls, and how many steps it skipped."""
    if record.device.type != "cuda":
        return {"skipped": "float16 training needs a GPU"}
    flags = ["--mixed_precision", "fp16", "--compile", "false", "--lr_warmup_steps", "1"]
    run = new_run(record, "fashion_mnist", *flags)
    step = steps_of(run)
    losses = torch.stack([step() for _ in range(100)]).tolist()
    return {"first": sum(losses[:5]) / 5, "last": sum(losses[-20:]) / 20, "skipped_steps": run.guard.counts()[0]}


def graphs(record: Recorder) -> dict[str, Any]:
    """Weights after compiled steps in CUDA graphs against those of eager ones, in float32: the largest difference."""
    flags = ["--mixed_precision", "no", "--learning_rate", "1e-4", "--lr_warmup_steps", "0"]
    eager = weights_after(new_run(record, "fashion_mnist", *flags, "--compile", "false"), 5)
    run = new_run(record, "fashion_mnist", *flags, "--compile", compiling(record))
    return {"largest": float((eager - weights_after(run, 5)).abs().max()), "rate": 1e-4, "graphs": run.graphs}


CHECKS: dict[str, Callable[[Recorder], dict[str, Any]]] = {
    "counter-based numbers": counters,
    "no waiting": waiting,
    "accumulation, compiled": accumulation,
    "resumed": resuming,
    "float16": half_precision,
    "CUDA graphs": graphs,
}


def sampling(record: Recorder) -> None:
    """Chains of 50 steps: ours and stock's, compiled and not, in float16."""
    keys = yaml.safe_load((PRESETS / "fashion_mnist.yaml").read_text(encoding="utf-8"))["model"]
    form = {**keys, "sample_size": 28, "in_channels": 1, "out_channels": 1}
    steps = 2 if record.smoke else 50
    torch.manual_seed(0)
    source = ScratchUNet2DModel(**form)
    for weight in source.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)  # zeros would run faster
    for ours, compiled in itertools.product((True, False), (False, True)):
        torch.compiler.reset()
        unet = (ScratchUNet2DModel if ours else UNet2DModel)(**form)
        unet.load_state_dict(source.state_dict())
        unet.to(record.device, torch.float16 if record.device.type == "cuda" else torch.float32).eval()
        if ours:
            unet.to(memory_format=torch.channels_last)
        if compiled and not record.smoke:
            unet.compile(mode=compile_mode(record.device) if ours else None)
        pipeline = ScratchDDPMPipeline(unet, ScratchDDPMScheduler()) if ours else DDPMPipeline(unet, DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        for batch in (2,) if record.smoke else (16, 256):
            name = f"{'ours' if ours else 'stock'}, {'compiled' if compiled else 'eager'}"
            draw = partial(chain, pipeline, batch, steps, record.device)
            record.time(name, draw, batch, warm_up=2, batch=batch, steps=steps)


def chain(pipeline: DDPMPipeline | ScratchDDPMPipeline, batch: int, steps: int, device: torch.device) -> None:
    """Draw a batch, with noise of the device."""
    generator = torch.Generator(device).manual_seed(0)
    pipeline(batch, generator, num_inference_steps=steps, output_type="np")


CURVE_MINUTES = (0.5, 1.0, 1.5, 2.0, 2.5)
CURVE_FLAGS = ["--lr_warmup_steps", "300", "--learning_rate", "4e-4", "--lr_scheduler", "cosine"]


def curve(record: Recorder, data: Path = Path("outputs/gpu/cifar10.parquet"), num_images: int = 1000) -> None:
    """CIFAR-10 by the clock: images after so many minutes of training, whose distances a CPU can measure.

    Compiling and drawing do not count.
    """
    flags = [*CURVE_FLAGS, "--dataset_name", str(data)] if data.is_file() else CURVE_FLAGS
    run = new_run(record, "cifar10", *flags, "--compile", compiling(record), "--max_train_steps", "1000000")
    step = steps_of(run)
    marks = (0.01,) if record.smoke else CURVE_MINUTES
    seconds, trained = pace(step, record), 0.0
    total = run.progress.step + int(60 * marks[-1] / seconds)
    run.progress.total_steps = total
    for mark in marks:
        start, goal = time.perf_counter(), total * mark / marks[-1]
        while run.progress.step < goal:
            step()
        synchronize(record.device)
        trained += time.perf_counter() - start
        images = drawn(run, 4 if record.smoke else num_images)
        path = record.path.with_name(f"cifar10_{mark:g}_minutes.npz")
        np.savez_compressed(path, images=images)
        seen = run.progress.step * run.global_batch_size
        record.add("curve", minutes=mark, trained=trained, images_seen=seen, file=path.name, real=data.is_file())


def pace(step: Callable[[], Tensor], record: Recorder) -> float:
    """Seconds of a step, after those that set things up."""
    for _ in range(record.count(20)):
        step()
    synchronize(record.device)
    start = time.perf_counter()
    for _ in range(record.count(50)):
        step()
    synchronize(record.device)
    return (time.perf_counter() - start) / record.count(50)


def drawn(run: Run, num_images: int) -> np.ndarray:
    """Images of the average as it is now, by 20 steps of DPM-Solver++: uint8 [N, H, W, C]."""
    pipeline = run.pipeline
    pipeline.scheduler = SAMPLERS["dpmsolver++"](run.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    spec = SampleSpec(20, num_images, batch_size=min(500, num_images))
    with run.accelerator.autocast():
        return generate(pipeline, spec, run.accelerator, progress=False)


PARTS: dict[str, Callable[[Recorder], None]] = {
    "about": about,
    "shipped": shipped,
    "cifar10": cifar10,
    "right": right,
    "sampling": sampling,
    "curve": curve,
}
