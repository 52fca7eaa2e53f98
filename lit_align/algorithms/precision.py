"""Keeping everything but the pipeline's networks in float32 under 16-bit weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import nn

from lit_align.policies.base import DiffusionPolicy


def check_precision(precision: str, policy: DiffusionPolicy) -> None:
    """Refuse 16-bit weights for LoRA.

    Raises:
        ValueError: If the trainer's precision would cast the adapters.
    """
    casts = precision.endswith("-true") and not precision.startswith(("32", "64"))
    if casts and policy.train_mode == "lora":
        raise ValueError(
            f"`precision: {precision}` would cast the LoRA weights, the VAE and the rewards; use "
            "`precision: bf16-mixed`, or `policy.dtype: bfloat16` for a bf16 base with float32 "
            "LoRA."
        )


def keep_float32(plugin: Precision, policy: DiffusionPolicy) -> None:
    """Let `bf16-true` and `16-true` cast the denoiser, the text encoders and the VAE only.

    Lightning's plugin would also cast minibatches (latents, log-probabilities, advantages),
    critics and running means, and make 16 bits the default of every tensor that a scheduler, a
    reward or its thread creates. Policies cast what enters their networks themselves.
    """
    if not isinstance(plugin, HalfPrecision):
        return
    dtype = torch.bfloat16 if plugin.precision == "bf16-true" else torch.float16

    def convert(module: nn.Module) -> nn.Module:
        for network in (policy.denoiser, policy.text_encoders, policy.vae):
            nn.Module.to(network, dtype)  # diffusers' own `to` warns of a cast that is meant
        return module

    options: Any = plugin
    options.convert_module = convert
    options.convert_input = lambda data: data
    options.forward_context = nullcontext
