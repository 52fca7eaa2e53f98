"""Size of the JPEG file, the reward of the first policy-gradient experiments on images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from lit_align.rewards.base import Metadata, RewardModule, uint8_images

_QUALITY = 95


class JPEGCompressibility(RewardModule):
    """Minus the JPEG size in kB (1000 bytes), or plus it if `negative`.

    Quality 95, 4:2:0, no Huffman optimisation, as in arXiv:2305.13301, App. C. Sizes depend on
    the resolution: a black 512x512 image is 4.7 kB, uniform noise 308 kB.

    Args:
        negative: Reward large files (incompressibility).
    """

    def __init__(self, negative: bool = False) -> None:
        super().__init__()
        self.negative = negative

    @property
    def name(self) -> str:
        """JPEGCompressibility or JPEGIncompressibility."""
        return "JPEGIncompressibility" if self.negative else "JPEGCompressibility"

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the signed size [B] in kB; see the base class."""
        sizes = [_jpeg_bytes(pixels.numpy()) / 1000 for pixels in uint8_images(images)]
        signed = torch.tensor(sizes, dtype=torch.float32, device=images.device)
        return signed if self.negative else -signed


def _jpeg_bytes(pixels: object) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(  # type: ignore[arg-type]
        buffer, "JPEG", quality=_QUALITY, subsampling=2, optimize=False
    )
    return buffer.tell()
