"""How well scores tell which of two images was preferred, ties included, and how sure they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_align.functional.reward_modeling import (
    accuracy_with_ties,
    accuracy_without_ties,
    reliability,
    tie_threshold,
)
from lit_align.metrics.base import SampleMetric


class _JudgedPairs(SampleMetric):
    """Keeps differences of scores and the labels of pairs; pairs with a NaN are left out."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_samples("deltas", torch.float64)
        self.add_samples("labels", torch.float64)

    def update(self, delta: Tensor, labels: Tensor) -> None:
        """Add judgements.

        Args:
            delta: Differences of scores [N], first minus second.
            labels: Probabilities [N] that the first is preferred; 1/2 is a tie.

        Raises:
            ValueError: If the shapes differ or are not [N], or labels lie outside [0, 1].
        """
        if delta.ndim != 1 or delta.shape != labels.shape:
            shapes = [list(delta.shape), list(labels.shape)]
            raise ValueError(f"`delta` and `labels` must both be [N], got {shapes}.")
        if ((labels < 0) | (labels > 1)).any():
            raise ValueError(f"`labels` must lie in [0, 1], got {labels.tolist()[:8]}.")
        valid = ~(delta.isnan() | labels.isnan())
        self.append_samples("deltas", delta[valid])
        self.append_samples("labels", labels[valid])


class TieAwareAccuracy(_JudgedPairs):
    """Accuracy of the sign of delta, with and without ties (arXiv:2501.13918).

    Args:
        threshold: At or below it |delta| predicts a tie; by default the best one for the judgements
            seen, which flatters a small set.
        kwargs: See `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, threshold: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if threshold is not None and threshold < 0:
            raise ValueError(f"`threshold` must not be negative, got {threshold}.")
        self.threshold = threshold

    def compute(self) -> dict[str, Tensor]:
        """Return float64 scalars, NaN without judgements.

        Returns:
            "accuracy" of the preferences, ties left out; "accuracy_with_ties" of all outcomes;
            "tie_threshold"; "count" of judgements.
        """
        delta, labels = self.samples("deltas"), self.samples("labels")
        if self.threshold is None:
            threshold, with_ties = tie_threshold(delta, labels)
        else:
            threshold = self.threshold
            with_ties = accuracy_with_ties(delta, labels, threshold)
        found = {
            "accuracy": accuracy_without_ties(delta, labels),
            "accuracy_with_ties": with_ties,
            "tie_threshold": threshold,
            "count": float(len(delta)),
        }
        return {name: delta.new_tensor(value) for name, value in found.items()}


class Calibration(_JudgedPairs):
    """Is a model that is 80 % sure right in 80 % of the cases? Confidence is sigmoid(|delta|).

    Args:
        bins: Of confidence, equally wide over [1/2, 1].
        kwargs: See `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"`bins` must be at least 1, got {bins}.")
        self.bins = bins

    def compute(self) -> dict[str, Tensor]:
        """Return float64 tensors.

        Returns:
            "ece", the expected calibration error, NaN without judgements; "confidence", "accuracy"
            and "judgements" of the bins [M], the first two NaN in empty ones.
        """
        curve = reliability(self.samples("deltas"), self.samples("labels"), self.bins)
        error = curve.error() if curve.judgements.sum() else math.nan
        return {"ece": curve.confidence.new_tensor(error), **curve._asdict()}
