"""`ddpm env`: what a bug report says, on machines of several kinds."""

import os
import platform
import socket
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from ddpm_from_scratch import cli
from ddpm_from_scratch.runtime import environment


@pytest.fixture
def facts(capsys):
    """A function that runs the command; what it prints, by name."""

    def run():
        assert cli.main(["env"]) == 0
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    return run


def test_system_and_versions(facts, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(environment, "commit", lambda: "abc123")
    found = facts()
    assert found["system"] == platform.platform() and found["commit"] == "abc123"
    assert found["python"] == platform.python_version() and found["torch"] == metadata.version("torch")
    assert found["CPU"].endswith(f"{torch.get_num_threads()} threads") and str(os.cpu_count()) in found["CPU"]
    assert found["OMP_NUM_THREADS"] == "3"
    text = str(found)
    assert "hf_secret" not in text and os.getcwd() not in text and socket.gethostname() not in text


@pytest.mark.parametrize("known", [{}, {"cpu_name": "Abacus 9", "avx2": True, "avx512_bf16": False, "amx_int8": True}])
def test_the_cpu(facts, monkeypatch, known):
    monkeypatch.setattr(environment, "capabilities", lambda: known)
    found = facts()
    assert found["instructions"] == ("avx2, amx_int8" if known else torch.backends.cpu.get_cpu_capability())
    assert found["CPU"].startswith("Abacus 9, ") == bool(known)


@pytest.mark.parametrize("tool", [True, False])
def test_gpus(facts, monkeypatch, tmp_path, tool):
    """With the driver's version where NVIDIA's tool is there."""
    if tool:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 999.1\necho 999.1\n", encoding="utf-8")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "commit", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "77.7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    of = SimpleNamespace(name="Big GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: of)
    found = facts()
    driver = "999.1" if tool else "unknown"
    assert found["GPU 0"] == found["GPU 1"] == f"Big GPU, 80 GiB, CUDA 77.7, driver {driver}" and "GPU 2" not in found
    assert found["commit"].startswith("unknown")


def test_no_gpu(facts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert facts()["GPU"].startswith("none")
