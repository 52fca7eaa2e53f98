"""The clipped surrogate of PPO and its diagnostics."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return ``max(-A rho, -A clip(rho, 1 - eps, 1 + eps))`` per item.

    Eq. (7) of arXiv:1707.06347, negated.

    Args:
        ratio: rho [N], new over old probability.
        advantages: A [N].
        clip_range: eps, positive.

    Returns:
        [N].
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def approx_kl(log_ratio: Tensor) -> Tensor:
    """Return ``rho - 1 - log rho`` per item [N], which averages to KL(old || new)."""
    return log_ratio.expm1() - log_ratio


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """Return 1 where ``|rho - 1| > eps``, else 0, per item [N]."""
    return ((ratio - 1).abs() > clip_range).float()


def ratio_diagnostics(log_ratio: Tensor, clip_range: float) -> dict[str, Tensor]:
    """Return the means of ratio, `approx_kl` and `clip_fraction`, as they are logged.

    Args:
        log_ratio: log rho [N].
        clip_range: eps, positive.
    """
    ratio = log_ratio.exp()
    return {
        "train/ratio": ratio.mean(),
        "train/approx_kl": approx_kl(log_ratio).mean(),
        "train/clip_fraction": clip_fraction(ratio, clip_range).mean(),
    }
