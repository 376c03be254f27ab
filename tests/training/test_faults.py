"""What befalls a run: gradients that are not finite, signals, a full disk, damaged checkpoints; and the exit codes."""

import errno
import inspect
import os
import resource
import signal
import subprocess
import sys
import time

import accelerate.utils.launch
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch import nn

from ddpm_from_scratch.runtime import errors
from ddpm_from_scratch.runtime.errors import CannotSave, Diverged, Refused, Stopped
from ddpm_from_scratch.sampling import checkpoints
from ddpm_from_scratch.training import checkpoint, run
from ddpm_from_scratch.training import loop as train
from ddpm_from_scratch.training.faults import FiniteGuard
from helpers.paths import TRAINING
from helpers.runs import STEPS, assert_equal, checkpoint_tensors, run_main, stop_in_step

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Gradients that are not finite


def poisoned(monkeypatch, *steps):
    """Noise that is not a number in these steps."""
    train_step = train.train_step

    def with_nan(run, batches, step):
        def spoilt(one):
            noise = one.batch.noise * (float("nan") if step in steps else 1)
            return one._replace(batch=one.batch._replace(noise=noise))

        return train_step(run, map(spoilt, batches), step)

    monkeypatch.setattr(train, "train_step", with_nan)


def test_a_step_that_is_not_finite_is_skipped_and_counted(inputs, tmp_path, monkeypatch, caplog):
    """Weights and optimiser are those of before, the rest of the run goes on; resuming in between changes nothing."""
    flags = ("--checkpointing_steps", "1", "--log_steps", "1", "--use_ema", "false")
    poisoned(monkeypatch, 3, 4)
    folder = run_main(inputs, tmp_path / "model", *flags)
    before, after = checkpoint_tensors_without_ema(folder, 3), checkpoint_tensors_without_ema(folder, 5)
    assert_equal(after, before)
    progress = checkpoints.read_state(folder / "checkpoints" / f"step_{STEPS:08d}")["progress"]
    assert progress["skipped_steps"] == 2 and progress["skipped_in_a_row"] == 0
    assert [step for step, _ in progress["losses"]] == [1, 2, 3, 6, 7, 8, 9, 10]
    assert "1 steps were skipped" in caplog.text
    assert not [name for name, t in checkpoint_tensors_without_ema(folder, STEPS).items() if not t.isfinite().all()]
    start = folder / "checkpoints" / "step_00000004"
    again = run_main(inputs, tmp_path / "again", *flags, "--resume_from_checkpoint", start)
    assert_equal(load_file(again / WEIGHTS), load_file(folder / WEIGHTS))


def checkpoint_tensors_without_ema(folder, step):
    path = folder / "checkpoints" / f"step_{step:08d}"
    return {
        f"{name}/{key}": tensor
        for name in ("unet", "optimizer")
        for key, tensor in load_file(path / f"{name}.safetensors").items()
    }


def test_too_many_in_a_row_end_the_run(inputs, tmp_path, monkeypatch):
    poisoned(monkeypatch, *range(3, 100))
    flags = ("--checkpointing_steps", "2", "--log_steps", "1", "--max_skipped_steps", "4")
    with pytest.raises(Diverged, match=r"last 4 steps, up to step 7, were not finite.*lower learning rate"):
        run_main(inputs, tmp_path / "model", *flags)
    latest = checkpoint.find_checkpoint("latest", tmp_path / "model" / "checkpoints")
    assert latest.name == "step_00000006"
    assert all(tensor.isfinite().all() for tensor in checkpoint_tensors(tmp_path / "model", 6).values())


def test_a_run_without_any_finite_step_leaves_no_model(inputs, tmp_path, monkeypatch):
    poisoned(monkeypatch, *range(100))
    with pytest.raises(Diverged, match="last 10 steps, up to step 10"):
        run_main(inputs, tmp_path / "model")
    assert not (tmp_path / "model" / "model_index.json").exists()


@pytest.mark.parametrize("fused", [True, False])
def test_the_guard_makes_the_optimiser_skip(fused):
    """What PyTorch's fused kernels do with `found_inf`, which gradient scalers rely on too."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused) for layer in layers]
    guard = FiniteGuard(optimizers[0], torch.device("cpu"))
    guard.go_on(5, 0)
    for step in range(4):
        spoilt = step in (1, 2)
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            layer(torch.ones(1, 3) * (step + 1)).square().sum().backward()
            if spoilt and layer is layers[1]:
                continue  # the reference leaves the step out
            if layer is layers[0]:
                if spoilt:
                    layer.weight.grad[0, 0] = float("inf")
                guard.check(nn.utils.get_total_norm([p.grad for p in layer.parameters()]))
                if step == 2:
                    assert guard.counts() == (7, 2)
            optimizer.step()
    assert guard.counts() == (7, 0)
    for name, weight in layers[0].state_dict().items():
        assert torch.equal(weight, layers[1].state_dict()[name]), name
    states = [optimizer.state[layer.weight] for layer, optimizer in zip(layers, optimizers, strict=True)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_under_a_gradient_scaler_every_skipped_step_is_counted():
    """PyTorch's scaler skips, lowers its scale and does not tell; two of these four steps are spoilt."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler, guard = torch.amp.GradScaler("cpu", init_scale=2.0**10), FiniteGuard(None, torch.device("cpu"))
    counts = []
    for factor in (1, float("inf"), float("nan"), 1):
        optimizer.zero_grad()
        before = layer.weight.detach().clone()
        scaler.scale(layer(torch.ones(1, 3) * factor).sum()).backward()
        scaler.unscale_(optimizer)
        guard.check(nn.utils.clip_grad_norm_(layer.parameters(), 1.0))
        scaler.step(optimizer)
        scaler.update()
        counts.append(guard.counts())
        assert torch.equal(layer.weight, before) == (factor != 1)
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0)] and scaler.get_scale() == 2.0**8


# Signals


@pytest.mark.parametrize(("number", "stop_in"), [(signal.SIGTERM, 4), (signal.SIGINT, 1), (signal.SIGTERM, STEPS)])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    inputs,
    whole_run,
    tmp_path,
    monkeypatch,
    number,
    stop_in,
):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"stopped after step {stop_in}"):
        stop_in_step(patch, stop_in, number)
        run_main(inputs, tmp_path / "model")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    found = checkpoint.find_checkpoint("latest", tmp_path / "model" / "checkpoints")
    assert found.name == f"step_{stop_in:08d}" and not (tmp_path / "model" / "model_index.json").exists()
    resumed = run_main(inputs, tmp_path / "model", "--checkpointing_steps", "10")
    assert_equal(load_file(resumed / WEIGHTS), load_file(whole_run / WEIGHTS))


def test_the_logged_losses_are_those_of_a_run_without_a_stop(inputs, tmp_path, monkeypatch):
    """log_steps is 3: the stop after step 4 falls between two entries."""
    flags = ("--checkpointing_steps", "10")

    def losses(folder):
        return checkpoints.read_state(folder / "checkpoints" / f"step_{STEPS:08d}")["progress"]["losses"]

    expected = losses(run_main(inputs, tmp_path / "undisturbed", *flags))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_in_step(patch, 4)
        run_main(inputs, tmp_path / "model", *flags)
    assert losses(run_main(inputs, tmp_path / "model", *flags)) == expected
    assert [step for step, _ in expected] == [3, 6, 9, 10]


@pytest.mark.full
def test_a_second_signal_has_its_usual_effect():
    code = (
        "import os, signal, time; from ddpm_from_scratch.training.faults import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGINT); print(signals.received == signal.SIGINT, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)  # the same, from a terminal and from a launcher\n"
        "    time.sleep(1.1); os.kill(os.getpid(), signal.SIGTERM); print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n" and done.returncode == -signal.SIGTERM


# One of two processes


@pytest.mark.full
def test_one_of_two_processes_killed(inputs, tmp_path):
    """The other one ends too, with an error that says what happened; the same command goes on to the same weights."""
    flags = ("--model.dropout", "0.0", "--checkpointing_steps", "1", "--max_train_steps", "40", "--log_steps", "5")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, TRAINING / "train.py", inputs.preset, "--output_dir", "model", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with open(tmp_path / "errors.txt", "w") as errors:
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=errors)
    try:
        deadline = time.monotonic() + 120
        while len(checkpoint.list_checkpoints(tmp_path / "model" / "checkpoints")) < 3:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        workers = [child for child in psutil.Process(first.pid).children() if child.environ().get("RANK") == "1"]
        workers[0].kill()
        first.wait(timeout=600)
    finally:
        first.kill()
        first.wait()
    assert first.returncode != 0 and "Signal 9 (SIGKILL)" in (tmp_path / "errors.txt").read_text()
    reached = checkpoint.find_checkpoint("latest", tmp_path / "model" / "checkpoints")
    assert reached is not None and reached.name < "step_00000040"
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    one = run_main(inputs, tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    expected = load_file(one / WEIGHTS)
    for name, weight in load_file(tmp_path / "model" / WEIGHTS).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-4, rtol=1e-3, msg=name)


# A disk that is full or not to be written to


