"""Adjoint Matching: reward fine-tuning as memoryless stochastic control (arXiv:2409.08861).

    sample x_0..x_T ~ P_theta (noise to clean) by a memoryless sampler, without gradient
    lean adjoint, with the pretrained network only:
        a_T = -lambda grad r(decode(x_T), prompt),   a_i = (d mean_base(x_i) / d x_i)^T a_{i+1}
    for some steps i:
        L = sum over elements of ((mean_theta(x_i) - mean_base(x_i)) / std_i + std_i a_{i+1})^2
        L = min(L, lct_constant lambda^2)

Its optimum is the pretrained distribution tilted by exp(lambda r). A sampler without noise may be
used afterwards.

Deviations:
    1. A step is paired with the adjoint after it ("next"), the exact optimum of the discrete
       chain; the official code takes the one before it ("same"), an error of the order 1 / T.
    2. Guidance serves the rollouts only, as in the official code: adjoint and loss are of the
       conditional network.
    3. The paper's algorithm for diffusion starts from +grad r; the sign must be negative.
    4. Flow matching takes ancestral steps (`kind: memoryless`) instead of Euler's with a shifted
       noise level, which double the variance in the first steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.algorithms.pixels import PixelGrad, latent_gradient
from lit_align.data.planner import RoundPlan
from lit_align.functional.gaussian import per_sample
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import Trajectory, Transition

AdjointIndex = Literal["next", "same"]


def control_loss(gap: Tensor, std: Tensor, adjoint: Tensor, bound: float | None) -> Tensor:
    """Return ``sum (gap / std + std a)^2`` [N], at most `bound`: no gradient beyond it.

    Args:
        gap: Difference of the means [N, ...].
        std: Of the steps [N].
        adjoint: [N, ...].
        bound: None for none.
    """
    std = per_sample(std, gap)
    loss = (gap / std + std * adjoint).square().flatten(1).sum(1)
    return loss if bound is None else loss.clamp(max=bound)


class AdjointMatching(OnlineModule):
    """Regress the control onto the lean adjoint.

    The arguments that are not listed are those of `OnlineModule`, less what concerns advantages,
    with the values of the official code for Stable Diffusion.

    Args:
        reward_scale: lambda.
        early_fraction: Share of the steps that count as early.
        early_steps: How many of them each sample is trained on.
        late_steps: How many of the others.
        lct_constant: Bound on a step's loss, in units of lambda squared; the paper's is 1.6, for
            ImageReward. None for no bound.
        adjoint_index: "next" or "same", see deviation 1.
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
        reward_scale: float = 100.0,
        early_fraction: float = 0.6,
        early_steps: int = 2,
        late_steps: int = 2,
        lct_constant: float | None = None,
        adjoint_index: AdjointIndex = "next",
        lr: float = 3e-6,
        weight_decay: float = 0.0,
        guidance_scale: float = 7.5,
        pixel_grad: PixelGrad = "clamped",
        decode_batch_size: int | None = 2,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, lr=lr, weight_decay=weight_decay,
            guidance_scale=guidance_scale, timestep_fraction=1.0, drop_last_step=False,
            advantage_norm="batch", advantage_eps=None, std_unbiased=None, adv_clip_max=None,
            buffer_size=1, min_count=1, **options,
        )  # fmt: skip
        check_choice("adjoint_index", adjoint_index, AdjointIndex)
        check_choice("pixel_grad", pixel_grad, PixelGrad)
        if not 0 < early_fraction < 1 or early_steps < 0 or late_steps < 1 or reward_scale < 0:
            raise ValueError(
                "`early_fraction` must lie in (0, 1), `early_steps` and `reward_scale` be at least "
                f"0 and `late_steps` at least 1, got {early_fraction}, {early_steps}, "
                f"{reward_scale} and {late_steps}."
            )
        self.reward_scale, self.early_fraction = reward_scale, early_fraction
        self.early_steps, self.late_steps = early_steps, late_steps
        self.bound = lct_constant and lct_constant * reward_scale**2
        self.adjoint_index = adjoint_index
        self.pixel_grad, self.decode_batch_size = pixel_grad, decode_batch_size
        policy.keep_reference()

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Solve the lean adjoint of every sample, and leave out those without a reward."""
        assert trajectory.rewards is not None
        parts = trajectory.split(self.rollout_batch_size)
        with self.trainer.precision_plugin.forward_context(), self.policy.reference():
            adjoints = torch.cat(list(map(self._adjoints, parts)))
        return trajectory.replace(advantages=trajectory.rewards * 0, extras={"adjoint": adjoints})

    def _adjoints(self, path: Trajectory) -> Tensor:
        """Return the adjoint [B, T, ...] that each step is paired with."""
        assert path.batch is not None
        pixels = (self.decode_batch_size, self.pixel_grad)
        clean = path.latents[:, -1]
        adjoint = -self.reward_scale * latent_gradient(self, clean, path.batch, *pixels)
        paired = []
        for step in reversed(range(self.num_inference_steps)):
            earlier = self._pull_back(path, step, adjoint)
            paired.append(adjoint if self.adjoint_index == "next" else earlier)
            adjoint = earlier
        self._count(1, len(path) * self.num_inference_steps)
        return torch.stack(paired[::-1], dim=1)

    def _pull_back(self, path: Trajectory, step: int, adjoint: Tensor) -> Tensor:
        """Return ``(d mean / d x)^T adjoint`` [B, ...] at a step."""
        scheduler, times = self.policy.scheduler, path.timesteps[:, step]
        with torch.enable_grad():
            leaf = path.latents[:, step].detach().requires_grad_()
            output = self.policy.predict(leaf, times, path.conditioning, guidance_scale=1)
            taken = path.latents[:, step + 1] if step in scheduler.density_steps else None
            mean = scheduler.step(output, times, leaf, taken).mean
            (earlier,) = torch.autograd.grad(mean, leaf, adjoint)
        return torch.as_tensor(earlier)

    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the squared distance of the control from minus the adjoint."""
        conditional = minibatch.replace(guidance_scale=1)
        step = self.policy.replay(conditional)
        base = self.reference_step(conditional)
        adjoint = minibatch.extras["adjoint"]
        loss = control_loss(step.mean - base.mean, step.std, adjoint, self.bound)
        logs = {"train/adjoint": adjoint.flatten(1).norm(dim=1).mean()}
        if self.bound is not None:
            logs["train/clipped"] = (loss.detach() >= self.bound).float().mean()
        return (minibatch.weights * loss).mean(), logs

    def count_calls(self, minibatch: Transition) -> None:
        """Count one for each pair: the update leaves guidance out."""
        self._count(1, len(minibatch))

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, with steps of the early and of the late ones."""
        plan = super().plan
        early = round(len(plan.steps) * self.early_fraction)
        drawn = ((plan.steps[:early], self.early_steps), (plan.steps[early:], self.late_steps))
        pools = tuple((steps, min(count, len(steps))) for steps, count in drawn if steps)
        return replace(plan, pools=pools, trained_steps=sum(count for _, count in pools))
