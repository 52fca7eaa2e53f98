"""Methods that learn from their own samples: rollout, score, targets, minibatches, loss."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_align.algorithms.base import AlignmentModule
from lit_align.algorithms.checkpoint import PostponedSaves
from lit_align.algorithms.rounds import progress_bar, sample_and_score
from lit_align.data.experience import ExperienceLoader
from lit_align.data.image_text import PairStream
from lit_align.data.planner import MinibatchOrder, RoundPlan, StepChoice
from lit_align.functional.advantages import AdvantageNorm, RewardNormalizer
from lit_align.functional.noise import keyed_generator, sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule, quantize
from lit_align.rewards.scoring import check_background
from lit_align.trajectory import PromptBatch, Trajectory, Transition

Logs = dict[str, Tensor]


class OnlineModule(AlignmentModule, ABC):
    """Sample, score and update in rounds; one Lightning epoch is one round.

    A subclass implements `compute_targets` and `loss`. Its constructor names the options that are
    its own, or whose default it changes; all others pass by keyword to this class and to
    `AlignmentModule`, which document them and refuse unknown ones.

    Args:
        prompts_per_round: Prompts per round, over all processes.
        samples_per_prompt: Images per prompt.
        rollout_batch_size: Images sampled at once, per process.
        minibatch_size: (sample, step) pairs per minibatch and process.
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
    keep_predicted = False  # whether rollouts keep the clean latents that each step implies
    noise_key = "rollout"  # of their noise, beside the seed and the round

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        prompts_per_round: int = 256,
        samples_per_prompt: int = 1,
        rollout_batch_size: int = 8,
        minibatch_size: int = 4,
        num_inner_epochs: int = 1,
        timestep_fraction: float = 1.0,
        drop_last_step: bool = False,
        minibatch_order: MinibatchOrder = "sample_major",
        step_choice: StepChoice = "per_sample",
        shared_init_noise: bool = False,
        cfg_grad: Literal["both", "cond_only"] = "both",
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
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"`timestep_fraction` must lie in (0, 1], got {timestep_fraction}.")
        self.prompts_per_round, self.samples_per_prompt = prompts_per_round, samples_per_prompt
        self.rollout_batch_size, self.minibatch_size = rollout_batch_size, minibatch_size
        self.num_inner_epochs, self.timestep_fraction = num_inner_epochs, timestep_fraction
        self.drop_last_step, self.shared_init_noise = drop_last_step, shared_init_noise
        self.minibatch_order, self.step_choice = minibatch_order, step_choice
        self.cfg_grad, self.background_rewards = cfg_grad, background_rewards
        self.adv_clip_max = adv_clip_max
        self.normalizer = RewardNormalizer(
            advantage_norm, advantage_eps, std_unbiased, buffer_size, min_count
        )
        self.reward_name = reward.name if reward is not None else ""
        self.stateful: dict[str, Any] = {"statistics": self.normalizer.statistics}
        self._round_logs: dict[str, float] = {}
        self._window: list[Logs] = []
        self._update_started = 0.0
        self._experience: Any = None
        self._experience_state: Any = None

    def begin(self, name: str) -> None:
        """Make it the turn of a part of `plans`; here it is always that of the only one."""

    @abstractmethod
    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Return the trajectory with `advantages` [B] or [B, T], NaN for what must not count."""

    @abstractmethod
    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the loss of a minibatch and what to log of it, scalars by name."""

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample one trajectory per prompt of the batch and decode its image."""
        key, positions = (self.noise_key, self.seed, round_index), batch.positions.tolist()
        shared = [keyed_generator("shared", *key) for _ in positions]
        with progress_bar(self.trainer, len(batch) * self.num_inference_steps) as bar:
            trajectory = self.policy.sample(
                self.policy.encode_prompt(batch.prompts),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=sample_generators(*key, positions),
                initial_generator=shared if self.shared_init_noise else None,
                keep_predicted=self.keep_predicted,
                progress=lambda: bar.update(len(batch)),
            )
        images = quantize(self.policy.decode(trajectory.latents[:, -1]))
        return trajectory.replace(batch=batch, images=images)

    def collect(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Run one round: rollout, score, targets, in the trainer's precision and without grad."""
        started = time.perf_counter()
        trajectory, logs = sample_and_score(self, batch, round_index)
        self._round_logs |= logs
        trajectory = self._weigh(self.compute_targets(trajectory))
        self._count(trajectory.guidance_scale, len(trajectory) * self.num_inference_steps)
        self.counters["reward_queries"] += len(trajectory) * self.trainer.world_size
        if self._update_started:
            self._round_logs["time/update"] = started - self._update_started
        self._update_started = time.perf_counter()
        return trajectory

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
    def minibatches_per_round(self) -> int:
        """How many of them there are."""
        return self.plan.minibatches

    def experience(self, loader: Any, pairs: PairStream | None = None) -> Any:
        """Return the loader of minibatches over a `PromptLoader`, continued if restored."""
        self._experience = self._make_experience(super().experience(loader, pairs))
        self._continue_experience()
        return self._experience

    def _make_experience(self, loader: Any) -> Any:
        return ExperienceLoader(self, loader)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what every step of the round logs, and the states of `stateful`."""
        super().on_save_checkpoint(checkpoint)
        states = {name: part.state_dict() for name, part in self.stateful.items()}
        checkpoint["lit_align"] |= {"round_logs": dict(self._round_logs), **states}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the loader too: Lightning does so only in the middle of an epoch."""
        super().on_load_checkpoint(checkpoint)
        self._round_logs = dict(checkpoint["lit_align"]["round_logs"])
        for name, part in self.stateful.items():
            part.load_state_dict(checkpoint["lit_align"][name])
        states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader") or [None]
        self._experience_state = states[0]
        self._continue_experience()

    def _continue_experience(self) -> None:
        if None not in (self._experience, self._experience_state):
            self._experience.load_state_dict(self._experience_state)

    @property
    def minibatches_in_flight(self) -> int:
        """How many minibatches were handed out but not learned from yet: 0 or 1."""
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(current.ready - current.processed)

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round."""
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

    @property
    def plans(self) -> dict[str, RoundPlan]:
        """The plan of each part of a round, by name."""
        return {"": self.plan}

    def setup(self, stage: str) -> None:
        """Check that there is a density to learn from and that all batch sizes divide."""
        super().setup(stage)
        if stage != "fit":
            return
        self.policy.scheduler.set_timesteps(self.num_inference_steps)
        self.policy.scheduler.check_density(type(self).__name__)
        for name, plan in reversed(self.plans.items()):  # it ends with the first one's turn
            self.begin(name)
            self.normalizer.check(plan.samples_per_prompt)
            plan.check(self.trainer.accumulate_grad_batches)
        for reward in (self.reward, *map(self.rewards.get, self.trained_rewards)):
            if self.background_rewards and reward is not None:
                check_background(reward)

    def configure_callbacks(self) -> list[Callback]:
        """Return what keeps every checkpoint of a round resumable."""
        return [PostponedSaves()]

    def on_train_start(self) -> None:
        """Print the arithmetic of a round once."""
        for name, plan in self.plans.items():
            arithmetic = plan.describe(self.trainer.accumulate_grad_batches)
            self.print(f"{name}: {arithmetic}" if name else arithmetic)

    def training_step(self, batch: Transition, batch_idx: int) -> Tensor:
        """Return the loss of a minibatch.

        Raises:
            TypeError: If the batch holds bare prompts.
        """
        if not isinstance(batch, self.minibatch_types):
            raise TypeError(
                f"{type(self).__name__} trains on its own samples, but the loader yields "
                f"{type(batch).__name__}; use a PromptDataModule, or wrap a PromptLoader: "
                "`trainer.fit(module, module.experience(loader))`."
            )
        loss, logs = self.loss(batch)
        logs = {"train/loss": loss, **logs}
        self._window.append({name: value.detach() for name, value in logs.items()})
        self._count(getattr(batch, "guidance_scale", 1), len(batch))  # pairs have no guidance
        counters = {name: float(count) for name, count in self.counters.items()}
        self.log_dict({**self._round_logs, **counters}, batch_size=len(batch))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the means over the minibatches of this optimiser step, and the gradient's norm."""
        super().on_before_optimizer_step(optimizer)
        for name in self._window[0]:
            mean = torch.stack([logs[name] for logs in self._window]).mean()
            self.log(name, mean, sync_dist=True, prog_bar=name == "train/loss")
        self._window = []

    def _count(self, guidance_scale: float, latents: int) -> None:
        branches = 1 if guidance_scale == 1 else 2
        self.counters["denoiser_calls"] += latents * branches * self.trainer.world_size
