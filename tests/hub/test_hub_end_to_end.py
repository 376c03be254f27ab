"""From training to the images of somebody who has never heard of us, over a stand-in for the Hub, in real processes."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import train as script
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, load_file

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.diffusion.pipeline import one_file
from ddpm_from_scratch.hub import publish
from ddpm_from_scratch.hub import repository as hub
from ddpm_from_scratch.runtime.errors import Refused
from ddpm_from_scratch.training import upload
from helpers.hub_files import WEIGHTS, WHOLE
from helpers.hub_runs import run
from helpers.hub_server import Fault, Hub
from helpers.networks import TINY_NETWORK, randomised
from helpers.paths import ROOT
from helpers.processes import in_a_process
from helpers.runs import TINY, picture, write_parquet

pytestmark = pytest.mark.full

TRUSTED = {"trust_remote_code": True}
STEPS = 6
NAME = "user/clothes"
OWNERS = {"hf_user": ("user", True), "hf_google": ("google", True)}
TINY_RUN = {**TINY, "max_train_steps": STEPS, "checkpointing_steps": 2, "log_steps": 1, "train_batch_size": 2}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with a model that `train.py --push_to_hub` has just trained, and stock checkpoints of other people."""
    root = tmp_path_factory.mktemp("published")
    preset = root / "tiny.yaml"
    data = write_parquet(root / "tiny.parquet", [picture(seed=seed) for seed in range(12)])
    preset.write_text(yaml.safe_dump({**TINY_RUN, "dataset_name": str(data)}))
    with Hub(OWNERS) as server:
        done = run(
            server,
            root,
            ROOT / "training" / "train.py",
            preset,
            *("--output_dir", root / "model", "--push_to_hub", "--hub_model_id", "clothes"),
            *("--hub_license", "apache-2.0"),
            token="hf_user",
        )
        trained = ScratchDDPMPipeline.from_pretrained(root / "model")
        stock = UNet2DModel.from_pretrained(root / "model" / "unet")
        for name, unet in {"same": stock, "ddpm-cifar10-32": randomised(UNet2DModel(**TINY_NETWORK))}.items():
            DDPMPipeline(unet, DDPMScheduler.from_config(trained.scheduler.config)).save_pretrained(root / name)
            push(server, root / name, f"google/{name}", "hf_google")
        assert server.unknown == []
        yield SimpleNamespace(server=server, root=root, model=root / "model", err=done.err)


def push(server, folder, name, token):
    """Push a folder as it is, in a process."""
    code = (
        "import sys, huggingface_hub as hub; api = hub.HfApi(); api.create_repo(sys.argv[2], exist_ok=True);"
        "api.upload_folder(folder_path=sys.argv[1], repo_id=sys.argv[2])"
    )
    home = folder.parent / "push_home"
    home.mkdir(exist_ok=True)
    run(server, home, "-c", code, folder, name, token=token)


def history(published):
    return published.server.repositories["models", NAME].commits[1:]


def test_the_run_leaves_exactly_the_model_on_the_hub(published):
    files = published.server.files(NAME)
    assert set(files) == WHOLE - {"neighbors.png", "bound.png"}  # those that evaluate.py draws
    config = yaml.safe_load(files["training_config.yaml"])
    assert config["dataset_name"] == "tiny.parquet" and config["output_dir"] == "model"
    for name, content in files.items():
        assert b"hf_user" not in content and str(published.root).encode() not in content, name
        if name != "training_config.yaml":
            assert content == (published.model / name).read_bytes(), name
    assert not (published.model / ".push").exists()
    assert "hf_user" not in published.err and "pushed http" in published.err
    assert "HTTP Request" not in published.err  # the HTTP library's own log


def test_each_commit_is_one_consistent_model(published):
    *snapshots, last = history(published)
    steps = [int(commit.message.removeprefix("Step ")) for commit in snapshots]
    assert last.message == "The trained model" and steps == sorted(set(steps)) and set(steps) <= {2, 4} and steps
    for step, commit in zip([*steps, STEPS], history(published), strict=True):
        assert json.loads(commit.files["results.json"])["steps"] == step
        average = load_file(published.model / "checkpoints" / f"step_{step:08d}" / "ema.safetensors")
        pushed = load(commit.files[WEIGHTS])
        assert all((pushed[name] == average[name]).all() for name in average)
        assert (f"{step} of {STEPS} optimiser steps" in commit.files["README.md"].decode()) == (step < STEPS)


