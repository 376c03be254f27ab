"""A training run: its parts, put together from a configuration, and its state on disk."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.utils.checkpoint
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from torch import Tensor, nn

from ..data.config import BACKGROUND
from ..data.dataset import ImageStream, TrainingData, load_data
from ..data.resident import can_reside
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.unet import ScratchUNet2DModel
from ..runtime.devices import (
    MEMORY_FORMAT,
    device_name,
    prepare_cpu,
    resolve_precision,
)
from ..runtime.errors import saving
from ..runtime.random_streams import derived_seed
from ..runtime.results import commit, versions
from ..sampling.checkpoints import PROCESS_FLAGS, read_state, read_tensors
from .checkpoint import (
    Progress,
    another_way,
    check_same_run,
    find_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from .config import TrainingConfig, check_halvings
from .consistency import BFLOAT16_RATIO, ConsistencyObjective
from .faults import FiniteGuard
from .graphs import GraphedNetwork
from .model import (
    CONSISTENCY_FLAGS,
    OBJECTIVE_FLAGS,
    build_objective,
    build_scheduler,
    build_timestep_sampler,
    build_unet,
    check_levels,
    load_trained,
    network_config,
    rate_for,
    sample_size,
    teacher_of,
    trained_unet,
    with_process_of,
)
from .objectives import BOUND_LOSSES, LossAwareSampler, Objective, UniformSampler
from .optimizer import EMA, build_optimizer, in_optimizer_steps, learning_rate
from .plan import renew_length

# What `accelerate launch` sets for each.
SPLITTING_ENGINES = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}

# Said explicitly: of diffusers' own a compiler warns.
RECOMPUTE = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

NOISE_BEFORE = "generator"  # the only kind of version 0.1.0
NOISE_OF_DEVICE = {"cuda": "philox"}

UNLIMITED = 10**9  # steps, before a budget of time has become a number of them


@dataclass
class Run:
    """The parts of a training run."""

    config: TrainingConfig  # its steps are optimiser steps
    accelerator: Accelerator
    data: TrainingData
    scheduler: ScratchDDPMScheduler
    unet: nn.Module  # as trained: wrapped for the devices and the precision
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    progress: Progress
    objective: Objective | ConsistencyObjective
    sampler: UniformSampler | LossAwareSampler  # of timesteps
    guard: FiniteGuard

    @cached_property
    def global_batch_size(self) -> int:
        """Images per optimiser step, over all backward passes and processes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; under a budget of time that is not fixed yet, the most that it can have."""
        if self.progress.total_steps is not None:
            return self.progress.total_steps
        if self.config.max_train_minutes is not None:
            return self.config.max_train_steps or UNLIMITED
        epochs = math.ceil(self.config.num_epochs * len(self.data.images) / self.global_batch_size)
        return self.config.max_train_steps or epochs

    @property
    def stream(self) -> ImageStream:
        """The images in the order of training, as the network sees them."""
        config = self.config
        return ImageStream(
            self.data,
            config.seed,
            config.center_crop,
            config.random_flip,
            config.label_dropout,
            config.skip_bad_images,
            config.noise or NOISE_BEFORE,
        )

    @property
    def known_steps(self) -> int | None:
        """`total_steps`; None as long as they wait for a budget of time to be fixed."""
        waiting = self.config.max_train_minutes is not None and self.progress.total_steps is None
        return None if waiting else self.total_steps

    @cached_property
    def trained_unet(self) -> ScratchUNet2DModel:
        """The network that the optimiser steps."""
        return cast(ScratchUNet2DModel, self.accelerator.unwrap_model(self.unet))

    @property
    def eval_unet(self) -> ScratchUNet2DModel:
        """The network to sample from and to save: the average, if there is one."""
        return cast(ScratchUNet2DModel, self.ema.network) if self.ema else self.trained_unet

    @property
    def id2label(self) -> dict[int, str] | None:
        """The names of the classes, as the pipeline takes them; None for unconditional training."""
        return self.data.labels.id2label if self.data.labels else None

    @property
    def pipeline(self) -> ScratchDDPMPipeline:
        """The model as it is now."""
        steps = self.config.ddpm_num_inference_steps if self.config.loss == "consistency" else None
        return ScratchDDPMPipeline(self.eval_unet, self.scheduler, self.id2label, steps)

    @cached_property
    def network(self) -> Callable[..., Any]:
        """What a pass calls: the network as trained, or its CUDA graphs where `--compile` can use them."""
        return GraphedNetwork(self.unet) if self.graphs else self.unet

    @cached_property
    def goal_network(self) -> Callable[..., Any]:
        """What an objective calls for its goal, without gradients that processes would share."""
        return self.network if self.graphs else self.trained_unet

    @property
    def graphs(self) -> bool:
        """Whether passes can be replayed: each gives all gradients of a step, and no other thread uses the device."""
        config, accelerator = self.config, self.accelerator
        single = config.gradient_accumulation_steps == accelerator.num_processes == 1
        plain = accelerator.scaler is None and not config.gradient_checkpointing and can_reside(self.stream)
        return config.compile and accelerator.device.type == "cuda" and single and plain

    @cached_property
    def weights(self) -> list[Tensor]:
        """All that is trained, listed once: a walk through the network takes as long as a good part of a step."""
        return list(self.trained_unet.parameters())

    @property
    def stepper(self) -> torch.optim.Optimizer:
        """What takes a step: the engine's optimiser where it scales gradients, else the plain one.

        The engine's looks for a package in every step, which takes long.
        """
        wrapped = cast(AcceleratedOptimizer, self.optimizer)
        return wrapped if self.accelerator.scaler is not None else wrapped.optimizer

    @cached_property
    def has_dropout(self) -> bool:
        """Whether a pass draws random numbers."""
        return bool(self.trained_unet.config.dropout)

    @cached_property
    def parameter_names(self) -> dict[Tensor, str]:
        """Names for the optimiser's state."""
        return {parameter: name for name, parameter in self.trained_unet.named_parameters()}

    def identity(self) -> dict[str, Any]:
        """Settings that must be the same when a run is resumed, or it would be another run."""
        config = self.config
        values = config.to_dict()
        same = ["seed", "center_crop", "random_flip", "use_ema", *PROCESS_FLAGS, *OBJECTIVE_FLAGS, "timestep_sampling"]
        if config.skip_bad_images:
            same.append("skip_bad_images")
        if config.optimizer != TrainingConfig.optimizer:
            same.append("optimizer")
        if config.noise != NOISE_BEFORE:
            same.append("noise")
        if config.background != BACKGROUND:
            same.append("background")
        if config.value_range is not None:
            same.append("value_range")
        if config.streaming:
            same += ["streaming", "shuffle_window_mb"]
        if config.loss in BOUND_LOSSES:  # the bound is that of a variance
            same.append("ddpm_variance_type")
        if config.loss == "consistency":
            same += CONSISTENCY_FLAGS
        betas = self.scheduler.config.trained_betas  # of a model to fine-tune: no flag makes them
        model = {f"model.{k}": v for k, v in self.trained_unet.config.items() if not k.startswith("_")}
        return {
            **{name: values[name] for name in same},
            **({"trained_betas": list(betas)} if betas is not None else {}),
            "global batch size (train_batch_size x gradient_accumulation_steps x processes)": self.global_batch_size,
            "training images (fingerprint)": self.data.fingerprint,
            **self.data.describe_labels(config),
            **model,
        }


