"""The clipped surrogate of PPO, its diagnostics, and other ratios and trust regions."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_align.functional.gaussian import per_sample


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


def normalised_log_ratio(
    next_latents: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor
) -> Tensor:
    """Return ``mean(z D)`` [B] with ``z = (x' - mu_old) / S`` and ``D = mu - mu_old``.

    It is ``S (log r + mean(D^2) / (2 S^2))``, Eq. (8) of arXiv:2510.22319. Over z it averages to 0
    whatever the policy, where log r averages to less, and its spread does not grow as S shrinks.

    Args:
        next_latents: x' [B, ...], drawn from N(mu_old, S^2 I).
        mean: mu [B, ...].
        old_mean: mu_old [B, ...].
        std: S [B], positive.
    """
    noise = (next_latents - old_mean) / per_sample(std, mean)
    return (noise * (mean - old_mean)).flatten(1).mean(1)


def leaves_trust_region(
    divergence: Tensor, ratio: Tensor, advantages: Tensor, threshold: float
) -> Tensor:
    """Return where a policy is beyond the threshold and asked to go further (arXiv:2606.11025).

    Args:
        divergence: From the policy that sampled [N].
        ratio: rho [N], new over old probability.
        advantages: A [N].
        threshold: Of the divergence.

    Returns:
        [N] boolean.
    """
    return (divergence > threshold) & (advantages * (ratio - 1) > 0)


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
