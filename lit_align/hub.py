"""Checkpoints on this machine or on the Hugging Face hub, and what to say if they are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, errors, get_token, hf_hub_download
from huggingface_hub.utils import validate_repo_id


class CheckpointError(ValueError):
    """A checkpoint is not at hand; the message says which, why, and how to get it."""


def checkpoint_file(pretrained: str, filename: str) -> Path:
    """Return the path of a checkpoint's file, fetched into the hub's cache if need be.

    Args:
        pretrained: The file itself, a folder that holds it, or a hub id.
        filename: Its name in the folder or repository.

    Raises:
        CheckpointError: If there is no such file, or it may not be fetched.
    """
    path = Path(pretrained)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / filename).is_file():
            return path / filename
        raise CheckpointError(
            f"The folder {pretrained!r} has no file {filename!r}; it holds: "
            f"{', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}."
        )
    with opening(pretrained, filename, whole=False):
        return Path(hf_hub_download(pretrained, filename))


@contextmanager
def opening(pretrained: str, filename: str, whole: bool = True) -> Iterator[None]:
    """Turn what the hub's libraries raise about `pretrained` into one clear message.

    Args:
        pretrained: A hub id or a folder.
        filename: The file that is wanted of it, for the message.
        whole: Whether the command that the message names fetches all of the repository.

    Raises:
        CheckpointError: In place of their error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, ImportError) as error:
        if (told := _explained(error, pretrained, filename, whole)) is None:
            raise
        raise CheckpointError(told) from error


def _explained(error: BaseException, repo: str, filename: str, whole: bool) -> str | None:
    """Return what to tell of an error about a file of a repository; None if it is another one."""
    if not _is_hub_id(repo):
        if Path(repo).exists():
            return None
        return (
            f"There is no file or folder {repo!r}, and it is no hub id (owner/name); "
            f"give a path that exists, or an id whose repository holds {filename!r}."
        )
    kinds = {type(cause) for cause in _chain(error)}

    def met(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    fetch = f"`hf download {repo}`" if whole else f"`hf download {repo} {filename}`"
    if met(errors.GatedRepoError):
        login = "" if get_token() else ", log in by `hf auth login` (or set HF_TOKEN)"
        return (
            f"{repo!r} is gated and {filename!r} could not be fetched: accept its terms on "
            f"https://huggingface.co/{repo}{login}, then fetch it: {fetch}."
        )
    if met(errors.RepositoryNotFoundError):
        login = (
            "the token at hand may not see it"
            if get_token()
            else "there is no token: `hf auth login`, or set HF_TOKEN"
        )
        return (
            f"There is no repository {repo!r} on the hub for {filename!r}, or it is private "
            f"({login}). Check the name; to fetch it: {fetch}."
        )
    if met(errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError):
        return (
            f"The repository {repo!r} has no file {filename!r}; see https://huggingface.co/{repo}."
        )
    # Some libraries tell only that a file is missing.
    if met(errors.OfflineModeIsEnabled) or (constants.HF_HUB_OFFLINE and met(OSError)):
        return _absent(repo, filename, fetch, "HF_HUB_OFFLINE is set")
    if met(errors.LocalEntryNotFoundError, errors.HfHubHTTPError, ConnectionError, TimeoutError):
        return _absent(repo, filename, fetch, "the hub could not be reached")
    return None


def _absent(repo: str, filename: str, fetch: str, why: str) -> str:
    return (
        f"{repo!r} is not on this machine: no {filename!r} in {constants.HF_HUB_CACHE}, and {why}. "
        f"Fetch it where there is a network, {fetch}, and copy the cache, "
        "or give the path of a local folder."
    )


def _is_hub_id(name: str) -> bool:
    if name.startswith((".", "/", "~")) or (os.sep != "/" and os.sep in name):
        return False
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
