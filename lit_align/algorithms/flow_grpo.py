"""Flow-GRPO: online policy gradient for flow matching (arXiv:2505.05470), and its relatives.

The sampler's stochastic differential equation makes each step a Gaussian policy, x' = mu_theta(x)
+ S z with z ~ N(0, I) and S = s sqrt(h); h = t - t' is the step's length.

    draw G images of each prompt, with noise in all steps or in a window,  R = reward(x_0, prompt)
    A = (R - mean of its group) / (std + eps), clipped to +-adv_clip_max;  D = mu_theta - mu_old
    ratio  plain    log r = log p_theta(x' | x) - log p_old(x' | x)
           norm     log r = mean(z D),  delta = 1 / h                             arXiv:2510.22319
    trust  clip     L = delta max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range))
           kl_mask  L = -delta A r, 0 where mean(D^2) / (2 S^2) > kl_threshold and A (r - 1) > 0
                                                                                  arXiv:2606.11025
    kl     velocity   L += beta mean((v_theta - v_ref)^2)
           gaussian   L += beta mean((mu_theta - mu_ref)^2) / (2 S^2)
           drift      L += beta mean((mu_theta - mu_ref)^2) / (2 s^2), as the official code

DanceGRPO (arXiv:2505.07818) and MixGRPO (arXiv:2507.21802) are this with other options: the kind
of noise, `shared_init_noise`, `timestep_fraction`, `window`.

Deviations:
    1. log p, like every mean above, is over the latent's elements, as in the code; the paper sums.
       A clip range therefore depends on their number.
    2. std is that of all rewards of the round, as in the code; the paper's is `advantage_norm:
       group`. Images without advantage keep their place with weight 0; the code drops them.
    3. log r of "norm" is computed as it stands, not as S (log r + mean(D^2) / (2 S^2)), which is
       the same but for rounding, and for "cps" needs the density. delta is 1 with "plain", and
       has a factor for "dance" noise (see `StochasticFlowMatch.gradient_weights`).
    4. In flow matching the last step adds no noise, and so it is not trained; in DDIM it is left
       out by `drop_last_step`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.data.planner import RoundPlan
from lit_align.data.windows import StepWindow
from lit_align.functional.advantages import AdvantageNorm, zero_std_fraction
from lit_align.functional.gaussian import gaussian_kl, mean_square
from lit_align.functional.policy_gradient import (
    clipped_surrogate,
    leaves_trust_region,
    normalised_log_ratio,
    ratio_diagnostics,
)
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.sampling import CFGGrad
from lit_align.rewards.base import RewardModule
from lit_align.schedulers.base import StepOutput
from lit_align.trajectory import Trajectory, Transition

Divergence = Literal["velocity", "gaussian", "drift"]
Ratio = Literal["plain", "norm"]
Trust = Literal["clip", "kl_mask"]


class FlowGRPO(OnlineModule):
    """Group-relative policy gradient over the steps of a flow-matching sampler.

    The arguments that are not listed are those of `OnlineModule`, with the values of the paper and
    its code. All but `kl: drift` and `ratio: norm` work with a DDIM sampler too.

    Args:
        clip_range: Of the ratio; the paper's 1e-4 is for 64x64x16 latents, and 1e-5 for a window
            or "cps" (both in the code). With `trust: kl_mask` it serves the logs only.
        beta: Weight of the penalty on the divergence from the pretrained model; 0 for none. The
            paper's 0.04 or 0.01 is for "drift"; about 1e-3 is usual for "velocity".
        kl: That divergence. "velocity" does not grow where the noise is small; see above.
        ratio: "plain" or "norm", see above; 2e-6 is a usual `clip_range` for "norm".
        trust: "clip" or "kl_mask", see above.
        kl_threshold: Of "kl_mask", in nats per element.
        window: Where steps add noise and are trained; None for all that have a density.
        cfg_grad: "cond_only" as in the code.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        clip_range: float = 1e-4,
        beta: float = 0.0,
        kl: Divergence = "velocity",
        ratio: Ratio = "plain",
        trust: Trust = "clip",
        kl_threshold: float = 1e-5,
        window: StepWindow | None = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 4.5,
        prompts_per_round: int = 48,
        samples_per_prompt: int = 24,
        advantage_norm: AdvantageNorm = "group_mean",
        advantage_eps: float | None = 1e-4,
        std_unbiased: bool | None = False,
        cfg_grad: CFGGrad = "cond_only",
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, prompts_per_round=prompts_per_round,
            samples_per_prompt=samples_per_prompt, advantage_norm=advantage_norm,
            advantage_eps=advantage_eps, std_unbiased=std_unbiased, cfg_grad=cfg_grad, **options,
        )  # fmt: skip
        check_choice("kl", kl, Divergence)
        check_choice("ratio", ratio, Ratio)
        check_choice("trust", trust, Trust)
        if min(clip_range, kl_threshold) <= 0 or beta < 0:
            raise ValueError(
                "`clip_range` and `kl_threshold` must be positive and `beta` not negative, got "
                f"{clip_range}, {kl_threshold} and {beta}."
            )
        self.clip_range, self.beta, self.kl = clip_range, beta, kl
        self.ratio, self.trust, self.kl_threshold = ratio, trust, kl_threshold
        # A checkpoint holds its fields.
        self.window = StepWindow(**window) if isinstance(window, dict) else window
        self.keep = ("mean",) if ratio == "norm" or trust == "kl_mask" else ()
        if beta > 0:
            policy.keep_reference()

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, with its window."""
        plan, window = super().plan, self.window
        if window is None:
            return plan
        trained = max(1, int(window.size * self.timestep_fraction))
        return replace(plan, window=window, trained_steps=trained)

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Compare each reward with those of its prompt; what has no advantage does not count."""
        advantages = self.normalised_rewards(trajectory)
        assert trajectory.batch is not None
        assert trajectory.rewards is not None
        groups = self.gathered(trajectory.batch.group_ids)
        fraction = zero_std_fraction(self.gathered(trajectory.rewards), groups)
        self._round_logs["rollout/zero_std_fraction"] = fraction
        return trajectory.replace(advantages=advantages.masked_fill(advantages == 0, torch.nan))

    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the surrogate of a minibatch, plus the penalty on the divergence."""
        step = self.policy.replay(minibatch, cfg_grad=self.cfg_grad)
        log_ratio = step.log_prob - minibatch.old_log_prob
        if self.ratio == "norm":
            means = (step.mean, minibatch.extras["mean"])
            log_ratio = normalised_log_ratio(minibatch.next_latents, *means, step.std)
        logs = ratio_diagnostics(log_ratio, self.clip_range)
        surrogate, more = self._surrogate(log_ratio.exp(), step, minibatch)
        if self.ratio == "norm":
            surrogate = surrogate * self.policy.scheduler.gradient_weights(minibatch.timesteps)
        if self.beta > 0:
            penalty, further = self._penalty(step, minibatch)
            surrogate, more = surrogate + self.beta * penalty, more | further
        return (minibatch.weights * surrogate).mean(), logs | more

    def _surrogate(
        self, ratio: Tensor, step: StepOutput, minibatch: Transition
    ) -> tuple[Tensor, Logs]:
        advantages = minibatch.advantages
        if self.trust == "clip":
            return clipped_surrogate(ratio, advantages, self.clip_range), {}
        divergence = gaussian_kl(step.mean, minibatch.extras["mean"], step.std)
        masked = leaves_trust_region(divergence, ratio, advantages, self.kl_threshold)
        logs = {"train/masked_fraction": masked.float().mean()}
        return (-advantages * ratio).where(~masked, 0.0), logs

    def _penalty(self, step: StepOutput, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the divergence from the pretrained model [B]."""
        scheduler, times = self.policy.scheduler, minibatch.timesteps
        reference = self.reference_step(minibatch)
        change = scheduler.output_change(times, step.pred_original - reference.pred_original)
        velocity = penalty = mean_square(change)
        if self.kl != "velocity":
            penalty = gaussian_kl(step.mean, reference.mean, step.std)
        if self.kl == "drift":
            penalty = penalty * scheduler.step_sizes(times)
        logs = {"train/velocity_kl": velocity.mean(), "train/kl_to_reference": penalty.mean()}
        return penalty, logs

    def setup(self, stage: str) -> None:
        """Check that the steps have a length, if one is asked for; see the base class."""
        super().setup(stage)
        scheduler = self.policy.scheduler
        if stage == "fit" and (self.ratio == "norm" or (self.beta > 0 and self.kl == "drift")):
            scheduler.step_sizes(scheduler.timesteps)
