"""Reward models: learn a score of image and prompt from comparisons.

With delta = r(c, x_1) - r(c, x_2), P(x_1 preferred) = p >= 1/2, and w the judgement's weight:

    bt        -log sigmoid(delta)                     arXiv:2203.02155, ImageReward (2304.05977)
    soft      -p log sigmoid(delta) - (1 - p) log sigmoid(-delta)       PickScore (2305.01569)
    margin    -log sigmoid(delta - (2 p - 1) margin)                    VideoAlign (2501.13918)
    scaled    -(2 p - 1) log sigmoid(delta)
    btt       Bradley-Terry with ties, theta          VideoAlign, Rao and Kupper (1967)
    listwise  Plackett-Luce over K ranked images
    loss = sum(w L) / sum(w)

Deviations from the papers' code:
1. The loss is a mean: HPSv2 (2306.09341) sums over the batch, VideoAlign divides by all judgements,
   also by those without a label.
2. Cosine decay after the warm-up for all; PickScore and VideoAlign stay constant.
3. ImageReward freezes up to the first tensor of the first trained layer, here up to that layer.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lit_align.algorithms.checkpoint import describe
from lit_align.algorithms.choices import check_choice
from lit_align.functional import reward_modeling as F
from lit_align.functional.noise import sample_keys
from lit_align.metrics.moments import RewardMoments
from lit_align.metrics.preference_accuracy import Calibration, TieAwareAccuracy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PreferenceBatch

LossType = Literal["bt", "btt", "soft", "margin", "scaled", "listwise"]
_TAKE_TIES = ("btt", "soft", "listwise")


class RewardModeling(LightningModule):
    """Train a `LearnedReward` on judgements.

    Every validation standardises the reward by the mean and spread of its scores of the validation
    images; a checkpoint holds those of the last validation before it.

    Args:
        reward: A `LearnedReward`: with `raw`, `set_trainable`, `standardise`, `options`.
        loss_type: See the module.
        theta: Of "btt", above 1.
        margin: Of "margin", not negative.
        lr: Peak learning rate of AdamW; cosine decay to 0 over the run.
        weight_decay: Of AdamW.
        warmup_steps: Optimiser steps of linear warm-up.
        freeze: Share of each encoder's layers that stay as they are, or "tower" for all.
        seed: Decides the dropout of the head "mlp".

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        reward: RewardModule,
        loss_type: LossType = "bt",
        theta: float = 5.0,
        margin: float = 0.57,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        freeze: float | Literal["tower"] = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check_choice("loss_type", loss_type, LossType)
        if theta <= 1 or margin < 0:
            raise ValueError(f"`theta` must be above 1, `margin` from 0, got {theta}, {margin}.")
        if not callable(set_trainable := getattr(reward, "set_trainable", None)):
            raise ValueError(f"`reward` must be a LearnedReward, got {type(reward).__name__}.")
        set_trainable(freeze)
        self.reward: Any = reward
        self.loss_type, self.theta, self.margin, self.seed = loss_type, theta, margin, seed
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.accuracy, self.calibration = TieAwareAccuracy(), Calibration()
        self.moments = RewardMoments(["raw"])

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the loss [B] of each judgement.

        Args:
            scores: Raw scores [B, K].
            labels: [B, K], see `PreferenceBatch`; ValueError if the loss is for K = 2 only.
        """
        if self.loss_type == "listwise":
            return F.plackett_luce(scores, F.ranks_of(labels))
        if scores.shape[1] != 2:
            raise ValueError(
                f"`loss_type` {self.loss_type!r} is for pairs, got {scores.shape[1]} images to a "
                "judgement; use 'listwise', or `unit: pairs` of the data module."
            )
        delta, p = F.judged_pairs(scores, labels)
        if self.loss_type == "btt":
            return F.bradley_terry_ties(delta, p, self.theta)
        if self.loss_type == "soft":
            return F.bradley_terry(delta, p)
        delta, gap = (2 * p - 1).sign() * delta, (2 * p - 1).abs()
        if self.loss_type == "scaled":
            return F.scaled_bradley_terry(delta, gap)
        return F.bradley_terry(delta - gap * self.margin if self.loss_type == "margin" else delta)

    def _ties(self, labels: Tensor) -> Tensor:
        """Return the judgements [B] that are ties, if the loss says nothing about them."""
        return (labels[:, 0] == labels[:, 1]) & (self.loss_type not in _TAKE_TIES)

    def score(self, batch: PreferenceBatch, dropout: bool = False) -> Tensor:
        """Return the raw scores [B, K] of a batch; ValueError if these are no comparisons."""
        if batch.images.ndim != 5 or batch.images.shape[1] < 2:
            raise ValueError(
                "A reward model learns from two or more images of a prompt, `images` [B, K, 3, H, "
                f"W], got {list(batch.images.shape)}."
            )
        count, places = batch.images.shape[:2]
        prompts = [prompt for prompt in batch.prompts for _ in range(places)]
        key = ("dropout", self.seed, self.global_step, batch.positions.tolist())
        keys = sample_keys(*key, places).flatten() if dropout else None
        scores: Tensor = self.reward.raw(batch.images.flatten(0, 1), prompts, keys)
        return scores.view(count, places)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Return the weighted mean loss over the batch of all processes; ties may be refused."""
        scores = self.score(batch, dropout=True)
        if ties := int(self._ties(batch.labels).sum()):
            raise ValueError(
                f"{ties} of the batch's {len(batch)} judgements are ties, which `loss_type` "
                f"{self.loss_type!r} says nothing about; use 'soft' or 'btt', or leave them out "
                "(`ties: drop` of the data module)."
            )
        losses = self.losses(scores, batch.labels)
        total = self.trainer.strategy.reduce(batch.weights.sum(), reduce_op="sum")
        # Lightning averages gradients over processes, and a sum is wanted.
        loss = F.masked_mean(losses, batch.weights, total) * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the scale of a cosine in its range."""
        self.reward.clamp_logit_scale()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Collect scores; the loss leaves out ties that it says nothing about."""
        batch = batch.select((batch.weights > 0).nonzero()[:, 0])  # 0 fills a process's share
        if not len(batch):
            return
        scores = self.score(batch)
        judged = F.judged_pairs(scores, batch.labels)
        self.accuracy.update(*judged)
        self.calibration.update(*judged)
        self.moments.update(scores[F.ranks_of(batch.labels) > 0][:, None])
        weights = batch.weights.masked_fill(self._ties(batch.labels), 0.0)
        loss = F.masked_mean(self.losses(scores, batch.labels), weights)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the measures of all processes and standardise the reward."""
        moments = self.moments.compute()
        found = {**self.accuracy.compute(), "ece": self.calibration.compute()["ece"]}
        for name in ("accuracy", "accuracy_with_ties", "tie_threshold", "ece"):
            self.log(f"val/{name}", found[name].float())
        if not self.trainer.sanity_checking and moments["std"] > 0:
            self.reward.standardise(moments["mean"], moments["std"])
        for metric in (self.accuracy, self.calibration, self.moments):
            metric.reset()

    def configure_optimizers(self) -> Any:
        """Return AdamW with linear warm-up and cosine decay."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)
        total, warmup = int(self.trainer.estimated_stepping_batches), self.warmup_steps

        def factor(step: int) -> float:
            done = (step - warmup) / max(1, total - warmup)
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            return (step + 1) / (warmup + 1) if step < warmup else cosine

        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what opens the reward without this module, and no network as hyperparameter."""
        identity = {"method": type(self).__name__}
        checkpoint["lit_align"] = {**describe(identity), "reward": self.reward.options()}
        given = checkpoint.get("hyper_parameters", {}).items()
        checkpoint["hyper_parameters"] = {n: v for n, v in given if not isinstance(v, nn.Module)}

    def save_pretrained(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Write the reward's folder."""
        self.reward.save_pretrained(path, dtype)
