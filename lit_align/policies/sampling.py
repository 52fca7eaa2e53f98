"""The sampling loop, with gradient through the steps that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_align.schedulers.base import StepOutput

if TYPE_CHECKING:
    from lit_align.policies.base import Conditioning, DiffusionPolicy

CFGGrad = Literal["both", "cond_only"]


def denoise(
    policy: DiffusionPolicy,
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    guidance_scale: float,
    generator: Sequence[torch.Generator],
    noisy_steps: Collection[int],
    grad_steps: Collection[int],
    detach_input: bool,
    cfg_grad: CFGGrad,
    progress: Callable[[], Any],
) -> list[StepOutput]:
    """Return the steps from `latents` [B, ...] on, one for each of `timesteps`.

    A step that is not of `grad_steps` calls the network without gradient; the linear path past the
    network keeps it.
    """
    steps: list[StepOutput] = []
    for index, timestep in enumerate(timesteps):
        inputs = latents.detach() if detach_input else latents
        times = timestep.expand(len(latents))
        if index in grad_steps:
            output = with_checkpoint(
                policy.predict, inputs, times, conditioning, guidance_scale, cfg_grad=cfg_grad
            )
        else:
            with torch.no_grad():
                output = policy.predict(inputs, times, conditioning, guidance_scale)
        noise = generator if index in noisy_steps else None
        steps.append(policy.scheduler.step(output, times, latents, generator=noise))
        latents = steps[-1].next_latents
        progress()
    return steps


def stack_steps(
    initial: Tensor, steps: Sequence[StepOutput], keep: Collection[str]
) -> dict[str, Any]:
    """Return what a `Trajectory` keeps of its steps, by name; `keep` names further fields."""

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(step, name) for step in steps], dim=1)

    return {
        "latents": torch.cat([initial[:, None], stacked("next_latents")], dim=1),
        "log_probs": stacked("log_prob"),
        "extras": {name: stacked(name) for name in keep},
    }


def with_checkpoint(function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Call it, keeping its inputs only; backward calls it again.

    It must draw no random numbers, and step no scheduler, whose state would advance twice.
    """
    result: Tensor = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, **options
    )
    return result
