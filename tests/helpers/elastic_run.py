"""Training runs of one or several processes, in float64, that write down each row they train on.

Run as a script, with a file of jobs: it imports everything once and forks for every process of every run. What is
written down is what reaches the training step and the network, not what was meant to.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch


def in_float64():
    """Weights, average, images and noise in float64. The noise is drawn as it always is."""
    from ddpm_from_scratch.training import loop as train
    from ddpm_from_scratch.training import run
    from ddpm_from_scratch.training.optimizer import EMA

    class EMA64(EMA):
        def __init__(self, network, *rest):
            super().__init__(network, *rest)
            self.network.double().load_state_dict(network.state_dict())

    build_unet, trained_unet, to_unit_range = run.build_unet, run.trained_unet, train.to_unit_range
    train_step = train.train_step
    run.build_unet = lambda *arguments: build_unet(*arguments).double()
    run.trained_unet = lambda *arguments: trained_unet(*arguments).double()
    run.EMA = EMA64
    train.to_unit_range = lambda pixels: to_unit_range(pixels).double()

    def with_float64_noise(run, passes, step):
        return train_step(run, map(in_doubles, passes), step)

    def in_doubles(one):
        return one._replace(batch=one.batch._replace(noise=one.batch.noise.double()))

    train.train_step = with_float64_noise


def keep_ledger(folder):
    """A line of JSON for each row of each step, in a file of this process."""
    import train as script

    from ddpm_from_scratch.training import loop as train

    build, train_step = script.build, train.train_step
    known, given, timesteps = {}, [], []

    def note_timesteps(_, arguments):
        if torch.is_grad_enabled():  # not the calls that a loss compares with
            timesteps.append(arguments[1])

    def build_and_watch(config):
        run = build(config)
        run.trained_unet.register_forward_pre_hook(note_timesteps)
        for index, image in enumerate(run.data.images):
            for flipped in (False, True):
                known[(image.flip(2) if flipped else image).numpy().tobytes()] = index, flipped
        assert len(known) == 2 * len(run.data.images), "images that look alike"
        return run

    def noted(one):
        given.append(one.batch)
        return one

    def descend_and_note(run, passes, step):
        given.clear()
        timesteps.clear()
        loss = train_step(run, map(noted, passes), step)
        rank, world_size = run.accelerator.process_index, run.accelerator.num_processes
        with open(folder / f"{rank}_of_{world_size}.jsonl", "a") as file:
            for micro_step, (batch, t) in enumerate(zip(given, timesteps, strict=True)):
                for place, image in enumerate(batch.images):
                    index, flipped = known[image.numpy().tobytes()]
                    facts = {
                        "step": step,
                        "row": (micro_step, rank, place),  # a global batch: pass by pass, in each of them by process
                        "index": index,
                        "flipped": flipped,
                        "label": int(batch.labels[place]),
                        "t": int(t[place]),
                        "noise": hashlib.sha256(batch.noise[place].numpy().tobytes()).hexdigest(),
                    }
                    file.write(json.dumps(facts) + "\n")
        return loss

    script.build, train.train_step = build_and_watch, descend_and_note


def stop_after(steps):
    """The last process gets SIGTERM in this step."""
    from ddpm_from_scratch.training import loop as train

    train_step = train.train_step

    def signalled(run, passes, step):
        if step == steps - 1 and run.accelerator.process_index == run.accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run, passes, step)

    train.train_step = signalled


def train_as(rank, job, port):
    """One process of a run, with what `torchrun` tells its own."""
    if port:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["processes"]),
            LOCAL_WORLD_SIZE=str(job["processes"]),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",  # the one at this port, of the process that forked
        )
    import train as script

    from ddpm_from_scratch.runtime.errors import Stopped

    output = Path(job["output"])
    keep_ledger(output)
    in_float64()
    if job["stop_after"]:
        stop_after(job["stop_after"])
    stopped = False
    try:
        script.main([*job["arguments"], "--output_dir", str(output)])
    except Stopped:
        stopped = True
    if stopped != bool(job["stop_after"]):
        raise AssertionError(f"{output.name}: {'stopped' if stopped else 'it went on to the end'}")


def launch(job):
    """All processes of a run, until they have ended."""
    import torch.multiprocessing
    from torch.distributed import TCPStore

    output, processes = Path(job["output"]), job["processes"]
    if job["start_from"]:
        shutil.copytree(job["start_from"], output)
    output.mkdir(exist_ok=True)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if processes > 1 else None  # a free port
    arguments = job, store and store.port
    torch.multiprocessing.start_processes(train_as, arguments, nprocs=processes, start_method="fork")


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")

    import train  # noqa: F401  here, for all the processes

    for job in json.loads(Path(sys.argv[1]).read_text()):
        launch(job)