@pytest.mark.full
def test_everybody_loads_it_and_draws_the_same(published, tmp_path):
    jobs = {
        "stock": {"folder": NAME},
        "ours": {"folder": NAME, "load": {"custom_pipeline": NAME, **TRUSTED}},
        "ours_on_a_stock_checkpoint": {"folder": "google/same", "load": {"custom_pipeline": NAME, **TRUSTED}},
        "untrusted": {"folder": NAME, "load": {"custom_pipeline": NAME}},
    }
    environment = published.server.environment(tmp_path / "home")
    report, images = in_a_process(tmp_path, jobs, package=False, environment=environment)
    assert report["stock"]["parts"] == ["UNet2DModel", "DDPMScheduler"]
    for name in ("ours", "ours_on_a_stock_checkpoint"):
        assert report[name]["parts"] == ["ScratchUNet2DModel", "ScratchDDPMScheduler"]
        assert report[name]["module"].startswith("diffusers_modules.") and "user--clothes" in report[name]["module"]
    assert "trust_remote_code=True" in report["untrusted"]["error"]
    own = {"own": {"folder": NAME, "own": True}, "own_on_stock": {"folder": "google/same", "own": True}}
    environment = published.server.environment(tmp_path / "other_home", PYTHONPATH=str(ROOT / "src"))
    report, more = in_a_process(tmp_path, own, package=True, environment=environment)
    assert report["own"]["module"] == "ddpm_from_scratch.diffusion.pipeline" and report["loaded"] == []
    images |= more
    assert len(images) == 5 and images["own"].std() > 0.01
    for name, drawn in images.items():
        np.testing.assert_allclose(drawn, images["own"], atol=1e-5, err_msg=name)


@pytest.mark.full
def test_the_code_of_the_page_runs_as_it_stands(published, tmp_path):
    page = published.server.files(NAME)["README.md"].decode()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4 and sum("ddpm_from_scratch" in block for block in blocks) == 1
    for block in blocks:
        package = {"PYTHONPATH": str(ROOT / "src")} if "ddpm_from_scratch" in block else {}
        if not package:
            block = 'import sys\nsys.modules["ddpm_from_scratch"] = None\n' + block
        out = run(published.server, tmp_path, "-c", block, **package).out
        if "print" in block:
            assert f"```text\n{out.strip()}\n```" in page
    with Image.open(tmp_path / "usage.png") as drawn, Image.open(published.model / "usage.png") as shown:
        assert np.abs(np.asarray(drawn, float) - np.asarray(shown, float)).max() <= 1


@pytest.mark.full
def test_publishing_again_without_a_change_makes_no_commit(published, tmp_path):
    command = ("-m", "ddpm_from_scratch.cli", "publish", published.model, "--hub_model_id", NAME)
    before = len(history(published))
    done = run(published.server, tmp_path, *command, token="hf_user")
    assert len(history(published)) == before and done.out.strip().endswith(history(published)[-1].oid)


@pytest.mark.full
def test_a_space_runs_by_itself(published, tmp_path):
    command = ("-m", "ddpm_from_scratch.cli", "publish", published.model, "--hub_model_id", NAME, "--space")
    run(published.server, tmp_path, *command, token="hf_user")
    name = f"{NAME}-demo"
    assert published.server.repositories["spaces", name].sdk == "gradio"
    files = published.server.files(name, "spaces")
    assert files["model_id.txt"].decode().split() == [NAME]
    assert ModelCard(files["README.md"].decode()).data.models == [NAME]
    assert "diffusers" in files["requirements.txt"].decode() and "gradio" not in files["requirements.txt"].decode()
    source = ROOT / "src"
    sources = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.py")}
    assert sources.items() <= files.items()
    for path, content in files.items():
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    code = "import app, sys; sys.argv = ['app.py']; print(app.ScratchDDPMPipeline.__module__, app.__file__)"
    out = run(published.server, tmp_path / "space", "-c", code, PYTHONPATH=str(tmp_path / "space")).out
    assert out.split() == ["ddpm_from_scratch.diffusion.pipeline", str(tmp_path / "space" / "app.py")]


