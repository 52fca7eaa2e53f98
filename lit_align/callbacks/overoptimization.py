"""Stops a run when its gain on the trained reward is no longer real."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.callbacks.cross_reward import CrossRewardCallback

MONITOR = "val/heldout_gain"


class OveroptimizationStopping(Callback):
    """Stops (or warns) when the trained reward rises while what was held out falls.

    It compares each validation with the one `window` validations earlier, once the trained reward
    has gained since: the run is over-optimised if a held-out reward has lost `margin` base
    standard deviations since then and is below the base model's, or diversity has lost
    `diversity_margin` of the base's. A `CrossRewardCallback` must come before it among the
    trainer's callbacks.

    The message names the validation with the best mean gain of the held-out rewards, and its
    checkpoint if a `ModelCheckpoint` monitors "val/heldout_gain" with mode "max".

    Args:
        window: Validations between the two that are compared.
        margin: In standard deviations of the base model's rewards.
        diversity_margin: As a share of the base model's diversity.
        action: "stop" ends training after the round, "warn" only says so, once.

    Attributes:
        reason: What was seen; empty before.
    """

    def __init__(
        self,
        window: int = 3,
        margin: float = 0.25,
        diversity_margin: float = 0.25,
        action: Literal["stop", "warn"] = "stop",
    ) -> None:
        if window < 1:
            raise ValueError(f"`window` must be positive, got {window}.")
        if margin <= 0 or diversity_margin <= 0:
            raise ValueError(
                f"`margin` and `diversity_margin` must be positive, got {margin} and "
                f"{diversity_margin}."
            )
        if action not in ("stop", "warn"):
            raise ValueError(f"`action` must be 'stop' or 'warn', got {action!r}.")
        self.window, self.margin, self.diversity_margin = window, margin, diversity_margin
        self.action = action
        self.reason = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is somebody who measures."""
        if stage == "fit":
            self._measuring(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the newest validation."""
        follows = self._measuring(trainer).generalization
        if trainer.sanity_checking or follows is None or self.reason:
            return
        points = {name: values.cpu() for name, values in follows.points.items()}
        self.reason = self.judge(follows.target, follows.held_out, points)
        if self.reason:
            rank_zero_warn(f"{self.reason} {_best(trainer, points)}")
            trainer.should_stop = trainer.should_stop or self.action == "stop"

    def judge(self, target: str, held_out: tuple[str, ...], points: dict[str, Tensor]) -> str:
        """Return what is wrong in words, or "".

        Args:
            target: Name of the trained reward.
            held_out: Names of the K others.
            points: See `CrossRewardGeneralization.points`.
        """
        gain, gains, diversity = (points[k] for k in ("gain", "held_out_gains", "diversity"))
        if len(gain) <= self.window or not gain[-1] > gain[-1 - self.window]:
            return ""
        change = gains[-1] - gains[-1 - self.window]
        fallen = [
            f"{name} by {-float(loss):.2f} base standard deviations"
            for name, loss, level in zip(held_out, change, gains[-1], strict=True)
            if loss <= -self.margin and level < 0
        ]
        lost = float((diversity[-1 - self.window] - diversity[-1]) / diversity[0])
        if not math.isnan(lost) and lost >= self.diversity_margin:
            fallen.append(f"diversity by {lost:.0%} of the base model's")
        if not fallen:
            return ""
        return (
            f"Over-optimisation: in the last {self.window} validations {target} rose by "
            f"{float(gain[-1] - gain[-1 - self.window]):.2f} base standard deviations, while "
            f"{' and '.join(fallen)} fell."
        )

    def _measuring(self, trainer: Trainer) -> CrossRewardCallback:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, CrossRewardCallback):
                return callback
            if callback is self:
                break
        raise ValueError(
            "OveroptimizationStopping needs a CrossRewardCallback before it in `trainer.callbacks`."
        )

    def state_dict(self) -> dict[str, str]:
        """Return what was seen."""
        return {"reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Restore what was seen: a run that is resumed all the same is not stopped for it again."""
        self.reason = state_dict["reason"]


def _best(trainer: Trainer, points: dict[str, Tensor]) -> str:
    means = points["held_out_gains"].mean(1)
    best = int(means.argmax())
    told = (
        f"The held-out rewards were best at {float(points['queries'][best]):.0f} reward queries "
        f"({float(means[best]):+.2f} base standard deviations)"
    )
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor == MONITOR and saver.mode == "max":
            kept = saver.best_model_path or "none written yet"
            return f"{told}; the best checkpoint: {kept}."
    return f"{told}; to keep that checkpoint, give ModelCheckpoint `monitor: {MONITOR}, mode: max`."
