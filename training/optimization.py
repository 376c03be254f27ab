"""The optimiser, its learning rate, and the precision and the threads it runs in."""

import ctypes
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import psutil
import torch

from config import TrainingConfig

# Rate after the warm-up, relative to the peak, at a progress from 0 to 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
    "constant_with_warmup": lambda progress: 1.0,
}
NO_WARMUP = ("constant",)  # as in diffusers

# What a configuration counts in steps.
STEP_FIELDS = (
    "max_train_steps",
    "lr_warmup_steps",
    "log_steps",
    "sample_steps",
    "eval_steps",
    "checkpointing_steps",
)

LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by `accelerate launch`, by `torchrun`

FUSED_ADAM_DEVICES = ("cpu", "cuda")
FAST_BF16_CPU = ("avx512_bf16", "amx_bf16", "amx_tile")

# Numbers of glibc's mallopt(3), and what they are set to.
KEEP_MEMORY = {-1: 2**31 - 1, -3: 2**30}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: in bytes


def in_optimizer_steps(config: TrainingConfig, global_batch_size: int) -> TrainingConfig:
    """The configuration with every number of steps, each of `step_images` images, as optimiser steps of this run.

    So the warm-up, the end, the intervals and the horizon of the average come after as many images on one GPU as on
    eight. The decay of the average after n steps is near 1 - (n / inv_gamma) ** -power; with r times as many images in
    a step it must fall r times as far short of 1 after n / r of them, which inv_gamma * r ** (1 / power - 1) does.
    """
    if config.step_images is None:
        return config
    ratio = global_batch_size / config.step_images
    steps = {name: max(1, round(count / ratio)) for name in STEP_FIELDS if (count := getattr(config, name))}
    return replace(
        config,
        **steps,
        ema_inv_gamma=config.ema_inv_gamma * ratio ** (1 / config.ema_power - 1),
        ema_max_decay=config.ema_max_decay**ratio,
        step_images=None,
    )


def learning_rate(step: int, config: TrainingConfig, total_steps: int) -> float:
    """The rate at which optimiser step number `step` (0, 1, ...) is taken; at `total_steps` a decay has reached 0.

    A function of the optimiser steps alone, so accumulation and the number of processes do not stretch it.
    """
    warmup = 0 if config.lr_scheduler in NO_WARMUP else config.lr_warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup  # from 1, since a step at rate 0 is wasted
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * DECAYS[config.lr_scheduler](progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Take the next step at this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainingConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW, as one fused kernel where the device has it."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=device.type in FUSED_ADAM_DEVICES,
    )


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.13
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in FAST_BF16_CPU)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the device computes it fast, else no.

    Raises:
        ValueError: fp16 on a device whose kernels or gradient scaling do not support it.
    """
    if mixed_precision == "fp16" and device.type != "cuda":
        raise ValueError(f"mixed_precision fp16 needs a CUDA device, this is {device.type}; choose auto, bf16 or no")
    if mixed_precision != "auto":
        return mixed_precision
    fast_bf16 = {"cpu": cpu_has_fast_bf16, "cuda": torch.cuda.is_bf16_supported}.get(device.type, lambda: False)
    return "bf16" if fast_bf16() else "no"


def threads_per_process(environment: Mapping[str, str], cores: int) -> int | None:
    """How many threads a CPU run should take; None to leave PyTorch's own choice.

    Both launchers set OMP_NUM_THREADS to 1 unless told otherwise, which would leave all cores but one idle.
    """
    launched = any(name in environment for name in LAUNCHERS)
    if not launched or environment.get("OMP_NUM_THREADS") != "1":
        return None
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def prepare_cpu() -> None:
    """What a run that computes on the CPU sets for its process."""
    use_all_cores()
    keep_freed_memory()


def use_all_cores() -> None:
    """Share this machine's cores among the run's processes on it."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads_per_process(os.environ, min(psutil.cpu_count(logical=False) or available, available))
    if threads is not None:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let the C library keep the memory that one step frees for the next step, which asks for the same again.

    Else it goes back to the system, which clears every page of it anew. Only glibc, Linux' usual one, is told.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in KEEP_MEMORY.items():
            mallopt(parameter, value)
