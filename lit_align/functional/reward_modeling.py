"""Losses and measures of reward models that learn from comparisons.

With delta = r(c, x_first) - r(c, x_second) and p the probability that the first is preferred:

Bradley-Terry    P(first) = sigmoid(delta)
with ties        P(first) = sigmoid(delta - log theta), P(second) = sigmoid(-delta - log theta)
                 P(tie) = (theta^2 - 1) P(first) P(second);  Rao and Kupper (1967), arXiv:2501.13918
Plackett-Luce    P(order) = prod_i exp r_(i) / sum_{j >= i} exp r_(j)

Losses are per judgement and keep the dtype of the scores; `masked_mean` averages them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(delta: Tensor, labels: Tensor | float = 1.0, margin: float = 0.0) -> Tensor:
    """Return ``-p log sigmoid(delta - m) - (1 - p) log sigmoid(-delta - m)``, of any shape.

    log 2 at delta = 0 without margin, whatever p; its derivative at p = 1 is -sigmoid(-delta).
    PickScore (arXiv:2305.01569) takes log 2 off ties, a constant that is left out here.

    Args:
        delta: Differences of scores, first minus second.
        labels: p in [0, 1], like `delta` or one number.
        margin: m, not negative: by how much the preferred score should be higher.
    """
    wins, losses = F.logsigmoid(delta - margin), F.logsigmoid(-delta - margin)
    return -(labels * wins + (1 - labels) * losses)


def scaled_bradley_terry(delta: Tensor, gaps: Tensor) -> Tensor:
    """Return ``-gap log sigmoid(delta)``: clear preferences count more.

    Args:
        delta: Differences of scores, preferred minus rejected.
        gaps: How clear each preference is, not negative, like `delta`.
    """
    return -gaps * F.logsigmoid(delta)


def bradley_terry_ties(delta: Tensor, labels: Tensor | float, theta: float = 5.0) -> Tensor:
    """Return the negative log-likelihood of Bradley-Terry with ties.

    ``-log P(first)`` for p = 1, ``-log P(tie)`` for p = 1/2, which is even in delta, ``-log
    P(second)`` for p = 0, and linear in between: p = 3/4 is half a win and half a tie.

    Args:
        delta: Differences of scores, first minus second, of any shape.
        labels: p in [0, 1], like `delta` or one number.
        theta: Above 1; the larger, the more ties. As it goes to 1, the loss of a preference goes
            to `bradley_terry` and that of a tie to infinity.

    Raises:
        ValueError: If theta is not above 1.
    """
    shift = _log_theta(theta)
    labels = torch.as_tensor(labels, dtype=delta.dtype, device=delta.device)
    wins, losses = -F.logsigmoid(delta - shift), -F.logsigmoid(-delta - shift)
    ties = wins + losses - math.log(theta**2 - 1)
    return (
        (2 * labels - 1).relu() * wins
        + (1 - (2 * labels - 1).abs()) * ties
        + (1 - 2 * labels).relu() * losses
    )


def tie_probabilities(delta: Tensor, theta: float) -> Tensor:
    """Return P(first), P(tie) and P(second) of Bradley-Terry with ties [..., 3]; they sum to 1.

    Args:
        delta: Differences of scores [...], first minus second.
        theta: Above 1.

    Raises:
        ValueError: If theta is not above 1.
    """
    shift = _log_theta(theta)
    win, loss = (delta - shift).sigmoid(), (-delta - shift).sigmoid()
    return torch.stack([win, (theta**2 - 1) * win * loss, loss], dim=-1)


def _log_theta(theta: float) -> float:
    if theta <= 1:
        raise ValueError(f"`theta` must be above 1, got {theta}; without ties use 'bt'.")
    return math.log(theta)


def plackett_luce(scores: Tensor, ranks: Tensor) -> Tensor:
    """Return the negative log-likelihood [B] of rankings.

    The sum over places of ``logsumexp(scores of this rank and worse) - score``. Equal ranks stand
    in each other's sums (Breslow's treatment of ties), so that their order does not matter. For
    two images it is `bradley_terry`, and twice that with p = 1/2 if they are tied.

    Args:
        scores: [B, K].
        ranks: [B, K] from 1, the best; 0 where there is no image.
    """
    present = ranks > 0
    rivals = (ranks[:, None, :] >= ranks[:, :, None]) & present[:, None, :]  # [B, K, of K others]
    # Absent images see all scores, so that no sum is empty; their terms are dropped.
    rivals = rivals | ~present[:, :, None]
    exceeded = scores[:, None, :].masked_fill(~rivals, -torch.inf).logsumexp(dim=2) - scores
    return exceeded.masked_fill(~present, 0.0).sum(dim=1)


def ranking_pairs(scores: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return delta [P] and p [P] of all pairs of rankings.

    Args:
        scores: [B, K].
        ranks: [B, K] from 1, the best, equal for a tie; 0 where there is no image.
    """
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1, device=scores.device)
    one, other = ranks[:, first], ranks[:, second]
    there = (one > 0) & (other > 0)
    labels = ((other - one).sign() + 1) / 2  # the lower rank is the better
    return (scores[:, first] - scores[:, second])[there], labels[there].to(scores.dtype)


