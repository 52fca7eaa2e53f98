"""Between pixels and latents: sizes, and the VAE."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.policies.sampling import with_checkpoint


class LatentSpace(nn.Module):
    """What a policy knows of its images and latents: their sizes, and how to turn one into another.

    Attributes:
        image_size: Height and width of the images in pixels.
    """

    pipeline: Any
    denoiser: Any
    vae: Any
    image_size: tuple[int, int]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along each side."""
        factor: int = self.pipeline.vae_scale_factor
        return factor

    @property
    def native_size(self) -> int:
        """Side of the images in pixels that the pipeline draws unless told otherwise."""
        side: int = self.denoiser.config["sample_size"] * self.vae_scale_factor
        return side

    def set_image_size(self, size: int | tuple[int, int] | None) -> None:
        """Choose the size of the images: a side, height and width, or None for the native one.

        Raises:
            ValueError: If the network cannot take it.
        """
        size = self.native_size if size is None else size
        self.image_size = (size, size) if isinstance(size, int) else (size[0], size[1])
        self.latent_shape()

    @property
    def patch_size(self) -> int:
        """Side of the square of latents that the network takes as one token."""
        return self.denoiser.config.get("patch_size") or 1

    @property
    def call_options(self) -> dict[str, Any]:
        """What the plain pipeline's call needs beside steps and guidance for the same images."""
        height, width = self.image_size
        return {} if height == width == self.native_size else {"height": height, "width": width}

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Return (C, H, W) of one sample's latents for an image of that size in pixels.

        Raises:
            ValueError: If the network cannot take that size.
        """
        factor = self.vae_scale_factor
        sides, unit = (height or self.image_size[0], width or self.image_size[1]), self.patch_size
        if any(side < 1 or side % (factor * unit) for side in sides):
            raise ValueError(
                f"Sides of images must be multiples of {factor * unit} pixels, got {sides}; "
                "change `image_size`."
            )
        return self.latent_channels, sides[0] // factor, sides[1] // factor

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        channels: int = self.vae.config["latent_channels"]
        return channels

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of what `decode` returns of one sample: (3, H, W), or (F, 3, H, W) of a video."""
        return 3, *self.image_size

    def render(self, latents: Tensor) -> Tensor:
        """Return all that the latents show, where `decode` returns what rewards look at."""
        return self.decode(latents)

    def decode(self, latents: Tensor, batch_size: int | None = None, clamp: bool = True) -> Tensor:
        """Return images [B, 3, H, W] in [0, 1], float32, or videos [B, F, 3, H, W].

        Args:
            latents: [B, C, H, W], of videos [B, C, f, H, W].
            batch_size: Decode so many at a time, and where there is a gradient keep none of the
                decoder's states: backward decodes again.
            clamp: Turn it off for pixels as the decoder gives them, some a little beyond [0, 1].
        """
        parts = latents.split(batch_size or len(latents))
        call = self._decode if batch_size is None else partial(with_checkpoint, self._decode)
        images = torch.cat([call(part) for part in parts])
        return images.clamp(0, 1) if clamp else images

    def _decode(self, latents: Tensor) -> Tensor:
        shift = self.vae.config.get("shift_factor") or 0.0
        scaled = (latents / self.vae.config["scaling_factor"] + shift).to(self.vae.dtype)
        return self.vae.decode(scaled).sample.float() / 2 + 0.5

    def encode(self, images: Tensor) -> Tensor:
        """Return latents [B, C, H, W] float32 of images [B, 3, H, W] in [0, 1]."""
        config = self.vae.config
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        return (posterior.mode().float() - (config.get("shift_factor") or 0.0)) * config[
            "scaling_factor"
        ]
