"""Methods that learn from their own samples: rollout, score, targets, minibatches, loss."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.rollout import progress_bar, sample_and_score
from lit_align.algorithms.rounds import Logs, RoundModule
from lit_align.data.planner import MinibatchOrder, RoundPlan, StepChoice
from lit_align.functional.advantages import AdvantageNorm, RewardNormalizer
from lit_align.functional.noise import keyed_generator, sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.sampling import CFGGrad
from lit_align.rewards.base import RewardModule, quantize
from lit_align.rewards.scoring import check_background
from lit_align.schedulers.base import StepOutput
from lit_align.trajectory import PromptBatch, Trajectory, Transition

__all__ = ["Logs", "OnlineModule"]


class OnlineModule(RoundModule, ABC):
    """Sample, score and update in rounds.

    A subclass implements `compute_targets` and `loss`. Its constructor names the options that are
    its own, or whose default it changes; all others pass by keyword to this class, `RoundModule`
    and `AlignmentModule`, which document them and refuse unknown ones. The minibatches are of
    (sample, step) pairs.

    Args:
        rollout_batch_size: Images sampled at once, per process.
        num_inner_epochs: Passes over the round's pairs.
        timestep_fraction: Share of the steps with a density that each sample is trained on.
        drop_last_step: Leave the last step out of training, where the noise is tiny and ratios
            are most sensitive (arXiv:2505.07818).
        minibatch_order: "sample_major" takes all steps of a sample together, "timestep_major" one
            step of every sample before the next.
        step_choice: "per_sample" draws the steps and their order for each sample and pass,
            "shared" for all samples alike; "denoising" takes them from noise to clean.
        shared_init_noise: Start all samples of a round from the same noise, so that they differ
            by the noise of their steps only (arXiv:2505.07818).
        cfg_grad: Whether gradient also flows through the unconditional branch of guidance.
        background_rewards: Score each batch in a thread while the next one is sampled, for a
            pointwise reward that computes on the CPU or elsewhere.
        advantage_norm: Normalise rewards by those of the prompt so far ("per_prompt",
            arXiv:2305.13301), of the round ("batch", arXiv:2401.12244), or of the images of one
            prompt draw ("group", arXiv:2505.07818, "group_mean"), see `RewardNormalizer`, also
            for `advantage_eps`, `std_unbiased`, `buffer_size` and `min_count`.
        adv_clip_max: Bound on normalised rewards; None for no bound.
    """

    minibatch_types: ClassVar[tuple[type, ...]] = (Transition,)
    needs_density: ClassVar[bool] = True  # steps whose probability it learns from
    needs_memoryless: ClassVar[bool] = False  # a sampler that forgets the initial noise
    keep: tuple[str, ...] = ()  # fields of `StepOutput` that rollouts keep, as extras
    noise_key = "rollout"  # of their noise, beside the seed and the round

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        rollout_batch_size: int = 8,
        num_inner_epochs: int = 1,
        timestep_fraction: float = 1.0,
        drop_last_step: bool = False,
        minibatch_order: MinibatchOrder = "sample_major",
        step_choice: StepChoice = "per_sample",
        shared_init_noise: bool = False,
        cfg_grad: CFGGrad = "both",
        background_rewards: bool = False,
        advantage_norm: AdvantageNorm = "per_prompt",
        advantage_eps: float | None = None,
        std_unbiased: bool | None = None,
        adv_clip_max: float | None = 5.0,
        buffer_size: int = 32,
        min_count: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, eval_rewards, **options)
        check_choice("minibatch_order", minibatch_order, MinibatchOrder)
        check_choice("step_choice", step_choice, StepChoice)
        check_choice("cfg_grad", cfg_grad, CFGGrad)
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"`timestep_fraction` must lie in (0, 1], got {timestep_fraction}.")
        self.rollout_batch_size = rollout_batch_size
        self.num_inner_epochs, self.timestep_fraction = num_inner_epochs, timestep_fraction
        self.drop_last_step, self.shared_init_noise = drop_last_step, shared_init_noise
        self.minibatch_order, self.step_choice = minibatch_order, step_choice
        self.cfg_grad, self.background_rewards = cfg_grad, background_rewards
        self.adv_clip_max = adv_clip_max
        self.normalizer = RewardNormalizer(
            advantage_norm, advantage_eps, std_unbiased, buffer_size, min_count
        )
        self.stateful["statistics"] = self.normalizer.statistics
        self._update_started = self._update_ended = 0.0

    @abstractmethod
    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Return the trajectory with `advantages` [B] or [B, T], NaN for what must not count."""

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample one trajectory per prompt of the batch and decode its image."""
        key = (self.noise_key, self.seed, round_index)
        with progress_bar(self.trainer, len(batch) * self.num_inference_steps) as bar:
            trajectory = self.policy.sample(
                self.policy.encode_prompt(batch.prompts),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=sample_generators(*key, batch.positions.tolist()),
                initial_generator=self.initial_generators(batch, key),
                stochastic_steps=self.noisy_steps(round_index),
                keep=self.keep,
                progress=lambda: bar.update(len(batch)),
            )
        images = quantize(self.policy.decode(trajectory.latents[:, -1]))
        return trajectory.replace(batch=batch, images=images)

    def initial_generators(
        self, batch: PromptBatch, key: tuple[str, int, int]
    ) -> list[torch.Generator] | None:
        """Return what draws the samples' initial noise, if not each sample's own generator.

        Args:
            batch: B prompts.
            key: Of the round.
        """
        if not self.shared_init_noise:
            return None
        return [keyed_generator("shared", *key) for _ in range(len(batch))]

    def noisy_steps(self, round_index: int) -> Collection[int] | None:
        """Return the steps of a round that add noise; None for all that have a density."""
        return self.plan.noisy_steps(round_index)

    def collect(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Run one round: rollout, score, targets, in the trainer's precision and without grad."""
        trajectory, logs = sample_and_score(self, batch, round_index)
        self._round_logs |= logs
        self.count_rollout(trajectory)
        self.counters["reward_queries"] += len(trajectory) * self.trainer.world_size
        trajectory = self._weigh(self.compute_targets(trajectory))
        if self._update_started:
            self._round_logs["time/update"] = self._update_ended - self._update_started
        self._update_started = time.perf_counter()
        return trajectory

    def count_rollout(self, trajectory: Trajectory) -> None:
        """Count one for each step of each sample."""
        self._count(trajectory.guidance_scale, len(trajectory) * self.num_inference_steps)

    def normalised_rewards(self, trajectory: Trajectory) -> Tensor:
        """Return the rewards [B] normalised over all processes, in float64; NaN stays NaN."""
        batch, rewards = trajectory.batch, trajectory.rewards
        assert batch is not None
        assert rewards is not None
        advantages = self.globally(self.normalizer, rewards, batch.prompt_ids, batch.group_ids)
        bound = self.adv_clip_max
        return advantages if bound is None else advantages.clamp(-bound, bound)

    def _weigh(self, trajectory: Trajectory) -> Trajectory:
        """Give what has no finite advantage weight 0, and the rest equal weights.

        Weights average to 1 over all processes, so that the mean of weighted losses is the mean
        over what counts, whatever its distribution over minibatches and processes.
        """
        advantages = trajectory.advantages
        if advantages is None:
            raise ValueError(f"{type(self).__name__}.compute_targets must set `advantages`.")
        valid = advantages.isfinite()
        weights = valid / self.gathered(valid.float()).mean().clamp(min=1e-8)
        return trajectory.replace(advantages=advantages.where(valid, 0.0).float(), weights=weights)

    def minibatches(self, trajectory: Trajectory, round_index: int) -> Iterator[Any]:
        """Cut the round into minibatches of (sample, step) pairs in the chosen order."""
        for samples, steps in self.plan.cut(round_index):
            yield trajectory.transitions(samples, steps)

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round."""
        # Evaluation may have left the scheduler with another number of steps.
        self.policy.scheduler.set_timesteps(self.num_inference_steps, self.policy.device)
        steps = tuple(self.policy.scheduler.density_steps)
        steps = steps[:-1] if self.drop_last_step else steps
        return RoundPlan(
            prompts_per_round=self.prompts_per_round,
            samples_per_prompt=self.samples_per_prompt,
            rollout_batch_size=self.rollout_batch_size,
            minibatch_size=self.minibatch_size,
            num_inner_epochs=self.num_inner_epochs,
            steps=steps,
            trained_steps=max(1, int(len(steps) * self.timestep_fraction)),
            minibatch_order=self.minibatch_order,
            step_choice=self.step_choice,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def setup(self, stage: str) -> None:
        """Check that there is a density to learn from and that all batch sizes divide."""
        super().setup(stage)
        if stage != "fit":
            return
        self.policy.scheduler.set_timesteps(self.num_inference_steps)
        if self.needs_density:
            self.policy.scheduler.check_density(type(self).__name__)
        if self.needs_memoryless:
            self.policy.scheduler.check_memoryless(type(self).__name__)
        for name, plan in reversed(self.plans.items()):  # it ends with the first one's turn
            self.begin(name)
            self.normalizer.check(plan.samples_per_prompt)
            plan.check(self.trainer.accumulate_grad_batches)
        for reward in (self.reward, *map(self.rewards.get, self.trained_rewards)):
            if self.background_rewards and reward is not None:
                check_background(reward)

    def adamw_with(
        self, network: nn.Module, lr: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """Return AdamW over two groups: the policy, and a network with options of its own."""
        policy = {"params": [p for p in self.policy.parameters() if p.requires_grad]}
        beside = {"params": list(network.parameters()), "lr": lr, "weight_decay": weight_decay}
        return self.adamw([policy, beside])

    @torch.no_grad()
    def reference_step(self, minibatch: Transition) -> StepOutput:
        """Return the pretrained weights' steps from the same states, and count them."""
        self._count(minibatch.guidance_scale, len(minibatch))
        with self.policy.reference():
            return self.policy.replay(minibatch)

    @torch.no_grad()
    def reference_log_probs(self, trajectory: Trajectory) -> Tensor:
        """Return the pretrained weights' `log_probs` [B, T] of a rollout, and count the calls."""
        with self.trainer.precision_plugin.forward_context(), self.policy.reference():
            parts = map(self.policy.replay_log_probs, trajectory.split(self.rollout_batch_size))
            log_probs = torch.cat(list(parts))
        steps = len(self.policy.scheduler.density_steps)
        self._count(trajectory.guidance_scale, len(trajectory) * steps)
        return log_probs

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note when the last update ended; a validation may follow before the next rollout."""
        self._update_ended = time.perf_counter()

    def count_calls(self, minibatch: Any) -> None:
        """Count one for each pair."""
        self._count(getattr(minibatch, "guidance_scale", 1), len(minibatch))  # else image-text
