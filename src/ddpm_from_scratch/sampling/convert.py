"""Make a model folder of a checkpoint of OpenAI's improved-diffusion or guided-diffusion, or of Ho et al.'s weights.

    ddpm convert 64x64_diffusion.pt adm-64 --image_size 64 --noise_schedule cosine --num_head_channels 64 \
        --use_new_attention_order True
    ddpm convert diffusion_cifar10_model/model-790000.ckpt ddpm-cifar10 --image_size 32 --noise_schedule linear

Ho et al.'s weights are those of pesser/pytorch_diffusion. Flags are OpenAI's. What the weights say by themselves need
not be said; if it is, it is checked. The file is read without running any code of it.
"""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.checks import check_range, check_whole
from ..diffusion.pipeline import ScratchDDPMPipeline
from ..diffusion.scheduler import ScratchDDPMScheduler
from ..diffusion.unet import ScratchUNet2DModel
from ..runtime.atomic_files import begin_folder, check_new, finish_folder
from ..runtime.errors import saving
from . import ho, openai
from .openai import Form, seems

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # by their names, and diffusers'
BASE_STEPS = 1000  # of the linear schedule's betas, and of timesteps that are rescaled
TRUTH = {"True": True, "False": False}
UNSAFE = re.compile(r"GLOBAL (\S+)")  # in what PyTorch says of a pickle that it does not read
PICKLE = b"\x80"  # with which pickles begin


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="ddpm convert",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="of the weights, such as ema_0.9999_500000.pt")
    parser.add_argument("folder", type=Path, help="of the model, which is made")
    network = parser.add_argument_group("the network, which weights do not tell")
    network.add_argument("--image_size", type=int, required=True, help="side of the images, in pixels")
    network.add_argument(
        "--num_heads", type=int, help="heads of attention on each level; 4 where training said nothing"
    )
    network.add_argument("--num_head_channels", type=int, help="channels of a head, instead")
    truth(network, "use_new_attention_order", "query, key and value are split before the heads; False if left out")
    network.add_argument("--dropout", type=float, default=0.0, help="for further training; 0 if left out")
    process = parser.add_argument_group("the process, which weights do not tell")
    process.add_argument("--noise_schedule", choices=SCHEDULES, required=True)
    process.add_argument("--diffusion_steps", type=int, default=BASE_STEPS, help=f"{BASE_STEPS} if left out")
    truth(process, "rescale_timesteps", f"as if there were {BASE_STEPS}; needed where there are not as many")
    truth(process, "predict_xstart", "the network predicts the image; False if left out")
    truth(process, "sigma_small", "the smaller of the two fixed variances; False if left out")
    told = parser.add_argument_group("what weights tell: checked where it is said")
    for name, form in TOLD.items():
        told.add_argument(f"--{name}", metavar=form)
    return parser.parse_args(arguments)


def truth(group: Any, name: str, help_text: str) -> None:  # noqa: ANN401
    """Add a flag that is True or False, as theirs are."""
    group.add_argument(f"--{name}", choices=TRUTH, help=help_text)


# Flags that weights answer by themselves, and how their values are written.
TOLD = {
    "num_channels": "N",
    "num_res_blocks": "N",
    "channel_mult": "N,N,...",
    "attention_resolutions": "N,N,...",
    "class_cond": "True|False",
    "learn_sigma": "True|False",
    "use_scale_shift_norm": "True|False",
    "resblock_updown": "True|False",
}


def told(form: Form, image_size: int) -> dict[str, object]:
    """The values of TOLD's flags for a network; lists are written with commas, as on their command lines."""
    return {
        "num_channels": form.num_channels,
        "num_res_blocks": form.num_res_blocks,
        "channel_mult": ",".join(f"{channels / form.num_channels:g}" for channels in form.channels),
        "attention_resolutions": ",".join(
            str(image_size >> level) for level, attends in enumerate(form.attention) if attends
        ),
        "class_cond": form.num_classes is not None,
        "learn_sigma": form.learn_sigma,
        "use_scale_shift_norm": form.use_scale_shift_norm,
        "resblock_updown": form.resblock_updown,
    }


def check(args: argparse.Namespace) -> None:
    """Check the flags before anything is read; ValueError for one that is not allowed."""
    check_whole("--image_size", args.image_size)
    check_whole("--diffusion_steps", args.diffusion_steps)
    check_range("--dropout", args.dropout, 0, 1)
    if args.diffusion_steps != BASE_STEPS and args.rescale_timesteps is None:
        raise ValueError(
            f"--diffusion_steps {args.diffusion_steps} needs --rescale_timesteps True or False: where nothing is said, "
            "improved-diffusion rescales and guided-diffusion does not."
        )
    check_new(args.folder)


