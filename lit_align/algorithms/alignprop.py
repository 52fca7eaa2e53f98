"""AlignProp: reward back-propagation with randomised truncation (arXiv:2310.03739).

    K ~ truncation
    sample x_T..x_K without gradient, x_{K-1}..x_0 with that of the network's calls
    r = reward(decode(x_0), prompt),  L = loss_scale |target_reward - r|, or -loss_scale r

    truncation   fixed       K = truncation_steps
                 uniform     T - K ~ U{0..T-1}
                 normal      T - K = floor(N(T - truncation_steps, truncation_std^2)), drawn again
                             until it lies in 1..T-1
                 bernoulli   each step i on its own, with probability (i + 1) / (T + 1)

Deviations:
    1. "normal" is the current official code's draw (42 and 5 of 50 steps), "bernoulli" that of its
       first version; there a step without gradient still passes on that of the steps before it.
    2. The draw is made once for each update, the same for all its samples and processes, which
       would else wait for the longest graph among them.
    3. Steps without gradient run without a graph; the official code detaches their outputs.
    4. A "bernoulli" draw without any step is drawn again (of 50 steps, one in 10^21).
    5. The current official code maps images to [0, 1] twice, so that its reward sees them in
       [0.5, 1]; here it sees them as they are, as in its first version.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal

import torch

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.reward_gradient import Drawn, RewardGradientModule
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PromptMinibatch

Truncation = Literal["fixed", "uniform", "normal", "bernoulli"]


def truncated_steps(
    truncation: Truncation, total: int, mean: float, std: float, generator: torch.Generator
) -> Collection[int]:
    """Return the indices of the steps that have a gradient, increasing.

    Args:
        truncation: See the module.
        total: T.
        mean: Of K, for "fixed" and "normal".
        std: Of K, for "normal".
        generator: Of the draw.
    """
    if truncation == "bernoulli":
        kept: list[int] = []
        while not kept:
            draws = torch.randint(total + 1, (total,), generator=generator)
            kept = [step for step in range(total) if draws[step] <= step]
        return kept
    if truncation == "fixed":
        return range(total - int(mean), total)
    if truncation == "uniform":
        return range(int(torch.randint(total, (), generator=generator)), total)
    first = 0
    while not 1 <= first <= total - 1:
        normal = float(torch.randn((), generator=generator))
        first = math.floor(total - mean + std * normal)
    return range(first, total)


class AlignProp(RewardGradientModule):
    """Back-propagation through a random number of the sampler's last steps.

    The arguments that are not listed are those of `RewardGradientModule`, with the official code's
    values.

    Args:
        truncation: How the number K of steps with gradient is drawn.
        truncation_steps: K for "fixed", its mean for "normal".
        truncation_std: Of K, for "normal".
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        truncation: Truncation = "normal",
        truncation_steps: int = 8,
        truncation_std: float = 5.0,
        loss_scale: float = 0.01,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        stochastic_sampling: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, loss_scale=loss_scale, lr=lr, weight_decay=weight_decay,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            stochastic_sampling=stochastic_sampling, **options,
        )  # fmt: skip
        check_choice("truncation", truncation, Truncation)
        most = num_inference_steps - (truncation == "normal")
        counted = truncation in ("fixed", "normal")
        if counted and not 1 <= truncation_steps <= most:
            raise ValueError(
                f"`truncation_steps` must lie in [1, {most}] for `truncation: {truncation}`, got "
                f"{truncation_steps}."
            )
        if truncation == "normal" and truncation_std <= 0:
            raise ValueError(f"`truncation_std` must be positive, got {truncation_std}.")
        self.truncation: Truncation = truncation
        self.truncation_steps, self.truncation_std = truncation_steps, truncation_std

    def draw(self, minibatch: PromptMinibatch) -> Drawn:
        """Sample with the gradient of the steps that were drawn for this update."""
        steps = truncated_steps(
            self.truncation, self.num_inference_steps, self.truncation_steps,
            self.truncation_std, self.draw_generator(),
        )  # fmt: skip
        path = self.sample(minibatch, steps)
        return Drawn([path.latents[:, -1]], path, steps)
