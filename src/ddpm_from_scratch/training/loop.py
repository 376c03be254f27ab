"""Algorithm 1 of Ho et al. 2020, as a loop that can stop anywhere and go on as if it had not."""

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.arrays import to_unit_range
from ..data.dataset import Batch, StreamBatches, build_loader
from ..data.images import check_bad_images
from ..data.resident import ResidentImages, can_reside
from ..diffusion.tensors import moved
from ..runtime.errors import Diverged, Stopped, saving
from ..runtime.random_streams import derived_seed, stratified_uniforms
from .faults import StopSignals
from .objectives import LossAwareSampler
from .optimizer import clip_gradients, ema_decay, forget_gradients, learning_rate, set_learning_rate
from .outputs import draw_grid, save_grid
from .plan import Stopwatch
from .run import Run, save
from .upload import Upload
from .validation import ValidationSet, evaluate_run, is_best, keep_best

logger = logging.getLogger("train")


class Pass(NamedTuple):
    """One forward and backward pass of a process."""

    batch: Batch
    t: Tensor  # long [B], on the host
    weight: Tensor  # float32 [B]: it undoes that not all timesteps are drawn alike


def train_step(run: Run, passes: Iterator[Pass], step: int) -> Tensor:
    """Optimiser step number `step` (0, 1, ...): the loop body of Algorithm 1 in Ho et al. 2020.

    With labels, that in Ho & Salimans 2022, where a share of the images is shown without its class.

    Returns:
        The mean loss over this process's images, on the device: reading it would make the host wait.
    """
    config, accelerator, unet = run.config, run.accelerator, run.unet
    to_device = partial(moved, device=accelerator.device)
    if run.has_dropout:
        torch.manual_seed(derived_seed(config.seed, "dropout", step, accelerator.process_index))
    objective = run.objective.at(step / run.total_steps)
    of_images, losses = [], []
    for batch, t, weight in itertools.islice(passes, config.gradient_accumulation_steps):
        with accelerator.accumulate(unet):
            x_0 = to_unit_range(to_device(batch.images))  # x_0 ~ q(x_0)
            y = None if batch.labels is None else to_device(batch.labels)  # its class, or the null label
            noise = to_device(batch.noise)  # ε ~ N(0, I), and t ~ Uniform({1, ..., T}), counted from 0
            x_t = run.scheduler.add_noise(x_0, noise, t)  # √ᾱ_t x_0 + √(1 - ᾱ_t) ε, in float32
            goal = objective.goal(run.goal_network, x_0, noise, t, y)  # x_0, but in consistency tuning
            output = run.network(x_t, to_device(t), class_labels=y).sample  # ε_θ(x_t, t, y)
            loss_of_image = objective(output, goal, noise, x_t, t)  # ‖ε - ε_θ(x_t, t, y)‖², or as configured
            loss = (to_device(weight) * loss_of_image).mean()
            accelerator.backward(loss)  # ∇_θ
            if accelerator.sync_gradients:
                accelerator.unscale_gradients()
                run.guard.check(clip_gradients(run.weights, config.max_grad_norm))
                run.stepper.step()
                forget_gradients(run.weights)
        of_images.append(loss_of_image.detach())
        losses.append(loss.detach())
    if isinstance(run.sampler, LossAwareSampler):
        remember(run, run.sampler, step, of_images)
    return torch.stack(losses).mean()


def batches_of(run: Run, positions: StreamBatches) -> Iterator[Batch]:
    """The batches at these positions: made on the device if they can be, else by a loader that starts at once."""
    config, stream, device = run.config, run.stream, run.accelerator.device
    if not can_reside(stream):
        workers = config.dataloader_num_workers
        here = map(stream.__getitems__, positions)  # a loader without workers does no more, in more time
        return iter(build_loader(stream, positions, workers, device.type == "cuda")) if workers else here
    resident = ResidentImages(stream, device)
    make = torch.compile(resident.batch) if config.compile and device.type == "cuda" else resident.batch
    return (
        make(moved(resident.indices(places), device), torch.arange(places.start, places.stop, device=device))
        for places in positions
    )


