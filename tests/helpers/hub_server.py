"""A stand-in for the Hugging Face Hub on the loopback interface, for the clients of the real one."""

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import socketserver
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import MappingProxyType, SimpleNamespace
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PREFIXES = {"models": "", "spaces": "spaces/", "datasets": "datasets/"}
LFS_SUFFIXES = (".safetensors", ".bin", ".png")
LARGEST_REGULAR_FILE = 10 * 1024 * 1024
SPACE_SDKS = ("gradio", "streamlit", "docker", "static")
SPACE_COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# What of an environment would lead a client away from the stand-in, or to somebody's token.
SETTINGS = re.compile(r"(?:HF|HUGGING_?FACE|TRANSFORMERS|DIFFUSERS)_\w+|(?:https?|all|no|ftp)_proxy", re.IGNORECASE)


@dataclass(frozen=True)
class User:
    """The owner of a token."""

    name: str
    can_write: bool


@dataclass(frozen=True)
class Commit:
    """A snapshot; `large` are the paths that are stored with LFS."""

    oid: str
    message: str
    files: Mapping[str, bytes]
    large: frozenset[str] = frozenset()
    date: str = ""


@dataclass
class Repository:
    """Commits from the oldest to the newest, which is `main`, and the LFS objects that were uploaded."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    sdk: str | None = None
    objects: dict[str, bytes] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        if revision in ("main", "refs/heads/main"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


@dataclass
class Fault:
    """Something that goes wrong with the requests of a method (None: any) whose path and query match a pattern.

    What happens is one of
    - a status, with `Retry-After: 0`: the request has no other effect;
    - "cut": half of the body is read, then the connection is closed without an answer: no other effect;
    - "stall": there is no answer, and no effect, until the server closes, or for `seconds`;
    - "truncate": the request is carried out, and the connection is closed after half of the answer's body.

    It happens `times` times (None: always), after `skip` matching requests have passed.
    """

    method: str | None
    path: str
    happens: int | str
    times: int | None = None
    skip: int = 0
    seconds: float | None = None
    seen: int = 0

    def meets(self, method: str, target: str) -> bool:
        """Whether it happens to this request, which is counted."""
        if self.method not in (None, method) or not re.search(self.path, target):
            return False
        self.seen += 1
        return self.seen > self.skip and (self.times is None or self.seen <= self.skip + self.times)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: User | None = None

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body)
        except ValueError:
            refuse(400, "Invalid JSON")
        return value if isinstance(value, dict) else refuse(400, "Expected a JSON object")

    def asks(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("true", "1")


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]


class RefusedError(Exception):
    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


def answer_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(
        status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"} | (headers or {})
    )


def refuse(status: int, message: str, code: str | None = None, commit: str | None = None, **more: Any) -> NoReturn:
    """End a request with an error, in the body and, for HEAD, in the headers."""
    headers = {"X-Error-Message": message.splitlines()[0]}
    if code:
        headers["X-Error-Code"] = code
    if commit:
        headers["X-Repo-Commit"] = commit
    raise RefusedError(answer_json({"error": message} | more, status, headers))


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def lfs_pointer(content: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()


def as_stored(commit: Commit, path: str) -> dict[str, Any]:
    """An entry of a listing."""
    content = commit.files[path]
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if path in commit.large:
        pointer = lfs_pointer(content)
        entry["oid"] = git_oid(pointer)
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return entry


def as_sibling(commit: Commit, path: str, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    entry = as_stored(commit, path)
    sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
    if "lfs" in entry:
        sibling["lfs"] = {"sha256": entry["lfs"]["oid"], **entry["lfs"]}
    return sibling


def folders_of(commit: Commit) -> dict[str, str]:
    """Every folder of a commit, with an oid that follows from what is in it."""
    names = {str(parent) for path in commit.files for parent in PurePosixPath(path).parents} - {"."}
    oids = {}
    for name in sorted(names):
        inside = [(path, git_oid(content)) for path, content in commit.files.items() if path.startswith(f"{name}/")]
        oids[name] = hashlib.sha1(repr(sorted(inside)).encode()).hexdigest()
    return oids


def front_matter(content: str) -> Any:
    """The metadata of a README; None if there is none."""
    found = FRONT_MATTER.match(content)
    return yaml.safe_load(found[1]) if found else None


def check_metadata(content: str, kind: str) -> tuple[list[str], list[str]]:
    """What the Hub says of a README: errors and warnings."""
    try:
        metadata = front_matter(content)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: the metadata is not a mapping"], []
    errors = []
    tags = metadata.get("tags", [])
    if not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        errors.append('"tags" must be an array of strings')
    if kind == "spaces":
        for key, allowed in (("sdk", SPACE_SDKS), ("colorFrom", SPACE_COLORS), ("colorTo", SPACE_COLORS)):
            if key in metadata and metadata[key] not in allowed:
                errors.append(f'"{key}" must be one of [{", ".join(allowed)}]')
        if len(str(metadata.get("short_description", ""))) > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    return errors, []


def check_path(path: str) -> str:
    if not path or path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.split("/")):
        refuse(400, f"Invalid path: {path!r}")
    return path


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end of a requested range; None for the whole file."""
    found = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", header or "")
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    start, end = (int(first), min(int(last or size) + 1, size)) if first else (max(size - int(last), 0), size)
    if start >= end:
        raise RefusedError(Answer(416, b"", {"Content-Range": f"bytes */{size}"}))
    return start, end


