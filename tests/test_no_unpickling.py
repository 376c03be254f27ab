"""Nothing is unpickled in training, resuming, evaluating and loading: an audit hook of the interpreter sees none of it.

One process without loader workers, since processes of one run may send each other pickles; uncompiled, since PyTorch's
cache of compiled code, which is its own, may hold pickles. `torch.load(weights_only=True)`, which reads the features'
network, has a reader of its own that knows tensors alone: no event. test_faults.py has the training by itself.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from helpers.evaluations import as_table, flags, pictures
from helpers.runs import ROOT, TINY

AUDITED = """
import json, os, pickle, sys, traceback

found, phase = {}, None

def watch(event, arguments):
    if phase is not None and event == "pickle.find_class":
        callers = [frame.name for frame in traceback.extract_stack(limit=6)[:-1]]
        found[phase].append([*map(str, arguments), *callers])

sys.addaudithook(watch)

import numpy as np
import torch
from diffusers import DDPMPipeline

from ddpm_from_scratch.evaluation import evaluate
from helpers import evaluations
import train
from ddpm_from_scratch import ScratchDDPMPipeline

def during(name, action, *arguments):
    global phase
    phase = name
    found[name] = []
    result = action(*arguments)
    phase = None
    return result

def refused(action, *arguments):
    try:
        action(*arguments)
    except (ValueError, OSError, pickle.UnpicklingError):
        return
    raise AssertionError(f"{arguments} was read")

told = json.loads(sys.argv[1])
evaluations.use_few_features()
with open("module.pickle", "wb") as file:
    pickle.dump(torch.nn.Linear(2, 2), file)
torch.save(torch.nn.Linear(2, 2), "module.pt")
np.save("objects.npy", np.array([print, torch.nn.Linear(2, 2)], dtype=object))
np.savez("objects.npz", images=np.array([torch.nn.Linear(2, 2)], dtype=object))

during("a pickle", pickle.loads, open("module.pickle", "rb").read())
during("a module of PyTorch", lambda: torch.load("module.pt", weights_only=False))
during("an array of objects", lambda: np.load("objects.npy", allow_pickle=True))

during("training", train.main, [*told["train"], "--max_train_steps", "4"])
during("resuming", train.main, [*told["train"], "--max_train_steps", "6"])
during("evaluating", evaluate.main, [*told["evaluate"], "--images_dir", "images"])
during("going on with images", evaluate.main, [*told["evaluate"], "--images_dir", "images", "--num_images", "24"])
during("evaluating saved images", evaluate.main, [*told["evaluate"], "--images", "images/steps-3.npz"])
during("loading", lambda: ScratchDDPMPipeline.from_pretrained("model")(num_inference_steps=2))
during("loading with diffusers", lambda: DDPMPipeline.from_pretrained("model"))
during("images that are objects", refused, evaluate.main, [*told["evaluate"], "--images", "objects.npz"])
os.replace("objects.npz", "images/steps-3.npz")
during("kept images that are objects", refused, evaluate.main, [*told["evaluate"], "--images_dir", "images"])
print(json.dumps(found))
"""
CONTROLS = {"a pickle", "a module of PyTorch", "an array of objects"}


@pytest.mark.full
def test_nothing_is_unpickled_in_evaluating_either(tmp_path):
    for name, count, seed in (("training", 50, 0), ("tests", 24, 1)):
        as_table(pictures(count, seed)).to_parquet(tmp_path / f"{name}.parquet")
    preset = {**TINY, "dataset_name": "training.parquet", "ddpm_num_steps": 20}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(preset))
    files = SimpleNamespace(training="training.parquet", tests="tests.parquet", cache="features")
    told = {
        "train": ["tiny.yaml", "--output_dir", "model", "--checkpointing_steps", "2"],
        "evaluate": ["model", *flags(files)],
    }
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "training", "tests"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", AUDITED, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    unseen = [name for name in CONTROLS if not found[name]]
    assert not unseen, f"the hook does not see these: {unseen}"
    unpickled = {name: events for name, events in found.items() if events and name not in CONTROLS}
    assert not unpickled, f"what was unpickled, and its callers: {unpickled}"
    assert len(found) == len(CONTROLS) + 9
    assert len(list((tmp_path / "features").rglob("*.npz"))) >= 1  # which the second evaluation reads
    evaluation = json.loads((tmp_path / "model" / "results.json").read_text())["evaluation"]
    assert evaluation["samples"][0]["file"] == "steps-3.npz"
    assert (tmp_path / "model" / "checkpoints" / "step_00000006").is_dir()
