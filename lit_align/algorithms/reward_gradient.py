"""Methods that draw samples with gradient and follow the reward's gradient through the sampler.

draw latents with the gradient of some denoising steps
r = reward(decode(latents), prompt),  loss = f(r), -r by default
optional: + beta |out_theta - out_pretrained|^2  + pretraining_beta L_pre(image-text pairs)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.denoising import check_pairs, denoising_loss
from lit_align.algorithms.pixels import PixelGrad, decode_pixels, pixel_gradient, saturated
from lit_align.algorithms.rounds import Logs, RoundModule
from lit_align.data.experience import ExperienceLoader
from lit_align.data.image_text import PairStream
from lit_align.data.planner import RoundPlan
from lit_align.functional.noise import keyed_generator, sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.policies.sampling import CFGGrad, with_checkpoint
from lit_align.rewards.base import RewardModule
from lit_align.rewards.scoring import check_invalid
from lit_align.trajectory import PromptBatch, PromptMinibatch, Trajectory


class Drawn(NamedTuple):
    """Samples with gradient.

    Attributes:
        latents: Clean latents, each [B, ...], scored alike.
        trajectory: How they came about.
        steps: Indices of its steps whose network call has a gradient.
    """

    latents: Sequence[Tensor]
    trajectory: Trajectory
    steps: Collection[int]


class RewardGradientModule(RoundModule, ABC):
    """Draw samples with gradient and raise their reward. A subclass implements `draw`.

    The minibatches are of samples; each draws and scores its own, with the current weights.

    Args:
        hinge_margin: Loss ``max(0, hinge_margin - r)``: no gradient from there on.
        target_reward: Loss ``|target_reward - r|`` instead.
        loss_scale: Factor of the reward's loss.
        beta: Weight of the squared distance, per element, between the network's outputs and the
            pretrained model's at the states of the trained steps; 0 for none.
        pretraining_beta: Weight of the denoising loss on image-text pairs; 0 needs no pairs.
        pretraining_batch_size: Pairs per minibatch and process.
        stochastic_sampling: Add noise at the steps that have a density, as the policy's scheduler
            says; else the sampler is deterministic.
        cfg_grad: Whether gradient also flows through the unconditional branch of guidance.
        pixel_grad: "clamped" gives pixels beyond [0, 1] no gradient; "straight_through" shows the
            reward pixels as in a file, and differentiates as if they had not been rounded.
        decode_batch_size: Images decoded at once, and again in backward; None decodes all once.
    """

    minibatch_types: ClassVar[tuple[type, ...]] = (PromptMinibatch,)
    follows_gradient: ClassVar[bool] = True

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        hinge_margin: float | None = None,
        target_reward: float | None = None,
        loss_scale: float = 1.0,
        beta: float = 0.0,
        pretraining_beta: float = 0.0,
        pretraining_batch_size: int = 16,
        stochastic_sampling: bool = False,
        cfg_grad: CFGGrad = "both",
        pixel_grad: PixelGrad = "clamped",
        decode_batch_size: int | None = 2,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, eval_rewards, **options)
        if None not in (hinge_margin, target_reward):
            raise ValueError("Give `hinge_margin` or `target_reward`, not both.")
        check_choice("cfg_grad", cfg_grad, CFGGrad)
        check_choice("pixel_grad", pixel_grad, PixelGrad)
        self.hinge_margin, self.target_reward = hinge_margin, target_reward
        self.loss_scale, self.beta = loss_scale, beta
        self.pretraining_beta = pretraining_beta
        self.pretraining_batch_size = pretraining_batch_size
        self.stochastic_sampling, self.cfg_grad = stochastic_sampling, cfg_grad
        self.pixel_grad, self.decode_batch_size = pixel_grad, decode_batch_size
        self.pairs: Any = None  # a `PairStream`, once there are loaders
        self._invalid = (-1, 0)  # round, images of it that could not be scored
        if beta > 0:
            policy.keep_reference()

    @abstractmethod
    def draw(self, minibatch: PromptMinibatch) -> Drawn:
        """Draw the minibatch's samples with gradient."""

    def sample(
        self, minibatch: PromptMinibatch, steps: Collection[int], **options: Any
    ) -> Trajectory:
        """Sample with the gradient of these steps; options are `DiffusionPolicy.sample`'s."""
        positions = minibatch.batch.positions.tolist()
        with torch.no_grad():
            conditioning = self.policy.encode_prompt(minibatch.batch.prompts)
        trajectory = self.policy.sample(
            conditioning,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            generator=sample_generators("rollout", self.seed, minibatch.round_index, positions),
            stochastic_steps=None if self.stochastic_sampling else (),
            grad_steps=steps,
            cfg_grad=self.cfg_grad,
            **options,
        )
        self._count(self.guidance_scale, trajectory.timesteps.numel())
        return trajectory

    def draw_generator(self) -> torch.Generator:
        """Return a generator that is the same for all minibatches and processes of an update."""
        return keyed_generator("draw", self.seed, self.trainer.global_step)

    def loss(self, minibatch: PromptMinibatch) -> tuple[Tensor, Logs]:
        """Return the reward's loss of the samples, plus the penalties."""
        drawn = self.draw(minibatch)
        loss, logs = self.reward_loss(torch.cat(list(drawn.latents)), minibatch)
        if self.beta > 0:
            penalty = self._distance(drawn)
            loss = loss + self.beta * penalty
            logs["train/distance_to_reference"] = penalty
        if minibatch.pairs is not None:
            pretraining = denoising_loss(self.policy, minibatch.pairs, self.seed).mean()
            loss = loss + self.pretraining_beta * pretraining
            logs["train/pretraining_loss"] = pretraining
            self._count(1, len(minibatch.pairs))
        return loss, logs

    def reward_loss(self, latents: Tensor, minibatch: PromptMinibatch) -> tuple[Tensor, Logs]:
        """Return the mean loss of latents [n B, ...], those of the minibatch n times over.

        Its gradient is taken up to the pixels first, in float32, and chained by hand with that of
        the sampler, so that an image without a score has none.
        """
        repeats = len(latents) // len(minibatch)
        batch = minibatch.batch.select(torch.arange(len(minibatch)).repeat(repeats))
        images = decode_pixels(self.policy, latents, self.decode_batch_size, self.pixel_grad)
        rewards, gradient = pixel_gradient(self, images, batch, self.loss_of)
        self.counters["reward_queries"] += len(rewards) * self.trainer.world_size
        valid = ~rewards.isnan()
        unscored = (~valid).view(repeats, -1).any(dim=0)
        self._check_invalid(minibatch.round_index, int(unscored.sum()))
        weights = valid / self.gathered(valid.float()).mean().clamp(min=1e-8)
        known = self.loss_of(rewards.where(valid, 0.0)).where(valid, 0.0)
        chained = (images * gradient).flatten(1).sum(1).where(valid, 0.0)
        losses = known + chained - chained.detach()
        logs = {
            f"rollout/reward/{self.reward_name}": rewards.nanmean(),
            "train/saturated": saturated(images),
        }
        return (weights * losses).mean(), logs

    def loss_of(self, rewards: Tensor) -> Tensor:
        """Return each reward's loss [B]."""
        if self.hinge_margin is not None:
            return self.loss_scale * (self.hinge_margin - rewards).relu()
        if self.target_reward is not None:
            return self.loss_scale * (self.target_reward - rewards).abs()
        return -self.loss_scale * rewards

    def _distance(self, drawn: Drawn) -> Tensor:
        """Return the mean squared distance of the trained steps' outputs from the base model's."""
        path = drawn.trajectory
        distances = []
        for step in drawn.steps:
            state, times = path.latents[:, step].detach(), path.timesteps[:, step]
            arguments = (state, times, path.conditioning, path.guidance_scale)
            output = with_checkpoint(self.policy.predict, *arguments, cfg_grad=self.cfg_grad)
            with torch.no_grad(), self.policy.reference():
                reference = self.policy.predict(*arguments)
            distances.append((output - reference).square().mean())
            self._count(path.guidance_scale, 2 * len(state))
        return torch.stack(distances).mean()

    def _check_invalid(self, round_index: int, count: int) -> None:
        """Count the images without a score; stop if the round has too many of them."""
        known = self._invalid[1] if self._invalid[0] == round_index else 0
        self._invalid = (round_index, known + count)
        self._round_logs["rollout/invalid"] = float(known + count)
        limit = self.max_invalid_fraction
        check_invalid(self.reward_name, known + count, self.plan.samples, limit)

    def collect(self, batch: PromptBatch, round_index: int) -> PromptBatch:
        """Return the prompts: samples are drawn when their minibatch's turn comes."""
        return batch

    def minibatches(self, collected: PromptBatch, round_index: int) -> Iterator[PromptMinibatch]:
        """Cut the round's prompts, with pairs beside if they are learned from."""
        first = round_index * self.minibatches_per_round
        for number, (samples, _) in enumerate(self.plan.cut(round_index), first):
            beside = self.pairs and self.pairs.batch(number, self.pretraining_batch_size)
            yield PromptMinibatch(collected.select(samples), round_index, beside)

    @property
    def plan(self) -> RoundPlan:
        """The sizes and order of a round; a sample is trained on once, as a whole."""
        return RoundPlan(
            prompts_per_round=self.prompts_per_round,
            samples_per_prompt=self.samples_per_prompt,
            rollout_batch_size=self.minibatch_size,
            minibatch_size=self.minibatch_size,
            num_inner_epochs=1,
            steps=(0,),
            trained_steps=1,
            minibatch_order="sample_major",
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def describe(self, plan: RoundPlan, accumulate_grad_batches: int) -> str:
        """Return the round's arithmetic in words."""
        return (
            f"A round: {plan.prompts_per_round} prompts x {plan.samples_per_prompt} images in "
            f"{plan.minibatches} minibatches of {plan.minibatch_size} per process; "
            f"{plan.minibatches // accumulate_grad_batches} optimiser step(s)."
        )

    def setup(self, stage: str) -> None:
        """Check that all batch sizes divide; see the base class."""
        super().setup(stage)
        if stage == "fit":
            self.plan.check(self.trainer.accumulate_grad_batches)

    def experience(self, loader: Any, pairs: PairStream | None = None) -> Any:
        """Return the loader of minibatches over prompts, and pairs."""
        setting = f"pretraining_beta: {self.pretraining_beta}"
        check_pairs(pairs, self.pretraining_beta > 0, setting)
        self.pairs = pairs
        return super().experience(loader)

    def _make_experience(self, loader: Any) -> Any:
        return ExperienceLoader(self, loader, self.pairs.fingerprint if self.pairs else "")
