"""Python in processes of its own."""

import json
import os
import subprocess
import sys

import numpy as np


def in_a_process(tmp_path, jobs, package, pythonpath="", environment=None):
    """Run jobs {name: {folder, own, load, call, save}} in a fresh process; its report, and the images by name."""
    for name, job in jobs.items():
        defaults = {"own": False, "load": {}, "call": {"batch_size": 2}, "save": None}
        jobs[name] = defaults | job | {"images": str(tmp_path / f"{name}.npy")}
    request, report = tmp_path / "request.json", tmp_path / "report.json"
    request.write_text(json.dumps({"package": package, "jobs": jobs}))
    offline = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "PYTHONPATH": pythonpath}
    environment = environment or offline
    done = subprocess.run(
        [sys.executable, "-c", WORKER, request, report], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    images = {name: np.load(tmp_path / f"{name}.npy") for name in jobs if (tmp_path / f"{name}.npy").exists()}
    return json.loads(report.read_text()), images


# Reads jobs (how to load, how to call) and reports what came out of each.
WORKER = """
import json, sys
jobs = json.load(open(sys.argv[1]))
if jobs["package"]:
    import ddpm_from_scratch
    own = ddpm_from_scratch.ScratchDDPMPipeline
else:
    sys.modules["ddpm_from_scratch"] = None  # an import of the package fails
    own = None
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
results = {}
for name, job in jobs["jobs"].items():
    loader = own if job["own"] else DiffusionPipeline
    try:
        pipeline = loader.from_pretrained(job["folder"], **job["load"])
    except ValueError as error:
        results[name] = {"error": str(error)}
        continue
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    images = pipeline(generator=generator, num_inference_steps=10, output_type="np", **job["call"]).images
    numpy.save(job["images"], images)
    if job["save"]:
        pipeline.save_pretrained(job["save"])
    results[name] = {
        "pipeline": type(pipeline).__name__,
        "module": type(pipeline).__module__,
        "parts": [type(pipeline.unet).__name__, type(pipeline.scheduler).__name__],
    }
results["loaded"] = sorted(name for name in sys.modules if name.startswith("diffusers_modules.local"))
if jobs["package"]:
    results["file"] = ddpm_from_scratch.__file__
json.dump(results, open(sys.argv[2], "w"))
"""