def check_engine() -> None:
    """Refuse engines that cut a network into parts; ValueError if the launcher was told to use one."""
    for engine, switch in SPLITTING_ENGINES.items():
        if parse_flag_from_env(switch):
            raise ValueError(
                f"accelerate is told to use {engine}, which cuts a network into parts: networks of this kind fit on "
                "every device whole, and checkpoints are written from whole ones. Use data parallelism (MULTI_GPU)."
            )


def build(config: TrainingConfig) -> Run:
    """Put a run together, at its start or where its checkpoint stands; nothing is written.

    Raises ValueError if data, network, device or checkpoint do not fit the configuration; FileNotFoundError if there is
    no such data set, model or checkpoint.
    """
    check_engine()
    accelerator = build_accelerator(config)
    checkpoint = checkpoint_of(config, accelerator)
    config = split_batch(with_noise(config, accelerator.device, checkpoint), accelerator.num_processes)
    config = in_optimizer_steps(
        config, config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    )
    torch.manual_seed(derived_seed(config.seed, "weights"))
    config, scheduler, unet, data = build_inputs(config, accelerator)
    device = accelerator.device
    unet.to(device, memory_format=MEMORY_FORMAT.get(device.type, torch.preserve_format))
    ema = EMA(unet, config.ema_inv_gamma, config.ema_power, config.ema_max_decay) if config.use_ema else None
    optimizer = build_optimizer(unet, config, device)
    if config.compile:
        unet.compile()
    prepared_unet, optimizer = accelerator.prepare(unet, optimizer)
    objective = build_objective(config, scheduler)
    run = Run(
        config,
        accelerator,
        data,
        scheduler,
        prepared_unet,
        optimizer,
        ema,
        Progress(bad_images=list(data.unreadable)),
        objective,
        build_timestep_sampler(config, objective),
        FiniteGuard(optimizer.optimizer if accelerator.scaler is None else None, device),
    )
    if checkpoint is not None:
        load(run, checkpoint)
    return run


