"""What a bug report has to say: `ddpm env`. The system, its CPU and GPUs, the versions, the commit; nothing private."""

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import torch

from .devices import allowed_cores, capabilities
from .results import commit, version, versions

# Beside those that results name.
PACKAGES = ("huggingface-hub", "safetensors", "jsonargparse", "scipy", "gradio")
# Variables that change what is computed, and where.
VARIABLES = (
    *("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("OMP_WAIT_POLICY", "PYTORCH_ENABLE_MPS_FALLBACK", "HF_HUB_OFFLINE"),
)
INSTRUCTIONS = ("avx2", "avx512", "amx", "neon", "sve", "vnni")  # beginnings of their names


def environment() -> dict[str, str]:
    """The facts by name, all in words."""
    return {
        "system": platform.platform(),
        "commit": commit() or "unknown: not run from a checkout",
        "CPU": cpu(),
        "instructions": ", ".join(instructions()) or "unknown",
        **({f"GPU {number}": gpu for number, gpu in enumerate(gpus())} or {"GPU": "none that torch can use"}),
        **versions(),
        **{package: version(package) for package in PACKAGES},
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def cpu() -> str:
    """The CPU's name, its cores, and the threads that torch takes."""
    name = capabilities().get("cpu_name") or platform.processor() or platform.machine()
    allowed = allowed_cores()
    return f"{name}, {os.cpu_count()} logical cores, {allowed} of them allowed, {torch.get_num_threads()} threads"


def instructions() -> list[str]:
    """The CPU's instructions for vectors and matrices; torch's kernels for it before torch 2.13."""
    found = [name for name, there in capabilities().items() if there is True and name.startswith(INSTRUCTIONS)]
    return found or [torch.backends.cpu.get_cpu_capability()]


def gpus() -> Iterator[str]:
    """Each GPU in words."""
    if torch.cuda.is_available():
        platform_version = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            yield f"{of.name}, {of.total_memory / 2**30:.0f} GiB, {platform_version}, driver {driver()}"
    elif torch.accelerator.is_available():
        yield str(torch.accelerator.current_accelerator())


def driver() -> str:
    """The version of NVIDIA's driver, which its own tool tells."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the facts, one a line."""
    argparse.ArgumentParser(prog="ddpm env", description=__doc__).parse_args(arguments)
    print("\n".join(f"{name}: {value}" for name, value in environment().items()))
