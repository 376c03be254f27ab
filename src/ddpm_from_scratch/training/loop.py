"""Algorithm 1 of Ho et al. 2020 as a loop that can stop anywhere, and the model folder that it ends in."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import Batch, ImageStream, StreamBatches, build_loader
from ..data.images import check_bad_images
from ..evaluation.figures import LOSS_LABELS, plot_losses
from ..runtime.atomic_files import replace_file, replacing_files
from ..runtime.errors import Diverged, Stopped, saving
from ..runtime.random_streams import batch_positions, derived_seed, stratified_timesteps, stratified_uniforms
from ..runtime.results import write_json
from ..sampling.generate import SampleSpec, generate
from ..sampling.previews import image_grid
from ..sampling.samplers import SAMPLERS
from .config import TrainingConfig, config_with_header
from .faults import StopSignals
from .objectives import LossAwareSampler
from .optimizer import ema_decay, learning_rate, set_learning_rate
from .run import Run, results, save
from .upload import Upload
from .validation import ValidationSet, evaluate_run, is_best, keep_best

logger = logging.getLogger("train")


def train_step(run: Run, batches: Iterator[Batch], step: int) -> Tensor:
    """Optimiser step number `step` (0, 1, ...): the loop body of Algorithm 1 in Ho et al. 2020.

    With labels, that in Ho & Salimans 2022, where a share of the images is shown without its class.

    Returns:
        The mean loss over this process's images, on the device: reading it would make the host wait.
    """
    config, accelerator, scheduler, unet = run.config, run.accelerator, run.scheduler, run.unet
    to_device = partial(moved, device=accelerator.device)
    rank, world_size, passes = accelerator.process_index, accelerator.num_processes, config.gradient_accumulation_steps
    torch.manual_seed(derived_seed(config.seed, "dropout", step, rank))
    all_t, all_weights = timesteps(run, step)
    seen, losses = [], []
    for micro_step in range(step * passes, (step + 1) * passes):
        positions = batch_positions(micro_step, rank, world_size, config.train_batch_size)
        rows = slice(first := positions.start - step * run.global_batch_size, first + len(positions))
        with accelerator.accumulate(unet):
            batch = next(batches)
            note_bad_images(run, batch.unreadable)
            x_0 = to_unit_range(to_device(batch.images))  # x_0 ~ q(x_0)
            y = None if batch.labels is None else to_device(batch.labels)  # its class, or the null label
            t = all_t[rows]  # t ~ Uniform({1, ..., T}), counted from 0
            noise = to_device(batch.noise)  # ε ~ N(0, I)
            x_t = scheduler.add_noise(x_0, noise, t)  # √ᾱ_t x_0 + √(1 - ᾱ_t) ε, in float32
            output = unet(x_t, to_device(t), class_labels=y).sample  # ε_θ(x_t, t, y)
            loss_of_image = run.objective(output, x_0, noise, x_t, t)  # ‖ε - ε_θ(x_t, t, y)‖², or as configured
            loss = (to_device(all_weights[rows]) * loss_of_image).mean()
            accelerator.backward(loss)  # ∇_θ
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                run.guard.check(norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
        seen.append(loss_of_image.detach())
        losses.append(loss.detach())
    if run.sampler is not None:
        remember(run, run.sampler, all_t, seen)
    return torch.stack(losses).mean()


def timesteps(run: Run, step: int) -> tuple[Tensor, Tensor]:
    """Timesteps of the global batch, and the weights of their losses, which undo that not all are drawn alike.

    Returns:
        Long and float32, [global_batch_size] each.
    """
    if run.sampler is None:
        t = stratified_timesteps(run.config.seed, step, run.global_batch_size, run.config.ddpm_num_steps)
        return t, torch.ones(len(t))
    t, weights = run.sampler.draw(stratified_uniforms(run.config.seed, step, run.global_batch_size))
    return t, weights.float()


def remember(run: Run, sampler: LossAwareSampler, all_t: Tensor, losses: list[Tensor]) -> None:
    """Tell the sampler the losses of the global batch, which every process gets; the host waits for them."""
    by_process = run.accelerator.gather(torch.stack(losses)).cpu()  # [processes x passes, B]
    # Rows of the global batch run over the passes first, then over the processes.
    by_pass = by_process.reshape(run.accelerator.num_processes, len(losses), -1).transpose(0, 1)
    sampler.update(all_t, by_pass.reshape(-1))


def note_bad_images(run: Run, messages: Iterable[str]) -> None:
    """Report images that were passed over, each once.

    Raises:
        BadImages: there are too many.
    """
    known = run.progress.bad_images
    for message in messages:
        if message not in known:
            known.append(message)
            logger.warning("passed over: %s", message)
    check_bad_images(known, run.config.max_bad_images)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; a GPU copies pinned memory while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_unit_range(pixels: Tensor) -> Tensor:
    """Uint8 0 .. 255 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def batches_from(run: Run, step: int) -> Iterator[Batch]:
    """This process's batches of images and labels, from an optimiser step to the end of the run."""
    config, accelerator = run.config, run.accelerator
    passes = config.gradient_accumulation_steps
    micro_steps = range(step * passes, run.total_steps * passes)
    stream = ImageStream(
        run.data, config.seed, config.center_crop, config.random_flip, config.label_dropout, config.skip_bad_images
    )
    batches = StreamBatches(micro_steps, accelerator.process_index, accelerator.num_processes, config.train_batch_size)
    return iter(build_loader(stream, batches, config.dataloader_num_workers, accelerator.device.type == "cuda"))


