"""Means, spreads and correlations of several rewards, when some images could not be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_align.metrics.base import PreciseMetric

# Squared float32 resolution, about: a variance this small relative to the mean square is rounding.
_CONSTANT = 1e-13


class RewardMoments(PreciseMetric):
    """Pairwise-complete moments of R rewards.

    A mean or a standard deviation is over the images that the reward could score, a correlation
    over those that both rewards could. With V [B, R] the mask of scores that are not NaN and X
    [B, R] the scores, 0 where they are NaN, the sums V'V, X'V, (X * X)'V and X'X are all it takes.

    Args:
        names: Of the rewards, R of them.
        kwargs: See `torchmetrics.Metric`.
    """

    count: Tensor
    total: Tensor
    square: Tensor
    outer: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"`names` must be distinct and at least one, got {list(names)}.")
        self.names = tuple(names)
        for state in ("count", "total", "square", "outer"):
            zeros = torch.zeros(len(names), len(names), dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def update(self, rewards: Tensor) -> None:
        """Add scores.

        Args:
            rewards: [B, R]; NaN where an image could not be scored.

        Raises:
            ValueError: If there are not R columns.
        """
        if rewards.ndim != 2 or rewards.shape[1] != len(self.names):
            raise ValueError(
                f"`rewards` must be [B, {len(self.names)}], one column for each of "
                f"{list(self.names)}, got {list(rewards.shape)}."
            )
        rewards = rewards.detach().to(self.count.device, torch.float64)
        valid = (~rewards.isnan()).double()
        values = rewards.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        self.count = self.count + valid.T @ valid
        self.total = self.total + values.T @ valid
        self.square = self.square + (values * values).T @ valid
        self.outer = self.outer + values.T @ values

    def compute(self) -> dict[str, Tensor]:
        """Return the moments in float64, NaN where they are undefined.

        Returns:
            "mean" [R]; "std" [R], unbiased; "count" [R], scored images; "correlation" [R, R],
            Pearson's. torchmetrics squeezes them to scalars if R = 1.
        """
        # [i, j]: of reward i, over the images that reward j could score too.
        spread = self.square - self.total**2 / self.count
        spread = spread.where(spread.isnan() | (spread > _CONSTANT * self.square), 0)
        covariance = self.outer - self.total * self.total.T / self.count
        correlation = covariance / (spread * spread.T).sqrt()
        undefined = (spread == 0) | (spread.T == 0)
        correlation = correlation.clamp(-1, 1).masked_fill(undefined, torch.nan)
        count = self.count.diagonal()
        variance = spread.diagonal() / (count - 1)  # 0 / 0 with a single score
        return {
            "mean": self.total.diagonal() / count,
            "std": variance.sqrt(),
            "correlation": correlation,
            "count": count,
        }
