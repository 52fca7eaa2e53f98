"""What is said when a checkpoint is not there: the id, the file, the reason and the command."""

import httpx
import pytest
from huggingface_hub import constants, errors

from lit_align import hub
from lit_align.hub import CheckpointError, checkpoint_file, opening


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def told(error, token=None, monkeypatch=None):
    """Return the message for an error of the hub while fetching `weights.pt` of `owner/name`."""
    if monkeypatch is not None:
        monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(CheckpointError) as caught, opening("owner/name", "weights.pt"):
        raise error
    return str(caught.value)


def answer(kind, status):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("refused", response=response)


def test_a_file_is_itself(tmp_path):
    path = tmp_path / "weights.pt"
    path.touch()
    assert checkpoint_file(str(path), "other.pt") == path
    assert checkpoint_file(str(tmp_path), "weights.pt") == path


def test_a_folder_without_the_file_tells_what_it_holds(tmp_path):
    (tmp_path / "other.bin").touch()
    with pytest.raises(CheckpointError, match=r"no file 'weights.pt'; it holds: .*other.bin"):
        checkpoint_file(str(tmp_path), "weights.pt")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "missing", "a/b/c"])
def test_a_path_that_is_none(name):
    with pytest.raises(CheckpointError, match=r"no file or folder .* no hub id"):
        checkpoint_file(name, "weights.pt")


def test_offline_names_id_file_and_command():
    with pytest.raises(CheckpointError) as caught:
        checkpoint_file("owner/name", "weights.pt")
    text = str(caught.value)
    for part in (
        "'owner/name'",
        "'weights.pt'",
        "HF_HUB_OFFLINE",
        "`hf download owner/name weights.pt`",
    ):
        assert part in text


def test_no_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    text = told(ConnectionError("down"))
    assert "could not be reached" in text
    assert "`hf download owner/name`" in text


def test_gated_without_and_with_a_token(monkeypatch):
    error = answer(errors.GatedRepoError, 403)
    text = told(error, None, monkeypatch)
    assert "gated" in text
    assert "https://huggingface.co/owner/name" in text
    assert "hf auth login" in text
    assert "auth login" not in told(error, "hf_x", monkeypatch)


def test_unknown_or_private(monkeypatch):
    error = answer(errors.RepositoryNotFoundError, 401)
    assert "no token" in told(error, None, monkeypatch)
    assert "may not see it" in told(error, "hf_x", monkeypatch)


def test_a_repository_without_the_file():
    text = told(answer(errors.RemoteEntryNotFoundError, 404))
    assert "has no file 'weights.pt'" in text


def test_causes_are_looked_through(monkeypatch):
    """transformers and diffusers wrap the hub's errors in an OSError."""
    wrapped = OSError("Can't load the configuration")
    wrapped.__cause__ = answer(errors.GatedRepoError, 403)
    assert "gated" in told(wrapped, None, monkeypatch)


def test_other_errors_pass(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="disk is full"), opening("owner/name", "weights.pt"):
        raise OSError("disk is full")
