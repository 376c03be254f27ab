"""Processes that share a machine's CPU: how many, how they find each other, and how they end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
import pytest

from ddpm_from_scratch.runtime.processes import processes_that_pay
from helpers.paths import python_path


@pytest.mark.parametrize(
    ("threads", "batch_size", "expected"),
    [
        (1, 32, 1),
        (2, 32, 2),
        (2, 16, 2),
        (2, 4, 1),
        (4, 16, 4),
        (6, 32, 4),
        (6, 36, 6),
        (8, 1, 1),
        (8, 9, 1),
        (64, 128, 8),
    ],
)
def test_as_many_processes_as_threads_that_share_the_batch_evenly(threads, batch_size, expected):
    assert processes_that_pay(threads, batch_size) == expected


PROGRAM = """
import os, sys, time
import torch
from ddpm_from_scratch.runtime import processes
from ddpm_from_scratch.runtime.errors import Outcome, tell

def found():
    from accelerate import PartialState
    PartialState()  # which finds the others, and says nothing
    ranks = torch.tensor([float(os.environ["RANK"])])
    torch.distributed.all_reduce(ranks)
    torch.distributed.destroy_process_group()
    return Outcome(0, f"{int(ranks)} of {os.environ['LOCAL_WORLD_SIZE']}, threads {torch.get_num_threads()}")

def failed():
    if os.environ["RANK"] == "0":
        return Outcome(74, "the disk is full")
    time.sleep(60)
    return Outcome(0)

def refused():
    return Outcome(2, "no such data")

def verbose():
    return Outcome(2, os.environ["RANK"] * 300_000)

def stopped():
    from ddpm_from_scratch.training.faults import StopSignals
    with StopSignals() as signals:
        os.write(1, b"listening\\n")
        while not signals.received:
            time.sleep(0.01)
        time.sleep(float(sys.argv[2]))
    return Outcome(75, f"stopped by {signals.received}")

def interrupted():
    from ddpm_from_scratch.runtime.errors import outcome
    return outcome(lambda arguments: os.write(1, b"listening\\n") and time.sleep(60), "train", [])

if __name__ == "__main__":
    processes.GRACE = 0.5
    torch.set_num_threads(4)
    sys.exit(tell(processes.run_together(globals()[sys.argv[1]], 2)))
"""


@pytest.fixture
def started(tmp_path):
    """A function that starts one of the programs, in two processes, in a group of their own as a terminal makes it."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    with ExitStack() as stack:

        def start(name, seconds=0):
            process = subprocess.Popen(
                [sys.executable, str(script), name, str(seconds)],
                env={**os.environ, "PYTHONPATH": python_path("src"), "OMP_NUM_THREADS": "4"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def listening(process):
    """Wait until both processes listen; they."""
    assert [process.stdout.readline() for _ in range(2)] == ["listening\n"] * 2
    return psutil.Process(process.pid).children()


def test_the_processes_find_each_other_and_share_the_threads(started):
    process = started("found")
    assert process.communicate(timeout=600)[1] == "1 of 2, threads 2\n"
    assert process.returncode == 0


def test_what_all_refuse_is_said_once(started):
    process = started("refused")
    assert process.communicate(timeout=600) == ("", "no such data\n")
    assert process.returncode == 2


def test_messages_longer_than_a_pipe_holds_arrive_whole(started):
    process = started("verbose")
    _, errors = process.communicate(timeout=600)
    assert sorted(errors.split()) == ["0" * 300_000, "1" * 300_000]
    assert process.returncode == 2


def test_where_one_fails_the_others_do_not_wait_for_ever(started):
    start = time.monotonic()
    process = started("failed")
    assert process.communicate(timeout=600)[1] == "the disk is full\n"
    assert process.returncode == 74 and time.monotonic() - start < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_to_the_group_or_to_the_first_alone_stops_all_once(started, number, whole_group):
    """A terminal sends it to all, a batch system to one: the one that each gets besides is not a second one."""
    process = started("stopped", 0.5)
    listening(process)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.communicate(timeout=60)[1] == f"stopped by {number}\n"
    assert process.returncode == 75


def test_a_second_signal_ends_all_at_once(started):
    process = started("stopped", 60)
    listening(process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 128 + signal.SIGINT


def test_an_interruption_before_anything_is_kept_is_one_line(started):
    process = started("interrupted")
    listening(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "ddpm train: interrupted\n"
    assert process.returncode == 130


def test_a_process_that_is_killed_ends_the_others(started):
    process = started("stopped", 60)
    listening(process)[1].kill()
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the processes go on")
def test_no_process_outlives_the_one_that_started_it(started):
    process = started("stopped")
    children = listening(process)
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=30)[1] == []
