"""Checkpoint files: written whole or not at all, and read with an answer to what is wrong."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there whole.

    A run that is killed while it writes, or a full disk, leaves the earlier file as it was.
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write the file; raise OSError with the remedy if there is no room."""
        if "://" in str(path):  # remote storage has no half-written files
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:
            unfinished.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free / 1e6
            raise OSError(
                f"The checkpoint {path} could not be written ({error}); {free:.1f} MB are free "
                "there. Checkpoints written earlier are whole: make room, then resume from one by "
                "`--ckpt_path`."
            ) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read the file; see `read_checkpoint`."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, weights_only is not False)


def read_checkpoint(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """Return what a checkpoint file holds, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file; the message names the files beside it.
        ValueError: If it is damaged or no checkpoint.
    """
    path = Path(path)
    beside = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
    others = f" There are also: {', '.join(beside)}." if beside else ""
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.{others}")
    try:
        stored: dict[str, Any] = torch.load(path, weights_only=weights_only, map_location="cpu")
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{str(path)!r} ({path.stat().st_size} bytes) is damaged or no checkpoint "
            f"({type(error).__name__}: {str(error)[:80]}).{others}"
        ) from error
    return stored
