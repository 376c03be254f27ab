"""Runs that go on with another number of processes in mid-epoch train on the same rows and end with the same weights.

Real processes, by gloo on the CPU, in float64; `elastic_run.py` starts them and has them keep a ledger of each row of
each global batch: step, image, flip, label, timestep and noise.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ddpm_from_scratch import ScratchDDPMPipeline, ScratchDDPMScheduler, ScratchUNet2DModel
from ddpm_from_scratch.sampling import checkpoints
from ddpm_from_scratch.training.objectives import HISTORY
from helpers import elastic_run
from helpers.networks import randomised
from helpers.paths import python_path
from helpers.runs import SIZE, TINY, picture, write_parquet

pytestmark = pytest.mark.full

FULL = os.environ.get("FULL_TESTS") == "1"
NUM_IMAGES, BATCH, STEPS, CHANGED = 30, 8, 100, 37  # the change comes after 9 epochs and 26 images
CUTS = {1: (8, 1), 2: (2, 2), 4: (2, 1)}  # processes: images in a pass, passes in a step
CHANGES = list(itertools.permutations(CUTS, 2))
TOLERANCE = 1e-9

KINDS = {  # what else is told to the runs, and which changes are made
    "uniform timesteps": ({}, CHANGES),
    "timesteps by past losses": (
        {"loss": "vlb", "timestep_sampling": "loss_aware", "ddpm_num_steps": 4},  # uniform for the first steps only
        CHANGES if FULL else [(2, 4), (4, 1)],
    ),
    "counter-based random numbers": ({"noise": "philox"}, CHANGES if FULL else [(2, 4), (4, 1)]),
    "Muon": (  # whose processes share the work of a step
        {"optimizer": "muon", "model": {**TINY["model"], "dropout": 0.0, "block_out_channels": [16, 16]}},
        CHANGES if FULL else [(1, 2)],
    ),
    "consistency": (
        {"loss": "consistency", "consistency_q": [4, 16], "ddpm_num_steps": None},
        CHANGES if FULL else [(1, 2), (2, 1)],
    ),
}


def write_preset(folder, changes):
    parquet = write_parquet(folder / "tiny.parquet", [picture(seed=seed) for seed in range(NUM_IMAGES)])
    values = {
        **TINY,
        "model": {**TINY["model"], "dropout": 0.0},  # its masks are of a process
        "dataset_name": str(parquet),
        "class_conditional": True,
        "max_train_steps": STEPS,
        "checkpointing_steps": CHANGED,
        "log_steps": 5,
        "ddpm_num_steps": 50,
    }
    if changes.get("loss") == "consistency":
        values["model_config_name_or_path"] = str(save_teacher(folder / "teacher"))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def save_teacher(folder):
    """A model to tune, of the form that the other runs train."""
    form = {**TINY["model"], "dropout": 0.0, "sample_size": SIZE, "in_channels": 1, "out_channels": 1}
    network = randomised(ScratchUNet2DModel(**form, num_class_embeds=NUM_IMAGES + 1))
    scheduler = ScratchDDPMScheduler(50, prediction_type="v_prediction")
    ScratchDDPMPipeline(network, scheduler).save_pretrained(folder)
    return folder


def train_all(folder, changes, made):
    """An undisturbed run, runs that are stopped, and each of those gone on with by another number of processes."""
    preset = write_preset(folder, changes)

    def job(name, processes, start_from=None, stop_after=None):
        images, passes = CUTS[processes]
        flags = ["--train_batch_size", str(images), "--gradient_accumulation_steps", str(passes)]
        return {
            "output": str(folder / name),
            "processes": processes,
            "arguments": [str(preset), *flags],
            "start_from": start_from and str(folder / start_from),
            "stop_after": stop_after,
        }

    jobs = [job("undisturbed", 1)]
    jobs += [job(f"{processes}", processes, stop_after=CHANGED) for processes in sorted({first for first, _ in made})]
    jobs += [job(f"{first} then {then}", then, start_from=f"{first}") for first, then in made]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, elastic_run.__file__, str(folder / "jobs.json")]
    environment = {**os.environ, "PYTHONPATH": python_path("src", "training", "tests")}
    with open(folder / "said.txt", "w") as said:
        options = {"stdout": subprocess.DEVNULL, "stderr": said, "start_new_session": True, "env": environment}
        process = subprocess.Popen(command, **options)
    try:
        code = process.wait(timeout=600)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nothing stays behind
    assert code == 0, (folder / "said.txt").read_text()[-5000:]


def merged_ledger(folder):
    """The rows of all global batches, one after the other, and who trained on each step: {(first, process)}."""
    rows, who = [], {}
    for path in folder.glob("*_of_*.jsonl"):
        for line in path.read_text().splitlines():
            rows.append(json.loads(line))
            who.setdefault(rows[-1]["step"], set()).add(path.stem)
    rows.sort(key=lambda row: (row["step"], row.pop("row")))
    return rows, who


def names_of(processes):
    return {f"{rank}_of_{processes}" for rank in range(processes)}


def check_ledger(folder, expected, first, then):
    """All rows are there once, and those of the undisturbed run."""
    rows, who = merged_ledger(folder)
    assert who == {step: names_of(first if step < CHANGED else then) for step in range(STEPS)}, "other processes"
    assert Counter(row["step"] for row in rows) == dict.fromkeys(range(STEPS), BATCH), "not all rows, or some twice"
    differing = [(row, other) for row, other in zip(rows, expected, strict=True) if row != other]
    assert not differing, f"{len(differing)} of {len(rows)} rows differ; first {differing[0][0]}, not {differing[0][1]}"
    check_epochs(rows)


def check_epochs(rows):
    """Each epoch holds each image once; the last one is not finished."""
    indices = [row["index"] for row in rows]
    for start in range(0, len(indices), NUM_IMAGES):
        seen = Counter(indices[start : start + NUM_IMAGES])
        assert max(seen.values()) == 1, f"epoch {start // NUM_IMAGES} repeats {seen.most_common(1)}"
        assert len(seen) == min(NUM_IMAGES, len(indices) - start)


def tensors_of(folder, step):
    """Weights, average, optimiser and, if there is one, the memory of the sampler."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    files = sorted(path.glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def largest_difference(tensors, others):
    assert tensors.keys() == others.keys()
    kinds = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(("/step", "/counts"))}
    assert kinds == {torch.float64}, kinds
    differences = torch.stack([(tensor - others[name]).abs().max().double() for name, tensor in tensors.items()])
    assert differences.isfinite().all()
    return float(differences.max())


