"""Who is better: the best and worst of a prompt's images, and the wins that labels imply."""

from __future__ import annotations

import torch
from torch import Tensor


def best_and_worst(rewards: Tensor, gap_min: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the best and the worst image of each prompt, and which is which.

    Args:
        rewards: [P, K], NaN where an image could not be scored.
        gap_min: Prompts whose best and worst differ by no more teach nothing.

    Returns:
        Their places [P, 2] int64, increasing, and their signs [P, 2]: +1 for the better, -1 for
        the worse, both NaN where the prompt teaches nothing.
    """
    unknown = rewards.isnan()
    best = rewards.masked_fill(unknown, -torch.inf).argmax(1)
    worst = rewards.masked_fill(unknown, torch.inf).argmin(1)
    low, high = rewards.gather(1, worst[:, None]), rewards.gather(1, best[:, None])
    teaches = (high - low > gap_min) & (best != worst)[:, None]
    # Any two will do of those that teach nothing, but they must be two.
    worst = worst.where(teaches[:, 0], (best + 1) % rewards.shape[1])
    places, order = torch.stack([best, worst], dim=1).sort(1)
    signs = (1.0 - 2.0 * order).where(teaches, torch.nan)
    return places, signs


def winner_first(values: Tensor, signs: Tensor) -> Tensor:
    """Return values [P, 2, ...] with the better image's first.

    Args:
        values: In the order of the signs.
        signs: [P, 2], the better image's the larger.
    """
    swapped = values.flip(1)
    flip = (signs[:, 0] < signs[:, 1]).view(-1, *[1] * (values.ndim - 1))
    return swapped.where(flip, values)


def win_shares(labels: Tensor) -> Tensor:
    """Return the share of its rivals that each image beats [B, K], a tie counting half.

    Args:
        labels: [B, 2] probabilities of pairs, or [B, K] ranks from 1 with 0 for no image.

    Returns:
        [B, K]; 0 where there is no image.
    """
    if labels.shape[1] == 2:
        return labels
    present = labels > 0
    better = (labels[:, :, None] < labels[:, None]) + 0.5 * (labels[:, :, None] == labels[:, None])
    both = present[:, :, None] & present[:, None]
    own = torch.eye(labels.shape[1], device=labels.device, dtype=torch.bool)
    wins = (better * (both & ~own)).sum(2)
    return wins / (present.sum(1, keepdim=True) - 1).clamp(min=1)
