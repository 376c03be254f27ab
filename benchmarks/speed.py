"""Time training steps, sampling chains and what surrounds them, of this package and of diffusers, side by side.

    python benchmarks/speed.py              # the quick form: 10 minutes on 2 cores
    python benchmarks/speed.py --networks small fashion_mnist_quick cifar10 --rounds 7 --compile

Every system is a process of its own. They take turns, one round each, so that what else the machine does falls on all
of them alike; a figure is the median of the rounds, a ratio the median of the ratios of each round. Training steps are
those of `training/train.py` without reading data: noise, x_t, forward and backward pass, clipping, AdamW. "Default" is
what each project's own training script does where nothing is said: ours in bfloat16 where the CPU computes it fast and
with the fused optimiser, diffusers' in float32.
"""

import argparse
import fcntl
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from few_steps import ROOT, replace_json  # which also makes the modules of training/ importable
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS
from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from optimization import resolve_precision
from report import device_name, versions
from run import COMPILE_MODE, MEMORY_FORMAT

RESULTS = ROOT / "outputs" / "speed"
# Nearly the quick preset's, but with attention in every block at 7x7.
SMALL = {
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}
NETWORKS = ("small", *sorted(path.stem for path in PRESETS.glob("*.yaml")))
FORMS = {"cifar10": (32, 3)}  # size and channels of a network's images, 28x28 gray otherwise
BATCHES = {"cifar10": 16}  # of a training step; 64 otherwise
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}  # by accelerate's names
SAMPLES, CHAIN = 16, 50
WARM_UP = 2


@dataclass(frozen=True)
class System:
    """A way to train or to sample."""

    ours: bool
    precision: str  # "no" or "bf16": by autocast, but in sampling by ours the weights'
    channels_last: bool = False
    fused: bool = False
    compiled: bool = False


def systems(device: torch.device) -> dict[str, System]:
    """The systems by name; those of diffusers begin with its name."""
    ours_last = MEMORY_FORMAT.get(device.type) == torch.channels_last
    found: dict[str, System] = {}
    for precision in DTYPES:
        kind = "fp32" if precision == "no" else precision
        found |= {
            f"diffusers {kind}, NCHW": System(False, precision),
            f"diffusers {kind}, channels last": System(False, precision, channels_last=True),
            f"ours {kind}": System(True, precision, ours_last),
        }
    auto = resolve_precision("auto", device)
    return found | {
        "ours, default": System(True, auto, ours_last, fused=True),
        "ours, default compiled": System(True, auto, ours_last, fused=True, compiled=True),
    }


def network_config(name: str) -> dict[str, Any]:
    """The keys of a network, with the form of its images, without dropout."""
    model = SMALL if name == "small" else yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["model"]
    size, channels = FORMS.get(name, (28, 1))
    return {**model, "dropout": 0.0, "sample_size": size, "in_channels": channels, "out_channels": channels}


