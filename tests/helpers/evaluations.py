"""Evaluations of tiny models on tiny sets of images."""

import json
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    UNet2DModel,
)
from PIL import Image
from torch import nn

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler
from ddpm_from_scratch.evaluation import evaluate
from ddpm_from_scratch.evaluation import features as features
from ddpm_from_scratch.evaluation import metrics as metrics
from helpers.networks import TINY_NETWORK, randomised

SIDE, T, STEPS, BATCH, N = 8, 20, 3, 8, 20  # 2.5 batches

NUM_TRAINING, NUM_HELD_OUT, NUM_BOUND = 50, 24, 6

FEW = r"from \d+ images, with less than"  # what `measure` warns of


def pictures(count, seed):
    """Random images in four levels of brightness, so that they are not all alike: uint8 [count, SIDE, SIDE]."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 64, (count, SIDE, SIDE), dtype=np.uint8) + 64 * (np.arange(count) % 4)[
        :, None, None
    ].astype(np.uint8)


TRAINING, HELD_OUT = pictures(NUM_TRAINING, 0), pictures(NUM_HELD_OUT, 1)


def as_table(images):
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in images]}, features=features)


def tiny(**changes):
    return randomised(UNet2DModel(**{**TINY_NETWORK, **changes})).eval()


def own_model(folder, scheduler=None, id2label=None, **changes):
    scheduler = scheduler or ScratchDDPMScheduler(num_train_timesteps=T)
    ScratchDDPMPipeline(tiny(**changes), scheduler, id2label).save_pretrained(folder)
    return folder


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class MeansOfFeatures(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixels, size):
        return self.network(pixels, size).unflatten(1, (16, -1)).mean(2)


def use_few_features(setitem=dict.__setitem__):
    """Of 1280, whose Fréchet distance takes seconds, 16; also by the other processes of a test."""
    known = features.EXTRACTORS["efficientnet-lite0"]
    short = features.Extractor(known.size, known.files, lambda files: MeansOfFeatures(known.build(files)))
    setitem(features.EXTRACTORS, "efficientnet-lite0", short)


@contextmanager
def few_features():
    """`use_few_features` in here; the network that `extract` keeps is another one before, in here, and after."""
    with pytest.MonkeyPatch.context() as patch:
        use_few_features(patch.setitem)
        features._network.cache_clear()
        yield
    features._network.cache_clear()


def flags(inputs, **changes):
    """The command line after the model; None takes a flag away."""
    values = {
        "dataset_name": inputs.training,
        "test_set": inputs.tests,
        "num_images": N,
        "num_inference_steps": STEPS,
        "batch_size": BATCH,
        "size": 32,
        "cache_dir": inputs.cache,
        "num_bound_images": NUM_BOUND,
        "mixed_precision": "no",
        **changes,
    }
    given = {name: value for name, value in values.items() if value is not None}
    lists = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
    return ["--no-compile", *(word for name, value in lists.items() for word in (f"--{name}", *map(str, value)))]


def strict(path):
    """A JSON file that every parser reads."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def run(model, arguments):
    """Its results; few images are warned of, and nothing else is."""
    reset_accelerate()
    with pytest.warns(UserWarning, match=FEW):
        path = evaluate.main([str(model), *arguments])
    return strict(path)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def images_in(path):
    with np.load(path) as archive:
        return archive["images"]


NAMES = {0: "shoe", 2: "coat", 3: "bag"}  # of the five labels of a network, whose last one stands for none


class Rank:
    """One of several processes; what each of them gathers turn by turn is kept, for the next round to give to all."""

    device = torch.device("cpu")

    def __init__(self, rank, num_processes, parts):
        self.process_index, self.num_processes, self.parts = rank, num_processes, parts
        self.is_main_process, self.turn = rank == 0, 0

    def gather(self, own):
        self.turn += 1
        self.parts[self.turn, self.process_index] = own
        return torch.cat([self.parts.get((self.turn, rank), own) for rank in range(self.num_processes)])

    def wait_for_everyone(self):
        pass
