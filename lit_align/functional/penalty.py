"""Penalties on the divergence from a reference model, per action, and their controller."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_align.functional.policy_gradient import approx_kl

PenaltyKind = Literal["kl", "abs", "square", "clip", "approx", "js"]
_MAX_CHANGE = 0.2  # of the adaptive coefficient, as a share of its error


def divergence_penalty(log_ratio: Tensor, kind: PenaltyKind) -> Tensor:
    """Return an estimate of the divergence from the reference at actions of the policy.

    With ``d = log p - log p_ref``:

        kl      d                           unbiased for KL(p || p_ref)
        abs     |d|
        square  d^2 / 2
        clip    max(d, 0)
        approx  exp(-d) - 1 + d             unbiased for KL(p || p_ref), never negative
        js      (u log u - (1 + u) log((1 + u) / 2)) / 2 with u = exp(-d), unbiased for the
                Jensen-Shannon divergence, in [0, log 2] on average

    Args:
        log_ratio: d, any shape; of log-densities that are averaged over elements, the penalty is
            one per element too.
        kind: One of the above.

    Returns:
        As `log_ratio`.
    """
    if kind == "kl":
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind == "square":
        return log_ratio.square() / 2
    if kind == "clip":
        return log_ratio.clamp(min=0)
    if kind == "approx":
        return approx_kl(-log_ratio)
    if kind == "js":
        u = (-log_ratio).exp()
        return (-log_ratio * u - (1 + u) * (torch.log1p(u) - math.log(2))) / 2
    raise ValueError(f"`kl_kind` must be kl, abs, square, clip, approx or js, got {kind!r}.")


class AdaptiveCoefficient:
    """A penalty's coefficient that steers the divergence to a target (arXiv:1909.08593, Sec. 2.2).

    ``value *= 1 + clip(divergence / target - 1, -0.2, 0.2) * samples / horizon``

    Args:
        initial: Its first value, not negative.
        target: The divergence to keep, positive; None for a constant coefficient.
        horizon: Samples over which an error is made good; positive.
    """

    def __init__(self, initial: float, target: float | None = None, horizon: float = 2000) -> None:
        if initial < 0 or horizon <= 0 or (target is not None and target <= 0):
            raise ValueError(
                "`initial` must not be negative, `target` and `horizon` must be positive, got "
                f"{initial}, {target} and {horizon}."
            )
        self.value, self.target, self.horizon = initial, target, horizon

    def update(self, divergence: float, samples: int) -> None:
        """Adapt to the mean divergence of so many samples."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1, -_MAX_CHANGE), _MAX_CHANGE)
            self.value *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Return the value."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the value."""
        self.value = state["value"]
