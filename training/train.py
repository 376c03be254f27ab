"""Train a denoising diffusion model: `accelerate launch training/train.py [preset] [--flag value ...]`.

`ddpm train` runs `main` of this file, with the same flags, in as many processes as pay. The exit codes are those of
`runtime/errors.py`.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Read when torch is loaded: threads that spin while they wait hold up whatever else the machine does, and each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tqdm.contrib.logging import logging_redirect_tqdm

from ddpm_from_scratch.runtime.errors import Fault, refusing
from ddpm_from_scratch.training.arguments import parse
from ddpm_from_scratch.training.config import TrainingConfig
from ddpm_from_scratch.training.dry_run import dry_run
from ddpm_from_scratch.training.faults import StopSignals
from ddpm_from_scratch.training.loop import train
from ddpm_from_scratch.training.outputs import finish, holding_output, leaving_together, log_to_stderr, start_output
from ddpm_from_scratch.training.run import build
from ddpm_from_scratch.training.upload import Upload
from ddpm_from_scratch.training.validation import build_validation_set

logger = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Train a model; the folder it is in, or None after a dry run. Raises a Fault where it cannot."""
    config, only_dry = parse(argv)
    log_to_stderr(config.log_level)
    with holding_output(config, only_dry):
        return train_model(config, only_dry)


def train_model(config: TrainingConfig, only_dry: bool) -> Path | None:
    """As `main`, with flags that were read, in a folder that no other run uses."""
    with refusing():
        run = build(config)  # data, network, optimiser: at the start, or where the last checkpoint stands
    if only_dry:
        dry_run(run)
        return None
    with refusing():
        validation_set = build_validation_set(config, run.data) if config.eval_steps else None
        upload = Upload(config) if config.push_to_hub and run.accelerator.is_main_process else None
        start_output(run, config)
    with StopSignals() as signals, leaving_together(run), logging_redirect_tqdm():
        train(run, validation_set, upload, signals)  # Algorithm 1
        finish(run)  # the model folder: network, samples, loss curve, results
    run.accelerator.end_training()
    if run.accelerator.is_main_process:
        print(config.output_dir, flush=True)
    if upload:
        logger.info("pushed %s", upload.finish())
    return Path(config.output_dir)


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        logger.error("train.py: %s", fault)
        sys.exit(fault.code)