# Two repositories, two versions of the code, one process

MIXING = """
import json, sys
sys.modules["ddpm_from_scratch"] = None
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
found = {}
for name, options in json.loads(sys.argv[1]).items():
    repository = options.pop("repository")
    pipeline = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    found[name] = pipeline
images = {}
for name, pipeline in found.items():
    generator = torch.Generator().manual_seed(7)
    images[name] = pipeline(batch_size=2, generator=generator, num_inference_steps=5, output_type="np").images
    pipeline.save_pretrained(sys.argv[2] + "/" + name)
numpy.savez(sys.argv[2] + "/images.npz", **images)
"""


@pytest.mark.full
def test_two_versions_of_the_code_do_not_mix(published, tmp_path):
    """One is of today, the other draws negatives: in either order, and as two revisions of one repository."""
    server, today = published.server, published.server.files(NAME)["pipeline.py"].decode()
    another = today.replace("images = (x / 2 + 0.5).clamp(0, 1)", "images = (0.5 - x / 2).clamp(0, 1)")
    assert another != today
    folder = tmp_path / "model"
    for file, content in server.files(NAME).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    for name, code in {"user/today": today, "user/another": another}.items():
        (folder / "pipeline.py").write_text(code)
        push(server, folder, name, "hf_user")
    (folder / "pipeline.py").write_text(today)
    push(server, folder, "user/another", "hf_user")
    old, new = [commit.oid for commit in server.repositories["models", "user/another"].commits[-2:]]

    def pinned(revision):
        return {"repository": "user/another", "custom_pipeline": "user/another", "custom_revision": revision}

    jobs = {
        "negative": pinned(old),
        "positive": {"repository": "user/today", "custom_pipeline": "user/today"},
        "newer": pinned(new),
        "negative_again": pinned(old),
        "positive_again": {"repository": "user/another", "custom_pipeline": "user/today"},
    }
    run(server, tmp_path, "-c", MIXING, json.dumps(jobs), tmp_path)
    images = np.load(tmp_path / "images.npz")
    assert images["positive"].std() > 0.01
    for name in jobs:
        negative = name.startswith("negative")
        drawn = 1 - images[name] if negative else images[name]
        np.testing.assert_allclose(drawn, images["positive"], atol=1e-6, err_msg=name)
        assert (tmp_path / name / "pipeline.py").read_text() == (another if negative else today), name


@pytest.mark.full
def test_a_revision_pins_the_code_of_a_model_that_names_its_own(published, tmp_path):
    server, today = published.server, published.server.files(NAME)["pipeline.py"].decode()
    unet = randomised(UNet2DModel(**TINY_NETWORK, num_class_embeds=5))
    ScratchDDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "classes")
    for code in (today.replace("(x / 2 + 0.5).clamp(0, 1)", "(0.5 - x / 2).clamp(0, 1)"), today):
        (tmp_path / "classes" / "pipeline.py").write_text(code)
        push(server, tmp_path / "classes", "user/classes", "hf_user")
    old = server.repositories["models", "user/classes"].commits[-2].oid
    jobs = {"new": {"repository": "user/classes"}, "old": {"repository": "user/classes", "revision": old}}
    run(server, tmp_path, "-c", MIXING, json.dumps(jobs), tmp_path)
    images = np.load(tmp_path / "images.npz")
    assert images["new"].std() > 0.01
    np.testing.assert_allclose(1 - images["old"], images["new"], atol=1e-6)


# The run goes on


@pytest.fixture
def training(tmp_path, monkeypatch):
    """Train in this process against a stand-in whose faults a test chooses."""
    data = write_parquet(tmp_path / "tiny.parquet", [picture(seed=seed) for seed in range(12)])
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump({**TINY_RUN, "dataset_name": str(data)}))
    with Hub(OWNERS) as server:
        server.in_this_process(monkeypatch)
        monkeypatch.setattr(hub, "WAITS", (0.0, 0.0))
        monkeypatch.setattr(hub, "TIMEOUT", 0.5)

        def main(*flags):
            flags = ("--output_dir", tmp_path / "model", "--push_to_hub", "--hub_token", "hf_user", *flags)
            return script.main([str(preset), *map(str, flags)])

        yield SimpleNamespace(server=server, main=main, model=tmp_path / "model")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


