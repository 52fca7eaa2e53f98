"""Wan 2.x text-to-video: a transformer over latent videos, trained by flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from lit_align.policies import loading
from lit_align.policies.base import Conditioning, DiffusionPolicy, SchedulerFactory
from lit_align.schedulers import StochasticFlowMatch

_LONGEST = 512  # UMT5 tokens that the plain pipeline reads
_NATIVE_SIZE = (480, 832)


class WanPolicy(DiffusionPolicy):
    """A `WanPipeline` as a policy: Wan 2.1, and those of Wan 2.2 with one network.

    Latents are [B, C, f, H, W]. `decode` returns videos [B, F, 3, H, W] in [0, 1], or images
    [B, 3, H, W] where there is a single frame. A reward of images scores each frame, and the mean
    is the video's.

    The VAE is causal in time: f latent frames decode to 4 (f - 1) + 1 frames, the first of them
    alone. So a reward of the first frame, or of the first few, needs the first latents only
    (`decode_latents`), which saves most of the memory of a reward's gradient and leaves motion to
    the model; gradient reaches the later latents through the network's attention alone.

    Args:
        pretrained, scheduler, train, lora_rank, lora_alpha, lora_targets, dtype,
        gradient_checkpointing, image_size, cache_text, offload_text_encoders: See the base class;
            images are 480 x 832 unless told.
        num_frames: F of the videos, 4 n + 1; 1 makes it a text-to-image model.
        decode_latents: Decode the first so many latent frames for rewards; None all of them.
        decode_frames: Of the decoded frames keep so many, evenly spaced from the first to the
            last; None all of them.

    Raises:
        ValueError: Also if the numbers of frames do not fit, or the pipeline has two networks.
    """

    pipeline_class = WanPipeline
    denoiser_name = "transformer"
    default_scheduler = StochasticFlowMatch
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(
        self,
        pretrained: str | DiffusionPipeline,
        scheduler: SchedulerFactory | None = None,
        train: Literal["lora", "full", "none"] = "lora",
        lora_rank: int = 4,
        lora_alpha: float | None = None,
        lora_targets: list[str] | None = None,
        dtype: loading.Dtype | None = "float32",
        gradient_checkpointing: bool = False,
        image_size: int | tuple[int, int] | None = None,
        num_frames: int = 81,
        decode_latents: int | None = None,
        decode_frames: int | None = None,
        cache_text: int = 0,
        offload_text_encoders: bool = False,
    ) -> None:
        # Set before the base class asks for shapes; plain numbers need no module.
        self.num_frames = num_frames
        self.decode_latents, self.decode_frames = decode_latents, decode_frames
        super().__init__(
            pretrained, scheduler, train, lora_rank, lora_alpha, lora_targets, dtype,
            gradient_checkpointing, image_size, cache_text, offload_text_encoders,
        )  # fmt: skip
        if self.pipeline.config.get("boundary_ratio") is not None:
            raise ValueError(
                f"{self.pretrained} has two networks, one for high and one for low noise, and a "
                "policy trains one; use Wan 2.1, or Wan2.2-TI2V-5B."
            )
        self._check_frames()

    def _check_frames(self) -> None:
        stride = self.pipeline.vae_scale_factor_temporal
        if self.num_frames < 1 or (self.num_frames - 1) % stride:
            raise ValueError(
                f"`num_frames` must be a multiple of {stride} and one, such as {stride * 4 + 1}, "
                f"got {self.num_frames}."
            )
        latents = self.latent_shape()[1]
        if self.decode_latents is not None and not 1 <= self.decode_latents <= latents:
            raise ValueError(
                f"`decode_latents` must lie in [1, {latents}], the latent frames of "
                f"{self.num_frames} frames, got {self.decode_latents}."
            )
        frames = 1 + stride * ((self.decode_latents or latents) - 1)
        if self.decode_frames is not None and not 1 <= self.decode_frames <= frames:
            raise ValueError(
                f"`decode_frames` must lie in [1, {frames}], the frames that are decoded, got "
                f"{self.decode_frames}."
            )

    def set_image_size(self, size: int | tuple[int, int] | None) -> None:
        """Choose the size of the frames; 480 x 832 for None. See the base class."""
        super().set_image_size(_NATIVE_SIZE if size is None else size)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along each side."""
        factor: int = self.pipeline.vae_scale_factor_spatial
        return factor

    @property
    def patch_size(self) -> int:
        """Side of the square of latents of a frame that the network takes as one token."""
        side: int = self.denoiser.config["patch_size"][1]
        return side

    @property
    def call_options(self) -> dict[str, Any]:
        """See the base class."""
        height, width = self.image_size
        return {"height": height, "width": width, "num_frames": self.num_frames}

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of what `decode` returns of one sample."""
        latents = self.decode_latents or self.latent_shape()[1]
        frames = 1 + self.pipeline.vae_scale_factor_temporal * (latents - 1)
        frames = self.decode_frames or frames
        return (3, *self.image_size) if frames == 1 else (frames, 3, *self.image_size)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Return (C, f, H, W) of one sample's latents; see the base class."""
        channels, *sides = super().latent_shape(height, width)
        frames = (self.num_frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        return channels, frames, *sides

    @property
    def latent_channels(self) -> int:
        """See the base class."""
        channels: int = self.vae.config["z_dim"]
        return channels

    def pipeline_scheduler(self) -> Any:
        """Return an Euler scheduler with the noise levels of the pipeline's own.

        The released pipelines sample by UniPC, whose levels are kept; its steps have no density.
        """
        config = self.pipeline.scheduler.config
        if config.get("use_flow_sigmas"):
            return _WanTimes(shift=config["flow_shift"])
        return self.pipeline.scheduler

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the predicted velocity [B, C, f, H, W]; see the base class."""
        if self.pipeline.config.get("expand_timesteps"):  # every token of Wan2.2-TI2V has a time
            patches = latents[0, 0].numel() // self.patch_size**2
            timesteps = timesteps[:, None].expand(-1, patches)
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(
            hidden_states=latents.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return output

    def _encode(self, prompts: Sequence[str], with_negative: bool) -> Conditioning:
        """Return `(negative_)prompt_embeds` [B, 512, width]; see the base class."""
        embeds, negative = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=with_negative,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        negatives = {"negative_prompt_embeds": negative} if with_negative else {}
        return {"prompt_embeds": embeds, **negatives}

    def _cast_frozen(self, dtype: torch.dtype) -> None:
        """Leave in float32 what the network asks for: times, norms and their scales."""
        super()._cast_frozen(dtype)
        kept = self.denoiser._keep_in_fp32_modules or ()
        for name, parameter in self.denoiser.named_parameters():
            if any(part in name.split(".") for part in kept):
                parameter.data = parameter.data.float()

    @property
    def max_sequence_length(self) -> int:
        """Number of UMT5 tokens."""
        return min(_LONGEST, self.pipeline.tokenizer.model_max_length)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return which prompts are longer than what the text encoder reads."""
        return loading.truncated(self.pipeline, prompts, self.max_sequence_length)

    def render(self, latents: Tensor) -> Tensor:
        """Return whole videos [B, F, 3, H, W] in [0, 1] of latents; see the base class."""
        return _as_frames(self._decoded(latents), None)

    def _decode(self, latents: Tensor) -> Tensor:
        return _as_frames(self._decoded(latents[:, :, : self.decode_latents]), self.decode_frames)

    def _decoded(self, latents: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents)
        scaled = (latents * std + mean).to(self.vae.dtype)
        video: Tensor = self.vae.decode(scaled).sample  # [B, 3, F, H, W] in [-1, 1]
        return video.float() / 2 + 0.5

    def encode(self, images: Tensor) -> Tensor:
        """Return latents [B, C, f, H, W] float32.

        Args:
            images: [B, 3, H, W], or videos [B, F, 3, H, W] of 4 n + 1 frames, in [0, 1].

        Raises:
            ValueError: If there are other numbers of frames.
        """
        videos = images.unsqueeze(1) if images.ndim == 4 else images
        stride = self.pipeline.vae_scale_factor_temporal
        if (videos.shape[1] - 1) % stride:
            raise ValueError(
                f"Videos must have a multiple of {stride} frames and one, got {videos.shape[1]}."
            )
        pixels = (videos.transpose(1, 2) * 2 - 1).to(self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode().float()
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the VAE's latents, by channel."""
        config = self.vae.config
        mean, std = (like.new_tensor(config[f"latents_{name}"]) for name in ("mean", "std"))
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def _as_frames(video: Tensor, count: int | None) -> Tensor:
    """Return [B, F, 3, H, W] of [B, 3, F, H, W], or [B, 3, H, W] of one frame."""
    if count is not None:
        places = torch.linspace(0, video.shape[2] - 1, count, device=video.device).round().long()
        video = video.index_select(2, places)
    return video.squeeze(2) if video.shape[2] == 1 else video.transpose(1, 2)


class _WanTimes(FlowMatchEulerDiscreteScheduler):
    """The noise levels of UniPC as Wan's pipelines configure it.

    With N training steps they are T + 1 even ones from 1 to 1 / N, then shifted, the last left out.
    """

    config: Any

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        lowest = 1 / self.config["num_train_timesteps"]
        sigmas = torch.linspace(1, lowest, num_inference_steps + 1, dtype=torch.float64)[:-1]
        ask: Any = super()
        ask.set_timesteps(sigmas=sigmas.tolist(), device=device)
