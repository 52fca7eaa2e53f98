"""How often does a policy denoise what people preferred better than its reference does?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_align.metrics.base import SampleMetric


class ImplicitAccuracy(SampleMetric):
    """Share of pairs whose implicit rewards are in the order of the labels, in [0, 1].

    A pair with equal implicit rewards counts half; one that was labelled a tie is left out.

    Args:
        bins: Number of equal intervals of noise levels whose accuracy is told apart: near-clean
            images are told apart by other things than nearly pure noise.
        kwargs: See `torchmetrics.Metric`.

    Raises:
        ValueError: If `bins` is not positive.
    """

    higher_is_better = True

    def __init__(self, bins: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"`bins` must be positive, got {bins}.")
        self.bins = bins
        for name in ("margins", "levels", "labels"):
            self.add_samples(name, torch.float32)

    def update(self, margins: Tensor, levels: Tensor, labels: Tensor) -> None:
        """Add pairs.

        Args:
            margins: z [B], the preferred image's implicit reward less the other's.
            levels: Shares of noise [B], in [0, 1].
            labels: Probabilities [B] that the first image is preferred.

        Raises:
            ValueError: If the shapes differ or are not [B].
        """
        if margins.ndim != 1 or not margins.shape == levels.shape == labels.shape:
            shapes = [list(part.shape) for part in (margins, levels, labels)]
            raise ValueError(f"`margins`, `levels` and `labels` must all be [B], got {shapes}.")
        for name, values in (("margins", margins), ("levels", levels), ("labels", labels)):
            self.append_samples(name, values)

    def compute(self) -> dict[str, Tensor]:
        """Return float64 scalars; NaN where there is no pair.

        Returns:
            "implicit_acc", "implicit_acc/<k>" of the k-th interval of noise levels from the least,
            and "margin", the mean of z.
        """
        labels = self.samples("labels")
        decided = labels != 0.5
        margins = self.samples("margins")[decided].double()
        margins = torch.where(labels[decided] > 0.5, margins, -margins)
        right = (margins > 0).double() + 0.5 * (margins == 0).double()
        place = (self.samples("levels")[decided] * self.bins).long().clamp(max=self.bins - 1)
        result = {"implicit_acc": right.mean(), "margin": margins.mean()}
        for k in range(self.bins):
            result[f"implicit_acc/{k}"] = right[place == k].mean()
        return result