def check_told(args: argparse.Namespace, form: Form) -> None:
    """Compare flags that weights answer with what these say; ValueError for one that differs."""
    there = {str(args.image_size >> level) for level in range(len(form.attention))}
    for name, found in told(form, args.image_size).items():
        asked = getattr(args, name)
        if name == "attention_resolutions" and asked is not None:  # in any order, of levels that there are
            same = set(asked.split(",")) & there == set(str(found).split(",")) - {""}
        else:
            same = asked in (None, str(found))
        if not same:
            raise ValueError(f"--{name} {asked}: of the weights in {args.file} it is {found}.")


def read(file: Path) -> dict[str, Tensor]:
    """The weights in a file of PyTorch's, which are tensors by name. No code runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or it holds something else; the message says what.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file.")
    try:
        with warnings.catch_warnings():  # of pickles that it then refuses
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise errors of every kind
        raise ValueError(f"{file} is not read: it is {_kind(file, error)}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, not weights by their names.")
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{file} holds other things than tensors ({', '.join(map(str, others[:3]))}); it seems to be "
            f"{seems(content)}."
        )
    return dict(content)


def _kind(file: Path, error: Exception) -> str:
    """What a file is that PyTorch does not read."""
    with open(file, "rb") as opened:
        head = opened.read(2)
    unsafe = UNSAFE.search(str(error))
    if unsafe or ("Unsupported" in str(error) and head[:1] == PICKLE):
        return f"a pickle of other things than tensors, which may run code{f' ({unsafe[1]})' if unsafe else ''}"
    if head == b"PK" and not zipfile.is_zipfile(file):
        return "a file of PyTorch's that is cut off: download it again"
    return "no file of PyTorch's, or a damaged one"


def scheduler(args: argparse.Namespace, form: Form) -> ScratchDDPMScheduler:
    """Their process: the linear schedule keeps the sum of its betas whatever the number of steps."""
    if form.learn_sigma and args.sigma_small is not None:
        raise ValueError("--sigma_small chooses a fixed variance, and this network predicts it: leave it out.")
    fixed = "fixed_small" if TRUTH.get(args.sigma_small) else "fixed_large"
    scale = BASE_STEPS / args.diffusion_steps
    ends = {"beta_start": scale * 0.0001, "beta_end": scale * 0.02} if args.noise_schedule == "linear" else {}
    return ScratchDDPMScheduler(
        num_train_timesteps=args.diffusion_steps,
        **ends,
        beta_schedule=SCHEDULES[args.noise_schedule],
        variance_type="learned_range" if form.learn_sigma else fixed,
        prediction_type="sample" if TRUTH.get(args.predict_xstart) else "epsilon",
        timestep_spacing="linspace",  # which their respacing is
    )


# Not for networks of pesser/pytorch_diffusion, which have one head and 1000 timesteps.
OPENAI_ALONE = ("num_heads", "num_head_channels", "use_new_attention_order", "rescale_timesteps", "diffusion_steps")


def convert(args: argparse.Namespace) -> ScratchDDPMPipeline:
    """The model of a checkpoint; ValueError if it is none, or a flag does not fit it."""
    weights = read(args.file)
    kind = ho if ho.MARK in weights else openai
    try:
        form = kind.recognise(weights)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from error
    check_told(args, form)
    unet = hos_network(args, weights, form) if kind is ho else openais_network(args, weights, form)
    # Each of their labels is a class; without names the last would stand for none.
    names = None if form.num_classes is None else {number: str(number) for number in range(form.num_classes)}
    return ScratchDDPMPipeline(unet, scheduler(args, form), names)


def hos_network(args: argparse.Namespace, weights: openai.Weights, form: Form) -> ScratchUNet2DModel:
    """The network of a file of pesser/pytorch_diffusion; ValueError for a flag that it has not."""
    given = [f"--{name}" for name in OPENAI_ALONE if getattr(args, name) not in (None, BASE_STEPS)]
    if given:
        raise ValueError(
            f"{', '.join(given)}: for OpenAI's networks, and {args.file} holds one of pesser/pytorch_diffusion. Leave "
            "that out."
        )
    return ho.build(weights, form, args.image_size, args.dropout)


def openais_network(args: argparse.Namespace, weights: openai.Weights, form: Form) -> ScratchUNet2DModel:
    """The network of a file of improved-diffusion or guided-diffusion."""
    heads = openai.head_width(form, args.num_heads, args.num_head_channels)
    times = torch.arange(args.diffusion_steps).float()
    if TRUTH.get(args.rescale_timesteps):
        times *= BASE_STEPS / args.diffusion_steps
    config = openai.unet_config(form, args.image_size, heads, args.dropout)
    return openai.build(weights, config, form, bool(TRUTH.get(args.use_new_attention_order)), times)


def main(arguments: Sequence[str]) -> None:
    """Convert; print the folder.

    Raises ValueError or FileNotFoundError for a file that is no such checkpoint, or a flag that is not allowed.
    """
    args = parse(arguments)
    check(args)
    pipeline = convert(args)
    with saving("the model"):
        unfinished = begin_folder(args.folder)
        pipeline.save_pretrained(unfinished)
        finish_folder(args.folder)
    print(args.folder)
