"""Flux.1 (dev, schnell): a transformer over packed latents, trained by flow matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from lit_align.policies import loading
from lit_align.policies.base import Conditioning, DiffusionPolicy
from lit_align.policies.features import FeatureTaps
from lit_align.policies.sampling import CFGGrad
from lit_align.schedulers import StochasticFlowMatch

_LONGEST = 512  # T5 tokens that the plain pipeline reads by default, as Flux.1-dev does


class FluxPolicy(DiffusionPolicy):
    """A `FluxPipeline` as a policy.

    Its guidance is an input of the network (guidance distillation, arXiv:2210.03142) and no second
    branch, so that it costs nothing and there are no negative prompts. A network without that
    input, as schnell's, takes `guidance_scale: 1` only.

    The times of Flux.1-dev depend on the number of image tokens: a policy has those of its
    `image_size`.
    """

    pipeline_class = FluxPipeline
    denoiser_name = "transformer"
    default_scheduler = StochasticFlowMatch
    # The projections of both streams and, by the first three, of the blocks where they are joined.
    default_lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    @property
    def native_size(self) -> int:
        """See the base class; the network itself has no size."""
        side: int = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side

    @property
    def patch_size(self) -> int:
        """Latents are packed 2x2 before the network, whose own patches are 1x1."""
        return 2

    @property
    def max_sequence_length(self) -> int:
        """Number of T5 tokens: 512, and 256 for a network without guidance, as schnell's card."""
        longest = _LONGEST if self.denoiser.config["guidance_embeds"] else _LONGEST // 2
        return min(longest, self.pipeline.tokenizer_2.model_max_length)

    @property
    def call_options(self) -> dict[str, Any]:
        """See the base class."""
        tokens = {"max_sequence_length": self.max_sequence_length}
        return super().call_options | (tokens if self.max_sequence_length != _LONGEST else {})

    def _take_parts(self, pipeline: Any) -> None:
        """Also keep cuDNN's attention out of this process; see the base class.

        On an H100, torch 2.11 with cuDNN 9.19 takes it by default, and its backward gives this
        network's queries and keys wrong gradients in 16 bits (a cosine of 0.2 with the right ones,
        or NaN), or reads memory that is not its own; the other kernels are right. The switch holds
        for the process, as checkpointed blocks run again where no context of ours reaches.
        """
        super()._take_parts(pipeline)
        torch.backends.cuda.enable_cudnn_sdp(False)

    def pipeline_scheduler(self) -> Any:
        """Return the pipeline's scheduler with its times for images of `image_size`."""
        scheduler = _FluxTimes.from_config(self.pipeline.scheduler.config)
        scheduler.image_tokens = math.prod(self.latent_shape()[1:]) // self.patch_size**2
        return scheduler

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Return (C, H, W) of one sample's latents; see the base class.

        Raises:
            ValueError: Also if the times are those of another size.
        """
        shape, own = super().latent_shape(height, width), super().latent_shape()
        depends = self.pipeline.scheduler.config.get("use_dynamic_shifting")
        if depends and math.prod(shape) != math.prod(own):
            raise ValueError(
                f"The times of this Flux depend on the size of images, which is {self.image_size}; "
                f"for another, here height {height} and width {width}, make a policy with that "
                "`image_size`."
            )
        return shape

    def branches(self, guidance_scale: float) -> int:
        """Return 1: guidance is an input of the network.

        Raises:
            ValueError: If the network has no such input and the scale is not 1.
        """
        if guidance_scale != 1 and not self.denoiser.config["guidance_embeds"]:
            raise ValueError(
                f"{self.pretrained} has no guidance; set `guidance_scale: 1`, got {guidance_scale}."
            )
        return 1

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        *,
        cfg_grad: CFGGrad = "both",
    ) -> Tensor:
        """Return the velocity [B, C, H, W] float32 under the guidance; see the base class."""
        self.branches(guidance_scale)
        guidance = torch.full_like(timesteps, guidance_scale, dtype=torch.float32)
        output: Tensor = self(latents, timesteps, {**conditioning, "guidance": guidance})
        return output.float()

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the predicted velocity [B, C, H, W]; see the base class.

        Args:
            latents: [B, C, H, W].
            timesteps: [B] in [0, 1000].
            conditioning: What `encode_prompt` returned, and "guidance" [B] unless it is 1.
        """
        dtype, sides = self.denoiser.dtype, [side // 2 for side in latents.shape[2:]]
        tokens = F.pixel_unshuffle(latents.to(dtype), 2).flatten(2).transpose(1, 2)
        guidance = conditioning.get("guidance", torch.ones_like(timesteps, dtype=torch.float32))
        embeds = conditioning["prompt_embeds"].to(dtype)
        axes = (torch.arange(side, device=latents.device) for side in sides)
        places = F.pad(torch.cartesian_prod(*axes).float(), (1, 0))  # [tokens, 3]: 0, row, column
        output: Tensor = self.denoiser(
            hidden_states=tokens,
            timestep=timesteps / 1000,  # which it multiplies by 1000 again
            guidance=guidance if self.denoiser.config["guidance_embeds"] else None,
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
            img_ids=places,
            return_dict=False,
        )[0]
        return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, sides), 2)

    def _encode(self, prompts: Sequence[str], with_negative: bool) -> Conditioning:
        """Return T5's `prompt_embeds` [B, tokens, width] and CLIP's `pooled_prompt_embeds`."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def feature_taps(self) -> FeatureTaps:
        """Return embedded tokens, normalised states of the last block, and time and text."""
        width = self.denoiser.inner_dim
        return FeatureTaps("x_embedder", "norm_out", "time_text_embed", width, width)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return which prompts are longer than what any of the text encoders reads."""
        return loading.truncated(self.pipeline, prompts, self.max_sequence_length)


class _FluxTimes(FlowMatchEulerDiscreteScheduler):
    """Flux's scheduler, asked for its times as `FluxPipeline` asks it.

    They go from 1 down to 1 / T before the shift, which depends on the image tokens if the
    configuration says `use_dynamic_shifting`.
    """

    config: Any
    image_tokens: int

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(self.image_tokens, *(self.config[name] for name in names))
        sigmas = [1 - index / num_inference_steps for index in range(num_inference_steps)]
        ask: Any = super()
        ask.set_timesteps(sigmas=sigmas, mu=mu, device=device)
