"""TPDM: time prediction diffusion model, a learned sampling schedule (arXiv:2412.01243).

The denoiser is frozen. A small head reads its features f at every step and gives a Beta over the
ratio of the next noise level to this one, so that every image takes its own number of steps N.

    t_0 = 1;  r_n ~ Beta(1 + e^a, 1 + e^b), (a, b) = head(f(x_{n-1}, t_{n-1})),  t_n = r_n t_{n-1}
    x_n = deterministic solver(x_{n-1} from t_{n-1} to t_n), until t_N < t_min or N = T
    R = c(N) r(decode(x_N), prompt),  c(N) = (1 - gamma^N) / (N (1 - gamma))
    A = R - mean of the R of the same prompt's other images                              (RLOO)
    rho = exp sum_n (log p_theta(r_n | f_n) - log p_old(r_n | f_n)), one for each image
    L = mean max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range))
    optional   R -= kl_coef sum_n KL(p_old(. | f_n) || Beta about a fixed schedule of 28 steps)

The discount is meant for positive rewards: one below 0 grows with the steps, see `reward_offset`.

Deviations:
    1. The step that falls below t_min ends at 0; the official code decodes the noise that is left.
       So does a step that reaches the cap in evaluation; in training its noise stays, and the
       reward suffers.
    2. Tokens become feature maps in raster order, which the official code scrambles.
    3. The head, the Beta and the ratios r are float32, and stored features are rounded before the
       head reads them, so that rho is 1 before the first update.
    4. Images that are finished are no longer computed.
    5. Models that predict noise or v take DDIM's steps at real-valued times; the official code
       takes those of DPM-Solver++ at truncated ones.
    6. With `init_steps` the head starts as a fixed schedule, and learns what to change of it; the
       paper's starts at a constant ratio, and first has to find out that steps near the image
       should be relatively longer.
    7. An update whose gradient is not finite is not skipped; InvariantsCallback stops there.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.algorithms.schedule_learning import Logs, ScheduleModule
from lit_align.functional.advantages import leave_one_out_advantages, step_discount
from lit_align.functional.beta import beta_entropy, beta_kl, beta_log_prob
from lit_align.functional.policy_gradient import clipped_surrogate, ratio_diagnostics
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.time_prediction import reference_shapes
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import Trajectory


class TPDM(ScheduleModule):
    """Policy gradient on the sampling schedule of a frozen policy.

    The arguments that are not listed are those of `ScheduleModule`.

    Args:
        gamma: Discount of the reward per step, in (0, 1]; a smaller one asks for fewer steps.
        reward_offset: Added to rewards before the discount.
        clip_range: Of an image's importance ratio.
        kl_coef: Weight of the divergence from the fixed schedule; 0 for none.
        mean_kl: Average it over an image's steps instead of adding it up.
        samples_per_prompt: k, at least 2.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        gamma: float = 0.97,
        reward_offset: float = 0.0,
        clip_range: float = 0.2,
        kl_coef: float = 0.0,
        mean_kl: bool = False,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        adam_epsilon: float = 1e-5,
        adam_betas: tuple[float, float] = (0.9, 0.99),
        guidance_scale: float = 7.0,
        samples_per_prompt: int = 2,
        num_inner_epochs: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, lr=lr, weight_decay=weight_decay,
            adam_epsilon=adam_epsilon, adam_betas=adam_betas, guidance_scale=guidance_scale,
            samples_per_prompt=samples_per_prompt, num_inner_epochs=num_inner_epochs, **options,
        )  # fmt: skip
        if not (0 < gamma <= 1 and clip_range > 0 and kl_coef >= 0):
            raise ValueError(
                "`gamma` must lie in (0, 1], `clip_range` be positive and `kl_coef` at least 0, "
                f"got {gamma}, {clip_range} and {kl_coef}."
            )
        if samples_per_prompt < 2:
            raise ValueError(
                "`samples_per_prompt` must be at least 2, as a prompt's images are compared with "
                f"each other, got {samples_per_prompt}."
            )
        self.gamma, self.reward_offset, self.clip_range = gamma, reward_offset, clip_range
        self.kl_coef, self.mean_kl = kl_coef, mean_kl

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Discount the rewards by the steps, and compare those of a prompt with each other."""
        assert trajectory.batch is not None
        assert trajectory.rewards is not None
        steps, rewards = self._steps_of(trajectory), trajectory.rewards + self.reward_offset
        if self.gamma < 1 and bool((rewards < 0).any()):
            rank_zero_warn(
                "Some rewards are negative, and for those the discount asks for more steps instead "
                "of fewer; set `reward_offset` so that they are positive."
            )
        returns = rewards * step_discount(steps, self.gamma)
        if self.kl_coef > 0:
            returns = returns - self.kl_coef * self._divergence(trajectory)
        self._round_logs |= {
            "rollout/return": float(self.gathered(returns).nanmean()),
            "rollout/steps": float(self.gathered(steps).double().mean()),
            "rollout/unfinished": float(self.gathered(self._unfinished(trajectory)).mean()),
        }
        ids = trajectory.batch.group_ids
        return trajectory.replace(advantages=self.globally(leave_one_out_advantages, returns, ids))

    def _steps_of(self, trajectory: Trajectory) -> Tensor:
        return trajectory.extras["alive"].sum(dim=1)

    def _unfinished(self, trajectory: Trajectory) -> Tensor:
        """Return 1 for images [B] that reached the cap with noise left."""
        levels, ratios = trajectory.extras["levels"], trajectory.extras["ratios"]
        return (levels * ratios)[:, -1].ge(self.t_min).double()

    def _divergence(self, trajectory: Trajectory) -> Tensor:
        """Return the divergence from the fixed schedule [B], over the steps that were taken."""
        alive, levels = trajectory.extras["alive"], trajectory.extras["levels"]
        alpha, beta = trajectory.extras["shapes"][alive].unbind(dim=1)
        divergence = torch.zeros_like(levels)
        divergence[alive] = beta_kl(alpha, beta, *reference_shapes(levels[alive]))
        total = divergence.sum(dim=1)
        return total / self._steps_of(trajectory) if self.mean_kl else total

    def loss(self, minibatch: Trajectory) -> tuple[Tensor, Logs]:
        """Return the clipped surrogate of a minibatch of images."""
        assert minibatch.advantages is not None
        assert minibatch.weights is not None
        extras, alive = minibatch.extras, minibatch.extras["alive"]
        seen = (extras[name][alive] for name in ("features", "embedding", "levels"))
        alpha, beta = self.head(*seen)
        change = torch.zeros_like(minibatch.log_probs)
        log_prob = beta_log_prob(extras["ratios"][alive], alpha, beta)
        change[alive] = log_prob - minibatch.log_probs[alive]
        log_ratio = change.sum(dim=1)  # [B]: one for each image
        surrogate = clipped_surrogate(log_ratio.exp(), minibatch.advantages, self.clip_range)
        logs = ratio_diagnostics(log_ratio, self.clip_range) | {
            "train/time_ratio": (alpha / (alpha + beta)).mean(),
            "train/concentration": (alpha + beta).mean(),
            "train/entropy": beta_entropy(alpha, beta).mean(),
        }
        return (minibatch.weights * surrogate).mean(), logs
