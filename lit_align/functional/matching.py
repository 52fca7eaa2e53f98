"""Errors of what a network predicts on noised samples, and their means over groups of them."""

from __future__ import annotations

from torch import Tensor

from lit_align.functional.gaussian import mean_square

_MIN_SCALE = 1e-5


def matching_error(prediction: Tensor, target: Tensor, normalise: bool) -> Tensor:
    """Return ``mean |p - target|^2`` [N] in float64, divided by ``sg[mean |p - target|]`` if asked.

    Args:
        prediction: p [N, ...].
        target: [N, ...].
        normalise: Bring errors of all sizes to one scale of gradients.
    """
    gap = prediction.double() - target.double()
    error = mean_square(gap)
    if not normalise:
        return error
    return error / gap.detach().abs().flatten(1).mean(1).clamp(min=_MIN_SCALE)


def good_share(advantages: Tensor, bound: float) -> Tensor:
    """Return how good samples are, ``1/2 + clip(A, +-c) / (2 c)``, in [0, 1].

    Args:
        advantages: A, of any shape.
        bound: c, positive.
    """
    return ((advantages / bound).clamp(-1, 1) + 1) / 2


def group_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of each group [P, 1], 0 where no member counts.

    Args:
        values: [P, G], of P groups of G members.
        weights: [P, G], not negative.
    """
    total = weights.sum(1, keepdim=True)
    return (weights * values).sum(1, keepdim=True) / total.where(total > 0, 1.0)