Handler = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
NAME = r"(?P<name>[^/]+/[^/]+|[^/]+)"
API = rf"/api/(?P<kind>models|spaces|datasets)/{NAME}"
PAGE = rf"/(?:(?P<kind>spaces|datasets)/)?{NAME}"


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    """Serve a method and a path, whose named groups are the arguments; GET serves HEAD too."""

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


class Hub:
    """The stand-in: serves inside its `with` block.

    Attributes:
        url: where it listens.
        tokens: {token: User}.
        repositories: {("models" | "spaces" | "datasets", "user/name"): Repository}.
        faults: what goes wrong; the first that meets a request happens to it.
        requests: (method, path) of every request, in order.
        unknown: those among them that the stand-in does not serve.
    """

    def __init__(
        self, tokens: Mapping[str, tuple[str, bool]] | None = None, lfs_suffixes: tuple[str, ...] = LFS_SUFFIXES
    ) -> None:
        tokens = tokens or {"hf_user": ("user", True), "hf_reader": ("user", False), "hf_other": ("other", True)}
        self.tokens = {token: User(*user) for token, user in tokens.items()}
        self.lfs_suffixes = lfs_suffixes
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.closing = threading.Event()
        self.errors: list[str] = []
        self._lock = threading.RLock()
        self._uploads: dict[str, tuple[Repository, str, int]] = {}
        self._home: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Hub":
        self._server = Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._home is not None:
            from huggingface_hub import close_session

            close_session()
            self._home.cleanup()
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()
        if self.errors and kind is None:
            raise RuntimeError("The stand-in itself failed:\n" + "\n".join(self.errors))

    def files(self, name: str, kind: str = "models") -> dict[str, bytes]:
        """What `main` holds, without the .gitattributes that every repository starts with."""
        commit = self.repositories[kind, name].commits[-1]
        return {path: content for path, content in commit.files.items() if path != ".gitattributes"}

    def environment(self, home: str | Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a process that talks to the stand-in, with its cache in a folder of its own."""
        kept = {name: value for name, value in os.environ.items() if not SETTINGS.fullmatch(name)}
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        return kept | own | dict.fromkeys(switches, "1") | ({"HF_TOKEN": token} if token else {}) | more

    def in_this_process(self, monkeypatch: Any) -> None:
        """Let this process's huggingface_hub talk to the stand-in: no token but those given, an empty cache.

        It does not wait before it tries again.
        """
        from huggingface_hub import close_session, constants, file_download, hf_api
        from huggingface_hub.utils import _http

        close_session()
        for name in [name for name in os.environ if SETTINGS.fullmatch(name)]:
            monkeypatch.delenv(name)
        self._home = self._home or tempfile.TemporaryDirectory()
        home = Path(self._home.name)
        changed = {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        }
        for name, value in changed.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))

    def fault_of(self, method: str, target: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self.faults if fault.meets(method, target)), None)

    def answer(self, request: Request) -> Answer:
        """Carry a request out, whole or not at all."""
        try:
            with self._lock:
                return self._routed(request)
        except RefusedError as refused:
            return refused.answer
        except Exception:
            self.errors.append(traceback.format_exc())
            return answer_json({"error": "Internal Error - the stand-in failed"}, 500)

    def _routed(self, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for served, pattern, handler in ROUTES:
            if served == method and (found := pattern.fullmatch(request.path)):
                groups = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return handler(self, self._authenticated(request), **groups)
        self.unknown.append((request.method, request.path))
        refuse(404, "Sorry, we can't find the page you are looking for.")

    def _authenticated(self, request: Request) -> Request:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.tokens:
            refuse(401, "Invalid credentials in Authorization header")
        return replace(request, user=self.tokens.get(token))

    def _readable(self, request: Request, kind: str, name: str) -> Repository:
        """A repository that this user may see; the Hub does not tell a private one from a missing one."""
        repository = self.repositories.get((kind, name))
        owner = request.user is not None and request.user.name == name.split("/")[0]
        if repository is None or (repository.private and not owner):
            refuse(404 if request.user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, request: Request, kind: str, name: str) -> Repository:
        repository = self._readable(request, kind, name)
        if request.user is None:
            # A client tells this from other errors by an https address, which the stand-in does not have.
            refuse(401, "Invalid username or password.", "RepoNotFound")
        if not request.user.can_write:
            refuse(403, "Forbidden: you must use a write token to upload to a repository.")
        if request.user.name != name.split("/")[0]:
            refuse(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request.")
        return repository

    def _add_commit(self, repository: Repository, message: str, files: dict[str, bytes], large: set[str]) -> Commit:
        oid = secrets.token_hex(20)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit = Commit(oid, message, MappingProxyType(files), frozenset(large & files.keys()), date)
        repository.commits.append(commit)
        return commit

    def _is_large(self, path: str, size: int) -> bool:
        return size > LARGEST_REGULAR_FILE or (size > 0 and path.endswith(self.lfs_suffixes))

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        if request.user is None:
            refuse(401, "Invalid username or password.")
        name = request.user.name
        access = {"displayName": "test", "role": "write" if request.user.can_write else "read"}
        known = {"type": "user", "id": name, "name": name, "fullname": name, "orgs": []}
        return answer_json(known | {"auth": {"type": "access_token", "accessToken": access}})

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Answer:
        if request.user is None:
            refuse(401, "Invalid username or password.")
        asked = request.json()
        kind = f"{asked.get('type') or 'model'}s"
        owner = asked.get("organization") or request.user.name
        name = f"{owner}/{asked.get('name')}"
        if kind not in PREFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", name) or "--" in name:
            refuse(400, f"Invalid repo name: {name}")
        if not request.user.can_write or owner != request.user.name:
            refuse(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        if kind == "spaces" and asked.get("sdk") not in SPACE_SDKS:
            refuse(400, '"sdk" is required')
        url = f"{self.url}/{PREFIXES[kind]}{name}"
        if (kind, name) in self.repositories:
            refuse(409, f"You already created this {kind[:-1]} repo: {name}", url=url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[kind, name] = Repository(private, sdk=asked.get("sdk"))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in self.lfs_suffixes)
        self._add_commit(
            self.repositories[kind, name], "initial commit", {".gitattributes": attributes.encode()}, set()
        )
        return answer_json({"url": url, "name": name, "id": name})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Answer:
        asked = request.json()
        found = check_metadata(asked.get("content", ""), f"{asked.get('repoType') or 'model'}s")
        errors, warnings = ([{"message": message} for message in messages] for messages in found)
        return answer_json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    @route("GET", API + "/auth-check(?P<write>/write)?")
    def _auth_check(self, request: Request, kind: str, name: str, write: str = "") -> Answer:
        (self._writable if write else self._readable)(request, kind, name)
        return answer_json({})

    @route("POST", API + "/preupload/(?P<revision>[^/]+)")
    def _preupload(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        commit = self._found(self._writable(request, kind, name), revision)
        return answer_json({"files": [self._upload_mode(commit, **file) for file in request.json()["files"]]})

    def _upload_mode(self, commit: Commit, path: str, size: int, **_: object) -> dict[str, Any]:
        oid = None
        if path in commit.files:
            oid = (sha256 if path in commit.large else git_oid)(commit.files[path])
        mode = "lfs" if self._is_large(path, size) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    @route("POST", PAGE + r"\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, name: str, kind: str = "models") -> Answer:
        repository = self._writable(request, kind, name)
        asked = request.json()
        if asked.get("operation") != "upload":
            refuse(400, "Only uploads are served")
        base = f"{self.url}/{PREFIXES[kind]}{name}.git/info/lfs/objects"
        objects = []
        for wanted in asked["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.objects:
                # The real one is a signed address of another host: it is used without a token.
                signature = secrets.token_hex(8)
                self._uploads[signature] = (repository, wanted["oid"], wanted["size"])
                upload = {"href": f"{base}/{wanted['oid']}?signature={signature}", "header": {}}
                known["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify", "header": {}}}
            objects.append(known)
        return answer_json({"transfer": "basic", "objects": objects})

    @route("PUT", PAGE + r"\.git/info/lfs/objects/(?P<oid>[0-9a-f]{64})")
    def _lfs_put(self, request: Request, oid: str, **_: str) -> Answer:
        repository, expected, size = self._uploads.get(request.query.get("signature", [""])[-1], (None, "", 0))
        if repository is None or oid != expected:
            refuse(403, "The request signature does not match")
        if len(request.body) != size or sha256(request.body) != oid:
            refuse(400, "The content does not match its checksum")
        repository.objects[oid] = request.body
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    @route("POST", PAGE + r"\.git/info/lfs/objects/verify")
    def _lfs_verify(self, request: Request, name: str, kind: str = "models") -> Answer:
        asked = request.json()
        content = self._writable(request, kind, name).objects.get(asked.get("oid", ""))
        if content is None or len(content) != asked.get("size"):
            refuse(404, "This object was not uploaded")
        return answer_json({})

    @route("POST", API + "/commit/(?P<revision>[^/]+)")
    def _commit(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self._writable(request, kind, name)
        if revision not in ("main", "refs/heads/main"):
            refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if request.asks("create_pr"):
            refuse(400, "Pull requests are not served")
        try:
            first, *changes = (json.loads(line) for line in request.body.split(b"\n") if line.strip())
            header = first["value"] if first["key"] == "header" else {}
            if not header.get("summary"):
                refuse(400, "The first line must be a header with a summary")
            head = repository.commits[-1]
            if header.get("parentCommit") not in (None, head.oid):
                refuse(412, "A commit has happened since. Please refresh and try again.")
            files, large = dict(head.files), set(head.large)
            for change in changes:
                self._apply(repository, files, large, change["key"], change["value"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            refuse(400, f"Malformed commit: {error!r}")
        self._check_card(kind, head, files)
        commit = self._add_commit(repository, header["summary"], files, large)
        url = f"{self.url}/{PREFIXES[kind]}{name}/commit/{commit.oid}"
        return answer_json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(
        self, repository: Repository, files: dict[str, bytes], large: set[str], key: str, value: dict[str, Any]
    ) -> None:
        """One line of a commit, to files that nobody sees before all lines are valid."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if len(content) > LARGEST_REGULAR_FILE:
                refuse(400, f"Your push was rejected because it contains files larger than 10 MiB: {path}")
            files[check_path(path)] = content
            large.discard(path)
        elif key == "lfsFile":
            content = repository.objects.get(value["oid"])
            if content is None or len(content) != value.get("size", len(content)):
                refuse(
                    400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}"
                )
            files[check_path(path)] = content
            large.add(path)
        elif key in ("deletedFile", "deletedFolder"):
            inside = f"{path.rstrip('/')}/"
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(inside))]
            if not gone:
                refuse(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            refuse(400, f"Unknown operation: {key!r}")

    def _check_card(self, kind: str, head: Commit, files: dict[str, bytes]) -> None:
        card = files.get("README.md")
        if card is not None and card != head.files.get("README.md"):
            errors, _ = check_metadata(card.decode(errors="replace"), kind)
            if errors:
                refuse(400, "Invalid metadata in README.md.", errors=[{"message": message} for message in errors])

    def _found(self, repository: Repository, revision: str) -> Commit:
        return repository.find(revision) or refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @route("GET", PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, request: Request, name: str, revision: str, path: str, kind: str = "models") -> Answer:
        commit = self._found(self._readable(request, kind, name), revision)
        if path not in commit.files:
            refuse(404, "Entry not found", "EntryNotFound", commit=commit.oid)
        content, is_large = commit.files[path], path in commit.large
        oid = sha256(content) if is_large else git_oid(content)
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{oid}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream" if is_large else "text/plain; charset=utf-8",
            "Content-Disposition": f'inline; filename="{PurePosixPath(path).name}";',
        }
        if is_large:
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        wanted = byte_range(request.headers.get("Range"), len(content))
        if wanted is None:
            return Answer(200, content, headers)
        start, end = wanted
        return Answer(206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    @route("GET", API + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def _tree(self, request: Request, kind: str, name: str, revision: str, path: str = "") -> Answer:
        repository = self._readable(request, kind, name)
        commit = self._found(repository, revision)
        entries = self._entries(repository, commit, request.asks("expand"))
        inside = f"{path.strip('/')}/" if path else ""
        if inside and inside.rstrip("/") not in folders_of(commit):
            refuse(404, f"{path} does not exist on {revision!r}", "EntryNotFound", commit=commit.oid)
        listed = [entry for at, entry in entries.items() if at.startswith(inside)]
        if not request.asks("recursive"):
            listed = [entry for entry in listed if "/" not in entry["path"][len(inside) :]]
        return answer_json(listed)

    def _entries(self, repository: Repository, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
        folders = folders_of(commit)
        entries = {at: {"type": "directory", "path": at, "oid": oid, "size": 0} for at, oid in folders.items()}
        entries |= {at: as_stored(commit, at) for at in commit.files}
        if expand:
            for at, entry in entries.items():
                last = self._last_change(repository, commit, at)
                entry["lastCommit"] = {"id": last.oid, "title": last.message, "date": last.date}
        return dict(sorted(entries.items()))

    def _last_change(self, repository: Repository, commit: Commit, at: str) -> Commit:
        def content(of: Commit) -> object:
            return of.files.get(at, folders_of(of).get(at))

        history = repository.commits[: repository.commits.index(commit) + 1]
        changed = [
            new for old, new in zip([None, *history], history, strict=False) if not old or content(old) != content(new)
        ]
        return changed[-1]

    @route("POST", API + "/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self._readable(request, kind, name)
        commit = self._found(repository, revision)
        asked = parse_qs(request.body.decode())
        entries = self._entries(repository, commit, asked.get("expand", [""])[-1].lower() == "true")
        return answer_json([entries[path] for path in asked.get("paths", []) if path in entries])

    @route("GET", API + "/commits/(?P<revision>[^/]+)")
    def _commits(self, request: Request, kind: str, name: str, revision: str) -> Answer:
        repository = self._readable(request, kind, name)
        newest = repository.commits.index(self._found(repository, revision))
        authors = [{"user": name.split("/")[0]}]
        history = [
            {"id": commit.oid, "title": commit.message, "message": "", "authors": authors, "date": commit.date}
            for commit in reversed(repository.commits[: newest + 1])
        ]
        return answer_json(history, headers={"X-Total-Count": str(len(history))})

    @route("GET", API + "/refs")
    def _refs(self, request: Request, kind: str, name: str) -> Answer:
        newest = self._readable(request, kind, name).commits[-1].oid
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": newest}]
        return answer_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    # The last one: its pattern matches what others name more specifically.
    @route("GET", API + "(?:/revision/(?P<revision>[^/]+))?")
    def _info(self, request: Request, kind: str, name: str, revision: str = "main") -> Answer:
        repository = self._readable(request, kind, name)
        commit = self._found(repository, revision)
        card = front_matter(commit.files.get("README.md", b"").decode(errors="replace")) or {}
        info = {
            "_id": sha256(name.encode())[:24],
            "id": name,
            "author": name.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "tags": [*card.get("tags", []), *([f"license:{card['license']}"] if "license" in card else [])],
            "siblings": [as_sibling(commit, path, request.asks("blobs")) for path in sorted(commit.files)],
            "createdAt": repository.commits[0].date,
            "lastModified": repository.commits[-1].date,
            "downloads": 0,
            "likes": 0,
        }
        if kind == "models":
            info |= {
                "modelId": name,
                "library_name": card.get("library_name"),
                "pipeline_tag": card.get("pipeline_tag"),
            }
        if kind == "spaces":
            info |= {"sdk": card.get("sdk", repository.sdk), "subdomain": name.replace("/", "-").lower()}
        if card:
            info["cardData"] = card
        if expand := request.query.get("expand"):
            info = {key: value for key, value in info.items() if key in ("_id", "id", *expand)}
        return Answer(200, json.dumps(info, default=str).encode(), {"Content-Type": "application/json; charset=utf-8"})


class Connection(BaseHTTPRequestHandler):
    """One connection of a client, and its requests one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def _serve(self) -> None:
        hub = self.server.hub
        target = urlsplit(self.path)
        hub.requests.append((self.command, target.path))
        fault = hub.fault_of(self.command, self.path)
        happens = fault.happens if fault else None
        if happens == "cut":
            self._read_half()
            self.close_connection = True
            return
        body = self._read_body()
        if happens == "stall" and hub.closing.wait(fault.seconds):
            self.close_connection = True
            return
        if isinstance(happens, int):
            self._send(answer_json({"error": "A fault"}, happens, {"Retry-After": "0"}))
            return
        answer = hub.answer(Request(self.command, target.path, parse_qs(target.query), self.headers, body))
        self._send(answer, whole=happens != "truncate")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _send(self, answer: Answer, whole: bool = True) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if whole else answer.body[: len(answer.body) // 2])
        if not whole:
            self.close_connection = True

    def _is_chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _read_half(self) -> None:
        if self._is_chunked():
            self._read_chunk()
        else:
            self._read_exactly(int(self.headers.get("Content-Length", 0)) // 2)

    def _read_body(self) -> bytes:
        if not self._is_chunked():
            return self._read_exactly(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while chunk := self._read_chunk():
            chunks.append(chunk)
        return b"".join(chunks)

    def _read_chunk(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise ConnectionError("The client went away")
        size = int(line.split(b";")[0], 16)
        content = self._read_exactly(size)
        while self.rfile.readline().strip() and not size:
            pass  # trailers, after the last chunk
        return content

    def _read_exactly(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("The client went away")
        return content

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Knows its connections, so that it can end them, and their threads with them."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Connection)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without looking up this machine's name

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
            super().shutdown_request(request)

    def hang_up(self) -> None:
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            self.hub.errors.append(traceback.format_exc())