def build_network(system: System, network: str, device: torch.device) -> UNet2DModel:
    """The network of a system."""
    torch.manual_seed(0)
    unet = (ScratchUNet2DModel if system.ours else UNet2DModel)(**network_config(network)).to(device)
    return unet.to(memory_format=torch.channels_last) if system.channels_last else unet


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(system: System, network: str, device: torch.device) -> Callable[[], None]:
    """A function that does one optimiser step on images that are on the device."""
    unet = build_network(system, network, device).train()
    if system.compiled:
        unet.compile(mode=COMPILE_MODE.get(device.type, "default"))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=system.fused or None)
    scheduler = (ScratchDDPMScheduler if system.ours else DDPMScheduler)()
    batch = BATCHES.get(network, 64)
    torch.manual_seed(0)
    x_0 = torch.rand(batch, unet.config.in_channels, *[unet.config.sample_size] * 2, device=device) * 2 - 1

    def step() -> None:
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (batch,))
        on_device = t.to(device)
        x_t = scheduler.add_noise(x_0, noise, t if system.ours else on_device)
        with torch.autocast(device.type, torch.bfloat16, enabled=system.precision == "bf16"):
            output = unet(x_t, on_device).sample
        F.mse_loss(output.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_chain(system: System, network: str, device: torch.device) -> Callable[[], None]:
    """A function that draws a batch of images."""
    unet = build_network(system, network, device).eval()
    if system.precision == "bf16" and system.ours:
        unet.to(torch.bfloat16)
    if system.compiled:
        unet.compile(mode=COMPILE_MODE.get(device.type, "default"))
    kinds = (ScratchDDPMPipeline, ScratchDDPMScheduler) if system.ours else (DDPMPipeline, DDPMScheduler)
    pipeline = kinds[0](unet=unet, scheduler=kinds[1]())
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> None:
        generator = torch.Generator(device).manual_seed(0)  # on a GPU, else stock noise comes from the host
        # Stock's pipeline cannot turn bfloat16 into numpy, so that only its network computes in it.
        with torch.autocast(device.type, torch.bfloat16, enabled=system.precision == "bf16" and not system.ours):
            pipeline(SAMPLES, generator, num_inference_steps=CHAIN, output_type="np")

    return sample


KINDS = {"training": training_step, "sampling": sampling_chain}


# --- turns ---------------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """One system: set up, then take turns with the others; prints what it measured."""
    device = torch.device(args.device)
    start = time.perf_counter()
    call = KINDS[args.kind](System(**json.loads(args.system)), args.network, device)
    with Path(args.lock).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time also while setting up
        for _ in range(WARM_UP):
            call()
        wait_for(device)
    set_up = time.perf_counter() - start
    print("ready", flush=True)
    rounds = []
    for line in sys.stdin:  # one for each turn
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            wait_for(device)
            rounds.append(time.perf_counter() - start)
        print("done", flush=True)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": rounds, "set_up": set_up, "peak_memory": peak}))


def take_turns(kind: str, network: str, chosen: dict[str, System], args: argparse.Namespace) -> dict[str, Any]:
    """Every system's rounds."""
    lock = args.results.with_suffix(".lock")
    command = [sys.executable, __file__, "--kind", kind, "--network", network, "--device", args.device]
    workers = {}
    with ExitStack() as stack:
        stack.callback(lock.unlink, missing_ok=True)
        for name, system in chosen.items():
            arguments = [*command, "--lock", str(lock), "--system", json.dumps(asdict(system))]
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            workers[name] = stack.enter_context(process)
            stack.callback(process.kill)
        for worker in workers.values():
            read(worker)
        for _ in range(args.rounds):
            for worker in workers.values():
                write(worker, f"{args.repeats if kind == 'training' else 1}\n")
                read(worker)
        return {name: json.loads(worker.communicate()[0]) for name, worker in workers.items()}


def read(worker: "subprocess.Popen[str]") -> None:
    """Wait for a line of a worker."""
    assert worker.stdout is not None
    if not worker.stdout.readline():
        raise RuntimeError(f"a system failed (see above): {worker.args!r}")


def write(worker: "subprocess.Popen[str]", text: str) -> None:
    """Tell a worker something."""
    assert worker.stdin is not None
    worker.stdin.write(text)
    worker.stdin.flush()


# --- the rest ------------------------------------------------------------------------------------------------------


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
            wait_for(device)
            if number:  # the first chain warms up
                seconds[name].append((time.perf_counter() - start) / CHAIN)
    return seconds


IMPORTS = {
    "diffusers": "from diffusers import UNet2DModel, DDPMScheduler, DDPMPipeline",
    "ours": "import ddpm_from_scratch",
}


def import_times(rounds: int) -> dict[str, list[float]]:
    """Seconds that a fresh process takes for the import."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, line in IMPORTS.items():
            code = f"import time; start = time.perf_counter(); {line}; print(time.perf_counter() - start)"
            said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
            seconds[name].append(float(said))
    return seconds


def peak_rate(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=precision) for _ in range(2))
    best = math.inf
    for _ in range(5):
        wait_for(device)
        start = time.perf_counter()
        a @ b
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def operations(network: str) -> float:
    """Floating-point operations of the network's forward pass for one image."""
    unet = ScratchUNet2DModel(**network_config(network)).eval()
    x = torch.zeros(1, unet.config.in_channels, *[unet.config.sample_size] * 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, torch.zeros(1, dtype=torch.long))
    return float(counter.get_total_flops())


# --- ratios --------------------------------------------------------------------------------------------------------


def ratio(of: dict[str, Any], to: dict[str, Any]) -> float:
    """How many times as fast `of` is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(of["seconds"], to["seconds"], strict=True))


def best_of_diffusers(rows: dict[str, Any], precision: str) -> dict[str, Any]:
    """The faster of diffusers' two memory formats."""
    stock = [row for name, row in rows.items() if name.startswith(f"diffusers {precision}")]
    return min(stock, key=lambda row: statistics.median(row["seconds"]))


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """What is compared, and how many times as fast ours is."""
    found = {
        f"{kind}, against the better memory format of diffusers": ratio(
            rows[f"ours {kind}"], best_of_diffusers(rows, kind)
        )
        for kind in ("fp32", "bf16")
    }
    stock = rows["diffusers fp32, NCHW"]
    for name, title in {"ours, default": "default", "ours, default compiled": "default and compiled"}.items():
        if name in rows:
            found[f"{title}, against diffusers' default"] = ratio(rows[name], stock)
    return found


def report(results: dict[str, Any]) -> list[str]:
    """A line for each ratio and figure."""
    lines = []
    for network, found in results["networks"].items():
        for kind in KINDS:
            for title, value in ratios(found[kind]).items() if kind in found else ():
                lines.append(f"{kind}, {network}, {title}: {value:.2f} times as fast")
        for name, row in found["training"].items():
            images = found["batch"] / statistics.median(row["seconds"])
            # A backward pass takes twice the operations of a forward pass.
            share = 3 * images * found["flops"] / results["peak_flops"][results["systems"][name]["precision"]]
            peak = row["peak_memory"] / 1e9
            lines.append(f"training, {network}, {name}: {images:.1f} images/s, {share:.0%} of the peak, {peak:.2f} GB")
    steps = {name: {"seconds": seconds} for name, seconds in results["scheduler_step"].items()}
    lines.append(f"a scheduler step: {ratio(steps['ours'], steps['diffusers']):.2f} times as fast")
    imports = {name: statistics.median(seconds) for name, seconds in results["import"].items()}
    lines.append(f"import: {imports['ours'] - imports['diffusers']:+.2f} s")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=["small", "cifar10"], choices=NETWORKS, help="presets")
    parser.add_argument("--compile", action="store_true", help="also what is compiled, which takes minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="training steps in a round")
    parser.add_argument("--results", type=Path, help="default: outputs/speed/<device>.json")
    for name in ("kind", "network", "system", "lock"):  # of a worker process
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    name = "cpu" if args.device == "cpu" else device_name(torch.device(args.device)).lower().replace(" ", "_")
    args.results = args.results or RESULTS / f"{name}.json"
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write it down."""
    args = parse(arguments)
    if args.system:
        return work(args)
    start = time.perf_counter()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    chosen = {name: system for name, system in systems(device).items() if args.compile or not system.compiled}
    result: dict[str, Any] = {
        "device": device_name(device),
        "scheduler_step": scheduler_overhead(device, args.rounds),
        "import": import_times(args.rounds),
        "peak_flops": {name: peak_rate(device, precision) for name, precision in DTYPES.items()},
        "systems": {name: asdict(system) for name, system in chosen.items()},
        "networks": {},
    }
    for network in args.networks:
        parameters = ScratchUNet2DModel(**network_config(network)).num_parameters()
        rows = {"training": take_turns("training", network, chosen, args)}
        if network == args.networks[0]:
            rows["sampling"] = take_turns("sampling", network, chosen, args)
        form = {"parameters": parameters, "batch": BATCHES.get(network, 64), "flops": operations(network)}
        result["networks"][network] = {**form, **rows}
    chain = {"samples": SAMPLES, "chain": CHAIN, "rounds": args.rounds}
    replace_json(args.results, {**result, **chain, "seconds": time.perf_counter() - start, "versions": versions()})
    print(*report(result), args.results, sep="\n")


if __name__ == "__main__":
    main()
