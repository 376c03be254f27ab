"""Pushing to the Hub, here a stand-in on the loopback: what a repository holds, refusals, and every kind of failure."""

import logging
import shutil
import threading
import time

import huggingface_hub
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from ddpm_from_scratch import ScratchDDPMPipeline
from ddpm_from_scratch.hub import repository as hub
from helpers.hub_files import WEIGHTS, WHOLE
from helpers.hub_server import Fault, Hub
from helpers.networks import TINY_NETWORK, randomised

# huggingface_hub sends the bytes of large files in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

NAME = "user/clothes"
WRITER, READER, OTHER = ({"token": f"hf_{name}"} for name in ("user", "reader", "other"))


def save_model(folder, seed=0):
    """A model folder as a finished run leaves it, with what must not be pushed."""
    unet = randomised(UNet2DModel(**TINY_NETWORK), seed)
    ScratchDDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    for name in WHOLE:
        if not (folder / name).exists():
            (folder / name).write_text(f"---\ntags:\n- a{seed}\n---\n{name}")
    for secret in ("checkpoints/step_00000004/optimizer.safetensors", "logs/events.out", ".push/step_1/README.md"):
        (folder / secret).parent.mkdir(parents=True)
        (folder / secret).write_text("hf_secret")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text("a pickle")
    (folder / "samples").mkdir()
    (folder / "samples" / "step_2.png").write_text("on the way")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("newer"), seed=1)


@pytest.fixture
def server(monkeypatch):
    with Hub() as server:
        server.in_this_process(monkeypatch)
        monkeypatch.setattr(hub, "WAITS", (0.0, 0.0))
        yield server


def local(folder):
    return {name: (folder / name).read_bytes() for name in WHOLE}


def commits(server, name=NAME, kind="models"):
    return [commit.message for commit in server.repositories[kind, name].commits[1:]]


def push(folder, message="a push", **options):
    return hub.push(folder, NAME, message=message, **{**WRITER, **options})


# What a repository holds


@pytest.mark.parametrize("lfs_suffixes", [(".safetensors", ".png"), (), tuple(f".{x}" for x in ("json", "py", "png"))])
def test_a_repository_holds_exactly_the_model(server, model, lfs_suffixes):
    server.lfs_suffixes = lfs_suffixes
    assert hub.open_repository(NAME, **WRITER) == NAME
    address = push(model)
    assert server.files(NAME) == local(model)
    commit = server.repositories["models", NAME].commits[-1]
    assert address.endswith(commit.oid) and commits(server) == ["a push"]
    assert {path.rpartition(".")[2] for path in commit.large} <= {suffix[1:] for suffix in lfs_suffixes}


def test_the_same_again_makes_no_commit(server, model):
    hub.open_repository(NAME, **WRITER)
    assert push(model) == push(model, "again")
    assert commits(server) == ["a push"]


def test_a_push_replaces_the_model_whole_and_leaves_what_is_not_ours(server, model, newer, tmp_path):
    hub.open_repository(NAME, **WRITER)
    huggingface_hub.HfApi(**WRITER).upload_file(path_or_fileobj=b"by hand", path_in_repo="NOTES.md", repo_id=NAME)
    push(model)
    old = {"unet/old.bin": b"pickled", "scheduler/old.txt": b"old"}
    for path, content in old.items():
        huggingface_hub.HfApi(**WRITER).upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=NAME)
    (newer / "bound.png").rename(tmp_path / "bound.png")
    try:
        push(newer, "newer")
        expected = {name: (newer / name).read_bytes() for name in WHOLE - {"bound.png"}}
    finally:
        (tmp_path / "bound.png").rename(newer / "bound.png")
    assert server.files(NAME) == {**expected, "NOTES.md": b"by hand"}
    assert commits(server)[-1] == "newer"


def test_a_name_without_an_owner_is_the_users(server):
    assert hub.open_repository("clothes", **WRITER) == NAME


