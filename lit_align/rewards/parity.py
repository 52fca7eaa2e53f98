"""Statistical parity: the images of a prompt should show every class equally often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_align.rewards.base import Metadata, RewardModule, granularity_of

_REACHED = 1e-9  # distances below are rounding; any other one of counts is far larger
_SUM_TOLERANCE = 1e-3


class Classifier(Protocol):
    """What `DistributionParity` asks of its classifier."""

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None) -> Tensor:
        """Return the class scores of images.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B prompts: an image whose prompt states the class says nothing about parity.
            metadata: What is known of each prompt, B entries.

        Returns:
            [B, K] floating point, K > 1, of which only the largest of a row counts; a row of NaN
            for an image that has no class (no face found) or must not count.
        """


class DistributionParity(RewardModule):
    """Minus the statistical parity, ``-SP = -||p - t||_2`` (arXiv:2401.12244, Sec. 4.2).

    p are the shares of the classes among the classified images of a group or a batch, t their
    target. The others get NaN and do not count. Range [-sqrt((K - 1) / K), 0] for a uniform
    target.

    With `credit: shared` all images of a group get this number, as in the paper: the advantages
    must then compare groups, so normalise them over the batch. With `credit: marginal` an image
    of class a also gets what more mass on its class would gain, see `marginal_parity`: positive
    for rare classes, negative for frequent ones, 0 on average, so that means are still -SP.

    Args:
        classifier: See `Classifier`: `ShapesColor` in the shapes world; of people
            `skin_tone.SkinToneClassifier` and `skin_tone.ImageClassifier`, whose errors differ
            between groups.
        scope: "group" counts the images of one prompt draw (all images if there are no groups),
            "batch" those of the whole batch, over all processes.
        credit: "shared" or "marginal".
        target: Shares of the K classes, which sum to 1; uniform if None.

    Raises:
        ValueError: If an option is unknown, the target is no distribution, or all images of a
            batch would share one score.
    """

    def __init__(
        self,
        classifier: nn.Module,
        scope: Literal["group", "batch"] = "group",
        credit: Literal["shared", "marginal"] = "shared",
        target: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.granularity = granularity_of(scope)  # type: ignore[misc]
        if credit not in ("shared", "marginal"):
            raise ValueError(f"`credit` must be 'shared' or 'marginal', got {credit!r}.")
        if scope == "batch" and credit == "shared":
            raise ValueError(
                "`scope: batch` with `credit: shared` gives all images of a batch one score, from "
                "which nothing can be learned; use `credit: marginal`."
            )
        self.classifier = classifier.requires_grad_(False)
        self.scope, self.credit = scope, credit
        self.target = None if target is None else _distribution(target)
        self.eval()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores [B]; see the base class."""
        labels, classes = self._classify(images, prompts, metadata)
        target = _uniform(classes) if self.target is None else self.target
        if group_ids is None or self.scope == "batch":
            group_ids = labels.new_zeros(len(labels))
        names, groups = group_ids.to(labels.device).unique(return_inverse=True)
        # Unclassified images have label -1 and count nowhere.
        one_hot = (labels[:, None] == torch.arange(classes, device=labels.device)).double()
        counts = one_hot.new_zeros(len(names), classes).index_add_(0, groups, one_hot)
        if self.scope == "batch" and dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        scores = -parity(counts, target)[groups]
        if self.credit == "marginal":
            scores = scores + marginal_parity(counts, target)[groups, labels.clamp(min=0)]
        return scores.where(labels >= 0, torch.nan).float()

    def _classify(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None
    ) -> tuple[Tensor, int]:
        """Return the labels [B] on the images' device, -1 for none, and the number of classes."""
        classify: Classifier = self.classifier
        scores = classify(images, prompts, metadata)
        name = type(self.classifier).__name__
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(
                f"The classifier {name} must return floating point class scores, got {kind}; turn "
                "labels into scores by a one-hot encoding."
            )
        if scores.ndim != 2 or len(scores) != len(images) or scores.shape[1] < 2:
            raise ValueError(
                f"The classifier {name} must return scores [{len(images)}, K] of K > 1 classes, "
                f"got {list(scores.shape)}."
            )
        if self.target is not None and scores.shape[1] != len(self.target):
            raise ValueError(
                f"`target` has {len(self.target)} shares, but the classifier {name} knows "
                f"{scores.shape[1]} classes; give one share per class."
            )
        labels = scores.argmax(dim=1).where(~scores.isnan().any(dim=1), -1)
        return labels.to(images.device), scores.shape[1]


def parity(counts: Tensor, target: Tensor) -> Tensor:
    """Return ``SP = ||counts / sum(counts) - target||_2`` (arXiv:2401.12244, Sec. 4.2).

    Args:
        counts: [..., K], images per class.
        target: [K], shares that sum to 1.

    Returns:
        [...] float64 in [0, sqrt(2)]; NaN where nothing was counted.
    """
    distance: Tensor = torch.linalg.vector_norm(_deviation(counts, target), dim=-1)
    return distance


def marginal_parity(counts: Tensor, target: Tensor) -> Tensor:
    """Return each class's share of -SP: its derivative with respect to mass on the class.

    Mass e more on class a gives the shares ``p(e) = (p + e u_a) / (1 + e)`` with the unit vector
    u_a, which start as ``dp/de = u_a - p``. With ``dSP/dp_k = (p_k - t_k) / SP``

        r_a = -dSP/de = -((p_a - t_a) - sum_k p_k (p_k - t_k)) / SP

    One image more among n is e = 1 / n. Weighted by the shares p the r_a sum to 0: the average
    image has nothing to gain. At parity, where SP has a kink, they are 0.

    Args:
        counts: [..., K], images per class.
        target: [K], shares that sum to 1.

    Returns:
        [..., K] float64 in [-sqrt(2), sqrt(2)]; NaN where nothing was counted.
    """
    deviation = _deviation(counts, target)
    shares = deviation + target.to(deviation)
    distance = torch.linalg.vector_norm(deviation, dim=-1, keepdim=True)
    average = (shares * deviation).sum(dim=-1, keepdim=True)
    gains: Tensor = (average - deviation) / distance.clamp(min=_REACHED)
    return gains.masked_fill(distance < _REACHED, 0.0)


def _deviation(counts: Tensor, target: Tensor) -> Tensor:
    counts = counts.double()
    return counts / counts.sum(dim=-1, keepdim=True) - target.to(counts)


def _uniform(classes: int) -> Tensor:
    return torch.full((classes,), 1 / classes, dtype=torch.float64)


def _distribution(target: list[float]) -> Tensor:
    shares = torch.tensor(target, dtype=torch.float64)
    total = float(shares.sum())
    if not bool((shares >= 0).all()) or not abs(total - 1) <= _SUM_TOLERANCE:
        raise ValueError(
            f"`target` must be shares of at least 0 that sum to 1, got {target}, which sum to "
            f"{total:.6g}; divide them by their sum."
        )
    return shares / total