def losses_of(folder):
    return checkpoints.read_state(folder / "checkpoints" / f"step_{STEPS:08d}")["progress"]["losses"]


def check_weights(folder, undisturbed, then):
    """All that training changes, and what it logged."""
    difference = largest_difference(tensors_of(folder, STEPS), tensors_of(undisturbed, STEPS))
    assert difference < TOLERANCE, f"the weights, or what the optimiser holds, differ by {difference}"
    models = [load_file(path / "unet" / "diffusion_pytorch_model.safetensors") for path in (folder, undisturbed)]
    assert largest_difference(*models) < TOLERANCE
    losses, expected = losses_of(folder), losses_of(undisturbed)
    assert [step for step, _ in losses] == [step for step, _ in expected]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected], rel=TOLERANCE)
    assert json.loads((folder / "results.json").read_text())["num_processes"] == then
    return difference


def check_undisturbed(folder, rows):
    """It has something to tell apart: everything drawn varies, and the later steps move the weights."""
    check_epochs(rows)
    assert {row["flipped"] for row in rows} == {False, True}
    assert len({row["label"] for row in rows}) == NUM_IMAGES + 1  # with the null label
    assert len({row["noise"] for row in rows}) == len(rows) == STEPS * BATCH
    assert len({row["t"] for row in rows if row["step"] >= CHANGED}) > 3
    assert len({path.name for path in (folder / "checkpoints").iterdir()}) == 3
    before = tensors_of(folder, CHANGED)
    assert "sampler/counts" not in before or before["sampler/counts"].min() >= HISTORY, "its timesteps are uniform yet"
    assert largest_difference(before, tensors_of(folder, STEPS)) > 1e-2
    assert [step for step, _ in losses_of(folder)] == sorted({*range(5, STEPS + 1, 5), CHANGED, 2 * CHANGED})


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_the_number_of_processes_changes_nothing(tmp_path, kind):
    changes, made = KINDS[kind]
    train_all(tmp_path, changes, made)
    rows, _ = merged_ledger(undisturbed := tmp_path / "undisturbed")
    check_undisturbed(undisturbed, rows)
    differences, wrong = {}, {}
    for first, then in made:
        name = f"{first} then {then}"
        assert [path.name for path in (tmp_path / str(first) / "checkpoints").iterdir()] == [f"step_{CHANGED:08d}"]
        try:
            check_ledger(tmp_path / name, rows, first, then)
            differences[name] = check_weights(tmp_path / name, undisturbed, then)
        except AssertionError as error:
            wrong[name] = str(error)
    print(f"\n{kind}; the largest differences: {differences}")
    assert not wrong, f"{len(wrong)} of {len(made)} changes:\n" + "\n".join(f"{k}: {v}" for k, v in wrong.items())
