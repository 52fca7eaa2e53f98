"""ReFL: reward feedback learning (arXiv:2304.05977).

    m ~ U{min_step..max_step}
    sample x_T..x_m without gradient
    x0 = the clean latents that the network's output at step m implies, with its gradient
    r = reward(decode(x0), prompt),  L = loss_scale max(0, hinge_margin - r)
    optional   L += pretraining_beta L_pre on image-text pairs

Deviations:
    1. The paper's pretraining loss is one term of a sum; the official code leaves it out, or takes
       a step of its own on it. It is a term here, with weight 0 by default.
    2. m is drawn once for each update, the same for all its samples and processes; the official
       code draws it for each process.
"""

from __future__ import annotations

from typing import Any

import torch

from lit_align.algorithms.reward_gradient import Drawn, RewardGradientModule
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PromptMinibatch


class ReFL(RewardGradientModule):
    """Reward of the clean image that one random late step predicts.

    The arguments that are not listed are those of `RewardGradientModule`, with the paper's values.

    Args:
        min_step: First step, counted from noise, that m may be.
        max_step: Last one; below `num_inference_steps`.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        min_step: int = 30,
        max_step: int = 39,
        hinge_margin: float | None = 2.0,
        loss_scale: float = 1e-3,
        lr: float = 1e-5,
        weight_decay: float = 1e-2,
        num_inference_steps: int = 40,
        guidance_scale: float = 1.0,
        stochastic_sampling: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, hinge_margin=hinge_margin, loss_scale=loss_scale, lr=lr,
            weight_decay=weight_decay, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, stochastic_sampling=stochastic_sampling, **options,
        )  # fmt: skip
        if not 0 <= min_step <= max_step < num_inference_steps:
            raise ValueError(
                f"`min_step` <= `max_step` must be steps of 0..{num_inference_steps - 1}, got "
                f"{min_step} and {max_step}."
            )
        self.min_step, self.max_step = min_step, max_step

    def draw(self, minibatch: PromptMinibatch) -> Drawn:
        """Stop at a random late step and take the clean latents that it predicts."""
        generator = self.draw_generator()
        step = int(torch.randint(self.min_step, self.max_step + 1, (), generator=generator))
        path = self.sample(minibatch, (step,), num_steps=step + 1, keep=("pred_original",))
        return Drawn([path.extras["pred_original"][:, -1]], path, (step,))
