"""Beta distributions over (0, 1): density, divergence, and draws that belong to a sample.

    p(x) = x^(alpha - 1) (1 - x)^(beta - 1) / B(alpha, beta)

with one mode inside (0, 1) where alpha and beta are above 1. All arguments broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def beta_mode(alpha: Tensor, beta: Tensor) -> Tensor:
    """Return ``(alpha - 1) / (alpha + beta - 2)``, for alpha and beta above 1."""
    return (alpha - 1) / (alpha + beta - 2)


def beta_around(mode: Tensor, concentration: float) -> tuple[Tensor, Tensor]:
    """Return alpha and beta of the distribution with that mode and ``alpha + beta``.

    Args:
        mode: In (0, 1).
        concentration: Above 2.
    """
    return mode * (concentration - 2) + 1, (1 - mode) * (concentration - 2) + 1


def beta_log_prob(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return the log-density at x in (0, 1)."""
    return (alpha - 1) * x.log() + (beta - 1) * (-x).log1p() - _log_normaliser(alpha, beta)


def beta_entropy(alpha: Tensor, beta: Tensor) -> Tensor:
    """Return the differential entropy in nats; it is negative where the density is high."""
    return (
        _log_normaliser(alpha, beta)
        - (alpha - 1) * alpha.digamma()
        - (beta - 1) * beta.digamma()
        + (alpha + beta - 2) * (alpha + beta).digamma()
    )


def beta_kl(alpha: Tensor, beta: Tensor, other_alpha: Tensor, other_beta: Tensor) -> Tensor:
    """Return KL(Beta(alpha, beta) || Beta(other_alpha, other_beta)) in nats.

    With psi the digamma function and a', b' the other's parameters:
    ``ln B(a', b') - ln B(a, b) + (a - a') psi(a) + (b - b') psi(b) + (a' - a + b' - b) psi(a + b)``
    """
    gap_alpha, gap_beta = alpha - other_alpha, beta - other_beta
    return (
        _log_normaliser(other_alpha, other_beta)
        - _log_normaliser(alpha, beta)
        + gap_alpha * alpha.digamma()
        + gap_beta * beta.digamma()
        - (gap_alpha + gap_beta) * (alpha + beta).digamma()
    )


def sample_beta(alpha: Tensor, beta: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one value per sample [B] float32, row i from `generators[i]`.

    numpy draws it on the CPU, as torch draws no Beta from a generator.

    Args:
        alpha: [B], positive.
        beta: [B], positive.
        generators: B of them; each gives the seed of its draw.
    """
    draws = [
        np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator))).beta(a, b)
        for a, b, generator in zip(alpha.tolist(), beta.tolist(), generators, strict=True)
    ]
    return torch.tensor(draws, dtype=torch.float32, device=alpha.device)


def _log_normaliser(alpha: Tensor, beta: Tensor) -> Tensor:
    return alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()
