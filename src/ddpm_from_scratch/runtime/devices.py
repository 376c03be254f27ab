"""Devices, their precision and memory layout, and the threads of a CPU."""

import ctypes
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env


def device_name(device: torch.device) -> str:
    """The name of a device, for results and logs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's names
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by `accelerate launch`, by `torchrun`

FAST_BF16_CPU = ("avx512_bf16", "amx_bf16", "amx_tile")

# Numbers of glibc's mallopt(3), and what they are set to.
KEEP_MEMORY = {-1: 2**31 - 1, -3: 2**30}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: in bytes


def capabilities() -> dict[str, Any]:
    """What torch knows of the CPU; empty before torch 2.13."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


def cpu_has_fast_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any(capabilities().get(name, False) for name in FAST_BF16_CPU)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# Whether devices compute bfloat16 fast. Older GPUs emulate it, which is slower than float32.
FAST_BF16: dict[str, Callable[[], bool]] = {
    "cpu": cpu_has_fast_bf16,
    "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
}


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """Resolve `auto` to bf16 where the device computes it fast, else to no.

    Raises ValueError for fp16 on a device whose kernels or gradient scaling do not support it.
    """
    if mixed_precision == "fp16" and device.type != "cuda":
        raise ValueError(f"mixed_precision fp16 needs a CUDA device, this is {device.type}; choose auto, bf16 or no")
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if FAST_BF16.get(device.type, lambda: False)() else "no"


def threads_per_process(environment: Mapping[str, str], cores: int) -> int | None:
    """The number of threads for a CPU run; None to keep PyTorch's choice.

    Both launchers set OMP_NUM_THREADS to 1 unless told otherwise, which would leave all cores but one idle.
    """
    launched = any(name in environment for name in LAUNCHERS)
    if not launched or environment.get("OMP_NUM_THREADS") != "1":
        return None
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", "1")))


def computes_on_cpu() -> bool:
    """Whether the run computes on the CPU: there is no accelerator, or accelerate is told to use the CPU.

    accelerate has to be told: otherwise its processes do not find each other on CPUs and run as unrelated copies.
    """
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()


def prepare_cpu() -> bool:
    """Set the threads and memory of a process that computes on the CPU; return whether it does."""
    if on_cpu := computes_on_cpu():
        use_all_cores()
        keep_freed_memory()
    return on_cpu


def allowed_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """Share this machine's cores among the run's processes on it."""
    available = allowed_cores()
    threads = threads_per_process(os.environ, min(psutil.cpu_count(logical=False) or available, available))
    if threads is not None:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next step, which needs as much again.

    Otherwise the memory goes back to the system, which has to clear every page again. Only glibc has this setting.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in KEEP_MEMORY.items():
            mallopt(parameter, value)


# The layout in which a device's convolutions are fast. On a GPU activations take that of the weights; on a CPU they
# have it anyway, and so the gradients need no turning.
MEMORY_FORMAT = dict.fromkeys(("cpu", "cuda"), torch.channels_last)


def compile_mode(device: torch.device) -> str:
    """How a network is compiled that samples, where it is called with one form again and again.

    CUDA graphs spare a GPU the wait for the host, which starts hundreds of kernels a step.
    """
    return "reduce-overhead" if device.type == "cuda" else "default"
