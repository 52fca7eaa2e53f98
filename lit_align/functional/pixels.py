"""What image encoders do to pixels before they look: resize, crop or pad, normalise.

In torch and with gradient, unlike the processors of transformers, which detach and rescale floats
once more. Bicubic with antialiasing differs from PIL's on uint8 images by the rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

# Of CLIP's training images, by channel (arXiv:2103.00020); BLIP takes them over.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    """Return images [..., 3, height, width] in [0, 1], bicubic; see the module."""
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=antialias)
    return resized.clamp(0, 1)  # bicubic interpolation overshoots at edges


def centre_square(images: Tensor, size: int) -> Tensor:
    """Return images [B, 3, size, size]: the short side scaled to `size`, the long one cropped."""
    short = min(images.shape[-2:])
    height, width = (side * size // short for side in images.shape[-2:])
    images = resize(images, height, width)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def padded_square(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Return images [B, 3, size, size]: the long side scaled to `size`, black beside the other."""
    long = max(images.shape[-2:])
    height, width = (max(1, round(side * size / long)) for side in images.shape[-2:])
    images = resize(images, height, width, antialias)
    above, left = ((size - side) // 2 for side in images.shape[-2:])
    below, right = size - images.shape[-2] - above, size - images.shape[-1] - left
    return F.pad(images, (left, right, above, below))


def normalise(
    images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Return ``(images - mean) / std`` by channel, for images [..., 3, H, W]."""
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - shift) / scale
