"""Is the gain real? Every reward before and after training, on the same prompts and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_align.algorithms.base import AlignmentModule

_HEADER = ("reward", "base", "aligned", "gain", "std. error", "gain / s.e.", "gain / base std")


class CrossRewardCallback(Callback):
    """Scores the validation prompts with the base model first, and compares at the end.

    The trained reward and the held-out ones (`eval_rewards`) are measured on the same prompts
    with the same noise, so differences are paired. The base's means are logged as step 0 of
    `val/reward/<name>`, and its spread over images, the unit of gains, as `val/reward_std/<name>`.
    At the end a table is printed and written to `summary.md`:

        gain         mean of aligned - base over the images that both could be scored on
        std. error   standard deviation of the differences / sqrt(their number)
    """

    def __init__(self) -> None:
        self.base: dict[str, Tensor] = {}
        self._current: dict[str, list[Tensor]] = {}
        self._validated_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the base model, unless the run is resumed."""
        if self.base:
            return
        self.base = _evaluate(trainer, pl_module)
        if not self.base:  # there are no validation prompts
            return
        logs = {"reward_queries": 0.0}
        for name, scores in self.base.items():
            logs[f"val/reward/{name}"] = float(scores.nanmean())
            logs[f"val/reward_std/{name}"] = float(scores[~scores.isnan()].std())
        for logger in trainer.loggers:
            logger.log_metrics(logs, step=0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the previous validation."""
        self._current = {}
        self._validated_step = trainer.global_step

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the scores of a batch."""
        for name, scores in outputs["scores"].items():
            self._current.setdefault(name, []).append(scores.cpu())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the table."""
        if not self.base:
            return
        if self._validated_step == trainer.global_step:
            aligned = {name: torch.cat(scores) for name, scores in self._current.items()}
        else:  # the last round was not validated; on every process, as they sample in step
            aligned = _evaluate(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        rows = [compare_paired(name, self.base[name], aligned[name]) for name in self.base]
        table = _markdown([_HEADER, *rows])
        images = len(next(iter(self.base.values())))
        print(f"\nBase -> aligned on {images} held-out images, same prompts and noise:\n\n{table}")
        if trainer.log_dir:
            path = Path(trainer.log_dir, "summary.md")
            path.write_text(table + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Return the base model's scores."""
        return {"base": self.base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base model's scores."""
        self.base = state_dict["base"]


@torch.no_grad()
def _evaluate(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """Return the scores [N] of all validation prompts by every reward."""
    assert isinstance(module, AlignmentModule)
    parts: dict[str, list[Tensor]] = {}
    for batch in module.validation_batches():
        with trainer.precision_plugin.forward_context():
            _, scores = module.evaluate(batch.to(module.device))
        for name, values in scores.items():
            parts.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def compare_paired(name: str, base: Tensor, aligned: Tensor) -> tuple[str, ...]:
    """Return a table row: means, paired gain, its standard error, and the gain in both units.

    Args:
        name: Of the reward.
        base: Scores [N], NaN where an image could not be scored.
        aligned: Scores [N] of the same prompts and noise.
    """
    both = ~(base.isnan() | aligned.isnan())
    base, aligned = base[both].double(), aligned[both].double()
    difference = aligned - base
    gain, error = difference.mean(), difference.std() / len(difference) ** 0.5
    figures = (base.mean(), aligned.mean(), gain, error)
    ratios = (gain / error, gain / base.std())
    return (name, *(f"{float(f):+.4f}" for f in figures), *(f"{float(r):+.2f}" for r in ratios))


def _markdown(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )
