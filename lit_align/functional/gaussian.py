"""Isotropic Gaussian transitions: log-density and divergence, averaged over an element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def at_least_float32(values: Tensor) -> Tensor:
    """Return the values in float32, or in float64 if that is what they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] so that it broadcasts over `like` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def mean_square(values: Tensor) -> Tensor:
    """Return the mean of the squares [B] of values [B, ...]."""
    return values.square().flatten(1).mean(1)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of N(mean, std^2 I), averaged over the non-batch dimensions.

    ``-(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2``

    The average instead of the sum makes an importance ratio the d-th root of the true one; it
    keeps ratios of high-dimensional latents finite (Eq. (9) of arXiv:2305.13301, as computed by
    all published implementations).

    Args:
        x: Point [B, ...]; no gradient flows into it.
        mean: [B, ...].
        std: [B], positive.

    Returns:
        [B], float32 or better.
    """
    std = per_sample(std, mean)
    z = (at_least_float32(x.detach()) - at_least_float32(mean)) / std
    density = -0.5 * z.square() - std.log() - _HALF_LOG_TWO_PI
    return density.flatten(1).mean(1)


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """Return KL(N(mean, std^2 I) || N(other_mean, std^2 I)), averaged over the dimensions.

    Args:
        mean: [B, ...].
        other_mean: [B, ...].
        std: [B], positive; both Gaussians share it.

    Returns:
        [B], float32 or better, in nats per dimension.
    """
    gap = at_least_float32(mean) - at_least_float32(other_mean)
    return mean_square(gap) / (2 * std.square())


def sample_gaussian(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Return ``mean + std * noise`` with std [B] broadcast over mean [B, ...]."""
    return torch.addcmul(mean, per_sample(std, mean), noise)
