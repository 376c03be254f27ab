"""Time training steps, sampling chains and what surrounds them, of this package and of others, side by side.

    python benchmarks/speed.py              # the quick form: 10 minutes on 2 cores
    python benchmarks/speed.py --full       # also compiled, in other forms, profiled, and the effect of bfloat16

Every system is a process of its own. They take turns, one round each, so that what else the machine does falls on all
of them alike; a figure is the median of the rounds, a ratio the median of the ratios of each round. Training steps are
those of `training/train.py` without reading data: noise, x_t, forward and backward pass, clipping, AdamW. "Default" is
what each project's own training script does where nothing is said: ours in bfloat16 where the CPU computes it fast,
with the fused optimiser, keeping freed memory; diffusers' in float32. The package `denoising-diffusion-pytorch` takes
part where it is installed.
"""

import argparse
import fcntl
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from few_steps import replace_json
from figures import faster_format, images_per_second, peak_share, ratio
from surroundings import (
    IMPORTS,
    first_images,
    loading_rates,
    operations,
    peak_rate,
    precision_effect,
    profile,
    scheduler_overhead,
    time_processes,
)
from systems import (
    CHAIN,
    DTYPES,
    KINDS,
    MODELS,
    NETWORKS,
    PEER,
    PEER_NETWORKS,
    ROOT,
    SAMPLES,
    System,
    network_config,
    network_form,
    systems,
)

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.runtime.devices import device_name
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.training.plan import synchronize

RESULTS = ROOT / "outputs" / "speed"
DEFAULTS = ("diffusers fp32, NCHW", "ours, default")  # what networks of other sizes are measured with
WARM_UP = 2


# --- turns ---------------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """One system: set up, then take turns with the others; prints what it measured."""
    device = torch.device(args.device)
    start = time.perf_counter()
    call = KINDS[args.kind](System(**json.loads(args.system)), args.network, device)
    with Path(args.lock).open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time also while setting up
        for _ in range(WARM_UP):
            call()
        synchronize(device)
    set_up = time.perf_counter() - start
    print("ready", flush=True)
    rounds = []
    for line in sys.stdin:  # one for each turn
        for _ in range(int(line)):
            start = time.perf_counter()
            call()
            synchronize(device)
            rounds.append(time.perf_counter() - start)
        print("done", flush=True)
    print(json.dumps({"seconds": rounds, "set_up": set_up, "peak_memory": peak_memory(device)}))


def peak_memory(device: torch.device) -> int:
    """Bytes of the device's memory, or of this process, for which `getrusage` would tell its parent's if larger."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


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


# --- ratios --------------------------------------------------------------------------------------------------------


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """What is compared, and how many times as fast ours is."""
    found = {
        f"{kind}, against the better memory format of diffusers": ratio(
            rows[f"ours {kind}"], rows[faster_format(rows, kind)]
        )
        for kind in ("fp32", "bf16")
        if f"ours {kind}" in rows
    }
    stock = rows["diffusers fp32, NCHW"]
    for name, title in {"ours, default": "default", "ours, default compiled": "default and compiled"}.items():
        if name in rows:
            found[f"{title}, against diffusers' default"] = ratio(rows[name], stock)
    if PEER in rows:
        found[f"default, against {PEER}"] = ratio(rows["ours, default"], rows[PEER])
    return found


def report(results: dict[str, Any]) -> list[str]:
    """A line for each ratio and figure."""
    lines = []
    for network, found in results["networks"].items():
        for kind in KINDS:
            for title, value in ratios(found[kind]).items() if kind in found else ():
                lines.append(f"{kind}, {network}, {title}: {value:.2f} times as fast")
        for name, row in found.get("training", {}).items():
            share = peak_share(found, row, results["peak_flops"][results["systems"][name]["precision"]])
            rate, peak = images_per_second(found, row), row["peak_memory"] / 1e9
            lines.append(f"training, {network}, {name}: {rate:.1f} images/s, {share:.0%} of the peak, {peak:.2f} GB")
    for title, key in {"a scheduler step": "scheduler_step", "import": "import", "first image": "first_image"}.items():
        seconds = {name: statistics.median(values) for name, values in results[key].items()}
        lines.append(f"{title}: ours {seconds['ours']:.3g} s, diffusers {seconds['diffusers']:.3g} s")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", default=["small", "cifar10"], choices=NETWORKS, help="presets")
    parser.add_argument(
        "--full", action="store_true", help="also compiled, in other forms, profiled, and bfloat16's effect"
    )
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=DTYPES, help="no is float32")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="training steps in a round")
    parser.add_argument("--num_images", type=int, default=1000, help="for the effect of bfloat16 on samples")
    parser.add_argument("--results", type=Path, help="default: outputs/speed/<device>.json")
    for name in ("kind", "network", "system", "lock"):  # of a worker process
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    name = "cpu" if args.device == "cpu" else device_name(torch.device(args.device)).lower().replace(" ", "_")
    args.results = args.results or RESULTS / f"{name}.json"
    return args


def choose(network: str, found: dict[str, System], args: argparse.Namespace) -> dict[str, System]:
    """The systems that a network is measured with: compiling a large one takes too long on a CPU."""
    if network in MODELS and network != "small":
        return {name: found[name] for name in DEFAULTS}
    compiling = args.full and (network == "small" or args.device != "cpu")
    fitting = {
        name: system
        for name, system in found.items()
        if (compiling or not system.compiled) and system.precision in args.precisions
    }
    return {name: system for name, system in fitting.items() if name != PEER or network in PEER_NETWORKS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write it down."""
    args = parse(arguments)
    if args.system:
        return work(args)
    start = time.perf_counter()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    found = systems(device)
    result: dict[str, Any] = {
        "device": device_name(device),
        "scheduler_step": scheduler_overhead(device, args.rounds),
        "import": time_processes(IMPORTS, args.rounds),
        "first_image": first_images(args.rounds),
        "loading": loading_rates(),
        "peak_flops": {
            name: peak_rate(device, precision) for name, precision in DTYPES.items() if name in args.precisions
        },
        "systems": {name: asdict(system) for name, system in found.items()},
        "networks": {},
    }
    if args.full:
        result["precision"] = precision_effect(args.num_images)
        result["profile"] = {name: profile(found["ours, default"], name, device) for name in args.networks}
    for network in [*args.networks, *(other for other in MODELS if args.full and other not in args.networks)]:
        chosen = choose(network, found, args)
        rows = {"training": take_turns("training", network, chosen, args)} if "training" in args.kinds else {}
        if network == args.networks[0] and "sampling" in args.kinds:
            rows["sampling"] = take_turns("sampling", network, chosen, args)
        parameters = ScratchUNet2DModel(**network_config(network)).num_parameters()
        form = dict(zip(("batch", "size", "channels"), network_form(network), strict=True))
        result["networks"][network] = {**form, "parameters": parameters, "flops": operations(network), **rows}
    about = versions() | ({PEER: importlib.metadata.version(PEER)} if PEER in found else {})
    chain = {"samples": SAMPLES, "chain": CHAIN, "rounds": args.rounds}
    replace_json(args.results, {**result, **chain, "seconds": time.perf_counter() - start, "versions": about})
    print(*report(result), args.results, sep="\n")


if __name__ == "__main__":
    main()
