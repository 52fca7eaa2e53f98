"""How often is the aligned model's image better than the base model's?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_align.metrics.base import SampleMetric

_CHUNK = 1_000_000  # resampled prompts in memory at once
_EXACT = 1000  # comparisons up to which the sign test is exact


class WinRate(SampleMetric):
    """Share of paired comparisons that the aligned model wins, in [0, 1]; a tie is half a win.

    The mean over prompts of the mean over a prompt's pairs. The interval is a percentile bootstrap
    that resamples prompts, as images of one prompt are not independent. Pairs with a NaN are left
    out.

    Args:
        replicates: Of the bootstrap.
        seed: Of the bootstrap's own generator.
        confidence: Of the interval, in (0, 1).
        kwargs: See `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(
        self,
        replicates: int = 10_000,
        seed: int = 0,
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if replicates < 1:
            raise ValueError(f"`replicates` must be at least 1, got {replicates}.")
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` must lie in (0, 1), got {confidence}.")
        self.replicates, self.seed, self.confidence = replicates, seed, confidence
        self.add_samples("wins", torch.float32)
        self.add_samples("prompt_ids", torch.int64)

    def update(self, aligned: Tensor, base: Tensor, prompt_ids: Tensor) -> None:
        """Add pairs.

        Args:
            aligned: Scores [B] of the aligned model's images.
            base: Scores [B] of the base model's, same prompts and noise.
            prompt_ids: [B] integers, equal for images of one prompt, on all processes.

        Raises:
            ValueError: If the shapes differ or are not [B].
        """
        if aligned.ndim != 1 or not aligned.shape == base.shape == prompt_ids.shape:
            shapes = [list(part.shape) for part in (aligned, base, prompt_ids)]
            raise ValueError(f"`aligned`, `base` and `prompt_ids` must all be [B], got {shapes}.")
        aligned, base = (scores.detach().to(self.device) for scores in (aligned, base))
        valid = ~(aligned.isnan() | base.isnan())
        wins = (aligned > base).float() + 0.5 * (aligned == base).float()
        self.append_samples("wins", wins[valid])
        self.append_samples("prompt_ids", prompt_ids.to(self.device)[valid])

    def compute(self) -> dict[str, Tensor]:
        """Return float64 scalars; all but the count are NaN if there is no pair.

        Returns:
            "rate"; "low" and "high", its confidence interval; "p_value" of `sign_test` over all
            pairs, which takes them as independent; "count" of pairs.
        """
        wins, ids = self.samples("wins").double(), self.samples("prompt_ids")
        rate, interval, p_value = math.nan, (math.nan, math.nan), math.nan
        if len(wins):
            _, prompts = ids.unique(return_inverse=True)
            means = _group_means(wins, prompts)
            rate = float(means.mean())
            interval = cluster_bootstrap(means, self.replicates, self.seed, self.confidence)
            p_value = sign_test(int((wins == 1).sum()), int((wins == 0).sum()))
        keys = ("rate", "low", "high", "p_value", "count")
        values = (rate, *interval, p_value, float(len(wins)))
        return {key: wins.new_tensor(value) for key, value in zip(keys, values, strict=True)}


def _group_means(values: Tensor, groups: Tensor) -> Tensor:
    """Return the means [P] of values [N] by group [N], numbered 0 .. P - 1."""
    sums = values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)
    return sums / groups.bincount()


def cluster_bootstrap(
    means: Tensor, replicates: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of the mean of `means` when whole clusters are resampled.

    Args:
        means: [P], one per cluster, such as a prompt.
        replicates: Of the bootstrap.
        seed: Of its own generator; the global one is not touched.
        confidence: Of the interval, in (0, 1).
    """
    means = means.cpu().double()  # the same draws wherever the scores live
    clusters = len(means)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // clusters)
    parts = []
    for start in range(0, replicates, rows):
        size = (min(rows, replicates - start), clusters)
        drawn = torch.randint(clusters, size, generator=generator)  # multinomial weights, spelt out
        parts.append(means[drawn].mean(1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(parts).quantile(means.new_tensor([tail, 1 - tail])).tolist()
    return low, high


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of as many wins and losses if both were equally likely.

    Exact for at most 1000 comparisons, then a normal approximation with continuity correction.
    Ties count for neither side; without any comparison the p-value is 1.

    Args:
        wins: At least 0.
        losses: At least 0.
    """
    total = wins + losses
    if total <= _EXACT:
        tail = sum(math.comb(total, k) for k in range(min(wins, losses) + 1))
        return float(min(1.0, 2 * tail / 2**total))
    return math.erfc(max(0, abs(wins - losses) - 1) / math.sqrt(2 * total))
