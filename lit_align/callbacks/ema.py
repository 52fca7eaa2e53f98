"""An exponential moving average of what is trained, kept beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class AdapterEMA(Callback):
    """Averages the trainable tensors in float32: ``ema <- decay * ema + (1 - decay) * w``.

    Training goes on with the trained weights, and they are the module's at the end. The average
    lies in the checkpoint, where `export --weights ema` and `generate --weights ema` find it.

    Args:
        decay: Weight of the past, in [0, 1).
        every_n_steps: Optimiser steps from one update of the average to the next.
        start_step: The average starts as the weights after so many optimiser steps.
        evaluate: Validate the average instead of the trained weights, once it has started.

    Attributes:
        average: The averaged tensors by name; empty before the start.
    """

    def __init__(
        self,
        decay: float = 0.99,
        every_n_steps: int = 1,
        start_step: int = 0,
        evaluate: bool = True,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1), got {decay}.")
        if every_n_steps < 1 or start_step < 0:
            raise ValueError(
                "`every_n_steps` must be positive and `start_step` not negative, got "
                f"{every_n_steps} and {start_step}."
            )
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.evaluate = evaluate
        self.average: dict[str, Tensor] = {}
        self._weights: dict[str, nn.Parameter] = {}
        self._sharded: list[FSDPModule] = []
        self._trained: dict[str, Tensor] = {}  # the trained weights while the average is in place
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average of an earlier run; that of a checkpoint is restored after this."""
        if stage == "fit" and trainer.global_step == 0:
            self.average = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, or lay a restored average out as the weights are."""
        self._step = trainer.global_step
        # Found once: walking the module at every step takes longer than the update.
        self._weights = _trainable(pl_module)
        self._sharded = [part for part in pl_module.modules() if isinstance(part, FSDPModule)]
        if self.average:
            self.average = {n: _laid_out(a, self._weights[n]) for n, a in self.average.items()}
        elif self._step >= self.start_step:
            self._start(pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update the average after an optimiser step."""
        if trainer.global_step == self._step or trainer.global_step < self.start_step:
            return
        self._step = trainer.global_step
        if not self.average:
            self._start(pl_module)
        elif (self._step - self.start_step) % self.every_n_steps == 0:
            for part in self._sharded:
                part.reshard()  # see `_trainable`
            for name, weight in self._weights.items():
                self.average[name].mul_(self.decay).add_(weight.detach(), alpha=1 - self.decay)

    def _start(self, module: nn.Module) -> None:
        self.average = {n: w.detach().float().clone() for n, w in _trainable(module).items()}

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Run with the average in place of the trained weights, if it has started."""
        if not self.average or self._trained:  # it may be in place already
            yield
            return
        self._apply(module)
        try:
            yield
        finally:
            self._restore(module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in place."""
        if self.evaluate and self.average and not self._trained:
            self._apply(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self._restore(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the trained weights back: what is saved after an exception are they."""
        self._restore(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the trained weights also if a signal asks for a checkpoint during validation."""
        checkpoint["state_dict"].update({n: _gathered(w) for n, w in self._trained.items()})

    @torch.no_grad()
    def _apply(self, module: nn.Module) -> None:
        weights = _trainable(module)
        self._trained = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.copy_(self.average[name])

    @torch.no_grad()
    def _restore(self, module: nn.Module) -> None:
        if self._trained:
            for name, weight in _trainable(module).items():
                weight.copy_(self._trained[name])
            self._trained = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the average as whole tensors on the CPU."""
        return {"average": {name: _gathered(tensor) for name, tensor in self.average.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average."""
        self.average = dict(state_dict["average"])


def stored_average(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the average in a checkpoint, by the names of the module's tensors.

    Raises:
        ValueError: If there is none.
    """
    state = checkpoint.get("callbacks", {}).get(AdapterEMA.__qualname__, {})
    if not state.get("average"):
        raise ValueError(
            "The checkpoint holds no averaged weights: the run had no AdapterEMA among its "
            "`trainer.callbacks`, or had not reached its `start_step`; use `weights: trained`."
        )
    average: dict[str, Tensor] = state["average"]
    return average


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable tensors by name; sharded ones as shards.

    FSDP2 keeps the outermost module's tensors gathered after a forward, and would compute with
    them after the shards were changed.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _gathered(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def _laid_out(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return `tensor`, whole or already laid out, on the device and in the shards of `weight`."""
    if isinstance(weight, DTensor) and not isinstance(tensor, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        return distribute_tensor(tensor.to(weight.device), mesh, placements)
    return tensor.to(weight.device)
