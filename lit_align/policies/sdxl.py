"""Stable Diffusion XL and XL-Turbo: a U-Net that also sees pooled text and the image's size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from lit_align.policies.base import Conditioning
from lit_align.policies.stable_diffusion import StableDiffusionPolicy


class SDXLPolicy(StableDiffusionPolicy):
    """A `StableDiffusionXLPipeline` as a policy (arXiv:2307.01952).

    Beside the text, the network is told the size of the image before cropping, the corner of the
    crop, and the size after it. As the plain pipeline does by default, it hears that nothing was
    cropped: (H, W, 0, 0, H, W) of the image that is drawn.

    XL-Turbo (arXiv:2311.17042) takes `guidance_scale: 1` and one to four steps. The plain pipeline
    draws its images by ancestral Euler steps, which are random. Here, as for every U-Net, steps are
    DDIM's at the same times: random with eta = 1, and otherwise along the probability-flow ODE.

    The released VAE overflows in float16 and says so in its configuration (`force_upcast`): it
    works in float32, whatever `dtype` and the trainer's precision are for the rest.

    Raises:
        ValueError: Also for networks of another kind: refiners, latent consistency models, and
            those of normalised latents.
    """

    pipeline_class = StableDiffusionXLPipeline

    def _check_pipeline(self) -> None:
        config = self.denoiser.config
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        sizes = config["projection_class_embeddings_input_dim"] - pooled
        if sizes != 6 * config["addition_time_embed_dim"]:
            raise ValueError(
                f"{self.pretrained} takes other sizes than the six of SDXL, as its refiner does, "
                "which cannot start from noise; use the base model."
            )
        if config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"The guidance of {self.pretrained} is an input of its network, as in latent "
                "consistency models, which have no policy; use the model it was distilled from."
            )
        if self.vae.config.get("latents_mean") is not None:
            raise ValueError(
                f"{self.pretrained} normalises latents by `latents_mean`, as models trained by EDM "
                "do, whose sampler has no stochastic form here."
            )

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the U-Net's output [B, 4, H, W]; see the base class."""
        dtype = self.denoiser.dtype
        height, width = (side * self.vae_scale_factor for side in latents.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=latents.device)
        output: Tensor = self.denoiser(
            latents.to(dtype),
            timesteps,
            conditioning["prompt_embeds"].to(dtype),
            added_cond_kwargs={
                "text_embeds": conditioning["pooled_prompt_embeds"].to(dtype),
                "time_ids": sizes.expand(len(latents), -1),
            },
            return_dict=False,
        )[0]
        return output

    def _encode(self, prompts: Sequence[str], with_negative: bool) -> Conditioning:
        """Return `(negative_)prompt_embeds` [B, tokens, width] and pooled ones [B, width].

        Where the pipeline says `force_zeros_for_empty_prompt`, the negative ones are zero.
        """
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=with_negative
        )
        encoded = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if with_negative:
            encoded["negative_prompt_embeds"] = negative
            encoded["negative_pooled_prompt_embeds"] = negative_pooled
        return encoded

    def encode(self, images: Tensor) -> Tensor:
        """Return latents [B, C, H, W] float32 of images [B, 3, H, W] in [0, 1]."""
        with self._vae_in_its_precision():
            return super().encode(images)

    def _decode(self, latents: Tensor) -> Tensor:
        with self._vae_in_its_precision():
            return super()._decode(latents)

    def _cast_frozen(self, dtype: torch.dtype) -> None:
        for network in (self.denoiser, self.text_encoders):
            nn.Module.to(network, dtype)
        # Never cast to 16 bits and back, which would round its weights.
        nn.Module.to(self.vae, torch.float32 if self.vae.config["force_upcast"] else dtype)

    @contextmanager
    def _vae_in_its_precision(self) -> Iterator[None]:
        """Run a VAE that needs it in float32, also one that others have cast."""
        if not self.vae.config["force_upcast"]:
            yield
            return
        dtype = self.vae.dtype
        nn.Module.to(self.vae, torch.float32)
        with torch.autocast(self.device.type, enabled=False):
            yield
        # Backward will still read the weights that forward used.
        if not torch.is_grad_enabled():
            nn.Module.to(self.vae, dtype)