def advance(run: Run, batches: Iterator[Batch]) -> Tensor:
    """The next optimiser step, at its learning rate, and the average after it; the loss as `train_step` gives it."""
    step = run.progress.step
    set_learning_rate(run.optimizer, learning_rate(step, run.config, run.total_steps))
    loss = train_step(run, batches, step)
    run.progress.step = step + 1
    if run.ema:
        run.ema.update(run.trained_unet, run.progress.step)
    return loss


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
    config, progress, total = run.config, run.progress, run.total_steps
    batches = batches_from(run, progress.step)
    bar = tqdm(total=total, initial=progress.step, unit="step", disable=not run.accelerator.is_main_process)
    unread = [torch.tensor(loss, device=run.accelerator.device) for loss in progress.unread]
    progress.unread = []
    clock = time.perf_counter()
    run.unet.train()
    while progress.step < total:
        unread.append(advance(run, batches))
        bar.update()
        last = progress.step == total
        saving = config.checkpointing_steps and (last or progress.step % config.checkpointing_steps == 0)
        sampling = config.sample_steps and progress.step % config.sample_steps == 0
        evaluating = config.eval_steps is not None and (last or progress.step % config.eval_steps == 0)
        logging_now = saving or sampling or evaluating or last or progress.step % config.log_steps == 0
        if logging_now:
            log(run, bar, unread, time.perf_counter() - clock)
            if evaluating and validation_set is not None:
                compare(run, validation_set)
            if saving:
                save(run)
                if upload and not last:
                    upload.snapshot(run)
            if sampling:
                save_grid(run, draw_grid(run))
            clock = time.perf_counter()  # so that saving and sampling do not count as training
        if asked_to_stop(run, signals, bool(logging_now)):
            progress.seconds += time.perf_counter() - clock
            progress.unread = [float(loss) for loss in unread]  # so that the next log is that of a run without a stop
            if not saving:
                save(run)
            raise Stopped(f"stopped after step {progress.step}; a checkpoint is written: the same command goes on.")
    bar.close()


