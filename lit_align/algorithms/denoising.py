"""The pretraining loss, for methods that take it beside their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.data.image_text import PairStream
from lit_align.functional.noise import keyed_generator, randn
from lit_align.policies.base import DiffusionPolicy
from lit_align.trajectory import PairBatch


def check_pairs(pairs: PairStream | None, needed: bool, setting: str) -> None:
    """Check that there are image-text pairs if, and only if, there is a use for them.

    Raises:
        ValueError: If not, naming the `setting` ("option: value") that decides.
    """
    if (pairs is not None) != needed:
        lack = "needs" if needed else "has no use for"
        raise ValueError(
            f"`{setting}` {lack} `data.init_args.pairs`, a data module of image-text pairs; add or "
            f"remove them, or change `{setting.partition(':')[0]}`."
        )


def denoising_loss(policy: DiffusionPolicy, pairs: PairBatch, seed: int) -> Tensor:
    """Return ``mean |target - network(noised latents, t, prompt)|^2`` of each pair [N].

    The time t is drawn as in pretraining; it and the noise are keyed by the place in the stream.
    """
    keys = [keyed_generator("pairs", seed, place) for place in pairs.positions.tolist()]
    with torch.no_grad():
        latents = policy.encode(pairs.images)
        conditioning = policy.encode_prompt(pairs.prompts)
    timesteps = torch.cat([policy.scheduler.sample_timesteps(1, g) for g in keys])
    noise = randn(latents.shape[1:], keys, latents.device)
    noised, target = policy.scheduler.corrupt(latents, noise, timesteps.to(latents.device))
    output = policy.predict(noised, timesteps.to(latents.device), conditioning, guidance_scale=1)
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
