"""What a checkpoint of an alignment method holds, and when it may be written.

It holds the trainable tensors (no frozen one), what the method and its rewards learned from
scores, the counters, and what it is: the method, the policy's name and hash, and versions.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_align import __version__

# The second is written by Lightning's weight averaging.
_STATES = ("state_dict", "current_model_state")
_NETWORKS = (
    "policy", "reward", "eval_rewards", "tasks", "critic", "flow_correction", "annotator",
)  # fmt: skip
_LIBRARIES = ("torch", "lightning", "diffusers", "transformers", "peft")


def keep_args(module: LightningModule) -> None:
    """Keep the arguments of a method's constructor, which calls this.

    Networks are left out, which Lightning would copy with all their weights; what the command line
    built them from is kept.
    """
    frame: Any = inspect.currentframe()
    module.save_hyperparameters(logger=False, ignore=_NETWORKS, frame=frame.f_back)
    if "_instantiator" in module.hparams:  # the command line's own configuration
        module.save_hyperparameters(logger=False, frame=frame.f_back)


def describe(identity: Mapping[str, str]) -> dict[str, Any]:
    """Return what a checkpoint says of itself: its identity and the versions that wrote it."""
    versions = {"lit_align": __version__, **{name: version(name) for name in _LIBRARIES}}
    return {**identity, "versions": versions}


def keep_trainable(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Drop frozen tensors, and hyperparameters that hold networks."""
    trained = trainable_names(module)
    for key in _STATES:
        if key in checkpoint:
            checkpoint[key] = {n: value for n, value in checkpoint[key].items() if n in trained}
    checkpoint["hyper_parameters"] = {
        name: _plain(value)
        for name, value in checkpoint.get("hyper_parameters", {}).items()
        if not _holds_module(value)
    }


def check_identity(
    module: LightningModule, checkpoint: dict[str, Any], identity: Mapping[str, str]
) -> dict[str, Any]:
    """Return the checkpoint's own part, after checking that it fits the module.

    Raises:
        ValueError: If the checkpoint is no alignment method's, belongs to another method or
            policy, or lacks a tensor.
    """
    stored: dict[str, Any] | None = checkpoint.get("lit_align")
    if stored is None:
        raise ValueError(
            "The checkpoint was not written by an alignment method of this package; resume from "
            "one that was, or start without a checkpoint."
        )
    for key, value in identity.items():
        if stored[key] != value:
            raise ValueError(
                f"The checkpoint has {key} {stored[key]!r}, this run {value!r}; give the "
                "configuration that the checkpoint was made with."
            )
    trained = trainable_names(module)
    # Under FSDP2 Lightning has loaded the tensors already, and taken them out.
    missing = sorted(trained - set(checkpoint.get("state_dict", trained)))
    if missing:
        raise ValueError(f"The checkpoint lacks {len(missing)} tensors, first {missing[0]!r}.")
    if "current_model_state" in checkpoint:  # averaged weights are loaded strictly
        for key in _STATES:
            checkpoint[key] = {**module.state_dict(), **checkpoint[key]}
    return stored


def trainable_names(module: nn.Module) -> set[str]:
    """Return the names of the tensors that training changes."""
    return {name for name, p in module.named_parameters() if p.requires_grad}


def _holds_module(value: Any) -> bool:
    if dataclasses.is_dataclass(value):  # a task holds its reward
        value = vars(value)
    if isinstance(value, dict):
        return any(_holds_module(item) for item in value.values())
    return isinstance(value, nn.Module)


def _plain(value: Any) -> Any:
    """Return the fields of a dataclass, which a checkpoint cannot hold, and all else as it is."""
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_record else value


class PostponedSaves(Callback):
    """Moves a save from where a run cannot be resumed exactly to the next place where it can.

    Within an accumulation window the gradient collected so far would be lost: the save waits for
    the window's end. Between a round's last update and its end, Lightning would resume after the
    round and skip its validation: the save waits for the round's end. Removals of older files
    wait with it, so that there is always one to resume from. After an exception nothing waits.
    """

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put itself before the trainer's saves and its strategy's removals."""
        for owner, name in ((trainer, "save_checkpoint"), (trainer.strategy, "remove_checkpoint")):
            original = getattr(owner, name)
            if isinstance(original, partial):  # of an earlier fit with the same trainer
                original = original.args[1]
            setattr(owner, name, partial(self._now_or_later, trainer, original))

    def _now_or_later(
        self, trainer: Trainer, call: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        if self._waiting or _must_wait(trainer):
            self._waiting.append(partial(call, *args, **kwargs))
        else:
            call(*args, **kwargs)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Do what waited for the end of an accumulation window."""
        self._release(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what waited for the round's end."""
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        if self._waiting and not _must_wait(trainer):
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                call()


def _must_wait(trainer: Trainer) -> bool:
    batches = trainer.fit_loop.epoch_loop.batch_progress
    rounds: Any = trainer.fit_loop.epoch_progress.current
    if trainer.interrupted or rounds.processed == rounds.ready:
        return False
    within_window = batches.current.ready % trainer.accumulate_grad_batches != 0
    return batches.is_last_batch or within_window
