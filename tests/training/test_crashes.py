"""Checkpoints and runs that are killed, stopped or refused by the disk, at every system call and at random moments.

A seeded sample by default; everything with the environment variable FULL_TESTS=1.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ddpm_from_scratch.runtime import atomic_files as durable
from ddpm_from_scratch.training import checkpoint
from helpers import crash_points
from helpers.crashes import WEIGHTS, assert_same_checkpoint, names_in
from helpers.runs import NUM_IMAGES, ROOT, TINY, picture, run_main, write_parquet

pytestmark = pytest.mark.full

FULL = os.environ.get("FULL_TESTS") == "1"
PREFIXES = (durable.UNFINISHED, durable.REPLACED, durable.REMOVED)


def read_folder(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Every system call of a save, of a save in place of another one, and of the clearing up


@pytest.fixture(scope="module")
def server():
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: it ends the saving at a chosen system call")
    with crash_points.Server() as server:
        yield server


@pytest.fixture(scope="module")
def start_folders(tmp_path_factory):
    """What each attempt starts from."""
    parent = tmp_path_factory.mktemp("start")
    for attempt in crash_points.ATTEMPTS:
        for step in (1, 2):
            crash_points.save(parent / attempt, step, 1)
    left = parent / "reopen"  # what several killed processes could leave
    shutil.copytree(left / "step_00000001", left / f"{durable.REPLACED}step_00000001")
    (left / "step_00000002").rename(left / f"{durable.REPLACED}step_00000002")
    for name in (f"{durable.REMOVED}step_00000000", f"{durable.UNFINISHED}step_00000003"):
        shutil.copytree(left / "step_00000001", left / name)
        (left / name / checkpoint.MANIFEST).unlink()
    return parent


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """The bytes that each checkpoint may hold."""
    parent = tmp_path_factory.mktemp("versions")
    allowed = {}
    for step, version in ((1, 1), (2, 1), (2, 2), (3, 1)):
        crash_points.save(parent / str(version), step, version, total_limit=None)
        name = f"step_{step:08d}"
        allowed.setdefault(name, []).append(read_folder(parent / str(version) / name))
    return allowed


DONE = {  # the newest checkpoint after an attempt that nothing disturbs, its version, and all that is there then
    "save": ("step_00000003", 0, {"step_00000002", "step_00000003"}),
    "replace": ("step_00000002", 1, {"step_00000001", "step_00000002"}),
    "reopen": ("step_00000002", 0, {"step_00000001", "step_00000002"}),
}


@dataclass(frozen=True)
class Point:
    """A system call of an attempt, and what befalls it."""

    attempt: str
    call: crash_points.Call
    fault: str  # as strace takes it

    def __str__(self):
        return f"{self.attempt}, {self.fault} at {self.call.name} number {self.call.number}: {self.call.text}"


def attempted(server, start_folders, folder, attempt, *injections):
    """An attempt on a fresh copy of its start."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start_folders / attempt, folder)
    try:
        return server.run(attempt, folder, *injections)
    except crash_points.CannotTrace as error:
        pytest.skip(f"strace may not attach to processes here: {error}")


def require(condition, message):
    """An assert that stays one in a helper."""
    if not condition:
        raise AssertionError(message)


def check_steps(folder, versions):
    """All that is called a checkpoint is one, with the bytes of one that was saved."""
    for path in checkpoint.list_checkpoints(folder):
        require(checkpoint.damage(path) is None, f"{path.name} is damaged: {checkpoint.damage(path)}")
        require(read_folder(path) in versions[path.name], f"{path.name} is none of those that were saved")


def check_outcome(point, outcome, folder, versions):
    """The attempt has ended as the fault wants it, and what it says is what is on the disk."""
    at = [call for call in outcome.calls if (call.name, call.number) == (point.call.name, point.call.number)]
    if point.fault == "signal=SIGKILL":
        require(outcome.status == -signal.SIGKILL, f"not killed: status {outcome.status}")
        require(outcome.calls[-1:] == at, f"killed at another call: {outcome.calls[-1:]}")
        return
    require(len(at) == 1 and "INJECTED" in at[0].text, "the call has not failed")
    require(outcome.status in (0, crash_points.OS_ERROR), f"no OSError but {outcome.report}")
    newest, version, names = DONE[point.attempt]
    if outcome.status == 0 and point.attempt != "reopen":  # then nothing may be missing
        # A checkpoint that could not be read does not count, and an older one stays.
        unread = point.call.name in ("openat", "read", "pread64") and "O_CREAT" not in point.call.text
        as_wanted = names_in(folder) >= names if unread else names_in(folder) == names
        require(as_wanted, f"no error, but there are {sorted(names_in(folder))}")
        require(read_folder(folder / newest) == versions[newest][version], "no error, but the old content")
    if outcome.status and point.attempt != "reopen":
        require((folder / "step_00000002").exists(), f"step 2 is gone; there are {sorted(names_in(folder))}")
    if point.call.name == "write":
        require(names_in(folder) == {"step_00000001", "step_00000002"}, "what was written still fills the disk")


