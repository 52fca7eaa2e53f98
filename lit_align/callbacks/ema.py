"""An exponential moving average of what is trained, kept beside it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_align.policies.snapshots import Snapshot, gathered, warm_up


class AdapterEMA(Callback):
    """Averages the trainable tensors in float32: ``ema <- decay * ema + (1 - decay) * w``.

    Training goes on with the trained weights, and they are the module's at the end. The average
    lies in the checkpoint, where `export --weights ema` and `generate --weights ema` find it.

    Args:
        decay: Weight of the past, in [0, 1).
        every_n_steps: Optimiser steps from one update of the average to the next.
        start_step: The average starts as the weights after so many optimiser steps.
        evaluate: Validate the average instead of the trained weights, once it has started.
        warm_up: After n optimiser steps, let the past weigh at most ``(1 + n) / (10 + n)``
            (arXiv:2505.05470, code).
    """

    def __init__(
        self,
        decay: float = 0.99,
        every_n_steps: int = 1,
        start_step: int = 0,
        evaluate: bool = True,
        warm_up: bool = False,
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
        self.warm_up = warm_up
        self._snapshot = Snapshot()
        self._step = 0

    @property
    def average(self) -> dict[str, Tensor]:
        """The averaged tensors by name; empty before the start."""
        return self._snapshot.average

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average of an earlier run; that of a checkpoint is restored after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._snapshot.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, or lay a restored average out as the weights are."""
        self._step = trainer.global_step
        self._snapshot.attach(pl_module)
        if not self.average and self._step >= self.start_step:
            self._snapshot.start()

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
            self._snapshot.attach(pl_module)
            self._snapshot.start()
        elif (self._step - self.start_step) % self.every_n_steps == 0:
            decay = warm_up(self._step, self.decay) if self.warm_up else self.decay
            self._snapshot.update(decay)

    def applied(self, module: nn.Module) -> AbstractContextManager[None]:
        """Run with the average in place of the trained weights, if it has started."""
        if self.average and not self._snapshot.displaced:
            self._snapshot.attach(module)
        return self._snapshot.applied()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in place."""
        if self.evaluate and self.average and not self._snapshot.displaced:
            self._snapshot.attach(pl_module)
            self._snapshot.put_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self._snapshot.put_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the trained weights back: what is saved after an exception are they."""
        self._snapshot.put_back()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the trained weights also if a signal asks for a checkpoint during validation."""
        trained = self._snapshot.displaced
        checkpoint["state_dict"].update({name: gathered(w) for name, w in trained.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the average as whole tensors on the CPU."""
        return {"average": self._snapshot.state_dict()["average"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the average."""
        self._snapshot.load_state_dict({"average": state_dict["average"], "step": 0})


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
