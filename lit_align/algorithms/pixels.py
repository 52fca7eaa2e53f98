"""The reward's gradient with respect to pixels and to latents, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_align.algorithms.base import AlignmentModule
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import quantize
from lit_align.trajectory import PromptBatch

PixelGrad = Literal["clamped", "straight_through"]


def decode_pixels(
    policy: DiffusionPolicy, latents: Tensor, batch_size: int | None, pixel_grad: PixelGrad
) -> Tensor:
    """Return images [B, 3, H, W] as a reward sees them, with their gradient, in float32.

    Args:
        policy: Decodes, with autocast off.
        latents: [B, C, H, W].
        batch_size: As of `DiffusionPolicy.decode`.
        pixel_grad: "clamped" gives pixels cut to [0, 1], and those beyond no gradient;
            "straight_through" rounds them to the levels of a file as well, and lets the gradient
            pass as if neither had been done.
    """
    with torch.autocast(latents.device.type, enabled=False):
        images = policy.decode(latents.float(), batch_size, clamp=pixel_grad == "clamped")
    if pixel_grad == "clamped":
        return images
    return images + (quantize(images.clamp(0, 1)) - images).detach()


def saturated(images: Tensor) -> Tensor:
    """Return the share of pixel values at the ends of the range, a scalar."""
    return ((images <= 0) | (images >= 1)).float().mean()


def pixel_gradient(
    module: AlignmentModule,
    images: Tensor,
    batch: PromptBatch,
    of: Callable[[Tensor], Tensor] = lambda rewards: rewards,
) -> tuple[Tensor, Tensor]:
    """Return the trained reward [B], and the gradient [B, 3, H, W] of a function of it.

    It is 0 for an image that could not be scored, whatever the reward's own derivative there.

    Args:
        module: Has the reward; counts the query.
        images: [B, 3, H, W] in [0, 1].
        batch: Their prompts.
        of: Takes the rewards that are known [V] and returns what to differentiate, [V].
    """
    assert module.reward is not None
    with torch.enable_grad():
        pixels = images.detach().float().requires_grad_()
        module.reward.train()  # running statistics follow training samples only
        rewards = module.score(module.reward, pixels, batch)
        module.reward.eval()
        valid = ~rewards.isnan()
        (gradient,) = torch.autograd.grad(of(rewards[valid]).sum(), pixels)
    module.counters["gradient_queries"] += len(images) * module.trainer.world_size
    known = valid.view(-1, 1, 1, 1)
    return rewards.detach(), gradient.where(known, 0.0)


def latent_gradient(
    module: AlignmentModule,
    latents: Tensor,
    batch: PromptBatch,
    batch_size: int | None,
    pixel_grad: PixelGrad,
    clean: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> Tensor:
    """Return ``d reward / d latents`` [B, ...] float32, 0 where the reward is NaN.

    Args:
        module: Has policy and reward; counts the query.
        latents: [B, ...]; the gradient is with respect to them.
        batch: Their prompts.
        batch_size: As of `DiffusionPolicy.decode`.
        pixel_grad: See `decode_pixels`.
        clean: Makes clean latents of them, with gradient.
    """
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        images = decode_pixels(module.policy, clean(leaf), batch_size, pixel_grad)
        _, outer = pixel_gradient(module, images, batch)
        (gradient,) = torch.autograd.grad(images, leaf, outer)
    return gradient.float()
