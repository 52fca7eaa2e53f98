"""One folder per run, `runs/<name>/version_N`, shared by all loggers and kept on resume."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override


class RunFolder:
    """The folder `root/name/version_N`.

    Args:
        root: Holds all runs.
        name: Of the experiment.
        version: N.
    """

    def __init__(self, root: Path, name: str, version: int) -> None:
        self.root, self.name, self.version = root, name, version

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.root / self.name / f"version_{self.version}"

    @classmethod
    def new(cls, root: str, name: str) -> RunFolder:
        """Reserve the next version. Only the main process decides; others never write."""
        versions = [int(path.name.removeprefix("version_")) for path in _versions(root, name)]
        folder = cls(Path(root), name, max(versions, default=-1) + 1)
        if _is_main_process():
            folder.path.mkdir(parents=True)
        return folder

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> RunFolder | None:
        """Return the run's folder that holds a checkpoint, None if it lies elsewhere."""
        path = Path(checkpoint).absolute()
        found = re.fullmatch(r"version_(\d+)", path.parent.parent.name)
        if path.parent.name != "checkpoints" or found is None:
            return None
        experiment = path.parent.parent.parent
        return cls(experiment.parent, experiment.name, int(found[1]))

    def loggers(self) -> list[Logger]:
        """Return the TensorBoard and CSV loggers that write here."""
        where: dict[str, Any] = {"save_dir": str(self.root), "name": self.name}
        return [
            TensorBoardLogger(**where, version=self.version, default_hp_metric=False),
            RunCSVLogger(**where, version=self.version, flush_logs_every_n_steps=1),
        ]


def newest_checkpoint(root: str, name: str) -> Path | None:
    """Return the last checkpoint written by any version of an experiment."""
    found = [path for run in _versions(root, name) for path in run.glob("checkpoints/*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _is_main_process() -> bool:
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _versions(root: str, name: str) -> list[Path]:
    return [
        path for path in Path(root, name).glob("version_*") if path.name.split("_")[1].isdigit()
    ]


class _AppendingWriter(ExperimentWriter):
    """Continues an existing `metrics.csv` instead of deleting it."""

    @override
    def _check_log_dir_exists(self) -> None:
        rows = self.read()
        self.metrics_keys = sorted(rows[0]) if rows else []

    def read(self) -> list[dict[str, str]]:
        """Return the rows written so far."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def cut(self, step: int) -> None:
        """Drop the rows of `step` and later."""
        kept = [row for row in self.read() if int(row["step"]) < step]
        with Path(self.metrics_file_path).open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger, but a resumed run continues `metrics.csv`."""

    @property
    @override
    def experiment(self) -> Any:
        """The writer, on the main process."""
        if self._experiment is None and _is_main_process():
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment if _is_main_process() else super().experiment


class CutMetrics(Callback):
    """On resume, cuts `metrics.csv` back to the step of the checkpoint."""

    def __init__(self) -> None:
        self._step: int | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember how far the checkpoint had logged."""
        self._step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that the resumed run will write again."""
        if self._step is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.experiment.cut(self._step)


class SaveRunConfig(SaveConfigCallback):
    """Writes the complete configuration: `config.yaml`, on resume `config-resumeN.yaml`."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose a free name, then save."""
        if trainer.log_dir is not None and not self.already_saved:
            folder = Path(trainer.log_dir)
            if (folder / self.config_filename).is_file():
                number = 1 + len(list(folder.glob("config-resume*.yaml")))
                self.config_filename = f"config-resume{number}.yaml"
            super().setup(trainer, pl_module, stage)
