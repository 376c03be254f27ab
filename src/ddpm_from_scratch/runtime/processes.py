"""Processes of one run on this machine's CPU: how many pay, and how they start and end together."""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType

import torch

from .errors import Outcome

# Two processes of one thread train as fast as one of two threads, or faster, and lose less beside other work: they wait
# for each other once a step and not at every operation (docs/speed.md).
MOST = 8
FEWEST_IMAGES = 4  # of a process in a pass: with fewer, a core does less
GRACE = 30.0  # seconds in which the others may end after one has failed
SIGNALS = (signal.SIGTERM, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of prctl(2): the signal for a process whose parent has died


def processes_that_pay(threads: int, batch_size: int) -> int:
    """The number of processes among which a batch is split on a CPU: as many as there are threads, within reason."""
    most = min(threads, MOST, max(1, batch_size // FEWEST_IMAGES))
    return max(count for count in range(1, most + 1) if batch_size % count == 0)


def run_together(program: Callable[[], Outcome], count: int) -> Outcome:
    """Run a program in several processes, which find each other by what `torch.distributed` reads from the environment.

    They share this process's threads. SIGTERM and SIGINT are passed on to them. Where one fails, the others get 30
    seconds to end.

    Args:
        program: without arguments; it must be picklable where processes are not forked.
        count: of processes, on this machine.

    Returns:
        The code of the process that failed first, or 0, and all their messages, each once.
    """
    # A forked process has imported everything already; elsewhere than on Linux it would not be safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    threads, port = max(1, torch.get_num_threads() // count), free_port()
    kind = context.Process  # type: ignore[attr-defined]  # every context has it but their base in typeshed
    processes: dict[BaseProcess, Connection] = {}  # with the end of a pipe where its message arrives
    with passing_on_signals(processes):
        for rank in range(count):
            here, there = context.Pipe(duplex=False)
            process = kind(target=take_part, args=(program, rank, count, port, threads, there))
            processes[process] = here
            process.start()
            there.close()  # or the pipe would not end with the process
        return wait_for_all(processes)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def take_part(
    program: Callable[[], Outcome],
    rank: int,
    count: int,
    port: int,
    threads: int,
    pipe: Connection,
) -> None:
    """Be one of the processes."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, interrupt_once)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    # accelerate takes another number of threads, and warns of it, where this one is not said.
    os.environ.update(MASTER_ADDR="localhost", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS=str(threads))
    torch.set_num_threads(threads)
    outcome = program()
    if outcome.message is not None:
        pipe.send(outcome.message)
    sys.exit(outcome.code)


def interrupt_once(number: int, _: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but not again for the signal that is passed on besides."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def passing_on_signals(processes: Collection[BaseProcess]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT on to the processes, which may have got them already, as from a terminal."""

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_all(processes: Mapping[BaseProcess, Connection]) -> Outcome:
    """Wait until all have ended.

    Once one has failed, the others are killed if they have not ended after `GRACE`. Messages are read as they come: a
    process does not end before a long one has been read.

    Args:
        processes: each with the pipe by which it sends a message, if it has one.

    Returns:
        The exit code of the one that failed first (128 and the signal's number for a signal) and all messages.
    """
    code, messages = 0, []
    deadline: float | None = None
    running, unread = list(processes), dict(processes)
    while running:
        remaining = None if deadline is None else max(0, deadline - time.monotonic())
        wait([*(process.sentinel for process in running), *unread.values()], remaining)
        ended = [process for process in running if process.exitcode is not None]
        running = [process for process in running if process not in ended]
        for process, pipe in list(unread.items()):
            if pipe.poll():
                del unread[process]
                with suppress(EOFError):  # it has ended, or will, without a message
                    messages.append(pipe.recv())
        for process in ended:
            if process.exitcode and not code:
                code = process.exitcode if process.exitcode > 0 else 128 - process.exitcode
                deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() >= deadline:
            for process in running:
                process.kill()
    return Outcome(code, "\n".join(dict.fromkeys(messages)) or None)
