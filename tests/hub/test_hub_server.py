"""The stand-in for the Hub, met by the clients that meet the real one."""

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from helpers.hub_server import Fault, Hub

# What huggingface_hub calls httpx with when it puts an LFS file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")

FILES = {
    "README.md": b"---\nlicense: mit\ntags: [ddpm]\n---\nA model.\n",
    "model_index.json": b'{"_class_name": "DDPMPipeline"}\n',
    "unet/config.json": b"{}\n",
    "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * 4000,
    "samples.png": b"\x89PNG" + bytes(1000),
    "empty.bin": b"",
}

PUSH_AND_PULL = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
folder, local = sys.argv[1:]
api = HfApi()
name = api.create_repo("model", private=True, exist_ok=True).repo_id
commits = [str(api.upload_folder(repo_id=name, folder_path=folder).oid) for _ in range(2)]
one = hf_hub_download(name, "unet/config.json", revision=commits[0])
snapshot_download(name, local_dir=local)
print(json.dumps({"name": name, "commits": commits, "one": one, "cached": snapshot_download(name)}))
"""


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def api(hub, monkeypatch):
    hub.in_this_process(monkeypatch)
    return HfApi(token="hf_user")


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "folder", FILES)


@pytest.fixture
def pushed(api, folder):
    """A repository with one commit of the folder."""
    api.create_repo("user/model")
    api.upload_folder(repo_id="user/model", folder_path=folder)
    return "user/model"


def write(folder: Path, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def connect(hub):
    host, port = hub.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def contents(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != ".gitattributes"}


def test_another_process_pushes_and_pulls_the_same_bytes(hub, folder, tmp_path):
    environment = hub.environment(tmp_path / "home", token="hf_user")
    command = [
        sys.executable,
        "-W",
        "error::ResourceWarning",
        "-c",
        PUSH_AND_PULL,
        str(folder),
        str(tmp_path / "local"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    first, second = report["commits"]
    assert first == second  # nothing had changed
    assert len(hub.repositories["models", "user/model"].commits) == 2
    assert hub.files("user/model") == FILES
    assert contents(tmp_path / "local") == contents(report["cached"]) == FILES
    assert Path(report["one"]).is_relative_to(tmp_path / "home")
    large = hub.repositories["models", "user/model"].commits[-1].large
    assert large == {"samples.png", "unet/diffusion_pytorch_model.safetensors"}
    assert sum(method == "PUT" for method, _ in hub.requests) == 2


def test_deleting_with_a_push(hub, api, pushed, folder):
    (folder / "samples.png").unlink()
    api.upload_folder(repo_id=pushed, folder_path=folder, delete_patterns=["*"])
    assert hub.files(pushed) == {path: content for path, content in FILES.items() if path != "samples.png"}
    api.delete_folder("unet", repo_id=pushed)
    assert sorted(hub.files(pushed)) == ["README.md", "empty.bin", "model_index.json"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("unet", repo_id=pushed)
    assert [commit.title for commit in api.list_repo_commits(pushed)][-1] == "initial commit"


def test_listings(hub, api, pushed):
    tree = {entry.path: entry for entry in api.list_repo_tree(pushed, recursive=True, expand=True)}
    weights = tree["unet/diffusion_pytorch_model.safetensors"]
    expected = hashlib.sha256(FILES[weights.path]).hexdigest()
    assert (weights.lfs.sha256, weights.size) == (expected, len(FILES[weights.path]))
    assert tree["unet"].last_commit.title.startswith("Upload folder")
    assert [entry.path for entry in api.list_repo_tree(pushed, "unet")] == sorted(
        path for path in FILES if "unet/" in path
    )
    info = api.model_info(pushed, files_metadata=True)
    assert {sibling.rfilename: sibling.size for sibling in info.siblings}["samples.png"] == len(FILES["samples.png"])
    assert info.tags == ["ddpm", "license:mit"] and info.card_data.license == "mit"
    assert api.model_info(pushed, expand=["sha"]).siblings is None
    assert api.list_repo_refs(pushed).branches[0].target_commit == info.sha
    assert [entry.path for entry in api.get_paths_info(pushed, ["unet", "samples.png", "no"])] == [
        "unet",
        "samples.png",
    ]
    assert api.whoami()["name"] == "user"


def test_a_private_repository_is_its_owners(hub, api):
    api.create_repo("secret", private=True)
    assert api.repo_info("user/secret").private
    api.auth_check("user/secret", write=True)
    for token, status in (("hf_other", 404), (False, 401)):
        for call in (api.repo_info, api.auth_check, api.list_repo_files):
            with pytest.raises(RepositoryNotFoundError) as caught:
                call("user/secret", token=token)
            assert caught.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("user/secret", ".gitattributes", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_nobody")


def test_who_may_write(hub, api, pushed):
    before = hub.files(pushed)
    for token in ("hf_reader", "hf_other"):
        api.auth_check(pushed, token=token)
        for call in (
            lambda token: api.auth_check(pushed, write=True, token=token),
            lambda token: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id=pushed, token=token),
            lambda token: api.create_repo("user/new", token=token),
            lambda token: api.create_repo("user/new", token=token, exist_ok=True),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                call(token)
            assert caught.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(pushed)
    assert caught.value.response.status_code == 409
    assert api.create_repo(pushed, exist_ok=True).repo_id == pushed
    assert hub.files(pushed) == before


def test_what_is_not_there(api, pushed):
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(pushed, "no.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(pushed, "README.md", revision="no")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(pushed, revision="no")
    for name in ("user/no", "no"):
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download(name)
    assert not api.file_exists(pushed, "no.json")


def test_an_old_commit_keeps_its_bytes(hub, api, pushed):
    old = api.repo_info(pushed).sha
    api.upload_file(path_or_fileobj=b"new", path_in_repo="samples.png", repo_id=pushed)
    assert Path(hf_hub_download(pushed, "samples.png")).read_bytes() == b"new"
    assert Path(hf_hub_download(pushed, "samples.png", revision=old)).read_bytes() == FILES["samples.png"]
    assert contents(snapshot_download(pushed, revision=old)) == FILES
    operation = CommitOperationAdd("a", b"a")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(pushed, [operation], commit_message="late", parent_commit=old)
    assert caught.value.response.status_code == 412
    assert "a" not in hub.files(pushed)


def test_a_space(hub, api):
    with pytest.raises(ValueError, match="space_sdk"):
        api.create_repo("user/demo", repo_type="space")
    url = api.create_repo("user/demo", repo_type="space", space_sdk="gradio")
    assert url == f"{hub.url}/spaces/user/demo"
    card = b"---\nsdk: gradio\ncolorFrom: %s\n---\n"
    with pytest.raises(ValueError, match="colorFrom"):
        api.upload_file(
            path_or_fileobj=card % b"mauve", path_in_repo="README.md", repo_id=url.repo_id, repo_type="space"
        )
    files = {"README.md": card % b"blue", "picture.png": b"\x89PNG"}
    operations = [CommitOperationAdd(*file) for file in files.items()]
    api.create_commit(url.repo_id, operations, commit_message="The demo", repo_type="space")
    assert hub.files("user/demo", "spaces") == files
    assert api.space_info("user/demo").sdk == "gradio"
    path = hf_hub_download("user/demo", "picture.png", repo_type="space")
    assert Path(path).read_bytes() == files["picture.png"]


def test_broken_metadata_is_refused_before_and_with_the_commit(hub, api, pushed, monkeypatch):
    def push(content: bytes) -> None:
        api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=pushed)

    with pytest.raises(ValueError, match="YAML"):
        push(b"---\na: [\n---\n")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        push(b"No metadata.\n")
    monkeypatch.setattr(api, "_validate_yaml", lambda *_, **__: None)
    with pytest.raises(BadRequestError):
        push(b"---\na: [\n---\n")
    assert hub.files(pushed)["README.md"] == b"No metadata.\n"


@pytest.mark.parametrize("happens", ["cut", 500])
@pytest.mark.parametrize(("method", "path"), [("PUT", r"\.git/info/lfs"), ("POST", "/commit/main")])
def test_a_push_that_fails_leaves_the_old_commit_whole(hub, api, pushed, folder, method, path, happens):
    write(folder, {"samples.png": b"new" * 1000, "unet/config.json": b"new"})
    hub.faults.append(Fault(method, path, happens))
    with pytest.raises((RuntimeError, HfHubHTTPError, huggingface_hub.utils.httpx.TransportError)):
        api.upload_folder(repo_id=pushed, folder_path=folder)
    assert hub.files(pushed) == FILES
    assert hub.faults[0].seen == (6 if method == "PUT" else 1)  # the client tries five times more
    hub.faults.clear()
    api.upload_folder(repo_id=pushed, folder_path=folder)
    assert hub.files(pushed) == contents(folder)


def test_a_passing_fault_is_tried_over(hub, api, pushed, folder):
    write(folder, {"samples.png": b"new" * 1000, "unet/diffusion_pytorch_model.safetensors": b"new" * 2000})
    hub.faults.append(Fault("PUT", r"\.git/info/lfs", "cut", times=1, skip=1))
    api.upload_folder(repo_id=pushed, folder_path=folder)
    assert hub.files(pushed) == contents(folder)
    hub.faults.append(Fault("GET", "safetensors", "truncate", times=1))
    assert contents(snapshot_download(pushed)) == contents(folder)


def test_a_stalled_commit_times_out(hub, api, pushed):
    huggingface_hub.get_session().timeout = 0.3
    hub.faults.append(Fault("POST", "/commit/", "stall"))
    with pytest.raises(huggingface_hub.utils.httpx.ReadTimeout):
        api.upload_file(path_or_fileobj=b"new", path_in_repo="a", repo_id=pushed)
    assert hub.files(pushed) == FILES


def test_closing_releases_what_is_stalled_and_what_is_idle():
    threads = threading.active_count()
    with ExitStack() as connections:
        with Hub() as hub:
            hub.faults.append(Fault(None, "", "stall"))
            idle, stalled = (connections.enter_context(connect(hub)) for _ in range(2))
            stalled.sendall(b"GET /api/models/user/a HTTP/1.1\r\nHost: hub\r\n\r\n")
            while not hub.requests:
                time.sleep(0.01)
            began = time.monotonic()
        assert time.monotonic() - began < 1
        assert stalled.recv(1) == idle.recv(1) == b""
    assert threading.active_count() == threads


def test_requests_on_one_connection_and_chunks(hub):
    chunks = b'5\r\n{"con\r\nc\r\ntent": "hi"}\r\n0\r\n\r\n'
    head = "POST {} HTTP/1.1\r\nHost: hub\r\nTransfer-Encoding: chunked\r\n\r\n"
    requests = [head.format("/nowhere").encode() + chunks, head.format("/api/validate-yaml").encode() + chunks]
    last = b"HEAD /user/no/resolve/main/a HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n"
    with connect(hub) as connection:
        connection.sendall(b"".join(requests) + last)
        answered = b""
        while part := connection.recv(10_000):
            answered += part
    assert [answered.count(status) for status in (b"HTTP/1.1 404", b"HTTP/1.1 200", b"HTTP/1.1 401")] == [1, 1, 1]
    assert b"empty or missing yaml" in answered and answered.endswith(b"\r\n\r\n")
    assert hub.unknown == [("POST", "/nowhere")]
    hub.unknown.clear()
