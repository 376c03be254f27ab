"""What `speed.py` measures around training steps and chains: one scheduler step, start-up, data loading, the peak."""

import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from few_steps import ROOT, solver
from systems import CHAIN, DTYPES, SAMPLES, System, network_config, training_step
from torch.utils.flop_counter import FlopCounterMode

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.data.dataset import ImageStream, StreamBatches, build_loader, load_data
from ddpm_from_scratch.evaluation.features import extract
from ddpm_from_scratch.evaluation.metrics import kernel_distance_with_error
from ddpm_from_scratch.sampling.generate import SampleSpec, generate
from ddpm_from_scratch.training.config import TrainingConfig
from ddpm_from_scratch.training.plan import synchronize
from ddpm_from_scratch.training.validation import build_validation_set

IMPORTS = {
    "diffusers": "from diffusers import UNet2DModel, DDPMScheduler, DDPMPipeline",
    "ours": "from ddpm_from_scratch import ScratchDDPMPipeline",
}
# Import, load a model's folder, draw one image in ten steps.
FIRST_IMAGES = {
    "diffusers": "from diffusers import DDPMPipeline as Pipeline",
    "ours": "from ddpm_from_scratch import ScratchDDPMPipeline as Pipeline",
}
DRAW = "; p = Pipeline.from_pretrained({folder!r}); p.set_progress_bar_config(disable=True); p(num_inference_steps=10)"
TIMED = "import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
LOADED_BATCHES, LOADED_BATCH = 150, 64
# What the names of a step's kernels begin with, by what they do.
KERNELS = {
    "convolutions": ("aten::convolution", "aten::mkldnn_convolution", "aten::cudnn_convolution"),
    "group normalisation": ("aten::native_group_norm",),
    "SiLU": ("aten::silu",),
    "matrix products and softmax": ("aten::mm", "aten::bmm", "aten::addmm", "aten::_softmax"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
    "additions": ("aten::add", "aten::sum"),
    "optimiser": ("aten::_fused_adamw", "Optimizer"),
}
MODEL = ROOT / "models" / "ddpm-fashion-mnist"
STEPS = 20  # of DPM-Solver++


def scheduler_overhead(device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of one step of each scheduler on the network's output for a batch of SAMPLES, by rounds."""
    x, output = (torch.randn(SAMPLES, 1, 28, 28, device=device) for _ in range(2))
    generator = torch.Generator(device).manual_seed(0)
    schedulers = {"diffusers": DDPMScheduler(), "ours": ScratchDDPMScheduler()}
    seconds: dict[str, list[float]] = {name: [] for name in schedulers}
    for number in range(10 * rounds + 1):
        for name, scheduler in schedulers.items():
            scheduler.set_timesteps(CHAIN, device=device)
            start = time.perf_counter()
            for t in scheduler.timesteps:
                scheduler.step(output, t, x, generator=generator)
            synchronize(device)
            if number:  # the first chain warms up
                seconds[name].append((time.perf_counter() - start) / CHAIN)
    return seconds


def time_processes(codes: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Seconds that fresh processes take for lines of code, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            command = [sys.executable, "-c", TIMED.format(code=code)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds[name].append(float(said.splitlines()[-1]))
    return seconds


def first_images(rounds: int) -> dict[str, list[float]]:
    """Seconds from the start of Python's work to the first image of the small network, saved by diffusers."""
    with tempfile.TemporaryDirectory() as folder:
        DDPMPipeline(UNet2DModel(**network_config("small")), DDPMScheduler()).save_pretrained(folder)
        draw = DRAW.format(folder=folder)
        return time_processes({name: line + draw for name, line in FIRST_IMAGES.items()}, rounds)


def loading_rates(workers: tuple[int, ...] = (0, 2)) -> dict[str, float]:
    """Images with their noise that the training loader delivers in a second, by its number of processes."""
    data = load_data(TrainingConfig(), None, None)
    stream = ImageStream(data, seed=0, center_crop=False, random_flip=True, label_dropout=0.0, skip_bad_images=False)
    rates = {}
    for count in workers:
        loader = build_loader(stream, StreamBatches(range(LOADED_BATCHES), 0, 1, LOADED_BATCH), count, False)
        batches = iter(loader)
        next(batches)  # by then all processes run
        start = time.perf_counter()
        for _ in batches:
            pass
        rates[str(count)] = (LOADED_BATCHES - 1) * LOADED_BATCH / (time.perf_counter() - start)
    return rates


def peak_rate(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=precision) for _ in range(2))
    best = math.inf
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def operations(network: str) -> float:
    """Floating-point operations of the network's forward pass for one image."""
    unet = ScratchUNet2DModel(**network_config(network)).eval()
    x = torch.zeros(1, unet.config.in_channels, *[unet.config.sample_size] * 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, torch.zeros(1, dtype=torch.long))
    return float(counter.get_total_flops())


def profile(system: System, network: str, device: torch.device, steps: int = 3) -> dict[str, float]:
    """Shares of a training step's time by kind of kernel."""
    step = training_step(system, network, device)
    for _ in range(steps):
        step()
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as record:
        for _ in range(steps):
            step()
        synchronize(device)
    times = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in record.key_averages()}
    shares = dict.fromkeys([*KERNELS, "the rest"], 0.0)
    for name, microseconds in times.items():
        kind = next((kind for kind, names in KERNELS.items() if name.startswith(names)), "the rest")
        shares[kind] += microseconds / sum(times.values())
    return shares


def precision_effect(num_images: int, model: Path = MODEL) -> dict[str, Any]:
    """The same samples drawn by a network in float32 and in bfloat16: how far they differ, and their distances."""
    accelerator = Accelerator()
    drawing = SampleSpec(STEPS, num_images, batch_size=100)
    data = load_data(TrainingConfig(), None, None)
    reference = build_validation_set(TrainingConfig(eval_num_images=num_images), data).reference.values
    images, found = {}, {}
    for name, dtype in DTYPES.items():
        pipeline = ScratchDDPMPipeline.from_pretrained(str(model), torch_dtype=dtype).to(accelerator.device)
        pipeline.scheduler = solver(DPMSolverMultistepScheduler, pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        start = time.perf_counter()
        images[name] = generate(pipeline, drawing, accelerator, progress=False)
        seconds = time.perf_counter() - start
        kernel = kernel_distance_with_error(extract(images[name]).values, reference)
        found[name] = {
            "seconds": seconds,
            "kernel_distance": kernel.value,
            "kernel_distance_error": kernel.error,
        }
    difference = images["no"].astype(np.float64) - images["bf16"]
    return {
        "model": model.name,
        "num_images": num_images,
        "steps": STEPS,
        "rms_difference": float(np.sqrt((difference**2).mean())),  # of 255
        **found,
    }