def judged_pairs(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return delta [P] and p [P] of B pairs, or of all pairs of B rankings.

    Args:
        scores: [B, K].
        labels: [B, K]; of pairs (K = 2) the probabilities, else the ranks.
    """
    if scores.shape[1] == 2:
        return scores[:, 0] - scores[:, 1], labels[:, 0].to(scores.dtype)
    return ranking_pairs(scores, labels)


def ranks_of(labels: Tensor) -> Tensor:
    """Return ranks [B, K]; those of pairs are 1 and 2 by their probabilities, or 1 and 1.

    Args:
        labels: [B, K]; of pairs (K = 2) the probabilities, else the ranks.
    """
    if labels.shape[1] != 2:
        return labels
    return 1 + (labels < labels.flip(1)).to(labels.dtype)


def masked_mean(losses: Tensor, weights: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Return ``sum(w L) / sum w``; 0 if nothing counts.

    What has weight 0 gets no gradient and does not dilute the mean, whatever its loss is.

    Args:
        losses: L, of any shape.
        weights: w, like `losses`, not negative; a mask is as good.
        total: The sum of weights to divide by, if others hold a part of the batch.
    """
    weights = weights.to(losses.dtype)
    kept = torch.where(weights > 0, losses, torch.zeros_like(losses))
    total = torch.as_tensor(weights.sum() if total is None else total).to(losses)
    return (weights * kept).sum() / total.where(total > 0, 1.0)


class TieThreshold(NamedTuple):
    """The half-width of the band of ties, and the accuracy that it gives."""

    threshold: float
    accuracy: float


def tie_threshold(delta: Tensor, labels: Tensor) -> TieThreshold:
    """Return the threshold eps that maximises the accuracy with ties, the smallest of equals.

    ``|delta| <= eps`` predicts a tie; the accuracy is the share of correctly predicted wins,
    losses and ties, (C + T) / N of arXiv:2501.13918. Candidates are 0 and every |delta|. NaN
    without judgements.

    Args:
        delta: Differences of scores [N], first minus second.
        labels: p in [0, 1] [N]; 1/2 is a tie.
    """
    if not len(delta):
        return TieThreshold(math.nan, math.nan)
    size, order = delta.double().abs().sort()
    truth = (labels.double() - 0.5).sign()[order]
    agrees = (truth != 0) & (delta.double().sign()[order] == truth)
    candidates = torch.cat([size.new_zeros(1), size]).unique()
    below = torch.searchsorted(size, candidates, right=True)  # judgements called ties
    zero = size.new_zeros(1)
    ties = torch.cat([zero, (truth == 0).double().cumsum(0)])[below]
    decided = agrees.double().sum() - torch.cat([zero, agrees.double().cumsum(0)])[below]
    accuracy = (ties + decided) / len(delta)
    best = int((accuracy == accuracy.max()).nonzero()[0])
    return TieThreshold(float(candidates[best]), float(accuracy[best]))


def accuracy_with_ties(delta: Tensor, labels: Tensor, threshold: float) -> float:
    """Return the share of outcomes predicted with a given threshold; NaN without judgements.

    Args:
        delta: Differences of scores [N], first minus second.
        labels: p in [0, 1] [N]; 1/2 is a tie.
        threshold: At or below it |delta| predicts a tie.
    """
    predicted = delta.sign() * (delta.abs() > threshold)
    return float((predicted == (labels - 0.5).sign()).double().mean())


def accuracy_without_ties(delta: Tensor, labels: Tensor) -> float:
    """Return the share of preferences whose side delta takes, C / (C + D); NaN if there are none.

    Judged ties are left out; delta = 0 is half right.

    Args:
        delta: Differences of scores [N], first minus second.
        labels: p in [0, 1] [N]; 1/2 is a tie.
    """
    truth = (labels.double() - 0.5).sign()
    agreement = (1 + delta.double().sign() * truth) / 2
    return float(agreement[truth != 0].mean())


class Reliability(NamedTuple):
    """Per bin of confidence [M]: mean confidence, accuracy (NaN if empty), and judgements."""

    confidence: Tensor
    accuracy: Tensor
    judgements: Tensor

    def error(self) -> float:
        """Return the expected calibration error ``sum_b n_b / N |confidence - accuracy|``."""
        gap = (self.confidence - self.accuracy).abs().nan_to_num()
        return float((self.judgements * gap).sum() / self.judgements.sum())


def reliability(delta: Tensor, labels: Tensor, bins: int = 10) -> Reliability:
    """Return how often a model that is so sure is right, in equal bins of [1/2, 1], in float64.

    The confidence is sigmoid(|delta|). A judgement agrees to p or 1 - p, so that half of a tie is
    right whatever is predicted.

    Args:
        delta: Differences of scores [N], first minus second.
        labels: p in [0, 1] [N].
        bins: M, at least 1.
    """
    delta, labels = delta.double(), labels.double()
    confidence = delta.abs().sigmoid()
    agreement = torch.where(delta == 0, 0.5, torch.where(delta > 0, labels, 1 - labels))
    places = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    count = places.bincount(minlength=bins)
    sums = [
        confidence.new_zeros(bins).index_add(0, places, values)
        for values in (confidence, agreement)
    ]
    return Reliability(sums[0] / count, sums[1] / count, count)
