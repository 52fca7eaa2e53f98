"""Global randomness of every process in the checkpoint, so that a resumed run draws the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer


class RNGStateCallback(Callback):
    """Saves and restores the states of Python's, numpy's and torch's global generators.

    Lightning restores none of them. The noise of this package comes from generators of its own;
    this is for whatever draws from the global ones, like dropout or a user's reward. If there are
    more processes than the checkpoint knows, the others keep the state that their seed gave them.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all processes, in the order of their ranks."""
        states = [rng_state()]
        if dist.is_available() and dist.is_initialized():
            states *= dist.get_world_size()
            dist.all_gather_object(states, rng_state())
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training starts, as building the run draws numbers too."""
        self._restored = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this process's state."""
        if trainer.global_rank < len(self._restored):
            set_rng_state(self._restored[trainer.global_rank])
        self._restored = []


def rng_state() -> dict[str, Any]:
    """Return this process's states as tensors and plain values, which load with `weights_only`."""
    _, keys, position, has_normal, normal = np.random.get_state()
    return {
        "python": random.getstate(),
        # numpy's own types are refused by `weights_only`, and torch saves no uint32.
        "numpy": (torch.tensor(keys, dtype=torch.int64), position, has_normal, normal),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue where `rng_state` was taken, on as many CUDA devices as there are."""
    version, keys, normal = state["python"]
    random.setstate((version, tuple(keys), normal))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    for device, of_device in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(of_device.cpu(), device)


@contextmanager
def undisturbed_rng() -> Iterator[None]:
    """Leave the global generators as they were, whatever is drawn inside."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
