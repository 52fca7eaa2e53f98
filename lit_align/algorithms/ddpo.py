"""DDPO: denoising diffusion policy optimisation (arXiv:2305.13301).

Denoising is a T-step decision process: the state is (x_t, prompt), the action x_{t-1} ~
N(mean_theta(x_t), std_t^2 I), and the reward r(x_0, prompt) comes at the end.

    sample x_T..x_0 ~ p_theta for each prompt,  r = reward(x_0, prompt)
    A = (r - mean) / (std + eps), clipped to +-adv_clip_max
    rho_t = p_theta(x_{t-1} | x_t) / p_old(x_{t-1} | x_t)
    DDPO-IS    L = mean_t max(-A rho_t, -A clip(rho_t, 1 - clip_range, 1 + clip_range))
    DDPO-SF    L = -mean_t A log p_theta(x_{t-1} | x_t), one optimiser step per round
    optional   L += beta * mean_t KL(p_theta(. | x_t) || p_pretrained(. | x_t))

Deviations:
    1. log p is averaged over the latent's elements, as in the official code; the paper sums. A
       clip range therefore depends on the number of elements.
    2. Prompts of a round are drawn without replacement; the official code draws each sample's
       prompt independently.
    3. Mean and std are those of the prompt's recent rewards ("per_prompt", the official default),
       of the round ("batch"), or of the images of one prompt draw ("group", arXiv:2505.07818);
       "group_mean" takes the mean there and the std in the round (arXiv:2505.05470, code).
    4. The KL penalty is an addition; the paper stops by eye instead.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.functional.gaussian import gaussian_kl
from lit_align.functional.policy_gradient import clipped_surrogate, ratio_diagnostics
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import Trajectory, Transition

Estimator = Literal["is", "sf"]


class DDPO(OnlineModule):
    """Policy gradient over denoising steps.

    The arguments that are not listed are those of `OnlineModule`, with the paper's values.

    Args:
        estimator: "is" (importance sampling, clipped) or "sf" (score function).
        clip_range: Of the importance ratio; 1e-4 on 64x64x4 latents.
        beta: Weight of the KL penalty to the pretrained model, per element; 0 for none.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        estimator: Estimator = "is",
        clip_range: float = 1e-4,
        beta: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, eval_rewards, **options)
        check_choice("estimator", estimator, Estimator)
        if clip_range <= 0:
            raise ValueError(f"`clip_range` must be positive, got {clip_range}.")
        self.estimator, self.clip_range = estimator, clip_range
        self.beta = beta
        if beta > 0:
            policy.keep_reference()

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Normalise the rewards of all processes into advantages."""
        return trajectory.replace(advantages=self.normalised_rewards(trajectory))

    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the surrogate of a minibatch, plus the KL penalty."""
        step = self.policy.replay(minibatch, cfg_grad=self.cfg_grad)
        log_ratio = step.log_prob - minibatch.old_log_prob
        if self.estimator == "is":
            surrogate = clipped_surrogate(log_ratio.exp(), minibatch.advantages, self.clip_range)
        else:
            surrogate = -minibatch.advantages * step.log_prob
        logs = ratio_diagnostics(log_ratio, self.clip_range)
        if self.beta > 0:
            kl = gaussian_kl(step.mean, self.reference_step(minibatch).mean, step.std)
            surrogate = surrogate + self.beta * kl
            logs["train/kl_to_reference"] = kl.mean()
        return (minibatch.weights * surrogate).mean(), logs

    def setup(self, stage: str) -> None:
        """Check that the score-function estimator stays on-policy; see the base class."""
        super().setup(stage)
        accumulated = self.trainer.accumulate_grad_batches
        if stage == "fit" and self.estimator == "sf" and accumulated != self.plan.minibatches:
            raise ValueError(
                "`estimator: sf` takes one optimiser step per round: set "
                f"`trainer.accumulate_grad_batches` to {self.plan.minibatches}, got {accumulated}."
            )
