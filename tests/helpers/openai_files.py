"""Files of weights as OpenAI's code saves them, and the model folders that `ddpm convert` makes of them.

`tests/sampling/openai/recorded.safetensors` has what guided-diffusion (22e0df8) and improved-diffusion (1bc7bbb)
computed with each network: outputs at three timesteps, and mean and log-variance of their step. The weights themselves
follow from the names and shapes in it, by numpy's generator whose numbers never change.
"""

import json
import math

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm_from_scratch.sampling import convert
from helpers.paths import ROOT

RECORDED = ROOT / "tests" / "sampling" / "openai" / "recorded.safetensors"
with safe_open(RECORDED, "pt") as opened:
    CASES = json.loads(opened.metadata()["cases"])
OUTPUTS = load_file(RECORDED)
LINEAR, WHOLE = "improved linear", "guided, class-conditional, new order"


def weights_of(name):
    """The random weights that their network had."""
    numbers = np.random.RandomState(0)
    made = {}
    for weight, shape in CASES[name]["shapes"]:
        noise = numbers.standard_normal(shape)
        scaled = noise / math.prod(shape[1:]) ** 0.5 if len(shape) > 1 else 0.3 * noise + weight.endswith("weight")
        made[weight] = torch.from_numpy(scaled).float()
    return made


def converted(folder, name, *others, weights=None):
    """The model folder that the command makes of a file with the weights."""
    torch.save(weights_of(name) if weights is None else weights, folder / "model.pt")
    convert.main([str(folder / "model.pt"), str(folder / "model"), *CASES[name]["flags"].split(), *others])
    return folder / "model"
