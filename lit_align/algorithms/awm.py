"""AWM: advantage weighted matching (arXiv:2509.25050).

The policy gradient with the pretraining loss in the place of minus the log-probability: samples
better than others of their prompt are learned as data are, worse ones are unlearned.

    sample x_0,  A = advantage_max clip((reward - mean of its prompt) / (std + eps), +-c) / c
    (x_t, target) = corrupt(x_0, eps, t)   for a time t of each stratum, see `time_strata`
    l = mean |network(x_t) - target|^2,    log p = -w(l)
        uniform l     t  t l     t2  t^2 l     huber  t (sqrt(l + e) - sqrt(e))
        ghuber  (t / p) ((l + e)^p - e^p)                              p = ghuber_power, e = 1e-10
    ratio = exp(log p - log p_old) at the same t and eps
    L = max(-A ratio, -A clip(ratio, 1 +- clip_range))
        + kl_beta mean |network - pretrained|^2 + ema_beta mean |network - averaged|^2
    after each round:  averaged <- d averaged + (1 - d) network,  d = min(0.001 updates, ema_decay)

Deviations:
    1. Times are drawn for each sample; the official code draws them for each minibatch, as
       `step_choice: shared` does for the round.
    2. x_0 comes from the sampler of evaluation (Euler, DDIM) instead of SA-Solver. The official
       code's other distributions of times (logit-normal, uniform) are left out.
    3. For networks that predict noise, t is the share of noise in x_t.
    4. Log-probabilities of the policy that sampled are computed for the pairs of a round's second
       update on only: at the first one it is the policy itself.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.forward_process import ForwardProcessModule, Logs
from lit_align.data.planner import Pool, RoundPlan
from lit_align.functional.gaussian import mean_square
from lit_align.functional.policy_gradient import clipped_surrogate, ratio_diagnostics
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import ForwardOutputs, ForwardPairs, PromptBatch, Trajectory

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
_EPS = 1e-10
_EMA_RATE = 1e-3  # what an optimiser step adds to the average's decay


def weighted_error(error: Tensor, times: Tensor, weighting: Weighting, power: float) -> Tensor:
    """Return ``w(l)`` [N], as listed above.

    Args:
        error: l [N], not negative.
        times: t [N], in [0, 1].
        weighting: Which w.
        power: p of "ghuber", in (0, 1].
    """
    if weighting == "uniform":
        return error
    if weighting == "t":
        return times * error
    if weighting == "t2":
        return times.square() * error
    if weighting == "huber":
        return times * ((error + _EPS).sqrt() - _EPS**0.5)
    return times / power * ((error + _EPS) ** power - _EPS**power)


def time_strata(count: int, fraction: float, trained: int) -> tuple[Pool, ...]:
    """Return `trained` pools of one time each to draw: the times of a range, cut evenly.

    The range leaves out the first time, pure noise, and those after `fraction` of all.

    Args:
        count: T, how many times there are.
        fraction: In (0, 1].
        trained: How many to draw.

    Raises:
        ValueError: If there are fewer times than that.
    """
    most = int(count * fraction) - 1
    if not 1 <= trained <= most:
        raise ValueError(
            f"`trained_times` must lie in [1, {most}], the first of {count} steps and the last "
            f"{1 - fraction:.0%} left out, got {trained}; change it, `num_inference_steps` or "
            "`timestep_fraction`."
        )
    bounds = [1 + most * k // trained for k in range(trained + 1)]
    return tuple((tuple(range(a, b)), 1) for a, b in pairwise(bounds))


class AWM(ForwardProcessModule):
    """Weigh the pretraining loss by the advantage.

    The arguments that are not listed are those of `ForwardProcessModule` and `OnlineModule`, with
    the values of the official code.

    Args:
        weighting: w, see above.
        ghuber_power: p, in (0, 1]; 1 makes it "t".
        trained_times: Strata of times, each with one for every sample.
        timestep_fraction: Share of the sampler's times, from noise on, that are divided.
        clip_range: Of the ratio; 1 bounds it by 2.
        advantage_max: Bound on A.
        kl_beta: Weight of the squared distance to the pretrained network's output; 0 for none.
        ema_beta: That to the averaged weights' output; 0 for none.
        ema_decay: Up to which their decay rises, in [0, 1).
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        weighting: Weighting = "ghuber",
        ghuber_power: float = 0.25,
        trained_times: int = 6,
        timestep_fraction: float = 0.9,
        clip_range: float = 1.0,
        advantage_max: float = 1.0,
        kl_beta: float = 1e-3,
        ema_beta: float = 1.0,
        ema_decay: float = 0.3,
        num_inference_steps: int = 14,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, kl_beta=kl_beta, timestep_fraction=timestep_fraction,
            num_inference_steps=num_inference_steps, **options,
        )  # fmt: skip
        check_choice("weighting", weighting, Weighting)
        if min(given := (clip_range, advantage_max)) <= 0:
            raise ValueError(f"`clip_range` and `advantage_max` must be positive, got {given}.")
        if not (0 < ghuber_power <= 1 and 0 <= ema_decay < 1 and ema_beta >= 0):
            raise ValueError(
                "`ghuber_power` must lie in (0, 1], `ema_decay` in [0, 1) and `ema_beta` be at "
                f"least 0, got {ghuber_power}, {ema_decay} and {ema_beta}."
            )
        time_strata(num_inference_steps, timestep_fraction, trained_times)  # refuses too many
        self.weighting, self.ghuber_power = weighting, ghuber_power
        self.trained_times, self.clip_range = trained_times, clip_range
        self.advantage_max, self.ema_beta = advantage_max, ema_beta
        if ema_beta > 0:
            self.keep_snapshot(0, _EMA_RATE, ema_decay)

    def collect(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Also keep the log-probabilities that later updates are compared with."""
        trajectory = super().collect(batch, round_index)
        extras = {"old_log_prob": self._old_log_probs(trajectory, round_index)}
        return trajectory.replace(extras=extras)

    @torch.no_grad()
    def _old_log_probs(self, trajectory: Trajectory, round_index: int) -> Tensor:
        """Return log p [B, T] of the pairs, NaN of those that only the first update sees."""
        old = torch.full(trajectory.timesteps.shape, torch.nan, dtype=torch.float64).to(self.device)
        # Without looking for pairs that come again: all processes make as many calls.
        first = self.trainer.accumulate_grad_batches
        for samples, times in islice(self.plan.cut(round_index), first, None):
            pairs = self._pairs(trajectory, samples, times, round_index)
            noised, target = self.corrupt(pairs)
            with self.trainer.precision_plugin.forward_context():
                output = self.predict(pairs, noised)
            old[samples, times] = self._log_prob(pairs, target, output)
            self._count(pairs.guidance_scale, len(pairs))
        return old

    def _log_prob(self, pairs: ForwardPairs, target: Tensor, output: Tensor) -> Tensor:
        error = mean_square(output.double() - target.double())
        times = self.policy.scheduler.noise_levels(pairs.timesteps).double()
        return -weighted_error(error, times, self.weighting, self.ghuber_power)

    def pair_loss(self, pairs: ForwardPairs, said: ForwardOutputs) -> tuple[Tensor, Logs]:
        """Return the surrogate of each pair, plus the distance to the averaged weights."""
        log_prob = self._log_prob(pairs, said.target, said.output)
        old = pairs.extras["old_log_prob"]
        log_ratio = (log_prob - old.where(old.isfinite(), log_prob.detach())).float()
        advantages = self.advantage_max / self.max_advantage * pairs.advantages
        loss = clipped_surrogate(log_ratio.exp(), advantages, self.clip_range)
        logs = ratio_diagnostics(log_ratio, self.clip_range)
        logs["train/matching_error"] = mean_square(said.output - said.target).mean()
        if said.averaged is not None:
            gap = mean_square(said.output - said.averaged)
            loss = loss + self.ema_beta * gap
            logs["train/ema_gap"] = gap.mean()
        return loss, logs

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, with one time of each stratum."""
        pools = time_strata(self.num_inference_steps, self.timestep_fraction, self.trained_times)
        return replace(super().plan, pools=pools, trained_steps=self.trained_times)
