"""Gradients with respect to pixels and latents: of the reward, in float32, and of densities."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_align.algorithms.base import AlignmentModule
from lit_align.functional.gaussian import per_sample
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import quantize
from lit_align.rewards.scoring import RewardError
from lit_align.trajectory import PromptBatch, Transition

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
    observe: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the trained reward [B], and the gradient [B, 3, H, W] of a function of it.

    It is 0 for an image that could not be scored, whatever the reward's own derivative there.

    Args:
        module: Has the reward; counts the query.
        images: [B, 3, H, W] in [0, 1], or videos [B, F, 3, H, W].
        batch: Their prompts.
        of: Takes the rewards that are known [V] and returns what to differentiate, [V].
        observe: Whether the reward's running statistics take these scores in.

    Raises:
        RewardError: If the scores have no gradient.
    """
    assert module.reward is not None
    with torch.enable_grad():
        pixels = images.detach().float().requires_grad_()
        module.reward.train(observe)
        rewards = module.score(module.reward, pixels, batch)
        module.reward.eval()
        valid = ~rewards.isnan()
        gradient = torch.zeros_like(pixels)
        if valid.any():
            if not rewards.requires_grad:
                raise RewardError(
                    f"{module.reward.name} claims to be differentiable, but its scores have no "
                    "gradient; look for `detach`, `no_grad` or a conversion to numbers in it."
                )
            # Backward computes in the precision of the context that it is called in.
            with torch.autocast(images.device.type, enabled=False):
                (gradient,) = torch.autograd.grad(of(rewards[valid]).sum(), pixels)
    module.counters["gradient_queries"] += len(images) * module.trainer.world_size
    return rewards.detach(), gradient.where(per_sample(valid, gradient), 0.0)


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
        _, outer = pixel_gradient(module, images, batch, observe=False)  # the rollout's were
        with torch.autocast(images.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(images, leaf, outer)
    return gradient.float()


def log_prob_gradient(
    policy: DiffusionPolicy, transition: Transition, create_graph: bool = False
) -> Tensor:
    """Return ``grad_x log p(x' | x)`` [N, ...], the gradient of a step's density at its start.

    Args:
        policy: Has the density.
        transition: N steps that were taken.
        create_graph: Keep the graph, so that the gradient has one too. This takes attention that
            is not fused, which has no second derivative.

    Raises:
        ValueError: If a graph is asked of a denoiser that checkpoints.
    """
    if create_graph and getattr(policy.denoiser, "is_gradient_checkpointing", False):
        raise ValueError("Second derivatives need `policy.gradient_checkpointing: false`.")
    with sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
        leaf = transition.latents.detach().requires_grad_()
        step = policy.replay(transition.replace(latents=leaf))
        error = (transition.next_latents - step.mean) / per_sample(step.std, leaf)
        log_prob = -0.5 * error.square().sum()
        (gradient,) = torch.autograd.grad(log_prob, leaf, create_graph=create_graph)
    return torch.as_tensor(gradient)