def checkpoint_of(config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """Where the run goes on, if it does."""
    with accelerator.main_process_first():  # it clears up what a killed run left, once
        return find_checkpoint(config.resume_from_checkpoint, Path(config.output_dir, "checkpoints"))


def with_noise(config: TrainingConfig, device: torch.device, checkpoint: Path | None) -> TrainingConfig:
    """The configuration with the kind of random numbers, if that was left open.

    A run that goes on keeps its own; a new one takes what its device draws quickly.
    """
    if config.noise is not None:
        return config
    if checkpoint is None:
        return replace(config, noise=NOISE_OF_DEVICE.get(device.type, NOISE_BEFORE))
    return replace(config, noise=read_state(checkpoint)["identity"].get("noise", NOISE_BEFORE))


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The engine, on the device and in the precision of the run."""
    on_cpu = prepare_cpu()
    return Accelerator(
        cpu=on_cpu,
        # Said explicitly: `accelerate launch` without a config of its own would set "no".
        mixed_precision=precision_of(config, PartialState(cpu=on_cpu).device),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        # One copy of the gradients less; and DDP takes them in whatever memory order weights of 1x1 have.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=None if config.logger == "none" else config.logger,
        project_dir=str(Path(config.output_dir, config.logging_dir)),
    )


def precision_of(config: TrainingConfig, device: torch.device) -> str:
    """What the network computes in; ValueError if the objective cannot bear what the configuration says."""
    if config.loss != "consistency" or max(config.consistency_q) <= BFLOAT16_RATIO:
        return resolve_precision(config.mixed_precision, device)
    if config.mixed_precision in ("auto", "no"):
        return "no"
    raise ValueError(
        f"mixed_precision {config.mixed_precision!r} rounds more than f differs between neighbours at consistency_q "
        f"{max(config.consistency_q):g}: take 'no', or ratios of at most {BFLOAT16_RATIO}"
    )


def split_batch(config: TrainingConfig, num_processes: int) -> TrainingConfig:
    """The configuration with the batch of a process; ValueError if that of all cannot be split among them."""
    if not config.split_batches:
        return config
    share, rest = divmod(config.train_batch_size, num_processes)
    if rest:
        raise ValueError(
            f"split_batches: {num_processes} processes cannot share a train_batch_size of {config.train_batch_size}; "
            f"make it a multiple of their number, or choose --num_processes"
        )
    return replace(config, train_batch_size=share, split_batches=False)


def build_inputs(
    config: TrainingConfig, accelerator: Accelerator
) -> tuple[TrainingConfig, ScratchDDPMScheduler, ScratchUNet2DModel, TrainingData]:
    """The configuration with all that was left open, the process, the network, new or trained, and the images."""
    with accelerator.main_process_first():  # downloads happen once
        trained = load_trained(config)
        scheduler = build_scheduler(config, trained.scheduler if trained else None)
        config = with_process_of(scheduler, config)
        keys = dict(trained.unet.config) if trained else network_config(config)
        data = load_data(config, keys.get("in_channels"), config.size or keys.get("sample_size"))
        check_levels(config, data)
    if trained:
        check_halvings(keys, data.size)
        unet = trained_unet(trained, config, data.labels)
    else:
        unet = build_unet(keys, config, data)
    unet.register_to_config(sample_size=sample_size(data.size))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing(RECOMPUTE)
    if config.learning_rate is None:
        config = replace(config, learning_rate=rate_for(unet.config.block_out_channels[0]))
    return config, scheduler, unet, data


def save(run: Run) -> None:
    """Write a checkpoint; one process does, since all hold the same.

    Raises CannotSave if it cannot be written; those that are there are whole.
    """
    if not run.accelerator.is_main_process:
        return
    progress, scaler = run.progress, run.accelerator.scaler
    progress.gradient_scaler = scaler.state_dict() if scaler is not None else {}
    progress.skipped_steps, progress.skipped_in_a_row = run.guard.counts()
    tensors: dict[str, dict[str, Any]] = {
        "unet": run.trained_unet.state_dict(),
        "optimizer": optimizer_tensors(run.optimizer, run.parameter_names),
        **({"ema": run.ema.network.state_dict()} if run.ema else {}),
        **({"sampler": sampler} if (sampler := run.sampler.state_dict()) else {}),
    }
    state = {"progress": vars(progress), "identity": run.identity()}
    about = {"step": progress.step, "config": run.config.to_dict(), "versions": versions()}
    about["scheduler"] = dict(run.scheduler.config)
    folder = Path(run.config.output_dir, "checkpoints", f"step_{progress.step:08d}")
    with saving(f"the checkpoint of step {progress.step}"):
        save_checkpoint(folder, tensors, state, run.config.checkpoints_total_limit, about)


def load(run: Run, checkpoint: Path) -> None:
    """Continue where a checkpoint stands: weights, average, optimiser and progress; all else follows from the seed.

    Raises ValueError if the checkpoint is of another run, or further than this run is to go.
    """
    state = read_state(checkpoint)
    older = {name: getattr(TrainingConfig(), name) for name in (*OBJECTIVE_FLAGS, "timestep_sampling")}
    advice = another_way(run.config.resume_from_checkpoint, run.config.output_dir)
    check_same_run({**older, **state["identity"]}, run.identity(), advice)  # version 0.1.0 had no other objective
    run.progress = Progress(**state["progress"])
    renew_length(run)
    if run.progress.step > run.total_steps:
        raise ValueError(
            f"{checkpoint} has done {run.progress.step} steps, the run has {run.total_steps}: give it more, or choose "
            "another --output_dir"
        )
    run.guard.go_on(run.progress.skipped_steps, run.progress.skipped_in_a_row)
    run.trained_unet.load_state_dict(read_tensors(checkpoint, "unet"))
    load_optimizer_tensors(run.optimizer, run.parameter_names, read_tensors(checkpoint, "optimizer"))
    if run.ema:
        run.ema.network.load_state_dict(read_tensors(checkpoint, "ema"))
    if isinstance(run.sampler, LossAwareSampler):
        run.sampler.load_state_dict(read_tensors(checkpoint, "sampler"))
    if run.accelerator.scaler is not None and run.progress.gradient_scaler:
        run.accelerator.scaler.load_state_dict(run.progress.gradient_scaler)


def results(run: Run) -> dict[str, Any]:
    """The run in numbers."""
    progress, accelerator = run.progress, run.accelerator
    images = progress.step * run.global_batch_size
    return {
        "final_loss": final_loss(progress.losses),
        "final_learning_rate": learning_rate(progress.step, run.config, run.total_steps),
        "steps": progress.step,
        "images_seen": images,
        "epochs": images / len(run.data.images),
        "seconds": progress.seconds,
        "images_per_second": images / progress.seconds,
        **({"skipped_steps": progress.skipped_steps} if progress.skipped_steps else {}),
        **({"bad_images": len(progress.bad_images)} if progress.bad_images else {}),
        **({"evaluations": progress.evaluations} if progress.evaluations else {}),
        **teacher_of(run.config),
        "seed": run.config.seed,
        "num_parameters": run.trained_unet.num_parameters(),
        "dataset": run.data.describe(run.config),
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": versions(),
        **({"commit": here} if (here := commit()) else {}),
    }


FINAL_PART = 0.1  # of the run, over which the final loss is averaged


def final_loss(losses: Sequence[tuple[int, float]]) -> float:
    """Mean of the logged losses of the last tenth of the run."""
    first = (1 - FINAL_PART) * losses[-1][0]
    return float(np.mean([loss for step, loss in losses if step > first]))