def asked_to_stop(run: Run, signals: StopSignals, logging_now: bool) -> bool:
    """Whether a signal asked for it; several processes agree on it where they wait for each other anyway."""
    asked = signals.received is not None
    if run.accelerator.num_processes == 1:
        return asked
    if not logging_now:
        return False
    return bool(run.accelerator.reduce(torch.tensor(float(asked), device=run.accelerator.device)) > 0)


def log(run: Run, bar: "tqdm[Any]", unread: list[Tensor], seconds: float) -> None:
    """Read the losses of the steps since the last call, which took `seconds`, and pass them on.

    Raises:
        Diverged: the gradients have not been finite for too many steps in a row.
    """
    config, progress, accelerator = run.config, run.progress, run.accelerator
    losses = torch.stack(unread)
    finite = losses.isfinite()
    both = torch.stack([losses.where(finite, 0).sum(), finite.sum()])
    total, count = accelerator.reduce(both, reduction="sum").tolist()  # waits for the device
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
    """Note how many steps were skipped.

    Raises:
        Diverged: too many did, one after the other.
    """
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


def draw_grid(run: Run) -> Image.Image:
    """Sample with the network as it is now, from the same noise each time; the processes share the work.

    Of a class-conditional network, the classes in turn.
    """
    config, unet, accelerator = run.config, run.eval_unet, run.accelerator
    pipeline = run.pipeline
    pipeline.scheduler = SAMPLERS[config.sample_scheduler](run.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    each = math.ceil(config.eval_batch_size / accelerator.num_processes)
    spec = SampleSpec(
        config.ddpm_num_inference_steps, config.eval_batch_size, run.id2label is not None, each, config.seed
    )
    was_training = unet.training
    unet.eval()
    with accelerator.autocast():
        images = generate(pipeline, spec, accelerator, progress=False)
    unet.train(was_training)
    return image_grid([Image.fromarray(image.squeeze()) for image in images])


def save_grid(run: Run, grid: Image.Image) -> None:
    """Keep a grid on the way; one process does.

    Raises:
        CannotSave: it cannot be written.
    """
    if run.accelerator.is_main_process:
        path = Path(run.config.output_dir, "samples", f"step_{run.progress.step}.png")
        with saving("a grid of samples"):
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)


def finish(run: Run) -> None:
    """Write the model folder: the network, samples, the loss curve and results.

    Raises:
        CannotSave: it cannot be written; files that were there are whole.
    """
    grid = draw_grid(run)
    if not run.accelerator.is_main_process:
        return
    folder = Path(run.config.output_dir)
    with saving("the model"), replacing_files(folder) as unfinished:
        run.pipeline.save_pretrained(unfinished)
        grid.save(unfinished / "samples.png")
        plot_losses(run.progress.losses, LOSS_LABELS[run.config.loss], unfinished / "loss.png")
        write_json(results(run), unfinished / "results.json")
    for picture in ("neighbors.png", "bound.png"):  # of an evaluation of the model that was here before
        (folder / picture).unlink(missing_ok=True)


def start_output(run: Run, config: TrainingConfig) -> None:
    """Create the output folder with the configuration as it was given, and the trackers."""
    if run.accelerator.is_main_process:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "training_config.yaml", config_with_header(config).encode())
    # Trackers take plain values; a list, a mapping or None becomes text.
    plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.to_dict().items()}
    run.accelerator.init_trackers("ddpm", config=plain)


def log_to_stderr() -> None:
    """Show what the run says, without every request of the HTTP libraries."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)


@contextmanager
def leaving_together(run: Run) -> Iterator[None]:
    """At the end of a run, or where all its processes stop at the same step: none leaves before the others are ready.

    A launcher ends all processes as soon as one fails, though another may be writing a checkpoint. And a process that
    leaves in the wake of a collective call can hang: torch's gloo frees its tensors with the help of the interpreter,
    which waits for gloo.
    """
    try:
        yield
    except (Stopped, Diverged):
        run.accelerator.wait_for_everyone()
        raise
    run.accelerator.wait_for_everyone()
