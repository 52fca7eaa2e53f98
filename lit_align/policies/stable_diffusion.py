"""Stable Diffusion 1.x and 2.x: a U-Net with epsilon- or v-prediction and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline
from torch import Tensor

from lit_align.policies.base import Conditioning, DiffusionPolicy
from lit_align.policies.features import FeatureTaps
from lit_align.schedulers import StochasticDDIM


class StableDiffusionPolicy(DiffusionPolicy):
    """A `StableDiffusionPipeline` as a policy; the prediction type is the scheduler's."""

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    denoiser_name = "unet"
    default_scheduler = StochasticDDIM
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the U-Net's output [B, 4, H, W]; see the base class."""
        dtype = self.denoiser.dtype
        embeds = conditioning["prompt_embeds"].to(dtype)
        output: Tensor = self.denoiser(latents.to(dtype), timesteps, embeds, return_dict=False)[0]
        return output

    def _encode(self, prompts: Sequence[str], with_negative: bool) -> Conditioning:
        """Return `(negative_)prompt_embeds` [B, tokens, width]."""
        embeds, negative = self.pipeline.encode_prompt(
            list(prompts), self.device, 1, do_classifier_free_guidance=with_negative
        )
        negatives = {"negative_prompt_embeds": negative} if with_negative else {}
        return {"prompt_embeds": embeds, **negatives}

    def feature_taps(self) -> FeatureTaps:
        """Return what enters the first block, leaves the last, and the sinusoids of the time."""
        width = self.denoiser.config["block_out_channels"][0]
        last = f"up_blocks.{len(self.denoiser.up_blocks) - 1}"
        return FeatureTaps("conv_in", last, "time_proj", width, width)