def test_a_full_disk_says_so_and_keeps_what_was_there(inputs, tmp_path, monkeypatch):
    save = run.save_checkpoint

    def full(folder, *rest):
        if folder.name == "step_00000006":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder, *rest)

    with monkeypatch.context() as patch, pytest.raises(CannotSave, match=r"of step 6 cannot be written.*No space left"):
        patch.setattr(run, "save_checkpoint", full)
        run_main(inputs, tmp_path / "model", "--checkpointing_steps", "2")
    assert checkpoint.find_checkpoint("latest", tmp_path / "model" / "checkpoints").name == "step_00000004"


# Pickles

AUDITED = """
import sys
unpickled = []
watching = False
def watch(event, arguments):
    if watching and event == "pickle.find_class":
        unpickled.append(arguments)
sys.addaudithook(watch)
preset = sys.argv[1]
import pickle, train as script
from ddpm_from_scratch.evaluation import evaluate
from ddpm_from_scratch import ScratchDDPMPipeline
flags = [preset, "--output_dir", "model", "--checkpointing_steps", "2"]
watching = True
script.main([*flags, "--max_train_steps", "4"])
script.main([*flags, "--max_train_steps", "6"])
ScratchDDPMPipeline.from_pretrained("model")(num_inference_steps=2)
found = list(unpickled)
pickle.loads(pickle.dumps(watch))
assert len(unpickled) > len(found), "the hook sees nothing"
print(found)
"""


@pytest.mark.full
def test_nothing_is_unpickled_in_saving_resuming_and_loading(inputs, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAINING)}
    command = [sys.executable, "-c", AUDITED, inputs.preset]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# Engines


@pytest.mark.parametrize("engine", run.SPLITTING_ENGINES)
def test_engines_that_cut_a_network_into_parts_are_refused(inputs, tmp_path, monkeypatch, engine):
    switch = run.SPLITTING_ENGINES[engine]
    assert f'"{switch}"' in inspect.getsource(accelerate.utils.launch)  # what `accelerate launch` tells its scripts
    monkeypatch.setenv(switch, "true")
    with pytest.raises(Refused, match=f"accelerate is told to use {engine}, which cuts a network into parts"):
        run_main(inputs, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_examples_of_accelerates_configuration_are_its_own():
    files = sorted((TRAINING / "accelerate").glob("*.yaml"))
    found = [load_config_from_file(str(file)) for file in files]
    assert [(config.num_machines, config.num_processes) for config in found] == [(1, 8), (2, 16), (1, 1)]
    assert {config.mixed_precision for config in found} == {"no"}


@pytest.mark.parametrize("place", ["/dev/null/model", "/proc/model"])
def test_a_folder_that_cannot_be_written_is_refused(inputs, place):
    with pytest.raises(Refused, match="model"):
        run_main(inputs, place, "--max_train_steps", "1")


@pytest.mark.full
def test_a_real_process_meets_a_full_disk(inputs, tmp_path):
    """RLIMIT_FSIZE stands in for it: a file may not grow beyond 40 kB, which the weights' does."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    flags = ("--output_dir", "model", "--checkpointing_steps", "2", "--max_train_steps", "4")
    wide = ("--model.block_out_channels", "[16, 32]")
    command = [sys.executable, TRAINING / "train.py", inputs.preset, *flags, *wide]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    done = subprocess.run(command, **options, preexec_fn=limited)
    assert done.returncode == CannotSave.code, done.stderr
    assert "checkpoint of step 2 cannot be written: [Errno 27] File too large" in done.stderr
    assert list((tmp_path / "model" / "checkpoints").iterdir()) == []
    assert subprocess.run(command, **options).returncode == 0


def test_exit_codes_are_those_of_the_table():
    for fault in (Diverged, CannotSave, Stopped):
        assert f"| {fault.code} |" in errors.__doc__


@pytest.mark.full
@pytest.mark.parametrize("fault", [Diverged, CannotSave, Stopped])
def test_the_process_ends_with_the_code_of_the_fault(inputs, tmp_path, fault):
    """As a real process; what befalls it is put in by an import hook."""
    hook = f"""
import sys, runpy
from ddpm_from_scratch.runtime import errors
from ddpm_from_scratch.training import run
def build(config):
    raise errors.{fault.__name__}("it befell the run")
run.build = build
sys.argv = ["train.py", {inputs.preset!r}, "--output_dir", "model"]
runpy.run_path({str(TRAINING / "train.py")!r}, run_name="__main__")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", hook]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == fault.code, done.stderr
    assert "train.py: it befell the run" in done.stderr and "Traceback" not in done.stderr