COMMITS = "/commit/"
DURING = {  # of a run with pushes at steps 2 and 4, and one at the end
    "500": [Fault("POST", COMMITS, 500, times=2)],  # a snapshot gets one try
    "cut": [Fault("POST", COMMITS, "cut", times=2)],
    "stall": [Fault("PUT", ".", "stall", times=3)],
}
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.mark.full
@pytest.mark.parametrize("kind", DURING)
def test_a_hub_that_fails_during_the_run_gets_the_model_at_its_end(training, kind):
    training.server.faults += [Fault(**{**vars(fault), "seen": 0}) for fault in DURING[kind]]
    training.main("--hub_model_id", "clothes")
    assert training.server.faults[0].seen > 0
    files = training.server.files(NAME)
    assert files[WEIGHTS] == (training.model / WEIGHTS).read_bytes() and json.loads(files["results.json"])["steps"] == 6


@pytest.mark.full
def test_a_hub_that_fails_to_the_end_costs_nothing_but_the_push(training):
    training.server.faults.append(Fault("POST", COMMITS, 503))
    with pytest.raises(ConnectionError, match="cannot push to user/clothes, after 3 tries") as caught:
        training.main("--hub_model_id", "clothes")
    (note,) = caught.value.__notes__
    assert f"ddpm publish {training.model} --hub_model_id user/clothes" in note
    assert training.server.files(NAME) == {}  # what it was before: created, and empty
    pipeline = ScratchDDPMPipeline.from_pretrained(training.model)
    assert pipeline(num_inference_steps=2).images and (training.model / "samples.png").is_file()
    training.server.faults.clear()
    publish.main([str(training.model), "--hub_model_id", NAME, "--hub_token", "hf_user"])
    assert training.server.files(NAME)[WEIGHTS] == (training.model / WEIGHTS).read_bytes()


@pytest.mark.parametrize("flags", [("--hub_token", "hf_wrong"), ("--hub_model_id", "google/clothes")])
def test_a_push_that_is_not_allowed_is_refused_before_any_training(training, flags):
    with pytest.raises(Refused, match="hf auth login"):
        training.main(*flags)
    assert not training.model.exists()


@pytest.mark.full
def test_a_snapshot_that_cannot_be_written_costs_nothing_but_the_snapshot(training, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upload, "write_json", full)
    training.main("--hub_model_id", "clothes")
    assert [commit.message for commit in training.server.repositories["models", NAME].commits[1:]] == [
        "The trained model"
    ]
    assert "step 2 is not pushed: [Errno 28] No space left" in caplog.text and not (training.model / ".push").exists()


@pytest.mark.full
def test_a_run_that_goes_on_does_not_keep_pictures_of_the_model_before(training):
    training.main("--hub_model_id", "clothes", "--max_train_steps", "2")
    for name in ("bound.png", "neighbors.png"):
        shutil.copy(training.model / "samples.png", training.model / name)
    training.main("--hub_model_id", "clothes", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    files = training.server.files(NAME)
    assert not {"bound.png", "neighbors.png"} & set(files) and json.loads(files["results.json"])["steps"] == 4


@pytest.mark.full
def test_the_space_of_a_private_model_is_private(training, capsys):
    training.main("--hub_model_id", "secret", "--hub_private_repo", "--checkpointing_steps", "null")
    publish.main([str(training.model), "--hub_model_id", "user/secret", "--hub_token", "hf_user", "--space"])
    assert training.server.repositories["spaces", "user/secret-demo"].private
    assert "needs a secret HF_TOKEN" in capsys.readouterr().err


@pytest.mark.full
def test_a_private_run_never_lands_in_a_public_repository(training):
    hub.open_repository("user/model", token="hf_user")
    with pytest.raises(Refused, match="user/model exists and is public"):
        training.main("--hub_private_repo")
    assert training.server.files("user/model") == {} and not training.model.exists()
    training.main("--hub_private_repo", "--hub_model_id", "secret", "--checkpointing_steps", "null")
    assert training.server.repositories["models", "user/secret"].private
    assert len(training.server.repositories["models", "user/secret"].commits) == 2


def test_the_saved_file_is_the_packages(published):
    assert published.server.files(NAME)["pipeline.py"].decode() == one_file(ScratchDDPMPipeline._module_sources)
