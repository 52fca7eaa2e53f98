"""One folder per run, `runs/<name>/version_N`: its loggers, its configuration, and its resume."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
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
        folder = cls(_relative(Path(root)), name, max(versions, default=-1) + 1)
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
        return cls(_relative(experiment.parent), experiment.name, int(found[1]))

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


def read_metrics(metrics: Path) -> list[dict[str, str]]:
    """Return the rows of a `metrics.csv`."""
    with metrics.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


_COUNTERS = ("reward_queries", "gradient_queries", "denoiser_calls", "judgements", "labels")


def validation_rows(metrics: Path) -> list[dict[str, float]]:
    """Return counters and `val/...` of the rows of a `metrics.csv` that hold a validation.

    Only those have a value of `val/reward/<name>`; other columns may miss from them, and are NaN,
    or 0 if they count.
    """
    rows = read_metrics(metrics)
    known = list(rows[0]) if rows else []
    names = sorted(name for name in known if name.startswith("val/"))
    counters = [name for name in _COUNTERS if name in known]
    rewards = [name for name in names if name.startswith("val/reward/")]
    return [
        {n: float(row[n] or 0) for n in counters} | {n: float(row[n] or "nan") for n in names}
        for row in rows
        if any(row[name] for name in rewards)
    ]


def _relative(path: Path) -> Path:
    """Return the path from the working folder, so that a resumed run's is that of the first."""
    path = path.absolute()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


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
        return read_metrics(path) if path.is_file() else []

    def keep(self, count: int) -> None:
        """Drop all rows but the first `count`."""
        kept = self.read()[:count]
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


class ResumeMetrics(Callback):
    """On resume, brings `metrics.csv` and TensorBoard back to the moment of the checkpoint.

    A checkpoint holds the number of rows written before it, and the row that Lightning was about
    to write: it logs a step after the hooks in which checkpoints are saved.
    """

    def __init__(self) -> None:
        self._stored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how far the metrics are written."""
        rows = [len(logger.experiment.read()) for logger in _csv_loggers(trainer)]
        checkpoint["metrics"] = {"rows": rows[0] if rows else 0, "pending": _pending_row(trainer)}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember what the checkpoint noted."""
        self._stored = {**checkpoint.get("metrics", {}), "step": checkpoint["global_step"]}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that the resumed run will write again, write the one that it will not."""
        stored, self._stored = self._stored, None
        if stored is None or "rows" not in stored:
            return
        for table in _csv_loggers(trainer):
            table.experiment.keep(stored["rows"])
        for tensorboard in trainer.loggers:
            if isinstance(tensorboard, TensorBoardLogger) and trainer.is_global_zero:
                _purge(tensorboard, stored["step"])
        if stored["pending"] is not None:
            for logger in trainer.loggers:
                logger.log_metrics(**stored["pending"])
                logger.save()


def _csv_loggers(trainer: Trainer) -> list[RunCSVLogger]:
    loggers = [logger for logger in trainer.loggers if isinstance(logger, RunCSVLogger)]
    return loggers if trainer.is_global_zero else []


def _pending_row(trainer: Trainer) -> dict[str, Any] | None:
    """Return what Lightning will log right after the current hook, as its loggers take it."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    batches: Any = loop.batch_progress.current
    rounds: Any = trainer.fit_loop.epoch_progress.current
    if not trainer.training:  # a validation's row is written before its checkpoint
        return None
    within_batch = batches.completed < batches.processed
    if within_batch and (loop._should_accumulate() or not connector.should_update_logs):
        return None
    if not within_batch and rounds.completed == rounds.processed:
        return None
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    if not metrics:
        return None
    step = loop._batches_that_stepped - (0 if within_batch else 1)
    return {"metrics": {**metrics, "epoch": trainer.current_epoch}, "step": step}


def _purge(logger: TensorBoardLogger, step: int) -> None:
    """Tell TensorBoard to forget what the broken run wrote from `step` on."""
    started = SessionLog(status=SessionLog.START)
    logger.experiment._get_file_writer().add_event(Event(step=step, session_log=started))


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
