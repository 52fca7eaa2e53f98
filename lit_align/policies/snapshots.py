"""An average of trained tensors, kept beside them and put in their place for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def ramp(step: int, flat: int, rate: float, hold: float) -> float:
    """Return a decay that is 0 for `flat` steps and then rises by `rate` a step, up to `hold`.

    Args:
        step: Optimiser steps so far.
        flat: Negative for a decay that has risen for so many steps already.
        rate: Not negative.
        hold: In [0, 1].
    """
    return min(max(step - flat, 0) * rate, hold)


def warm_up(step: int, decay: float) -> float:
    """Return ``min((1 + n) / (10 + n), decay)``, by which a young average forgets its start.

    Args:
        step: n, optimiser steps so far.
        decay: In [0, 1].
    """
    return min((1 + step) / (10 + step), decay)


class Snapshot:
    """An average of a module's trainable tensors: ``average <- decay * average + (1 - decay) * w``.

    It is float32, lies in shards where the weights do, and in checkpoints as whole tensors.

    The weights are swapped in place. Do so only while no graph is alive: compute what the average
    predicts before what is to be differentiated.

    Attributes:
        average: The averaged tensors by name; empty before `start`.
        displaced: The trained tensors by name, while the average is in their place.
        step: Of the optimiser, at the last `refresh` or at the start.
    """

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.displaced: dict[str, Tensor] = {}
        self.step = 0
        self._weights: dict[str, nn.Parameter] = {}
        self._sharded: list[FSDPModule] = []

    def attach(self, module: nn.Module) -> None:
        """Find the trainable tensors of `module`, and lay a restored average out as they are.

        They are kept: walking the module takes longer than an update.
        """
        self._sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._reshard()
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if self.average:
            self.average = {n: _laid_out(a, self._weights[n]) for n, a in self.average.items()}

    def start(self, step: int = 0) -> None:
        """Start from the weights of the attached module, after so many optimiser steps."""
        self.average = {n: w.detach().float().clone() for n, w in self._weights.items()}
        self.step = step

    def clear(self) -> None:
        """Forget the average."""
        self.average, self.step = {}, 0

    def update(self, decay: float) -> None:
        """Move towards the weights.

        Args:
            decay: Weight of the past, in [0, 1]; 0 copies the weights.
        """
        self._reshard()
        for name, weight in self._weights.items():
            self.average[name].mul_(decay).add_(weight.detach(), alpha=1 - decay)

    def refresh(self, step: int, decay: float) -> None:
        """Update, unless that was done at this optimiser step already.

        So a round that failed and is collected again by a resumed run finds the same average.
        """
        if step != self.step:
            self.update(decay)
            self.step = step

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the average in place of the weights, if it has started."""
        if not self.average or self.displaced:  # it may be in place already
            yield
            return
        try:
            self.put_in()
            yield
        finally:
            self.put_back()

    @torch.no_grad()
    def put_in(self) -> None:
        """Put the average in place of the weights."""
        self._reshard()
        self.displaced = {name: w.detach().clone() for name, w in self._weights.items()}
        for name, weight in self._weights.items():
            weight.copy_(self.average[name])
        torch.clear_autocast_cache()  # it holds 16-bit copies of the weights

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the trained weights back, if they were displaced."""
        if not self.displaced:
            return
        self._reshard()
        for name, weight in self._weights.items():
            weight.copy_(self.displaced[name])
        self.displaced = {}
        torch.clear_autocast_cache()

    def _reshard(self) -> None:
        """Make FSDP2 forget gathered tensors.

        It keeps those of the outermost module after a forward, and would compute with them after
        the shards were changed.
        """
        for part in self._sharded:
            part.reshard()

    def state_dict(self) -> dict[str, Any]:
        """Return the average as whole tensors on the CPU; called on every process."""
        return {"average": {n: gathered(a) for n, a in self.average.items()}, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average; `attach` lays it out."""
        self.average, self.step = dict(state_dict["average"]), state_dict["step"]


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor as a copy on the CPU; called on every process."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def _laid_out(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return `tensor`, whole or already laid out, on the device and in the shards of `weight`."""
    if isinstance(weight, DTensor) and not isinstance(tensor, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        return distribute_tensor(tensor.to(weight.device), mesh, placements)
    return tensor.to(weight.device)
