"""Methods that learn the sampling schedule of a frozen policy, by a head that reads its features.

    sample with ratios drawn from the head's Betas -> rewards -> targets -> minibatches of images

The update calls the head on stored features, and never the denoiser.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.algorithms.rollout import progress_bar
from lit_align.algorithms.sharding import anywhere
from lit_align.data.planner import RoundPlan
from lit_align.functional.noise import keyed_generator, sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.learned_schedule import LearnedSchedule
from lit_align.policies.time_prediction import TimePredictor
from lit_align.rewards.base import RewardModule, quantize
from lit_align.trajectory import PromptBatch, Trajectory

__all__ = ["Logs", "ScheduleModule"]

FeatureDtype = Literal["float32", "bfloat16", "float16"]


class ScheduleModule(OnlineModule, ABC):
    """Sample on learned schedules, score and update in rounds.

    A subclass implements `compute_targets` and `loss`, of minibatches of whole images. The
    arguments that are not listed are those of `OnlineModule`, less what concerns single steps and
    the normalisation of advantages.

    Args:
        policy: The frozen model, with `train: none`.
        t_min: Noise level below which an image is finished, in (0, 1).
        final_to_zero: See `LearnedSchedule`.
        head_width: Channels of the `TimePredictor`.
        init_alpha: Bias of its first output at the start; by default 2.5, with `init_steps` 0.
        init_beta: Of its second, by default 1, with `init_steps` 0; ratios start around
            ``sigmoid(init_alpha - init_beta)``.
        init_steps: Start as a fixed schedule of so many steps instead; see `TimePredictor`.
        init_shift: Shift of that schedule.
        feature_dtype: That features are kept in for the updates. A round holds samples x T of them
            in main memory: for Stable Diffusion 3 at 1024 pixels 25 MB each in 16 bits.
        shared_init_noise: Start the images of a prompt from the same noise, so that they differ by
            their schedules only and their comparison is far less noisy; an addition.
        num_inference_steps: T, the most steps of an image; `eval_num_inference_steps` in
            evaluation.

    Attributes:
        head: What is trained.
    """

    minibatch_types: ClassVar[tuple[type, ...]] = (Trajectory,)
    trains_policy: ClassVar[bool] = False
    needs_density: ClassVar[bool] = False

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        t_min: float = 0.01,
        final_to_zero: bool = True,
        head_width: int = 128,
        init_alpha: float | None = None,
        init_beta: float | None = None,
        init_steps: int = 0,
        init_shift: float = 1.0,
        feature_dtype: FeatureDtype = "bfloat16",
        shared_init_noise: bool = False,
        num_inference_steps: int = 28,
        **options: Any,
    ) -> None:
        super().__init__(
            policy, reward, eval_rewards, num_inference_steps=num_inference_steps,
            timestep_fraction=1.0, drop_last_step=False, minibatch_order="sample_major",
            step_choice="per_sample", shared_init_noise=shared_init_noise, cfg_grad="both",
            advantage_norm="batch", advantage_eps=None, std_unbiased=None, adv_clip_max=None,
            buffer_size=1, min_count=1, **options,
        )  # fmt: skip
        check_choice("feature_dtype", feature_dtype, FeatureDtype)
        if not 0 < t_min < 1:
            raise ValueError(f"`t_min` must lie in (0, 1), got {t_min}.")
        self.t_min, self.final_to_zero = t_min, final_to_zero
        self.feature_dtype: torch.dtype = getattr(torch, feature_dtype)
        self.head = TimePredictor.for_policy(
            policy, head_width, init_alpha=init_alpha, init_beta=init_beta, init_steps=init_steps,
            init_shift=init_shift,
        )  # fmt: skip
        self.mean_steps = MeanMetric()

    @property
    def schedule(self) -> LearnedSchedule:
        """What is learned, as it is evaluated and exported."""
        return LearnedSchedule(
            self.head, type(self.policy.pipeline).__name__, self.guidance_scale,
            self.eval_num_inference_steps, self.t_min, self.final_to_zero,
        )  # fmt: skip

    def _sample(
        self, schedule: LearnedSchedule, batch: PromptBatch, key: Sequence[Any], **options: Any
    ) -> tuple[Trajectory, Tensor]:
        """Return trajectories by the schedule and their images."""
        purpose, seed, round_index = key
        trajectory = schedule.sample(
            self.policy, self.policy.encode_prompt(batch.prompts),
            sample_generators(purpose, seed, round_index, batch.positions.tolist()),
            anywhere=partial(anywhere, self), **options,
        )  # fmt: skip
        return trajectory, quantize(self.policy.decode(trajectory.latents[:, -1]))

    def rollout(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample with ratios drawn from the head; see `LearnedSchedule.sample` for what is kept."""
        schedule = replace(self.schedule, max_steps=self.num_inference_steps)
        key = (self.noise_key, self.seed, round_index)
        shared = [keyed_generator("shared", *key, group) for group in batch.group_ids.tolist()]
        with progress_bar(self.trainer, len(batch) * self.num_inference_steps) as bar:
            trajectory, images = self._sample(
                schedule, batch, key, explore=True, feature_dtype=self.feature_dtype,
                initial_generator=shared if self.shared_init_noise else None, progress=bar.update,
            )  # fmt: skip
        return trajectory.replace(batch=batch, images=images)

    @torch.no_grad()
    def generate(self, batch: PromptBatch, purpose: str = "val") -> tuple[Tensor, Tensor]:
        """Return images and latents by the most likely ratios; see the base class."""
        trajectory, images = self._sample(self.schedule, batch, (purpose, self.seed, 0))
        self._steps = trajectory.extras["alive"].sum(dim=1)
        return images, trajectory.latents[:, -1]

    def evaluate(self, batch: PromptBatch) -> dict[str, Any]:
        """Return also the `steps` [B] that the images took; see the base class."""
        return {**super().evaluate(batch), "steps": self._steps}

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Also average the steps, for `val/steps`; see the base class."""
        outputs = super().validation_step(batch, batch_idx)
        self.mean_steps.update(outputs["steps"])
        return outputs

    def _log_means(self, stage: str) -> None:
        super()._log_means(stage)
        self.log(f"{stage}/steps", self.mean_steps.compute())
        self.mean_steps.reset()

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round, of whole images."""
        return replace(super().plan, steps=(0,), trained_steps=1)

    def minibatches(self, trajectory: Trajectory, round_index: int) -> Iterator[Trajectory]:
        """Cut the round into minibatches of images."""
        for samples, _ in self.plan.cut(round_index):
            yield trajectory.select(samples)

    def count_rollout(self, trajectory: Trajectory) -> None:
        """Count one for each step that was taken."""
        rows = int(self.gathered(trajectory.extras["alive"].sum()[None]).sum())
        self.counters["denoiser_calls"] += rows * self.policy.branches(trajectory.guidance_scale)

    def count_calls(self, minibatch: Any) -> None:
        """Count nothing: the update calls the head only."""

    def save_pretrained(self, path: str, dtype: torch.dtype | None = None) -> None:
        """Write the schedule, which `LearnedSchedule.from_pretrained` reads."""
        self.schedule.save_pretrained(path, dtype)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the head is; see the base class."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_align"]["schedule"] = self.schedule.options()
