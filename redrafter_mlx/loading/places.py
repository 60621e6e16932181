"""What a model's name refers to: a path on this machine, or a Hugging Face repo."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from redrafter_mlx.errors import UserError
from redrafter_mlx.machine.storage import NOT_WAITED_FOR

TARGET_NAMES = (
    "'demo', 'gemma-demo', a model directory, a .gguf file or a Hugging Face repo as org/name"
)


def expanded(name: str) -> Path:
    """The path, with ~ resolved; UserError for an unknown user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: no such home directory") from error


def local_directory(name: str, accepted: str) -> Path | None:
    """The existing directory `name`, or None if it can only be a Hugging Face repo.

    accepted  the names that could be given instead, for errors
    """
    path = expanded(name)
    if name and path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{name} is not a kind of file that can be loaded; give {accepted}")
    if not is_repo_id(name):
        raise UserError(f"{name!r} is neither an existing path nor org/name; give {accepted}")
    return None


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form org/name."""
    part = r"[A-Za-z0-9][\w.-]*"
    return bool(re.fullmatch(f"{part}/{part}", name)) and not name.endswith(".gguf")


def snapshot(name: str, revision: str | None, patterns: list[str], accepted: str) -> Path:
    """The files of a Hugging Face repo that match `patterns`, in the Hugging Face cache."""
    try:
        fetch = lambda: snapshot_download(name, revision=revision, allow_patterns=patterns)
        return Path(_beside(fetch))
    except (HTTPError, EntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"{name} is not a local path, and Hugging Face did not provide it: "
            f"{_reason(error)}; {_way_out(error, accepted)}"
        ) from error


def _beside(fetch: Callable[[], str]) -> str:
    """The result of a download, run in a thread so that Ctrl-C takes effect at once.

    In the main thread, Hugging Face would first finish the files that its threads have begun.
    """
    done: Future[str] = Future()

    def work() -> None:
        try:
            done.set_result(fetch())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name=NOT_WAITED_FOR).start()
    return done.result()


def _way_out(error: Exception, accepted: str) -> str:
    if isinstance(error, OSError) and error.errno:
        return "set HF_HOME to a writable directory with room"
    answered = isinstance(error, HfHubHTTPError) or not isinstance(error, HTTPError)
    if isinstance(error, LocalEntryNotFoundError) or not answered:
        return "try again when the network is available: complete files are kept"
    return f"give {accepted}"


def _reason(error: Exception) -> str:
    """Why Hugging Face refused, on one line; its own messages have many."""
    if isinstance(error, GatedRepoError):
        return "the repo is gated (accept its terms on its page and run 'hf auth login')"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repo, or a private one (for those run 'hf auth login')"
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such revision"
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