def test_the_token_of_the_login_is_taken(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    assert hub.open_repository("clothes") == NAME


def test_two_who_push_at_once_do_not_mix(server, model, newer, monkeypatch):
    """Files that were the same when they were compared are not sent: the other's must not come in between."""
    hub.open_repository(NAME, **WRITER)
    push(newer, "old")
    create_commit, tried = huggingface_hub.HfApi.create_commit, []

    def interrupted(api, *arguments, **options):
        tried.append(options["parent_commit"])
        if len(tried) == 1:
            push(model, "somebody else's")
        return create_commit(api, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", interrupted)
    (newer / "loss.png").write_text("another")
    push(newer, "ours")
    assert server.files(NAME) == local(newer) and commits(server) == ["old", "somebody else's", "ours"]
    assert len(tried) == 3 and tried[0] == tried[1] != tried[2]


# Private, and not allowed


def test_private_repositories(server, model):
    hub.open_repository(NAME, private=True, **WRITER)
    assert server.repositories["models", NAME].private
    assert hub.open_repository(NAME, **WRITER) == NAME  # one that is there already, without saying that it is private
    push(model)
    assert server.repositories["models", NAME].private and server.files(NAME) == local(model)
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.HfApi(**OTHER).repo_info(NAME)


def test_a_public_repository_is_refused_if_a_private_one_is_asked_for(server):
    hub.open_repository(NAME, **WRITER)
    with pytest.raises(ValueError, match="user/clothes exists and is public, but a private"):
        hub.open_repository(NAME, private=True, **WRITER)


@pytest.mark.parametrize(
    ("there", "who"), [(False, READER), (True, READER), (False, OTHER), (True, OTHER), (False, {"token": "hf_wrong"})]
)
def test_a_token_that_may_not_write_is_refused_at_once(server, model, there, who):
    if there:
        hub.open_repository(NAME, **WRITER)
    with pytest.raises(PermissionError, match=r"cannot open the repository user/clothes.*\(40[13]\).*hf auth login"):
        hub.open_repository(NAME, **who)
    asked = len(server.requests)
    if there:
        with pytest.raises(PermissionError, match="cannot push to user/clothes"):
            push(model, **who)
        assert commits(server) == [] and len(server.requests) - asked < 5  # no second try


def test_no_error_shows_the_token(server, model):
    with pytest.raises(PermissionError) as caught:
        hub.open_repository(NAME, token="hf_wrong_and_secret")
    assert "hf_wrong" not in str(caught.value)


def test_a_repository_that_is_not_there(server, model):
    with pytest.raises(RepositoryNotFoundError):
        push(model)
    assert not server.repositories


def test_a_name_that_is_not_allowed(server):
    with pytest.raises(ValueError, match="Repo id"):
        hub.open_repository("a/b/c", **WRITER)
    assert server.requests == []


def test_offline_is_said_at_once(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineModeIsEnabled):
        hub.open_repository(NAME, **WRITER)


# Failures: the old model or the new one, whole

COMMIT, PREUPLOAD = "/commit/", "/preupload/"
FOR_A_WHILE = [
    Fault(None, ".", 500, times=2),
    Fault("PUT", ".", "cut", times=1),
    Fault("PUT", ".", 503, times=1),
    Fault("POST", COMMIT, 500, times=1),
    Fault("POST", COMMIT, "cut", times=2),
    Fault("POST", COMMIT, 429, times=1),
    Fault("POST", COMMIT, "stall", times=1),
    Fault("PUT", ".", "stall", times=1),
    Fault("POST", PREUPLOAD, "stall", times=1),
    Fault("POST", COMMIT, "truncate", times=1),  # the commit is made, and nobody is told
]


@pytest.mark.parametrize("fault", FOR_A_WHILE, ids=lambda fault: f"{fault.method}-{fault.path}-{fault.happens}")
def test_what_fails_for_a_while_is_tried_again(server, model, newer, fault, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    hub.open_repository(NAME, **WRITER)
    push(model, "old")
    server.faults.append(Fault(**{**vars(fault), "seen": 0}))
    push(newer, "new")
    assert server.files(NAME) == local(newer) and commits(server) == ["old", "new"]
    assert server.faults[0].seen > 0


FOR_EVER = [
    Fault(None, ".", 500),
    Fault(None, ".", "cut"),
    Fault("PUT", ".", "cut"),
    Fault("POST", COMMIT, 502),
    Fault("POST", COMMIT, "cut"),
    Fault("POST", COMMIT, "stall"),
]


@pytest.mark.parametrize("fault", FOR_EVER, ids=lambda fault: f"{fault.method}-{fault.path}-{fault.happens}")
def test_what_fails_for_ever_leaves_the_old_model_whole(server, model, newer, fault, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    hub.open_repository(NAME, **WRITER)
    push(model, "old")
    server.faults.append(Fault(**{**vars(fault), "seen": 0}))
    with pytest.raises(ConnectionError, match=r"cannot push to user/clothes, after 3 tries: ."):
        push(newer, "new")
    assert server.files(NAME) == local(model) and commits(server) == ["old"]
    server.faults.clear()
    push(newer, "new")
    assert server.files(NAME) == local(newer)


def test_a_hub_that_is_not_there(server, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="cannot open the repository user/clothes, after 3 tries"):
        hub.open_repository(NAME, **WRITER)


def test_a_wrong_request_is_not_tried_again(server, model):
    hub.open_repository(NAME, **WRITER)
    server.faults.append(Fault("POST", COMMIT, 400))
    with pytest.raises(HfHubHTTPError):
        push(model)
    assert server.faults[0].seen == 1


@pytest.mark.full
def test_a_stall_after_a_refused_connection_ends_too(server, model, monkeypatch):
    """huggingface_hub makes a new client after a refused connection, which must have a timeout as well."""
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    hub.open_repository(NAME, **WRITER)
    create_commit = huggingface_hub.HfApi.create_commit

    def refused_before(*arguments, **options):
        huggingface_hub.close_session()  # as after a refused connection
        return create_commit(*arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", refused_before)
    server.faults.append(Fault("PUT", ".", "stall", seconds=20))
    with pytest.raises(ConnectionError, match="after 3 tries"):
        push(model)
    assert commits(server) == []  # waiting for the end of the stall would have made one


def test_a_timeout_of_the_callers_own_stays(server):
    kind = type(huggingface_hub.get_session())
    hub.set_timeout()
    assert huggingface_hub.get_session().timeout.read == hub.TIMEOUT == 60
    huggingface_hub.set_client_factory(lambda: kind(timeout=7))
    hub.set_timeout()
    assert huggingface_hub.get_session().timeout.read == 7


@pytest.mark.parametrize("error", [ConnectionError("Network error: 503"), RuntimeError("Error while uploading")])
def test_what_sends_large_files_fails_in_its_own_way(monkeypatch, error):
    """hf_xet raises Python's own ConnectionError; huggingface_hub's older way, a RuntimeError around the cause."""
    monkeypatch.setattr(hub, "WAITS", (0.0,))
    if isinstance(error, RuntimeError):
        error.__cause__ = HTTPError("cut")
    tried = []

    def failing():
        tried.append(1)
        raise error

    with pytest.raises(ConnectionError, match=r"cannot push, after 2 tries: (Network error: 503|cut)"):
        hub.insistently(failing, "push")
    assert len(tried) == 2


def test_our_own_mistakes_are_not_taken_for_the_hubs(monkeypatch):
    def mistaken():
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        hub.insistently(mistaken, "do it")


def test_every_failure_of_the_http_library_is_the_error_that_we_retry():
    """`huggingface_hub.errors` takes its HTTPError from httpx, or from what comes after it: so do we."""
    assert issubclass(HfHubHTTPError, HTTPError)
    client = type(huggingface_hub.get_session())
    package = __import__(client.__module__.partition(".")[0])
    for name in ("ConnectError", "ReadTimeout", "WriteError", "RemoteProtocolError"):
        assert issubclass(getattr(package, name), HTTPError)


# In the background


def stages(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


def test_the_background_does_not_keep_anybody_waiting(tmp_path):
    go, pushed = threading.Event(), []

    def slow(folder):
        assert folder.is_dir()
        go.wait(10)
        pushed.append(folder.name)

    background = hub.BackgroundPush(slow)
    first, second, third = stages(tmp_path, "first", "second", "third")
    background.submit(first)
    while background._waiting is not None:  # until the thread has taken it
        time.sleep(0.001)
    background.submit(second)
    background.submit(third)  # the newest that waits is enough
    assert pushed == []
    go.set()
    background.wait()
    assert pushed == ["first", "third"] and list(tmp_path.iterdir()) == []


def test_a_failure_in_the_background_is_told_and_stops_nothing(tmp_path, caplog):
    pushed = []

    def failing(folder):
        if folder.name == "first":
            raise ConnectionError("the wire was cut")
        pushed.append(folder.name)

    background = hub.BackgroundPush(failing)
    with caplog.at_level(logging.INFO):
        for folder in stages(tmp_path, "first", "second"):
            background.submit(folder)
            background.wait()
    assert pushed == ["second"] and list(tmp_path.iterdir()) == []
    assert "first was not pushed; the next push makes up for it: the wire was cut" in caplog.text


def test_the_background_starts_again_when_it_had_run_dry(tmp_path):
    pushed = []
    background = hub.BackgroundPush(lambda folder: pushed.append(folder.name))
    background.wait()
    for folder in stages(tmp_path, "first", "second"):
        background.submit(folder)
        background.wait()
    background.wait()
    assert pushed == ["first", "second"]


# The pipeline's own push, as in diffusers


@pytest.mark.filterwarnings("ignore:Warnings while validating metadata in README.md")
def test_a_pipeline_pushes_itself(server, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    pipeline = ScratchDDPMPipeline.from_pretrained(model)
    pipeline.push_to_hub("clothes", private=True)
    files = server.files(NAME)
    assert server.repositories["models", NAME].private
    for name in ("model_index.json", "pipeline.py", WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json"):
        assert files[name] == (model / name).read_bytes(), name


# Loading is safe


def test_pickled_weights_of_a_repository_are_only_read_if_asked_for(server, model, tmp_path):
    """A class-conditional model, whose files our class fetches itself."""
    unet = randomised(UNet2DModel(**TINY_NETWORK, num_class_embeds=5))
    ScratchDDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    hub.open_repository(NAME, **WRITER)
    hub.push(tmp_path / "pickled", NAME, message="pickled", **WRITER, files=("*",))
    with pytest.raises(OSError, match=r"user/clothes has no weights in safetensors.*use_safetensors=False\."):
        ScratchDDPMPipeline.from_pretrained(NAME, **WRITER)
    assert not any(path.endswith(".bin") for _, path in server.requests if "/resolve/" in path)
    loaded = ScratchDDPMPipeline.from_pretrained(NAME, use_safetensors=False, **WRITER)
    assert torch.equal(loaded.unet.conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize("wrong", ["cut short", "the Hub fails"])
def test_other_troubles_with_weights_are_not_blamed_on_pickles(server, model, tmp_path, wrong):
    hub.open_repository(NAME, **WRITER)
    folder = shutil.copytree(model, tmp_path / "copy")
    if wrong == "cut short":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    push(folder)
    if wrong == "the Hub fails":
        server.faults.append(Fault("GET", "safetensors", 500))
    with pytest.raises(OSError) as caught:
        ScratchDDPMPipeline.from_pretrained(NAME, **WRITER)
    assert "pickle" not in str(caught.value).lower() and "use_safetensors" not in str(caught.value)


def test_an_old_revision_stays_to_be_had(server, model, newer):
    hub.open_repository(NAME, **WRITER)
    for folder in (model, newer):
        push(folder)
    old = server.repositories["models", NAME].commits[1].oid
    loaded = ScratchDDPMPipeline.from_pretrained(NAME, revision=old, **WRITER)
    expected = ScratchDDPMPipeline.from_pretrained(model)
    assert torch.equal(loaded.unet.conv_in.weight, expected.unet.conv_in.weight)
