"""Stable Diffusion 3 and 3.5: a multimodal transformer trained by flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from lit_align.policies.base import MAX_TEXT_TOKENS, Conditioning, DiffusionPolicy
from lit_align.policies.features import FeatureTaps
from lit_align.schedulers import StochasticFlowMatch


class SD3Policy(DiffusionPolicy):
    """A `StableDiffusion3Pipeline` as a policy.

    Without a T5 encoder no zero tokens stand in for its output (`max_sequence_length=0`): diffusers
    pads 256 by default, which costs time and changes images.
    """

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    default_scheduler = StochasticFlowMatch
    # The projections of both streams, as in Flow-GRPO (arXiv:2505.05470).
    default_lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    @property
    def max_sequence_length(self) -> int:
        """Number of T5 tokens, 0 without a T5 encoder."""
        return 0 if self.pipeline.text_encoder_3 is None else MAX_TEXT_TOKENS

    @property
    def call_options(self) -> dict[str, Any]:
        """See the base class."""
        tokens = {} if self.max_sequence_length else {"max_sequence_length": 0}
        return super().call_options | tokens

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the predicted velocity [B, C, H, W]; see the base class."""
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(
            hidden_states=latents.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return output

    def _encode(self, prompts: Sequence[str], with_negative: bool) -> Conditioning:
        """Return `(negative_)prompt_embeds` [B, tokens, width] and pooled ones [B, width]."""
        embeds, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=with_negative,
            max_sequence_length=self.max_sequence_length,
        )
        encoded = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if with_negative:
            encoded["negative_prompt_embeds"] = negative
            encoded["negative_pooled_prompt_embeds"] = negative_pooled
        return encoded

    def feature_taps(self) -> FeatureTaps:
        """Return embedded patches, normalised states of the last block, and time and text."""
        width = self.denoiser.inner_dim
        return FeatureTaps("pos_embed", "norm_out", "time_text_embed", width, width)