def passes_from(run: Run, step: int) -> Iterator[Pass]:
    """This process's passes, from an optimiser step to the end of the run; the loader starts at once."""
    config, accelerator = run.config, run.accelerator
    passes = config.gradient_accumulation_steps
    micro_steps = range(step * passes, run.total_steps * passes)
    batches = StreamBatches(micro_steps, accelerator.process_index, accelerator.num_processes, config.train_batch_size)
    loader = batches_of(run, batches)

    def all_passes() -> Iterator[Pass]:
        for optimizer_step in range(step, run.total_steps):
            all_t, all_weights = timesteps(run, optimizer_step)
            for micro_step in range(optimizer_step * passes, (optimizer_step + 1) * passes):
                batch = next(loader)
                note_bad_images(run, batch.unreadable)
                first = batches.positions(micro_step).start - optimizer_step * run.global_batch_size
                rows = slice(first, first + config.train_batch_size)
                yield Pass(batch, all_t[rows], all_weights[rows])

    return all_passes()


def timesteps(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Timesteps of the global batch, long, and the weights of their losses, float32: [global_batch_size] each."""
    t, weights = run.sampler.draw(stratified_uniforms(run.config.seed, step, run.global_batch_size))
    return t, weights.float()


def remember(run: Run, sampler: LossAwareSampler, step: int, losses: list[Tensor]) -> None:
    """Tell the sampler the losses of the global batch, which every process gets; the host waits for them."""
    all_t, _ = timesteps(run, step)
    by_process = run.accelerator.gather(torch.stack(losses)).cpu()  # [processes x passes, B]
    # Rows of the global batch run over the passes first, then over the processes.
    by_pass = by_process.reshape(run.accelerator.num_processes, len(losses), -1).transpose(0, 1)
    sampler.update(all_t, by_pass.reshape(-1))


def note_bad_images(run: Run, messages: Iterable[str]) -> None:
    """Report images that were passed over, each once; BadImages if there are too many."""
    known = run.progress.bad_images
    for message in messages:
        if message not in known:
            known.append(message)
            logger.warning("passed over: %s", message)
    check_bad_images(known, run.config.max_bad_images)


def advance(run: Run, passes: Iterator[Pass]) -> Tensor:
    """The next optimiser step, at its learning rate, and the average after it; the loss as `train_step` gives it."""
    step = run.progress.step
    set_learning_rate(run.optimizer, learning_rate(step, run.config, run.total_steps))
    loss = train_step(run, passes, step)
    run.progress.step = step + 1
    if run.ema:
        run.ema.update(run.weights, run.progress.step)
    return loss


def due(step: int, every: int | None, last: bool = False) -> bool:
    """Whether a thing that is done every so many steps, if at all, is due after this one, or after the last one."""
    return every is not None and (last or step % every == 0)


def train(run: Run, validation_set: ValidationSet | None, upload: Upload | None, signals: StopSignals) -> None:
    """Algorithm 1: repeat until converged, here for a fixed number of optimiser steps.

    Args:
        run: as built.
        validation_set: for the evaluations on the way; None for a run without.
        upload: gets the model at every checkpoint but the last; None for a run without, and on all processes but one.
        signals: that ask the run to stop.

    Raises:
        Stopped: one did; a checkpoint is written.
        CannotSave, Diverged: see `save` and `log`.
    """
    config, progress = run.config, run.progress
    passes = passes_from(run, progress.step)
    bar = tqdm(total=run.known_steps, initial=progress.step, unit="step", disable=not run.accelerator.is_main_process)
    unread = [torch.tensor(loss, device=run.accelerator.device) for loss in progress.unread]
    progress.unread = []
    clock = time.perf_counter()
    run.unet.train()
    stopwatch = Stopwatch(run)
    while progress.step < run.total_steps:
        unread.append(advance(run, passes))
        stopwatch.lap()
        bar.total, total = run.known_steps, run.total_steps
        bar.update()
        step, last = progress.step, progress.step == total
        saves = due(step, config.checkpointing_steps, last)
        draws = due(step, config.sample_steps)
        evaluates = due(step, config.eval_steps, last)
        if logs := saves or draws or evaluates or last or due(step, config.log_steps):
            log(run, bar, unread, clock)
            if evaluates and validation_set is not None:
                compare(run, validation_set)
            if saves:
                save(run)
                if upload and not last:
                    upload.snapshot(run)
            if draws:
                save_grid(run, draw_grid(run))
            clock = time.perf_counter()  # so that saving and sampling do not count as training
        if asked_to_stop(run, signals, logs):
            progress.unread = [float(loss) for loss in unread]  # so that the next log is that of a run without a stop
            progress.seconds += time.perf_counter() - clock
            if not saves:
                save(run)
            raise Stopped(f"stopped after step {step}; a checkpoint is written: the same command goes on.")
    bar.close()


def asked_to_stop(run: Run, signals: StopSignals, logging_now: bool) -> bool:
    """Whether a signal asked for it; several processes agree on it where they wait for each other anyway."""
    asked = signals.received is not None
    if run.accelerator.num_processes == 1:
        return asked
    if not logging_now:
        return False
    return bool(run.accelerator.reduce(torch.tensor(float(asked), device=run.accelerator.device)) > 0)


def log(run: Run, bar: "tqdm[Any]", unread: list[Tensor], since: float) -> None:
    """Read the losses of the steps since the last call, which began at a time of `perf_counter`, and pass them on.

    Raises Diverged if the gradients have not been finite for too many steps in a row.
    """
    config, progress, accelerator = run.config, run.progress, run.accelerator
    losses = torch.stack(unread)
    finite = losses.isfinite()
    both = torch.stack([losses.where(finite, 0).sum(), finite.sum()])
    total, count = accelerator.reduce(both, reduction="sum").tolist()  # waits for the device
    seconds = time.perf_counter() - since  # read only now: the host may have been ahead
    steps = len(unread)
    images_per_second = steps * run.global_batch_size / seconds
    unread.clear()
    count_skipped(run)
    if not count:
        return
    loss = total / count
    progress.seconds += seconds
    progress.losses.append((progress.step, loss))
    rate = learning_rate(progress.step, config, run.total_steps)  # of the next step, so a decay ends at 0
    values = {"loss": loss, "learning_rate": rate, "images_per_second": images_per_second}
    if run.ema:
        values["ema_decay"] = ema_decay(progress.step, config.ema_inv_gamma, config.ema_power, config.ema_max_decay)
    accelerator.log(values, step=progress.step)
    bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}, {images_per_second:.0f} images/s")


def count_skipped(run: Run) -> None:
    """Note how many steps were skipped; Diverged if too many did, one after the other."""
    config, progress = run.config, run.progress
    before = progress.skipped_steps
    progress.skipped_steps, progress.skipped_in_a_row = run.guard.counts()
    if progress.skipped_steps > before and run.accelerator.is_main_process:
        logger.warning("%d steps were skipped: gradients not finite", progress.skipped_steps - before)
    if progress.skipped_in_a_row >= min(config.max_skipped_steps, run.total_steps):
        raise Diverged(
            f"the gradients of the last {progress.skipped_in_a_row} steps, up to step {progress.step}, were not "
            "finite. The last checkpoint is of before; try a lower learning rate."
        )


def compare(run: Run, validation_set: ValidationSet) -> None:
    """Evaluate the network as it is now, and keep it if it is the best so far."""
    figures = evaluate_run(run, validation_set)
    run.progress.evaluations.append(figures)
    run.accelerator.log({f"eval/{name}": value for name, value in figures.items()}, step=run.progress.step)
    if run.accelerator.is_main_process and is_best(run.progress.evaluations):
        with saving("the best model so far"):
            keep_best(run, figures)
    run.accelerator.wait_for_everyone()
