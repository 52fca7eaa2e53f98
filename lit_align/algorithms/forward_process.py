"""Methods that learn on the forward process: from their own clean samples, noised anew.

    sample x_0 by the deterministic sampler, reward it, and forget how it came about
    for some of the sampler's times t, with fresh noise eps:
        (x_t, target) = corrupt(x_0, eps, t)
        L = l(network(x_t, t), target, advantage) + kl_beta mean |network - pretrained|^2

No step needs a density, so that any sampler serves, and a pair is one call of the network. Networks
that predict noise, velocity or the clean sample are trained alike: `corrupt` gives their target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.data.planner import RoundPlan
from lit_align.functional.advantages import AdvantageNorm, zero_std_fraction
from lit_align.functional.gaussian import mean_square
from lit_align.functional.noise import keyed_generator, randn
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.snapshots import Snapshot, gathered, ramp
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import ForwardOutputs, ForwardPairs, PromptBatch, Trajectory

__all__ = ["ForwardProcessModule", "Logs"]


class ForwardProcessModule(OnlineModule, ABC):
    """Sample, score, noise and update in rounds.

    A subclass implements `pair_loss`. Its trajectories keep only the clean latents, [B, 1, ...].
    The arguments that are not listed are those of `OnlineModule`, with values from the official
    codes.

    Args:
        num_inference_steps: Of the sampler, whose times are those trained at.
        samples_per_prompt: Images per prompt.
        kl_beta: Weight of the squared distance to the pretrained network's output; 0 for none.
        kl_guidance: Guidance of that output; None for the trained network's own.
        stochastic_rollout: Let the sampler's steps add noise; evaluation never does.
        adv_clip_max: Bound on normalised rewards, which they are divided by; positive.
    """

    minibatch_types: ClassVar[tuple[type, ...]] = (ForwardPairs,)
    needs_density: ClassVar[bool] = False
    needs_reference: bool = False  # also without a penalty
    whole_groups: ClassVar[bool] = False  # minibatches of all images of a prompt, at one time
    shared_noise: ClassVar[bool] = False  # images of a prompt are noised alike
    kept_per_prompt: ClassVar[int | None] = None  # of its images, by `compute_targets`

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        prompts_per_round: int = 48,
        samples_per_prompt: int = 24,
        kl_beta: float = 0.0,
        kl_guidance: float | None = None,
        stochastic_rollout: bool = False,
        advantage_norm: AdvantageNorm = "group_mean",
        advantage_eps: float | None = 1e-4,
        std_unbiased: bool | None = False,
        adv_clip_max: float = 5.0,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, prompts_per_round=prompts_per_round,
            samples_per_prompt=samples_per_prompt, drop_last_step=False,
            advantage_norm=advantage_norm, advantage_eps=advantage_eps, std_unbiased=std_unbiased,
            adv_clip_max=adv_clip_max, **options,
        )  # fmt: skip
        if kl_beta < 0 or adv_clip_max <= 0:
            raise ValueError(
                "`kl_beta` must be at least 0 and `adv_clip_max` positive, got "
                f"{kl_beta} and {adv_clip_max}."
            )
        self.kl_beta, self.stochastic_rollout = kl_beta, stochastic_rollout
        self.kl_guidance = self.guidance_scale if kl_guidance is None else kl_guidance
        self.max_advantage = adv_clip_max
        self.snapshots: defaultdict[str, Snapshot] = defaultdict(Snapshot)
        self._schedules: dict[str, tuple[int, int, float, float]] = {}
        if self.needs_reference or kl_beta > 0:
            policy.keep_reference()

    @property
    def snapshot(self) -> Snapshot:
        """The averaged weights that the loss asks."""
        return self.snapshots["snapshot"]

    def keep_snapshot(
        self, flat: int, rate: float, hold: float, name: str = "snapshot", every: int = 1
    ) -> Snapshot:
        """Return an average of the policy's weights that is refreshed before each `every`-th round.

        Its decay is `ramp(n, flat, rate, hold)` after n optimiser steps.
        """
        self._schedules[name] = every, flat, rate, hold
        self.stateful[name] = self.snapshots[name]
        return self.snapshots[name]

    @abstractmethod
    def pair_loss(self, pairs: ForwardPairs, said: ForwardOutputs) -> tuple[Tensor, Logs]:
        """Return the loss of each pair [N], and what to log of it.

        Args:
            pairs: N of them.
            said: What the networks say of them.
        """

    def penalties(self, pairs: ForwardPairs) -> Tensor | float:
        """Return the weight of each pair's distance to the pretrained network's output."""
        return self.kl_beta

    def grouped(self, values: Tensor) -> Tensor:
        """Return values [N, ...] of a minibatch of whole groups as [groups, images, ...]."""
        return values.unflatten(0, (-1, self.kept_per_prompt or self.samples_per_prompt))

    def noisy_steps(self, round_index: int) -> Collection[int] | None:
        """Return none of the steps, unless rollouts are stochastic."""
        return None if self.stochastic_rollout else ()

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample, and keep the clean latents only."""
        trajectory = super().rollout(batch, round_index)
        return trajectory.replace(latents=trajectory.latents[:, -1:].clone())

    def collect(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Refresh the snapshots and run one round; see the base class."""
        step = self.trainer.global_step
        for name, (every, flat, rate, hold) in self._schedules.items():
            if round_index % every == 0:
                decay = ramp(step, flat, rate, hold)
                self.snapshots[name].refresh(step, decay)
                self._round_logs[f"rollout/{name}_decay"] = decay
        return super().collect(batch, round_index)

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Normalise the rewards of all processes into advantages."""
        assert trajectory.batch is not None
        assert trajectory.rewards is not None
        everywhere = map(self.gathered, (trajectory.rewards, trajectory.batch.group_ids))
        self._round_logs["rollout/zero_std_fraction"] = zero_std_fraction(*everywhere)
        return trajectory.replace(advantages=self.normalised_rewards(trajectory))

    def minibatches(self, trajectory: Trajectory, round_index: int) -> Iterator[ForwardPairs]:
        """Cut the round into minibatches of (sample, time) pairs in the chosen order."""
        for samples, times in self.plan.cut(round_index):
            yield self._pairs(trajectory, samples, times, round_index)

    def _pairs(
        self, trajectory: Trajectory, samples: Tensor, times: Tensor, round_index: int
    ) -> ForwardPairs:
        """Return pairs whose noise is keyed by the round, the sample's place in it and the time.

        If it is shared, the place is that of the prompt's first sample.
        """
        assert trajectory.advantages is not None
        assert trajectory.weights is not None
        clean = trajectory.latents[samples, 0]
        places = trajectory.positions.cpu()[samples]
        if self.shared_noise:
            places = places - places % self.samples_per_prompt
        generators = [
            keyed_generator("forward", self.seed, round_index, place, time)
            for place, time in zip(places.tolist(), times.tolist(), strict=True)
        ]
        return ForwardPairs(
            clean=clean,
            noise=randn(clean.shape[1:], generators, clean.device),
            timesteps=trajectory.timesteps[samples, times],
            advantages=trajectory.advantages[samples],
            weights=trajectory.weights[samples],
            conditioning={key: value[samples] for key, value in trajectory.conditioning.items()},
            guidance_scale=trajectory.guidance_scale,
            extras={key: value[samples, times] for key, value in trajectory.extras.items()},
            batch=None if trajectory.batch is None else trajectory.batch.select(samples),
        )

    def loss(self, minibatch: ForwardPairs) -> tuple[Tensor, Logs]:
        """Return the mean of the pairs' losses and of their penalties."""
        noised, target = self.corrupt(minibatch)
        averaged = reference = None
        if "snapshot" in self._schedules:  # before there is a graph, whose weights must stay
            averaged = self._predict_frozen(self.snapshot.applied(), minibatch, noised)
        if self.needs_reference or self.kl_beta > 0:
            guided = minibatch.replace(guidance_scale=self.kl_guidance)
            reference = self._predict_frozen(self.policy.reference(), guided, noised)
        output = self.predict(minibatch, noised)
        loss, logs = self.pair_loss(
            minibatch, ForwardOutputs(noised, target, output, averaged, reference)
        )
        if self.kl_beta > 0:
            assert reference is not None
            gap = mean_square(output - reference)
            loss = loss + self.penalties(minibatch) * gap
            logs["train/kl_to_reference"] = gap.mean()
        return (minibatch.weights * loss).mean(), logs

    def corrupt(self, pairs: ForwardPairs) -> tuple[Tensor, Tensor]:
        """Return the pairs' noised latents, and what the network should say there."""
        return self.policy.scheduler.corrupt(pairs.clean, pairs.noise, pairs.timesteps)

    def predict(self, pairs: ForwardPairs, noised: Tensor) -> Tensor:
        """Return what the network says at noised latents [N, ...], under guidance."""
        return self.policy.predict(
            noised, pairs.timesteps, pairs.conditioning, pairs.guidance_scale,
            cfg_grad=self.cfg_grad,
        )  # fmt: skip

    @torch.no_grad()
    def _predict_frozen(
        self, weights: AbstractContextManager[None], pairs: ForwardPairs, noised: Tensor
    ) -> Tensor:
        self._count(pairs.guidance_scale, len(pairs))
        with weights:
            return self.predict(pairs, noised)

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, in which steps are indices of the sampler's times."""
        times = self.num_inference_steps
        trained = max(1, int(times * self.timestep_fraction))
        return replace(
            super().plan, steps=tuple(range(times)), trained_steps=trained,
            whole_groups=self.whole_groups, kept_per_prompt=self.kept_per_prompt,
        )  # fmt: skip

    def setup(self, stage: str) -> None:
        """Forget the snapshots of an earlier run; see the base class."""
        super().setup(stage)
        if stage == "fit":
            self.policy.branches(self.kl_guidance)  # refuses one that the network cannot take
            for snapshot in self.snapshots.values():
                snapshot.clear()  # those of a checkpoint are restored after this

    def on_train_start(self) -> None:
        """Start the snapshots, or lay restored ones out as the weights are; see the base class."""
        super().on_train_start()
        for name in self._schedules:
            snapshot = self.snapshots[name]
            snapshot.attach(self.policy)
            if not snapshot.average:
                snapshot.start(self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the trained weights also if a signal asks for a checkpoint during a rollout."""
        super().on_save_checkpoint(checkpoint)
        for snapshot in self.snapshots.values():
            trained = {f"policy.{n}": gathered(w) for n, w in snapshot.displaced.items()}
            checkpoint["state_dict"].update(trained)
