"""Pictures of fixed prompts and noise, the base model's row first."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from lit_align.algorithms.base import AlignmentModule
from lit_align.callbacks.evaluation import evaluated_weights, first_prompts
from lit_align.functional.frames import side_by_side
from lit_align.rewards.base import uint8_images


class SampleGallery(Callback):
    """Writes `samples/round_XXXX.png` in the run's folder, and the same to TensorBoard.

    Args:
        num_prompts: The first so many validation prompts.
        every_n_rounds: How often; the last round is always drawn.
    """

    def __init__(self, num_prompts: int = 8, every_n_rounds: int = 10) -> None:
        self.num_prompts, self.every_n_rounds = num_prompts, every_n_rounds
        self.base: Tensor | None = None
        self.path: Path | None = None
        self._rounds = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample the base model's row, unless the run is resumed."""
        assert isinstance(pl_module, AlignmentModule)
        if self.base is None and any(True for _ in pl_module.validation_batches()):
            self.base = self._sample(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the gallery every n rounds."""
        self._rounds = trainer.current_epoch + 1
        if self._rounds % self.every_n_rounds == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last round and name the picture."""
        if self._rounds % self.every_n_rounds:
            self._draw(trainer, pl_module)
        if self.path is not None and trainer.is_global_zero:
            print(f"\nSamples, base model above and aligned below: {self.path}")

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, AlignmentModule)
        folder = trainer.log_dir  # on every process: the first one tells the others
        if self.base is None or folder is None:
            return
        current = self._sample(trainer, module)  # on every process: they sample in step
        if not trainer.is_global_zero:
            return
        self.path = Path(folder, "samples", f"round_{self._rounds:04d}.png")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = {"base": self.base, f"round {self._rounds}": current}
        figure = draw_rows(rows, first_prompts(module, self.num_prompts).prompts)
        figure.savefig(self.path)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("samples", figure, trainer.global_step)

    def _sample(self, trainer: Trainer, module: AlignmentModule) -> Tensor:
        """Draw all prompts on every process, so that the picture is the same for any number."""
        batch = first_prompts(module, self.num_prompts).to(module.device)
        with evaluated_weights(trainer, module), trainer.precision_plugin.forward_context():
            return uint8_images(side_by_side(module.generate(batch)[0]))

    def state_dict(self) -> dict[str, Any]:
        """Return the base model's row."""
        return {"base": self.base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base model's row."""
        self.base = state_dict["base"]


def draw_rows(rows: dict[str, Tensor], prompts: list[str]) -> Figure:
    """Draw rows of images [N, H, W, 3] uint8 under their prompts."""
    columns = len(prompts)
    figure = Figure(figsize=(1.3 * columns + 0.4, 1.35 * len(rows) + 0.8), dpi=120, layout="tight")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title(textwrap.fill(prompt, 18), fontsize=6)
    return figure