def check_reopened(folder, versions):
    """Reopening finds the old state or the new one; the next save works and clears up."""
    found = checkpoint.find_checkpoint("latest", folder)
    require(found is not None and found.name in ("step_00000002", "step_00000003"), f"it finds {found}")
    check_steps(folder, versions)
    crash_points.save(folder, 4, 1)
    expected = {found.name, "step_00000004"}
    require(names_in(folder) == expected, f"after the next save there are {sorted(names_in(folder))}")


def check_point(point, server, start_folders, folder, versions):
    """None, or what is wrong."""
    call = point.call
    outcome = attempted(server, start_folders, folder, point.attempt, f"{call.name}:{point.fault}:when={call.number}")
    left = sorted(names_in(folder))
    try:
        check_steps(folder, versions)
        check_outcome(point, outcome, folder, versions)
        check_reopened(folder, versions)
    except (AssertionError, OSError, ValueError) as error:
        return f"{point}\n    {error}\n    {outcome.report}\n    left: {left}"
    return None


@pytest.fixture(scope="module")
def points(server, start_folders, tmp_path_factory):
    """All of them: each call of undisturbed attempts, times what can befall it."""
    folder, every = tmp_path_factory.mktemp("undisturbed") / "checkpoints", []
    for attempt, (_, _, names) in DONE.items():
        once, again = (attempted(server, start_folders, folder, attempt) for _ in range(2))
        assert once.status == 0, once.report
        assert names_in(folder) == names
        assert [call.name for call in once.calls] == [call.name for call in again.calls], "each attempt is different"
        faults = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")
        every += [Point(attempt, call, fault) for call in once.calls for fault in faults]
    return every


def test_a_checkpoint_is_whole_or_absent_wherever_its_saving_ends(server, points, start_folders, versions, tmp_path):
    chosen = points if FULL else random.Random(0).sample(points, 40)
    with_wrong = [(p, check_point(p, server, start_folders, tmp_path / "checkpoints", versions)) for p in chosen]
    wrong = [text for _, text in with_wrong if text]
    print(f"\n{len(chosen)} of {len(points)} points tried: {dict(Counter((p.attempt, p.fault) for p in chosen))}")
    assert len(points) >= 60
    assert not wrong, f"{len(wrong)} of {len(chosen)} points:\n" + "\n".join(wrong)


def check_order(calls):
    """Nothing gets its name, and nothing old goes, before what it rests on has reached the disk."""
    not_on_disk = set()
    for call in calls:
        paths = re.findall(r'[<"](/[^>"]*)[>"]', call.text)
        if call.name.startswith("mkdir") and "EEXIST" not in call.text:
            not_on_disk |= {paths[0]}
        elif call.name == "write" or "O_CREAT" in call.text:
            not_on_disk |= {paths[-1], os.path.dirname(paths[-1])}
        elif call.name == "fsync":
            not_on_disk -= {paths[0]}
        elif call.name.startswith("rename"):
            early = {path for path in not_on_disk if (path + "/").startswith(paths[0] + "/")}
            assert not early, f"{call.text} comes before these have reached the disk: {early}"
            not_on_disk |= {os.path.dirname(paths[1])}
        elif call.name.startswith(("unlink", "rmdir")):
            parent = os.path.dirname(paths[0])
            assert parent not in not_on_disk, f"{call.text} comes before the list of names has reached the disk"


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(server, start_folders, tmp_path):
    for name in ("save", "replace"):
        calls = attempted(server, start_folders, tmp_path / "checkpoints", name).calls
        counts = Counter(call.name for call in calls)
        assert counts["write"] >= 4 and counts["rename"] == 2, counts
        check_order(calls)


# Real runs

STEPS = 120 if FULL else 40
KILLS = 20 if FULL else 3
STOPPED = 75


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """The preset of all runs here."""
    folder = tmp_path_factory.mktemp("inputs")
    parquet = write_parquet(folder / "tiny.parquet", [picture(seed=seed) for seed in range(NUM_IMAGES)])
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "dataset_name": str(parquet), "max_train_steps": STEPS}))
    return path


def start(preset, output, *flags):
    """Train in a process group of its own; its standard error goes to a file beside the model folder."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), str(preset), "--output_dir", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    with open(f"{output}.log", "w") as log:
        return subprocess.Popen(
            [*command, *flags], stdout=subprocess.DEVNULL, stderr=log, env=environment, start_new_session=True
        )


def finished(process, output):
    """Its exit code, and what it said."""
    try:
        code = process.wait(timeout=600)
    finally:
        end(process)
    return code, Path(f"{output}.log").read_text()


def end(process):
    """Nothing stays behind a failed test."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_names(process, folder, pattern, count):
    """Until so many names that fit have come up since now; what they are. Fewer if the process ends before."""
    before, new = names_in(folder), set()
    while len(new) < count and process.poll() is None:
        new |= {name for name in names_in(folder) - before if re.search(pattern, name)}
        time.sleep(0.0005)
    return new


def assert_same_run(output, undisturbed):
    """The model and the last checkpoint."""
    weights, expected = load_file(output / WEIGHTS), load_file(undisturbed / WEIGHTS)
    assert weights.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(weights[key], expected[key])]
    last = f"step_{STEPS:08d}"
    assert_same_checkpoint(output / "checkpoints" / last, undisturbed / "checkpoints" / last)
    assert not [name for name in names_in(output / "checkpoints") if name.startswith(PREFIXES)]


def check_after_kill(folder, undisturbed, seen):
    """Every checkpoint is whole and that of the undisturbed run; none that was seen is lost. The step of the last."""
    found = checkpoint.list_checkpoints(folder)
    for path in found:
        assert checkpoint.damage(path) is None, f"{path.name}: {checkpoint.damage(path)}"
        assert_same_checkpoint(path, undisturbed / "checkpoints" / path.name)
    steps = [int(path.name.removeprefix("step_")) for path in found]
    seen_steps = [int(name.removeprefix("step_")) for name in seen if name.startswith("step_")]
    assert max(steps, default=0) >= max(seen_steps, default=0), f"seen {seen}, left {names_in(folder)}"
    return max(steps, default=0)


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(preset, tmp_path):
    flags = ("--checkpointing_steps", "1")
    undisturbed = run_main(SimpleNamespace(preset=str(preset)), tmp_path / "undisturbed", *flags)
    output, rng, at = tmp_path / "model", random.Random(0), []
    while len(at) < KILLS:
        process = start(preset, output, *flags, "--checkpoints_total_limit", "2")
        try:
            seen = wait_for_names(process, output / "checkpoints", "step_", rng.randint(1, 10))
            time.sleep(rng.uniform(0, 0.02))
            left = process.poll()
        finally:
            end(process)
        message = f"it ended by itself ({left}) after {len(at)} of {KILLS} kills\n{Path(f'{output}.log').read_text()}"
        assert process.returncode == -signal.SIGKILL, message
        at.append(check_after_kill(output / "checkpoints", undisturbed, seen))
    assert at[-1] < STEPS, "the last kills came after the training"
    code, said = finished(start(preset, output, *flags, "--checkpoints_total_limit", "2"), output)
    print(f"\n{len(at)} kills; the last checkpoints then: {at}")
    assert code == 0, said
    assert all(before <= after for before, after in pairwise(at))
    assert_same_run(output, undisturbed)
    assert names_in(output / "checkpoints") == {f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"}


@pytest.mark.parametrize("workers", ["0", "2"] if FULL else ["2"])
def test_a_run_that_is_stopped_goes_on_as_if_nothing_had_been(preset, tmp_path, workers):
    flags = ("--checkpointing_steps", "7", "--dataloader_num_workers", workers)
    undisturbed = run_main(SimpleNamespace(preset=str(preset)), tmp_path / "undisturbed", *flags)
    output, rng = tmp_path / "model", random.Random(int(workers))
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(preset, output, *flags)
        wait_for_names(process, output / "checkpoints", "^step_", 1)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, number)
        code, said = finished(process, output)
        assert code == STOPPED, f"{number.name}: {code}\n{said}"
        step = re.search(r"train\.py: stopped after step (\d+); a checkpoint is written", said)
        assert step, said
        assert "Traceback" not in said, said
        last = checkpoint.find_checkpoint("latest", output / "checkpoints")
        assert last.name == f"step_{int(step[1]):08d}"
        print(f"\n{number.name}: {step[0]}")
    code, said = finished(start(preset, output, *flags), output)
    assert code == 0, said
    assert_same_run(output, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] if FULL else [signal.SIGTERM])
def test_a_second_signal_ends_a_run_at_once(preset, tmp_path, number):
    output = tmp_path / "model"
    flags = ("--checkpointing_steps", "1", "--gradient_accumulation_steps", "500")  # so that a step takes seconds
    process = start(preset, output, *flags)
    wait_for_names(process, output / "checkpoints", "^step_", 1)
    for _ in range(2):
        time.sleep(1.2)  # within a second it would count as the same one
        os.killpg(process.pid, number)
    code, said = finished(process, output)
    assert code == -number, f"{code}\n{said}"
    assert "stopped after step" not in said
    assert checkpoint.find_checkpoint("latest", output / "checkpoints") == output / "checkpoints" / "step_00000001"
