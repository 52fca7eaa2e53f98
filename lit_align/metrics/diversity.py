"""How different are the images of one prompt?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_align.metrics.base import Embedder, EmbeddingMetric, normalized

_SMALLEST = 1e-12  # eigenvalues up to here are rounding, and contribute nothing to the entropy


class _GroupMetric(EmbeddingMetric):
    def __init__(self, embedder: Embedder | None = None, **kwargs: Any) -> None:
        super().__init__(embedder, **kwargs)
        self.add_samples("features", torch.float32)
        self.add_samples("group_ids", torch.int64)

    def update(self, images: Tensor, group_ids: Tensor | None = None) -> None:
        """Add images.

        Args:
            images: [B, 3, H, W], or embeddings [B, D] if there is no embedder.
            group_ids: [B] integers, equal for images of one prompt, on all processes; None puts
                all images in group 0.

        Raises:
            ValueError: If there is not one group per image.
        """
        if group_ids is None:
            group_ids = torch.zeros(len(images), dtype=torch.int64)
        if group_ids.shape != (len(images),):
            raise ValueError(
                f"`group_ids` must be [{len(images)}], one per image, got {list(group_ids.shape)}."
            )
        self.append_embeddings("features", images)
        self.append_samples("group_ids", group_ids)

    def _groups(self) -> list[Tensor]:
        """Return the normalised embeddings [n, D] of each group."""
        embeddings, ids = normalized(self.embeddings("features")), self.samples("group_ids")
        return [embeddings[ids == group] for group in ids.unique()]

    def _mean(self, values: list[Tensor]) -> Tensor:
        if not values:
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        return torch.stack(values).mean()


class PairwiseDiversity(_GroupMetric):
    """Mean over groups of the mean of 1 - cos over pairs of a group, in [0, 2].

    With embeddings of DreamSim it is the diversity of arXiv:2306.09344. 0 if all images of a prompt
    are the same, 1 if their embeddings are orthogonal.

    Args:
        embedder: Images [B, 3, H, W] to embeddings [B, D]; None if embeddings are given.
        kwargs: See `torchmetrics.Metric`.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the diversity, a float64 scalar; NaN if no group has two images."""
        return self._mean([pairwise_diversity(g) for g in self._groups() if len(g) > 1])


class VendiScore(_GroupMetric):
    """Mean over groups of the effective number of different images, in [1, n] (arXiv:2210.02410).

    It depends on the number n of images in a group: compare at equal n.

    Args:
        embedder: Images [B, 3, H, W] to embeddings [B, D]; None if embeddings are given.
        kwargs: See `torchmetrics.Metric`.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the score, a float64 scalar; NaN if there is no image."""
        return self._mean([vendi_score(group) for group in self._groups()])


def pairwise_diversity(embeddings: Tensor) -> Tensor:
    """Return the mean of 1 - cos over pairs of normalised embeddings [n, D], n > 1, a scalar."""
    n = len(embeddings)
    # The sum over all ordered pairs is |sum of e|^2; a row with itself is not a pair.
    pairs = embeddings.sum(0).square().sum() - embeddings.square().sum()
    return 1 - pairs / (n * (n - 1))


def vendi_score(embeddings: Tensor) -> Tensor:
    """Return exp(entropy of the eigenvalues of E E' / n), a scalar in [1, n] (arXiv:2210.02410).

    E' E / n has the same eigenvalues but for zeros, and is used if it is smaller.

    Args:
        embeddings: E [n, D], normalised.
    """
    n, width = embeddings.shape
    gram = embeddings.T @ embeddings if width < n else embeddings @ embeddings.T
    eigenvalues = torch.linalg.eigvalsh(gram / n)
    eigenvalues = eigenvalues[eigenvalues > _SMALLEST]
    return torch.exp(-(eigenvalues * eigenvalues.log()).sum())
