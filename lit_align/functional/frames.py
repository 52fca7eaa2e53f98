"""Videos for what looks at images: frame by frame, or side by side."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def over_frames(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return ``function(images)``; of videos the mean over frames.

    Args:
        function: Images [N, 3, H, W] to values [N, ...].
        images: [B, 3, H, W], or videos [B, F, 3, H, W].

    Returns:
        [B, ...]; NaN where a value of one of the frames is NaN.
    """
    if images.ndim == 4:
        return function(images)
    values = function(images.flatten(0, 1))
    return values.view(*images.shape[:2], *values.shape[1:]).mean(dim=1)


def side_by_side(images: Tensor) -> Tensor:
    """Return images [B, 3, H, W] as they are, and videos [B, F, 3, H, W] as [B, 3, H, F W]."""
    if images.ndim == 4:
        return images
    return images.permute(0, 2, 3, 1, 4).flatten(3)
