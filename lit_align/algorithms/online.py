"""Methods that learn from their own samples: rollout, score, targets, minibatches, loss."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor
from tqdm.auto import tqdm

from lit_align.algorithms.base import AlignmentModule, quantize
from lit_align.algorithms.checkpoint import PostponedSaves
from lit_align.data.experience import ExperienceLoader
from lit_align.data.planner import MinibatchOrder, RoundPlan
from lit_align.functional.noise import sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.rewards.scoring import RewardError, check_background, in_thread
from lit_align.trajectory import PromptBatch, Trajectory, Transition

Logs = dict[str, Tensor]
Scores = list[Future[Tensor]]


class OnlineModule(AlignmentModule, ABC):
    """Sample, score and update in rounds; one Lightning epoch is one round.

    A subclass implements `compute_targets` and `loss`. The arguments that are not listed are those
    of `AlignmentModule`.

    Args:
        prompts_per_round: Prompts per round, over all processes.
        samples_per_prompt: Images per prompt.
        rollout_batch_size: Images sampled at once, per process.
        minibatch_size: (sample, step) pairs per minibatch and process.
        num_inner_epochs: Passes over the round's pairs.
        timestep_fraction: Share of the steps with a density that each sample is trained on, drawn
            at random per sample and pass.
        minibatch_order: "sample_major" takes all steps of a sample together, "timestep_major" one
            step of every sample before the next.
        cfg_grad: Whether gradient also flows through the unconditional branch of guidance.
        background_rewards: Score each batch in a thread while the next one is sampled, for a
            pointwise reward that computes on the CPU or elsewhere.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        lr: float = 3e-4,
        weight_decay: float = 1e-4,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        eval_num_inference_steps: int | None = None,
        seed: int = 42,
        max_invalid_fraction: float = 0.05,
        reward_timeout: float | None = None,
        prompts_per_round: int = 256,
        samples_per_prompt: int = 1,
        rollout_batch_size: int = 8,
        minibatch_size: int = 4,
        num_inner_epochs: int = 1,
        timestep_fraction: float = 1.0,
        minibatch_order: MinibatchOrder = "sample_major",
        cfg_grad: Literal["both", "cond_only"] = "both",
        background_rewards: bool = False,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, lr, weight_decay, num_inference_steps, guidance_scale,
            eval_num_inference_steps, seed, max_invalid_fraction, reward_timeout,
        )  # fmt: skip
        if not 0 < timestep_fraction <= 1:
            raise ValueError(f"`timestep_fraction` must lie in (0, 1], got {timestep_fraction}.")
        self.prompts_per_round, self.samples_per_prompt = prompts_per_round, samples_per_prompt
        self.rollout_batch_size, self.minibatch_size = rollout_batch_size, minibatch_size
        self.num_inner_epochs, self.timestep_fraction = num_inner_epochs, timestep_fraction
        self.minibatch_order, self.cfg_grad = minibatch_order, cfg_grad
        self.background_rewards = background_rewards
        self._round_logs: dict[str, float] = {}
        self._window: list[Logs] = []
        self._update_started = 0.0
        self._experience: ExperienceLoader | None = None
        self._experience_state: Any = None

    @abstractmethod
    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Return the trajectory with `advantages` [B], NaN where a sample must not count."""

    @abstractmethod
    def loss(self, minibatch: Transition) -> tuple[Tensor, Logs]:
        """Return the loss of a minibatch and what to log of it, scalars by name."""

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample one trajectory per prompt of the batch and decode its image."""
        conditioning = self.policy.encode_prompt(batch.prompts)
        positions = batch.positions.tolist()
        with self._progress(len(batch) * self.num_inference_steps) as bar:
            trajectory = self.policy.sample(
                conditioning,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=sample_generators("rollout", self.seed, round_index, positions),
                progress=lambda: bar.update(len(batch)),
            )
        images = quantize(self.policy.decode(trajectory.latents[:, -1]))
        return trajectory.replace(batch=batch, images=images)

    def collect(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Run one round: rollout, score, targets, in the trainer's precision and without grad.

        Raises:
            RewardError: If the reward fails, or for more images than `max_invalid_fraction`.
        """
        started = time.perf_counter()
        trajectory, scores = self._sample(batch, round_index)
        sampled = time.perf_counter()
        rewards = torch.cat([s.result() for s in scores]) if scores else self._score(trajectory)
        trajectory = trajectory.replace(rewards=rewards, images=None)
        scored = time.perf_counter()
        self._check_rewards(trajectory)
        trajectory = self._weigh(self.compute_targets(trajectory))
        self._count(len(trajectory) * self.num_inference_steps, rewards=len(trajectory))
        self._round_logs |= {"time/rollout": sampled - started, "time/reward": scored - sampled}
        if self._update_started:
            self._round_logs["time/update"] = started - self._update_started
        self._update_started = time.perf_counter()
        return trajectory

    @torch.no_grad()
    def _sample(self, batch: PromptBatch, round_index: int) -> tuple[Trajectory, Scores]:
        """Return the round's samples, and their scores if those are computed beside."""
        parts: list[Trajectory] = []
        scores: Scores = []
        for chunk in torch.arange(len(batch)).split(self.rollout_batch_size):
            with self.trainer.precision_plugin.forward_context():
                parts.append(self.rollout(batch.select(chunk), round_index))
            if self.background_rewards:
                scores.append(in_thread(partial(self._score, parts[-1])))
        return Trajectory.concatenate(parts), scores

    @torch.no_grad()
    def _score(self, trajectory: Trajectory) -> Tensor:
        assert self.reward is not None
        assert trajectory.images is not None
        assert trajectory.batch is not None
        self.reward.train()  # running statistics follow training samples only
        scores = self.score(self.reward, trajectory.images, trajectory.batch)
        self.reward.eval()
        return scores

    def _check_rewards(self, trajectory: Trajectory) -> None:
        """Keep the round's statistics, and stop if too many images could not be scored."""
        assert self.reward is not None
        assert trajectory.rewards is not None
        everywhere = self.gathered(trajectory.rewards)
        valid = everywhere[~everywhere.isnan()]
        invalid = len(everywhere) - len(valid)
        if invalid > self.max_invalid_fraction * len(everywhere):
            raise RewardError(
                f"{self.reward.name} could not score {invalid} of the round's {len(everywhere)} "
                f"images, more than `max_invalid_fraction` ({self.max_invalid_fraction}) allows; "
                "repair the reward, or raise the limit if so many NaN are expected."
            )
        self._round_logs |= {
            f"rollout/reward/{self.reward.name}": float(valid.mean()),
            f"rollout/reward_std/{self.reward.name}": float(valid.std(correction=0)),
            "rollout/invalid": float(invalid),
        }

    def _weigh(self, trajectory: Trajectory) -> Trajectory:
        """Give samples without a finite advantage weight 0, and the others equal weights.

        Weights average to 1 over all processes, so that the mean of weighted losses is the mean
        over valid samples, whatever their distribution over minibatches and processes.
        """
        advantages = trajectory.advantages
        if advantages is None:
            raise ValueError(f"{type(self).__name__}.compute_targets must set `advantages`.")
        valid = advantages.isfinite()
        weights = valid / self.gathered(valid.float()).mean().clamp(min=1e-8)
        return trajectory.replace(advantages=advantages.where(valid, 0.0).float(), weights=weights)

    def minibatches(self, trajectory: Trajectory, round_index: int) -> Iterator[Transition]:
        """Cut the round into minibatches of (sample, step) pairs in the chosen order."""
        for samples, steps in self.plan.cut(round_index):
            yield trajectory.transitions(samples, steps)

    def experience(self, loader: Any) -> ExperienceLoader:
        """Return the loader of minibatches over a `PromptLoader`, continued if restored."""
        self._experience = ExperienceLoader(self, super().experience(loader))
        if self._experience_state is not None:
            self._experience.load_state_dict(self._experience_state)
        return self._experience

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what every step of the round logs; see the base class."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_align"]["round_logs"] = dict(self._round_logs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the loader too: Lightning does so only in the middle of an epoch."""
        super().on_load_checkpoint(checkpoint)
        self._round_logs = dict(checkpoint["lit_align"]["round_logs"])
        states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader")
        if states:
            self._experience_state = states[0]
            if self._experience is not None:
                self._experience.load_state_dict(states[0])

    @property
    def minibatches_in_flight(self) -> int:
        """How many minibatches were handed out but not learned from yet: 0 or 1."""
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(current.ready - current.processed)

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round."""
        steps = tuple(self.policy.scheduler.density_steps)
        return RoundPlan(
            prompts_per_round=self.prompts_per_round,
            samples_per_prompt=self.samples_per_prompt,
            rollout_batch_size=self.rollout_batch_size,
            minibatch_size=self.minibatch_size,
            num_inner_epochs=self.num_inner_epochs,
            steps=steps,
            trained_steps=max(1, int(len(steps) * self.timestep_fraction)),
            minibatch_order=self.minibatch_order,
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
        if not len(self.policy.scheduler.density_steps):
            raise ValueError(
                f"{type(self).__name__} needs a stochastic sampler: set `eta` above 0 (DDIM), or a "
                "`kind` other than 'ode' and a positive `noise_level` (flow matching)."
            )
        self.plan.check(self.trainer.accumulate_grad_batches)
        if self.background_rewards and self.reward is not None:
            check_background(self.reward)

    def configure_callbacks(self) -> list[Callback]:
        """Return what keeps every checkpoint of a round resumable."""
        return [PostponedSaves()]

    def on_train_start(self) -> None:
        """Print the arithmetic of a round once."""
        self.print(self.plan.describe(self.trainer.accumulate_grad_batches))

    def training_step(self, batch: Transition, batch_idx: int) -> Tensor:
        """Return the loss of a minibatch.

        Raises:
            TypeError: If the batch holds bare prompts.
        """
        if not isinstance(batch, Transition):
            raise TypeError(
                f"{type(self).__name__} trains on its own samples, but the loader yields "
                f"{type(batch).__name__}; use a PromptDataModule, or wrap a PromptLoader: "
                "`trainer.fit(module, module.experience(loader))`."
            )
        loss, logs = self.loss(batch)
        logs = {"train/loss": loss, **logs}
        self._window.append({name: value.detach() for name, value in logs.items()})
        self._count(len(batch))
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

    def _count(self, latents: int, rewards: int = 0) -> None:
        branches = 1 if self.guidance_scale == 1 else 2
        self.counters["denoiser_calls"] += latents * branches * self.trainer.world_size
        self.counters["reward_queries"] += rewards * self.trainer.world_size

    def _progress(self, total: int) -> Any:
        quiet = self.trainer.progress_bar_callback is None or self.trainer.global_rank > 0
        return tqdm(total=total, desc="Rollout", unit="call", leave=False, disable=quiet)
