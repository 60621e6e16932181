"""Sends a finished head to Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path

from redrafter_mlx.errors import UserError
from redrafter_mlx.loading import places
from redrafter_mlx.machine.storage import one_line

LOGIN = "run 'hf auth login' with a token that may write"


def check_access(repo: str) -> None:
    """Find out before a long conversion whether there is a network and a login."""
    from huggingface_hub import HfApi

    if not places.is_repo_id(repo):
        raise UserError(f"--upload {repo!r} is not a repo name; give org/name")
    try:
        HfApi().whoami()
    except Exception as error:  # one of a dozen, from the network up
        raise UserError(
            f"--upload {repo}: Hugging Face does not know you: {_reason(error)}; {LOGIN}, or leave "
            "--upload out"
        ) from error


def upload(directory: Path, repo: str, public: bool) -> str:
    """Send the directory to the repo, made first if there is none; the address of the repo.

    public  of a new repo; one that exists stays as it is

    Raises UserError that says why not; the directory is left as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory, commit_message="Add draft head")
    except Exception as error:  # one of a dozen, from the network up
        raise UserError(
            f"--upload {repo} failed: {_reason(error)}; the head is in {directory}: "
            f"{LOGIN} and then 'hf upload {repo} {directory}'"
        ) from error
    return str(url)


def _reason(error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return "HF_HUB_OFFLINE is set"
    if type(error).__name__ == "LocalTokenNotFoundError":
        return "nobody is logged in on this machine"
    cause: BaseException | None = error
    while cause is not None:
        if "connect" in type(cause).__name__.lower() or isinstance(cause, ConnectionError):
            return "it cannot be reached"
        cause = cause.__cause__ or cause.__context__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"access was denied ({status})"
    return one_line(error).partition(". ")[0]
