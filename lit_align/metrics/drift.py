"""Simple statistics of images that move when a reward is exploited.

Aesthetic rewards drift to saturated colours, preference rewards to fine texture, compressibility
to flat images; these need no network, and are plain to read beside any reward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_align.functional.frames import over_frames
from lit_align.metrics.base import PreciseMetric

STATISTICS = ("luminance", "saturation", "high_frequency", "saturated_pixels")

_REC709 = (0.2126, 0.7152, 0.0722)
_HALF_NYQUIST = 0.25  # cycles per pixel
_FLAT = 1e-12  # variance of the luminance up to which an image is constant, in float32


class DriftStatistics(PreciseMetric):
    """Means over images of `image_statistics`, and of the size of latents.

    Args:
        kwargs: See `torchmetrics.Metric`.
    """

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = (*STATISTICS, "latent_norm")
        for state in ("total", "count"):
            zeros = torch.zeros(len(self.names), dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")

    def update(self, images: Tensor, latents: Tensor | None = None) -> None:
        """Add images.

        Args:
            images: [B, 3, H, W] in [0, 1], or videos [B, F, 3, H, W], whose frames count alike.
            latents: [B, ...], those they were decoded from, if known.

        Raises:
            ValueError: If the images have another shape.
        """
        statistics = dict(zip(STATISTICS, over_frames(_stacked, images).unbind(1), strict=True))
        if latents is not None:
            statistics["latent_norm"] = latents.detach().float().flatten(1).square().mean(1).sqrt()
        known = [float(name in statistics) for name in self.names]
        sums = [
            statistics[name].to(self.total).sum()
            if name in statistics
            else self.total.new_zeros(())
            for name in self.names
        ]
        self.total = self.total + torch.stack(sums)
        self.count = self.count + self.count.new_tensor(known) * len(images)

    def compute(self) -> dict[str, Tensor]:
        """Return float64 scalars: those of `image_statistics`, and "latent_norm".

        The latter is the root mean square of a sample's latents. NaN where nothing was given.
        """
        return dict(zip(self.names, self.total / self.count, strict=True))


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Return statistics of each image, [B] float32 in [0, 1].

    Args:
        images: [B, 3, H, W] in [0, 1].

    Returns:
        "luminance": Mean of the Rec. 709 luma.
        "saturation": Mean HSV saturation, (max - min) / max over channels, 0 for black.
        "high_frequency": Share of the energy of the luma, its mean removed, at more than half
            the Nyquist frequency (0.25 cycles per pixel, in any direction); 0 if it is constant.
        "saturated_pixels": Share of pixels with a channel at 0 or 255 in 8 bits.

    Raises:
        ValueError: If the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"`images` must be [B, 3, H, W], got {list(images.shape)}.")
    images = images.detach().float()
    weights = images.new_tensor(_REC709)[:, None, None]
    luminance = (images * weights).sum(1)  # [B, H, W]
    brightest, darkest = images.amax(1), images.amin(1)
    saturation = (brightest - darkest) / brightest.where(brightest > 0, 1)
    levels = (images * 255).round()
    clipped = ((levels <= 0) | (levels >= 255)).any(1)
    values = (
        luminance.mean((1, 2)),
        saturation.mean((1, 2)),
        _high_frequency(luminance),
        clipped.float().mean((1, 2)),
    )
    return dict(zip(STATISTICS, values, strict=True))


def _stacked(images: Tensor) -> Tensor:
    """Return the `image_statistics` [B, 4]."""
    return torch.stack(list(image_statistics(images).values()), dim=1)


def _high_frequency(luminance: Tensor) -> Tensor:
    """Return the share of energy beyond half the Nyquist frequency [B] of [B, H, W]."""
    centred = luminance - luminance.mean((1, 2), keepdim=True)
    height, width = centred.shape[1:]
    energy = torch.fft.fft2(centred).abs().square()
    vertical = torch.fft.fftfreq(height, device=energy.device)
    horizontal = torch.fft.fftfreq(width, device=energy.device)
    high = torch.hypot(vertical[:, None], horizontal) > _HALF_NYQUIST
    flat = centred.square().mean((1, 2)) <= _FLAT
    total = energy.sum((1, 2)).masked_fill(flat, 1)
    share: Tensor = (energy * high).sum((1, 2)) / total
    return share.masked_fill(flat, 0)
