"""Colourfulness of natural images (Hasler and Suesstrunk, 2003)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lit_align.rewards.base import Metadata, RewardModule

_VARIANCE_FLOOR = 1e-8  # keeps the square root's gradient finite on flat images


class Colorfulness(RewardModule):
    """Spread and strength of the opponent colours.

    ``sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)`` with ``rg = R - G`` and
    ``yb = (R + G) / 2 - B``, on pixels in [0, 1]. Published values use [0, 255].

    Range [0, 1.4]; 0 for gray images. Source: D. Hasler, S. Suesstrunk, "Measuring colorfulness
    in natural images", Human Vision and Electronic Imaging VIII, 2003.
    """

    differentiable = True

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the colourfulness [B]; see the base class."""
        red, green, blue = images.float().flatten(2).unbind(1)
        rg, yb = red - green, (red + green) / 2 - blue
        spread = rg.var(dim=1, correction=0) + yb.var(dim=1, correction=0)
        offset = rg.mean(dim=1).square() + yb.mean(dim=1).square()
        return (spread + _VARIANCE_FLOOR).sqrt() + 0.3 * (offset + _VARIANCE_FLOOR).sqrt()
