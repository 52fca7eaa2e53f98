"""DRaFT: direct reward fine-tuning (arXiv:2309.17400).

    sample x_T..x_K without gradient, x_{K-1}..x_0 with that of the network's calls
    L = -reward(decode(x_0), prompt)

    DRaFT      K = T
    DRaFT-K    the last K steps
    DRaFT-LV   K = 1, and n times more: x_1^j = noise sg(x_0) to the last step's level afresh,
               x_0^j = one step from it;  L = -mean of reward(x_0) and all reward(x_0^j)

Deviations:
    1. The loss of DRaFT-LV is the mean of its 1 + n terms; the paper sums gradients.
    2. `beta` penalises the distance from the pretrained model, as NVIDIA's DRaFT+ does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_align.algorithms.reward_gradient import Drawn, RewardGradientModule
from lit_align.functional.noise import randn, sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.sampling import with_checkpoint
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PromptMinibatch, Trajectory


class DRaFT(RewardGradientModule):
    """Back-propagation through the last steps of the sampler.

    The arguments that are not listed are those of `RewardGradientModule`, with the paper's values.

    Args:
        truncation_steps: K, how many of the last steps have a gradient.
        num_lv_samples: n, how often the last step is repeated with fresh noise (DRaFT-LV: 2).
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        truncation_steps: int = 1,
        num_lv_samples: int = 0,
        lr: float = 4e-4,
        weight_decay: float = 0.1,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, lr=lr, weight_decay=weight_decay,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **options,
        )  # fmt: skip
        if not 1 <= truncation_steps <= num_inference_steps:
            raise ValueError(
                f"`truncation_steps` must lie in [1, {num_inference_steps}], got "
                f"{truncation_steps}."
            )
        if num_lv_samples and truncation_steps != 1:
            raise ValueError(
                "`num_lv_samples` repeats the last step: use `truncation_steps: 1`, got "
                f"{truncation_steps}."
            )
        self.truncation_steps, self.num_lv_samples = truncation_steps, num_lv_samples

    def draw(self, minibatch: PromptMinibatch) -> Drawn:
        """Sample with the gradient of the last steps, and repeat the last one."""
        total = self.num_inference_steps
        steps = range(total - self.truncation_steps, total)
        path = self.sample(minibatch, steps)
        repeated = (self._repeat(path, minibatch, j) for j in range(self.num_lv_samples))
        return Drawn([path.latents[:, -1], *repeated], path, steps)

    def _repeat(self, path: Trajectory, minibatch: PromptMinibatch, number: int) -> Tensor:
        """Return the clean latents of one more last step, from fresh noise of its level."""
        scheduler, times = self.policy.scheduler, path.timesteps[:, -1]
        key = (self.seed, minibatch.round_index, minibatch.batch.positions.tolist())
        generators = sample_generators(f"repeat {number}", *key)
        clean = path.latents[:, -1].detach()
        noise = randn(clean.shape[1:], generators, clean.device)
        noised, _ = scheduler.corrupt(clean, noise, times)
        arguments = (noised, times, path.conditioning, path.guidance_scale)
        output = with_checkpoint(self.policy.predict, *arguments, cfg_grad=self.cfg_grad)
        self._count(path.guidance_scale, len(clean))
        noisy = self.num_inference_steps - 1 in scheduler.density_steps
        fresh = generators if noisy and self.stochastic_sampling else None
        return scheduler.step(output, times, noised, generator=fresh).next_latents
