"""Push a model to the Hub so that the repository is complete at any time: each push is one commit, or none.

Uploads are retried while the Hub is unreachable or fails. `BackgroundPush` uploads in a thread.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # that of the HTTP library, of every failure
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import filter_repo_objects

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What a model's repository holds, and all that a push touches; checkpoints, optimiser state and logs are not in it.
MODEL_FILES = (
    "README.md",
    "model_index.json",
    "pipeline.py",
    "unet/*.json",
    "unet/*.safetensors",
    "scheduler/*.json",
    "results.json",
    "training_config.yaml",
    "samples.png",
    "usage.png",
    "neighbors.png",
    "bound.png",
    "loss.png",
)
# Older weights that are no longer pushed would still be found by a reader who asks for their format.
REPLACED_FILES = (*MODEL_FILES, "unet/*", "scheduler/*")

TIMEOUT = 60.0  # seconds without a sign of the Hub after which a request counts as failed
WAITS = (5.0, 30.0)  # seconds before the second and third try; each try of huggingface_hub's retries by itself too
REFUSALS = (401, 403)
TEMPORARY = (408, 409, 412, 425, 429)  # and all from 500 on; 412: somebody else made a commit meanwhile


def open_repository(
    name: str, *, private: bool = False, token: str | None = None, kind: str = "model", sdk: str | None = None
) -> str:
    """Create a repository unless it exists, and check that it can be written to.

    Args:
        name: `owner/name`, or a name in the namespace of the token's owner.
        private: nobody else may read it. An existing one stays as private as it is.
        token: of the Hub; that of the login if left out.
        kind: "model" or "space".
        sdk: of a Space.

    Returns:
        Its whole name, `owner/name`.

    Raises:
        PermissionError: the token may not write there.
        ValueError: `private` was asked for, and there is a public one; or the name is not allowed.
        ConnectionError: the Hub cannot be reached.
    """
    api = HfApi(token=token)

    def opened() -> str:
        url = api.create_repo(name, private=private or None, repo_type=kind, space_sdk=sdk, exist_ok=True)
        repository: str = url.repo_id
        api.auth_check(repository, repo_type=kind, write=True)
        if private and not api.repo_info(repository, repo_type=kind).private:
            raise ValueError(
                f"{repository} exists and is public, but a private repository was asked for: make it private on its "
                "settings page, or choose another name."
            )
        return repository

    return insistently(opened, f"open the repository {name}")


def push(
    folder: Path,
    repository: str,
    *,
    message: str,
    token: str | None = None,
    kind: str = "model",
    files: Sequence[str] = MODEL_FILES,
    replaced: Sequence[str] = REPLACED_FILES,
    waits: Sequence[float] | None = None,
) -> str:
    """Make the repository hold a folder's files, in one commit; without a change there is no commit.

    Args:
        folder: must not change meanwhile.
        repository: `owner/name`, as `open_repository` returns it.
        message: of the commit.
        token: of the Hub; that of the login if left out.
        kind: "model" or "space".
        files: patterns of the files to push.
        replaced: patterns of files of the repository that go if the folder does not have them; all others stay.
        waits: seconds before each further try; `WAITS` if left out.

    Returns:
        The address of the commit that now is the newest.

    Raises:
        PermissionError: the token may not write there.
        ConnectionError: the Hub cannot be reached, or it fails; the repository is as it was.
    """
    api = HfApi(token=token)

    here = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    added = list(filter_repo_objects(here, allow_patterns=list(files)))

    def pushed() -> str:
        # Files that are the same there are not sent, so this commit must follow the one that they were compared with.
        head = api.repo_info(repository, repo_type=kind).sha
        there = api.list_repo_files(repository, repo_type=kind, revision=head)
        gone = set(filter_repo_objects(there, allow_patterns=list(replaced))) - {*added, ".gitattributes"}
        # `upload_folder` may make several commits of it.
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(path, folder / path) for path in added),
                *(CommitOperationDelete(path) for path in sorted(gone)),
            ],
            commit_message=message,
            repo_type=kind,
            parent_commit=head,
        )
        return str(commit.commit_url)

    return insistently(pushed, f"push to {repository}", waits)


def insistently(action: Callable[[], T], what: str, waits: Sequence[float] | None = None) -> T:
    """Call action, and again after each of the waits (by default `WAITS`) while another try may help.

    Raises:
        PermissionError: the Hub refuses.
        ConnectionError: it cannot be reached, or fails, at every try.
        HfHubHTTPError: it says that the request is wrong.
    """
    waits = WAITS if waits is None else waits
    for wait in (*waits, None):
        set_timeout()
        try:
            return action()
        except OfflineModeIsEnabled:
            raise
        except (HTTPError, ConnectionError, RuntimeError) as error:
            reason = failure(error)
            status = reason.response.status_code if isinstance(reason, HfHubHTTPError) else None
            if status in REFUSALS:
                raise PermissionError(
                    f"cannot {what}: the Hub refuses ({status}). Log in with a token that may write there "
                    f"(`hf auth login`, https://huggingface.co/settings/tokens). It says: {reason}"
                ) from error
            if status is not None and status < 500 and status not in TEMPORARY:
                raise
            said = str(reason) or type(reason).__name__
            if wait is None:
                raise ConnectionError(f"cannot {what}, after {len(waits) + 1} tries: {said}") from error
            logger.warning("cannot %s, trying again in %g s: %s", what, wait, said)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def set_timeout() -> None:
    """Give huggingface_hub's HTTP client, and each later one, a timeout; without one a silent server would block us.

    A client of the caller's that has a timeout stays.
    """
    client = get_session()
    if client.timeout.read is None:
        kind, hooks = type(client), client.event_hooks
        set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT))


def failure(error: Exception) -> Exception:
    """Find the Hub's own error behind an exception; raise the exception if there is none.

    Small requests fail with an HTTPError; hf_xet, which sends large files, with a ConnectionError; where it does not
    send them, huggingface_hub puts a RuntimeError around the cause.
    """
    reason = error.__cause__ if isinstance(error, RuntimeError) else error
    if not isinstance(reason, HTTPError | ConnectionError):
        raise error
    return reason


class BackgroundPush:
    """Push folders one after the other in a thread; failures are logged and not raised.

    A folder that is still waiting when the next one comes is skipped, so a slow Hub never makes a queue. Each folder is
    removed once it is pushed, has failed or is skipped.

    Args:
        push: the function that pushes a folder.
    """

    def __init__(self, push: Callable[[Path], object]) -> None:
        self._push = push
        self._lock = threading.Lock()
        self._waiting: Path | None = None
        self._thread: threading.Thread | None = None

    def submit(self, folder: Path) -> None:
        """Push a folder as soon as the one before it is done; return at once."""
        with self._lock:
            passed_over, self._waiting = self._waiting, folder
            if self._thread is None:
                # A daemon does not keep an interrupted program waiting; a half-done push is no commit.
                self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
                self._thread.start()
        if passed_over is not None:
            logger.info("%s is not pushed, since a newer one waits", passed_over.name)
            shutil.rmtree(passed_over, ignore_errors=True)

    def wait(self) -> None:
        """Wait until everything is pushed or has failed."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                folder, self._waiting = self._waiting, None
                if folder is None:
                    self._thread = None
                    return
            try:
                self._push(folder)
            except Exception as error:  # whatever it is: the program that goes on meanwhile is worth more
                logger.warning("%s was not pushed; the next push makes up for it: %s", folder.name, error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
