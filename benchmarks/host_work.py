"""Time what a training step costs the host besides the network: what a GPU waits for if it is quick enough.

    python benchmarks/host_work.py

The network of the preset fashion_mnist, as many tensors but few channels, does nothing: its output is its input, and
every weight gets a gradient of zeros. What is left of a step is the loader, the noise, the loss, clipping, optimiser
and average. Its own part, the backward pass that hands out the zeros, is timed by itself and subtracted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from few_steps import ROOT, replace_json
from own_images import processor
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ddpm_from_scratch import ScratchUNet2DModel
from ddpm_from_scratch.runtime.devices import device_name, keep_freed_memory
from ddpm_from_scratch.runtime.results import versions
from ddpm_from_scratch.training.arguments import parse as parse_training
from ddpm_from_scratch.training.loop import advance, passes_from
from ddpm_from_scratch.training.run import build

RESULTS = ROOT / "docs" / "results" / "host_work.json"
FLAGS = [
    "fashion_mnist",
    *("--dataset_name", "null", "--output_dir", "outputs/host_work", "--resume_from_checkpoint", "null"),
    *("--model.block_out_channels", "[8,16,16]", "--model.norm_num_groups", "4", "--model.attention_head_dim", "4"),
    *("--compile", "false", "--dataloader_num_workers", "0", "--mixed_precision", "no", "--logger", "none"),
]


class Idle(torch.autograd.Function):
    """The identity, with zeros as the gradients of all weights."""

    @staticmethod
    def forward(context: FunctionCtx, x: Tensor, *weights: Tensor) -> Tensor:
        """The input."""
        context.save_for_backward(*weights)
        return x.clone()

    @staticmethod
    def backward(context: FunctionCtx, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Zeros."""
        return None, *map(torch.zeros_like, context.saved_tensors)  # type: ignore[attr-defined]


class Output:
    """What a network returns."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


def idle(unet: ScratchUNet2DModel) -> Callable[..., Output]:
    """A forward pass that does nothing."""
    weights = list(unet.parameters())
    return lambda x, t, class_labels=None, **_: Output(Idle.apply(x, *weights))


def per_call(call: Callable[[], object], count: int) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def measure(flags: Sequence[str], rounds: int, steps: int) -> dict[str, float]:
    """Milliseconds of host work a step: the median of the rounds, and the network's own share."""
    config, _ = parse_training(flags)
    run = build(config)
    run.unet.train()
    network = run.trained_unet
    network.forward = idle(network)  # type: ignore[method-assign]
    weights, x = list(network.parameters()), torch.randn(1, 1, 28, 28)

    def nothing() -> None:
        Idle.apply(x, *weights).sum().backward()
        for weight in weights:
            weight.grad = None

    passes = passes_from(run, 0)
    advance(run, passes)
    whole, own = [], []
    for _ in range(rounds):
        whole.append(per_call(lambda: advance(run, passes), steps))
        own.append(per_call(nothing, steps))
    found = {"tensors": len(weights), "step": statistics.median(whole) * 1e3, "network": statistics.median(own) * 1e3}
    return {**found, "host": found["step"] - found["network"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="in each round")
    parser.add_argument("--train_batch_size", type=int, default=1, help="1: the work that does not grow with it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--label", default="now", help="the name of these figures, beside others in the results")
    parser.add_argument("more", nargs="*", help="flags of the run")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(1)
    flags = [*FLAGS, "--train_batch_size", str(args.train_batch_size), *args.more]
    figures = measure(flags, args.rounds, args.steps)
    found = json.loads(args.results.read_text(encoding="utf-8")) if args.results.is_file() else {}
    device = f"{device_name(torch.device('cpu'))}, {processor()}"
    about = {"device": device, "versions": versions(), "rounds": args.rounds, "steps": args.steps}
    replace_json(args.results, {**found, args.label: {**figures, **about}})
    print(args.label, figures)


if __name__ == "__main__":
    main()
