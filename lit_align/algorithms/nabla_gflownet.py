"""Nabla-GFlowNet: residual gradient-informed detailed balance (arXiv:2412.07775).

The chain from noise to image is a GFlowNet whose terminal flow is p_base(x_T) exp(beta r). Taking
gradients of its balance, divided by that of the pretrained chain, leaves with P~ = P_theta / P_base

    sample x_0..x_T ~ P_theta (noise to clean), without gradient; for some steps, always the last:
    S(x) = beta gamma sg[grad_x r(decode(x0_theta(x)), prompt)] + g(x)
    forward    L_F = |grad_x' log P~(x' | x) - S(x')|^2
    backward   L_B = |grad_x  log P~(x' | x) + S(x)|^2
    terminal   L_T = |g(x_T)|^2, and S(x_T) = beta grad r(decode(x_T))
    trust      L_R = |out_theta(x) - out_old(x)|^2, old being the policy that sampled
    L = L_F + backward_weight L_B + L_T + trust_region_weight L_R

with x0_theta(x) the clean latents that the network's output at x implies, gamma the share of signal
at x and g a learned correction, without which only L_F and L_R remain.

Deviations:
    1. Losses are means over elements. L_B trains only g, as in the official code, unless
       `backward_trains_policy`, which needs second derivatives of the network.
    2. gamma is 1 at the last state, where the flow is known; the official code leaves abar there.
    3. The strata that steps are drawn from leave the last step out, which is taken anyway.
    4. Not copied: other batches' prompts, old samples, two optimiser steps in 16-bit updates.
    5. In flow matching, where the last step adds no noise, the chain ends before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.algorithms.pixels import PixelGrad, latent_gradient, log_prob_gradient
from lit_align.data.planner import RoundPlan, strata
from lit_align.functional.gaussian import mean_square, per_sample
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import Trajectory, Transition

LossWeighting = Literal["none", "variance"]
GammaMode = Literal["alpha_bar", "sqrt", "one"]


class NablaGFlowNet(OnlineModule):
    """Match the policy's score to the pretrained one plus the gradient of the flow.

    The arguments that are not listed are those of `OnlineModule`, less what concerns advantages.

    Args:
        reward_scale: beta, the inverse temperature of the distribution that is aimed at.
        loss_weighting: "variance" multiplies L_F and L_B by each step's (arXiv:2604.17415), as flow
            matching needs: its last noisy steps are so narrow that they outweigh all others.
        gamma_mode: gamma is the share of signal squared ("alpha_bar"), as it is ("sqrt"), or 1.
            Without g the last comes closest to the distribution that is aimed at.
        flow_correction: g, a `FlowCorrection`; None leaves it out.
        lr_flow: Its learning rate.
        flow_weight_decay: Its weight decay.
        detach_flow: Keep the gradient of L_F from g.
        backward_weight: Of L_B.
        backward_trains_policy: Let L_B train the policy too.
        trust_region_weight: Of L_R; 0 for none.
        timestep_fraction: Share of the steps to train on beside the last.
        pixel_grad: See `decode_pixels`.
        decode_batch_size: Images decoded at once, and again in backward; None decodes all once.
    """

    follows_gradient: ClassVar[bool] = True
    needs_memoryless: ClassVar[bool] = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        reward_scale: float = 1e3,
        loss_weighting: LossWeighting = "none",
        gamma_mode: GammaMode = "alpha_bar",
        flow_correction: nn.Module | None = None,
        lr: float = 1e-3,
        lr_flow: float = 1e-3,
        flow_weight_decay: float = 1e-2,
        detach_flow: bool = False,
        backward_weight: float = 1.0,
        backward_trains_policy: bool = False,
        trust_region_weight: float = 1e3,
        timestep_fraction: float = 0.1,
        pixel_grad: PixelGrad = "clamped",
        decode_batch_size: int | None = 2,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, lr=lr, timestep_fraction=timestep_fraction,
            drop_last_step=False, advantage_norm="batch", advantage_eps=None, std_unbiased=None,
            adv_clip_max=None, buffer_size=1, min_count=1, **options,
        )  # fmt: skip
        check_choice("loss_weighting", loss_weighting, LossWeighting)
        check_choice("gamma_mode", gamma_mode, GammaMode)
        check_choice("pixel_grad", pixel_grad, PixelGrad)
        if min(weights := (reward_scale, trust_region_weight, backward_weight)) < 0:
            names = "`reward_scale`, `trust_region_weight` and `backward_weight`"
            raise ValueError(f"{names} must be at least 0, got {weights}.")
        self.reward_scale, self.gamma_mode = reward_scale, gamma_mode
        self.variance_weighted = loss_weighting == "variance"
        self.flow_correction: Any = flow_correction
        self.lr_flow, self.flow_weight_decay = lr_flow, flow_weight_decay
        self.detach_flow, self.backward_weight = detach_flow, backward_weight
        self.backward_trains_policy = backward_trains_policy and flow_correction is not None
        self.trust_region_weight = trust_region_weight
        self.keep = ("pred_original",) if trust_region_weight > 0 else ()
        self.pixel_grad, self.decode_batch_size = pixel_grad, decode_batch_size
        policy.keep_reference()

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Leave out samples without a reward; the targets are computed with the loss."""
        assert trajectory.rewards is not None
        return trajectory.replace(advantages=trajectory.rewards * 0)

    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the sum of the balance losses and the trust region's."""
        scheduler = self.policy.scheduler
        after = scheduler.index(minibatch.timesteps) + 1
        # Before the policy's own graph is built: two at once would be the peak of memory.
        target, correction, last = self._flow_gradient(minibatch, minibatch.next_latents, after)
        step = self.policy.replay(minibatch, cfg_grad=self.cfg_grad)
        base = self.reference_step(minibatch)
        gap = (step.mean - base.mean) / per_sample(step.std.square(), step.mean)
        inner = correction.detach() if self.detach_flow else correction
        weight = step.std.square() if self.variance_weighted else 1.0
        loss = weight * mean_square(gap - target - inner.where(~last, 0.0))
        logs = {"train/forward_loss": loss.mean()}
        if self.trust_region_weight > 0:
            moved = step.pred_original - minibatch.extras["pred_original"]
            trust = mean_square(scheduler.output_change(minibatch.timesteps, moved))
            loss = loss + self.trust_region_weight * trust
            logs["train/trust_region"] = trust.mean()
        if self.flow_correction is not None:
            terminal = mean_square(correction.where(last, 0.0))
            loss = loss + terminal
            logs["train/terminal_loss"] = terminal.mean()
            if self.backward_weight > 0:
                backward = weight * self._backward_loss(minibatch, after - 1)
                loss = loss + self.backward_weight * backward
                logs["train/backward_loss"] = backward.mean()
        return (minibatch.weights * loss).mean(), logs

    def _flow_gradient(
        self, minibatch: Transition, latents: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return beta gamma grad r and g, each [N, ...], at states, and which are the last."""
        scheduler, steps = self.policy.scheduler, self.num_inference_steps
        times = scheduler.timesteps[index.clamp(max=steps - 1)]
        final = per_sample(index == steps, latents)
        guided = (minibatch.conditioning, minibatch.guidance_scale)
        last = index == scheduler.density_steps[-1] + 1

        def clean(states: Tensor) -> Tensor:
            output = self.policy.predict(states, times, *guided)
            return states.where(final, scheduler.step(output, times, states).pred_original)

        assert minibatch.batch is not None
        decoding = (self.decode_batch_size, self.pixel_grad, clean)
        gradient = latent_gradient(self, latents, minibatch.batch, *decoding)
        self._count(minibatch.guidance_scale, len(minibatch))
        exponent = {"alpha_bar": 2, "sqrt": 1, "one": 0}[self.gamma_mode]
        gamma = (scheduler.signal_levels[index] ** exponent).where(~last, 1.0)
        target = self.reward_scale * per_sample(gamma, latents) * gradient
        correction = torch.zeros_like(latents)
        if self.flow_correction is not None:
            at, prompts = times * (index < steps), minibatch.conditioning["prompt_embeds"]
            correction = self.flow_correction(latents, at, prompts)
        return target, correction, per_sample(last, latents)

    def _backward_loss(self, minibatch: Transition, index: Tensor) -> Tensor:
        target, correction, _ = self._flow_gradient(minibatch, minibatch.latents, index)
        own = log_prob_gradient(self.policy, minibatch, self.backward_trains_policy)
        with self.policy.reference():
            base = log_prob_gradient(self.policy, minibatch)
        self._count(minibatch.guidance_scale, 2 * len(minibatch))
        return mean_square(own - base + target + correction)

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, with a step of each stratum and the last one."""
        plan = super().plan
        pools = strata(plan.steps, self.timestep_fraction)
        return replace(plan, pools=pools, trained_steps=len(pools))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over one group for the policy, and one for g if there is one."""
        if self.flow_correction is None:
            return super().configure_optimizers()
        return self.adamw_with(self.flow_correction, self.lr_flow, self.flow_weight_decay)
