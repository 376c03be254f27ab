"""Saves checkpoints in processes that strace ends, or whose system calls it makes fail, at a chosen call.

Run as a script, this is the server that does the saving: it imports PyTorch once and forks for every attempt.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import python_path

CALLS = (  # that change something on the disk, or open what is read
    *("open", "openat", "write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2"),
    *("unlink", "unlinkat", "mkdir", "mkdirat", "rmdir"),
)
TRACED = ",".join(f"?{name}" for name in CALLS)  # not every processor has them all
BEGIN, END = "BEGIN-of-the-attempt", "END-of-the-attempt"
OS_ERROR, OTHER_ERROR = 74, 70


class CannotTrace(Exception):
    """strace may not attach to processes here."""


@dataclass(frozen=True)
class Call:
    """A system call of an attempt."""

    name: str
    number: int  # the n-th of this name since strace is attached
    text: str  # as strace prints it


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    status: int  # 0, OS_ERROR, OTHER_ERROR, or minus the signal that ended it
    report: str  # what was raised
    calls: list[Call]  # from BEGIN to END


def content(step, version):
    """Tensors and state of a checkpoint."""
    import torch

    tensors = {name: {"weight": torch.full((64,), step + version / 10)} for name in ("unet", "optimizer")}
    return tensors, {"step": step, "version": version}


def save(folder, step, version, total_limit=2):
    from ddpm_from_scratch.training import checkpoint

    checkpoint.save_checkpoint(folder / f"step_{step:08d}", *content(step, version), total_limit)


def reopen(folder):
    from ddpm_from_scratch.training import checkpoint

    checkpoint.find_checkpoint("latest", folder)


ATTEMPTS = {
    "save": lambda folder: save(folder, 3, 1),  # and drop step 1
    "replace": lambda folder: save(folder, 2, 2),
    "reopen": reopen,
}


# The server


def mark(name):
    with suppress(FileNotFoundError):
        os.open(name, os.O_RDONLY)


def allow_tracing():
    """By processes that are no ancestors, which Linux' Yama module forbids otherwise."""
    pr_set_ptracer, anybody = 0x59616D61, ctypes.c_ulong(-1)
    ctypes.CDLL(None).prctl(pr_set_ptracer, anybody, 0, 0, 0)


def attempt(name, folder):
    """The exit status and what was raised."""
    mark(BEGIN)
    try:
        ATTEMPTS[name](folder)
        status, report = 0, ""
    except OSError as error:
        status, report = OS_ERROR, f"{type(error).__name__}: {error}"
    except Exception as error:
        status, report = OTHER_ERROR, f"{type(error).__name__}: {error}"
    mark(END)
    return status, report


def forked_attempt(name, folder):
    """Attempt in a process of its own; the client says when it may begin."""
    (go, may_go), (read, write) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        allow_tracing()
        os.read(go, 1)
        status, report = attempt(name, folder)
        os.write(write, report.encode())
        os._exit(status)
    os.close(write)
    print(pid, flush=True)
    sys.stdin.readline()
    os.write(may_go, b"\n")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(read, "rb") as pipe:
        report = pipe.read().decode()
    for descriptor in (go, may_go):
        os.close(descriptor)
    return status, report


def serve():
    with tempfile.TemporaryDirectory() as folder:  # whatever is imported at first use
        for prepare in (lambda folder: save(folder, 2, 1), *ATTEMPTS.values()):
            prepare(Path(folder))
    print("ready", flush=True)
    for line in sys.stdin:
        name, folder = json.loads(line)
        print(json.dumps(forked_attempt(name, Path(folder))), flush=True)


# The client


class Server:
    """Attempts, traced; use as a context."""

    def __enter__(self):
        command, environment = [sys.executable, __file__], {**os.environ, "PYTHONPATH": python_path("src", "tests")}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._receive() == "ready"
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _receive(self):
        line = self._process.stdout.readline()
        assert line, "the server has ended"
        return line.strip()

    def _send(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def run(self, name, folder, *injections):
        """An attempt on a folder of checkpoints.

        Args:
            name: of ATTEMPTS.
            folder: of checkpoints.
            injections: as strace's option -e takes them.

        Raises:
            CannotTrace: strace is not allowed to.
        """
        self._send(json.dumps([name, str(folder)]))
        trace = folder.with_name("trace.txt")
        options = [f"--attach={self._receive()}", "-f", "-y", "-s", "8", "-o", str(trace), "-e", f"trace={TRACED}"]
        for injection in injections:
            options += ["-e", f"inject={injection}"]
        with subprocess.Popen(["strace", *options], stderr=subprocess.PIPE, text=True) as strace:
            line = strace.stderr.readline()
            self._send("go")
            status, report = json.loads(self._receive())
            strace.stderr.read()
        if "attached" not in line:
            raise CannotTrace(line.strip())
        return Outcome(status, report, parse_trace(trace.read_text()))


def parse_trace(text):
    """The calls between the two marks, with their numbers."""
    counts, calls, inside = dict.fromkeys(CALLS, 0), [], False
    for line in text.splitlines():
        match = re.match(r"\d+ +((\w+)\(.*)", line)
        if not match:
            continue  # `+++ killed by SIGKILL +++`
        name = match[2]
        counts[name] += 1
        if BEGIN in line or END in line:
            inside = BEGIN in line
        elif inside:
            calls.append(Call(name, counts[name], match[1]))
    return calls


if __name__ == "__main__":
    serve()
