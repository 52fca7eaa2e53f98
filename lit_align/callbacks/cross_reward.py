"""Is the gain real? Every reward, diversity and drift over a run, on the same prompts and noise."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor, nn

from lit_align.algorithms.base import AlignmentModule
from lit_align.callbacks import evaluation
from lit_align.callbacks.evaluation import Evaluation, EvaluationCollector
from lit_align.data.prompts import PromptLoader
from lit_align.metrics import (
    CMMD,
    CrossRewardGeneralization,
    FrechetDistance,
    KernelDistance,
    RewardMoments,
    WinRate,
    joint_rates,
    proxy_correlation,
)
from lit_align.metrics.base import Embedder

_HEADER = ("reward", "base", "aligned", "gain", "std. error", "gain / s.e.", "gain / base std",
           "win rate (95 %)")  # fmt: skip


class CrossRewardCallback(Callback):
    """Measures the validation prompts with the base model first, and follows the run from there.

    The trained reward and the held-out ones (`eval_rewards`) are scored on the same prompts with
    the same noise, so differences are paired. Each validation logs, beside `val/reward/<name>`:

        val/heldout_gain            mean gain of the held-out rewards, in base standard deviations
        val/generalization/<name>   slope of the held-out reward on the trained one, both in base
                                    standard deviations, through the origin, over the run so far
        val/correlation/<name>      Spearman's correlation with the trained reward over images
        val/win_rate/<name>         share of images better than the base model's, ties half
        val/joint_gain, val/joint_collapse   share of images that gain on the trained reward, and
                                    gain (lose) on all held-out ones
        val/invalid/<name>          images that could not be scored
        val/diversity, val/vendi    of images of one prompt, in the embedder's space
        val/fid, val/kid, val/cmmd  distance of the embeddings from the base model's
        val/kl                      divergence of the sampling path from the pretrained model's
        val/drift/<name>            luminance, saturation, high frequencies, saturated pixels,
                                    norm of the latents

    The base's own are step 0, with its spread over images, the unit of gains, as
    `val/reward_std/<name>`. The run's folder gets `generalization.png`, and at the end
    `generalization.csv` (see `CrossRewardGeneralization`) and `summary.md`.

    Args:
        embedder: Maps images [B, 3, H, W] in [0, 1] to embeddings [B, D], by `embed_images` if it
            has that, else by its forward; by default the first of the module's rewards that has
            `embed_images`. Without any, diversity and distances are not measured.
        levels: Gains of the trained reward, in base standard deviations, at which the held-out
            rewards are read.
        diversity_prompts: Number of prompts for diversity; 0 measures none.
        samples_per_prompt: Images of each of them, at least 2.
        kl_prompts: Number of prompts for the divergence, one sample each; 0 measures none. For a
            fully trained denoiser this keeps a copy of the pretrained one.

    Attributes:
        generalization: The run's trajectory; None without held-out rewards.
    """

    def __init__(
        self,
        embedder: nn.Module | None = None,
        levels: tuple[float, ...] = (0.5, 1.0, 2.0),
        diversity_prompts: int = 24,
        samples_per_prompt: int = 4,
        kl_prompts: int = 32,
    ) -> None:
        if samples_per_prompt < 2:
            raise ValueError(f"`samples_per_prompt` must be at least 2, got {samples_per_prompt}.")
        self.embedder = embedder
        self._embed: Embedder | None = None
        self.levels = tuple(levels)
        self.diversity_prompts, self.samples_per_prompt = diversity_prompts, samples_per_prompt
        self.kl_prompts = kl_prompts
        self.base: Evaluation | None = None
        self.generalization: CrossRewardGeneralization | None = None
        self._names: list[str] = []
        self._trained: set[str] = set()
        self._prompts = ""
        self._collector: EvaluationCollector | None = None
        self._current: Evaluation | None = None
        self._validated_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the embedder, and keep the pretrained weights if they are needed."""
        assert isinstance(pl_module, AlignmentModule)
        if stage != "fit":
            return
        self._names = list(pl_module.rewards)
        self._trained = set(pl_module.trained_rewards)
        for candidate in (self.embedder, *pl_module.rewards.values()):
            if self._embed is None and candidate is not None:
                fallback = candidate if candidate is self.embedder else None
                self._embed = getattr(candidate, "embed_images", fallback)
        if self.embedder is not None:
            self.embedder.requires_grad_(False).eval().to(pl_module.device)
        if pl_module.policy.train_mode == "full" and self.kl_prompts:
            if isinstance(trainer.strategy, ModelParallelStrategy):
                rank_zero_warn("`val/kl` is not measured: a sharded denoiser keeps no copy.")
                self.kl_prompts = 0
            else:
                pl_module.policy.keep_reference()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the base model, unless the run is resumed.

        Raises:
            ValueError: If the resumed run validates other prompts than the base model's.
        """
        assert isinstance(pl_module, AlignmentModule)
        loader = pl_module.validation_batches()
        prompts = loader.fingerprint if isinstance(loader, PromptLoader) else ""
        if self.base is not None:
            if prompts != self._prompts:
                raise ValueError(
                    "The validation prompts are not those on which the base model was measured "
                    "when the checkpoint was made; restore them, or start a new run."
                )
            return
        collector = evaluation.evaluate(trainer, pl_module, self._embed)
        if not collector:  # there are no validation prompts
            return
        self.base, self._prompts = collector.finish(), prompts
        self._open_trajectory()
        logs = self._measure(trainer, pl_module, self.base)
        moments = _moments(self._names, self.base.scores)
        for column, name in enumerate(self._names):
            logs[f"val/reward/{name}"] = float(moments["mean"][column])
            logs[f"val/reward_std/{name}"] = float(moments["std"][column])
        for logger in trainer.loggers:
            logger.log_metrics({"reward_queries": 0.0, **logs}, step=0)
            logger.save()

    def _open_trajectory(self) -> None:
        """Follow the rewards that vary over the base model's images: gains need a unit."""
        assert self.base is not None
        moments = _moments(self._names, self.base.scores)
        varies = [bool(std > 0) for std in moments["std"]]
        for name, known in zip(self._names, varies, strict=True):
            if not known:
                rank_zero_warn(f"{name} scores all images of the base model the same: no unit.")
        names = [name for name, known in zip(self._names, varies, strict=True) if known]
        held_out = [name for name in names if name not in {self._names[0], *self._trained}]
        if varies[0] and held_out:
            self.generalization = CrossRewardGeneralization(names[0], held_out, self.levels)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the previous validation."""
        assert isinstance(pl_module, AlignmentModule)
        self._collector = None
        if self.base is not None and not trainer.sanity_checking:
            self._collector = EvaluationCollector(pl_module, self._embed)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch."""
        if self._collector is not None:
            self._collector.add(batch, outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log everything, and draw the curves so far."""
        assert isinstance(pl_module, AlignmentModule)
        if not self._collector:
            return
        self._current = self._collector.finish()
        self._validated_step = trainer.global_step
        pl_module.log_dict(self._measure(trainer, pl_module, self._current))
        self._draw(trainer)

    def _measure(
        self, trainer: Trainer, module: AlignmentModule, current: Evaluation
    ) -> dict[str, float]:
        """Return what is logged of an evaluation, and add it to the trajectory."""
        logs = {**current.figures, **self._compare(current)}
        if self._embed is not None and self.diversity_prompts:
            logs |= evaluation.diversity(
                trainer, module, self._embed, self.diversity_prompts, self.samples_per_prompt
            )
        if self.kl_prompts:
            logs["val/kl"] = evaluation.path_kl(trainer, module, self.kl_prompts)
        if self.generalization is not None:
            columns = [self._names.index(name) for name in self.generalization.names]
            moments = _moments(self.generalization.names, current.scores[:, columns])
            self.generalization.update(
                moments["mean"],
                moments["std"],
                float(module.counters["reward_queries"]),
                logs.get("val/kl", math.nan),
                logs.get("val/diversity", math.nan),
            )
            gains = self.generalization.points["held_out_gains"]
            logs["val/heldout_gain"] = float(gains[-1].mean())
            summary = self.generalization.compute()
            for name in self.generalization.held_out:
                logs[f"val/generalization/{name}"] = float(summary[f"slope/{name}"])
        return logs

    def _compare(self, current: Evaluation) -> dict[str, float]:
        """Return what compares the images of an evaluation with the base model's."""
        assert self.base is not None
        logs = {}
        for column, name in enumerate(self._names):
            aligned, base = current.scores[:, column], self.base.scores[:, column]
            logs[f"val/win_rate/{name}"] = _win_rate(aligned, base, self.base.prompt_ids)["rate"]
            logs[f"val/invalid/{name}"] = float(aligned.isnan().sum())
        if len(self._names) > 1:
            rates = joint_rates(self.base.scores, current.scores)
            logs["val/joint_gain"], logs["val/joint_collapse"] = map(float, rates)
            correlations = proxy_correlation(current.scores).tolist()
            names = [f"val/correlation/{name}" for name in self._names[1:]]
            logs |= dict(zip(names, correlations, strict=True))
        if self.base.embeddings is not None and current.embeddings is not None:
            width = self.base.embeddings.shape[1]
            for name, metric in (
                ("fid", FrechetDistance(width, sync_on_compute=False)),
                ("kid", KernelDistance(width, sync_on_compute=False)),
                ("cmmd", CMMD(sync_on_compute=False)),
            ):
                metric.update(self.base.embeddings, real=True)
                metric.update(current.embeddings, real=False)
                logs[f"val/{name}"] = float(metric.compute())
        return logs

    def _draw(self, trainer: Trainer) -> None:
        folder = trainer.log_dir  # on every process: the first one tells the others
        if self.generalization is None or not trainer.is_global_zero or folder is None:
            return
        figure = draw_generalization(self.generalization)
        figure.savefig(Path(folder, "generalization.png"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("generalization", figure, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the table, and write the summary of the trajectory."""
        assert isinstance(pl_module, AlignmentModule)
        if self.base is None:
            return
        if self._validated_step != trainer.global_step or self._current is None:
            # The last round was not validated; on every process, as they sample in step.
            self._current = evaluation.evaluate(trainer, pl_module, self._embed).finish()
        folder = trainer.log_dir  # on every process, as in `_draw`
        if not trainer.is_global_zero:
            return
        rows = [
            compare_paired(name, self.base.scores[:, column], self._current.scores[:, column],
                           self.base.prompt_ids)
            for column, name in enumerate(self._names)
        ]  # fmt: skip
        table = _markdown([_HEADER, *rows])
        count = len(self.base.scores)
        print(f"\nBase -> aligned on {count} held-out images, same prompts and noise:\n\n{table}")
        if folder:
            Path(folder, "summary.md").write_text(table + "\n", encoding="utf-8")
            if self.generalization is not None:
                _write_summary(self.generalization, Path(folder, "generalization.csv"))

    def state_dict(self) -> dict[str, Any]:
        """Return the base model's measurements and the trajectory."""
        if self.base is None:
            return {}
        follows = self.generalization
        return {
            "base": vars(self.base),
            "prompts": self._prompts,
            "rewards": list(follows.names) if follows is not None else [],
            "trajectory": follows.trajectory.cpu() if follows is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the base model's measurements and the trajectory."""
        if not state_dict:
            return
        self.base = Evaluation(**state_dict["base"])
        self._prompts = state_dict["prompts"]
        if state_dict["rewards"]:
            target, *held_out = state_dict["rewards"]
            self.generalization = CrossRewardGeneralization(target, held_out, self.levels)
            self.generalization.load_state_dict({"trajectory": state_dict["trajectory"]})


def _moments(names: Any, scores: Tensor) -> dict[str, Tensor]:
    moments = RewardMoments(names, sync_on_compute=False)
    moments.update(scores)
    # torchmetrics gives scalars for a single reward.
    return {name: torch.atleast_1d(values) for name, values in moments.compute().items()}


def _win_rate(aligned: Tensor, base: Tensor, prompt_ids: Tensor) -> dict[str, float]:
    rate = WinRate(sync_on_compute=False)
    rate.update(aligned, base, prompt_ids)
    return {name: float(value) for name, value in rate.compute().items()}


def compare_paired(name: str, base: Tensor, aligned: Tensor, prompt_ids: Tensor) -> tuple[str, ...]:
    """Return a table row: means, paired gain, its standard error, the gain in units, win rate.

    Args:
        name: Of the reward.
        base: Scores [N], NaN where an image could not be scored.
        aligned: Scores [N] of the same prompts and noise.
        prompt_ids: [N], for the win rate's interval, which resamples prompts.
    """
    both = ~(base.isnan() | aligned.isnan())
    base, aligned, prompt_ids = base[both].double(), aligned[both].double(), prompt_ids[both]
    difference = aligned - base
    gain, error = difference.mean(), difference.std() / len(difference) ** 0.5
    figures = (base.mean(), aligned.mean(), gain, error)
    ratios = (gain / error, gain / base.std())
    won = _win_rate(aligned, base, prompt_ids)
    wins = f"{won['rate']:.3f} ({won['low']:.3f}, {won['high']:.3f})"
    return (name, *(f"{float(f):+.4f}" for f in figures), *(f"{float(r):+.2f}" for r in ratios),
            wins)  # fmt: skip


def draw_generalization(trajectory: CrossRewardGeneralization) -> Figure:
    """Draw each held-out reward's gain against the trained reward's, both in base deviations."""
    points = {name: values.cpu() for name, values in trajectory.points.items()}
    figure = Figure(figsize=(4.6, 3.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    for name, gains in zip(trajectory.held_out, points["held_out_gains"].T, strict=True):
        axis.plot(points["gain"], gains, marker="o", markersize=3, label=name)
    axis.axhline(0, color="gray", linewidth=0.5)
    axis.set_xlabel(f"gain of {trajectory.target} (trained), base std")
    axis.set_ylabel("gain of held-out rewards, base std")
    axis.legend(fontsize=7)
    return figure


def _write_summary(trajectory: CrossRewardGeneralization, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("key", "value"))
        writer.writerows((key, float(value)) for key, value in trajectory.compute().items())


def _markdown(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )
