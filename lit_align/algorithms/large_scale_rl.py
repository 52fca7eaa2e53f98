"""Large-scale reinforcement learning of diffusion models (arXiv:2401.12244).

Algorithm 1, one round:

    for each task (reward, prompts):
        sample x_T..x_0 ~ p_theta for its prompts,  r = reward(x_0, prompt), also of whole groups
        A = (r - mean) / (std + eps) over the task's batch, clipped to +-adv_clip_max
        for each of a few steps t, drawn for the round, over all samples:
            rho = p_theta(x_{t-1} | x_t) / p_old(x_{t-1} | x_t)
            L = max(-A rho, -A clip(rho, 1 - clip_range, 1 + clip_range)), one gradient step
        (the next task samples from the updated weights)
    on image-text pairs: L_pre = |eps - eps_theta(x_t, t, text)|^2, one gradient step

Deviations:
    1. The paper prints J + beta L_pre; what is minimised is -J + beta L_pre ("weighted"). Its
       algorithm takes a step of its own on L_pre instead ("separate", the default).
    2. Loss and log p are means over samples, steps and elements; the official code sums the loss.
    3. The drawn steps are the same on all processes, as one generator decides them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

from torch import Tensor

from lit_align.algorithms.choices import check_choice
from lit_align.algorithms.denoising import check_pairs, denoising_loss
from lit_align.algorithms.online import Logs, OnlineModule
from lit_align.algorithms.tasks import Task, chain_tasks
from lit_align.data.image_text import PairStream
from lit_align.data.planner import MinibatchOrder, RoundPlan, StepChoice
from lit_align.functional.advantages import AdvantageNorm
from lit_align.functional.policy_gradient import clipped_surrogate, ratio_diagnostics
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PairBatch, Trajectory, Transition

Pretraining = Literal["separate", "weighted", "none"]


class LargeScaleRL(OnlineModule):
    """Clipped policy gradient on one task or several, with a pretraining loss.

    Give `reward`, or `tasks` and a prompt list for each of them. The arguments that are not listed
    are those of `OnlineModule`, with the paper's values.

    Args:
        tasks: What each task maximises, by name, in their order; `data.train` names their prompts.
        pretraining: "separate" takes gradient steps on image-text pairs after the last task,
            "weighted" adds their loss to every other; "none" needs no pairs.
        pretraining_beta: Weight of the pretraining loss.
        pretraining_batch_size: Pairs per minibatch and process.
        pretraining_steps: Optimiser steps per round on pairs, for "separate".
        clip_range: Of the importance ratio; 1e-4 on 64x64x4 latents.
    """

    minibatch_types: ClassVar[tuple[type, ...]] = (Transition, PairBatch)

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        tasks: dict[str, Task] | None = None,
        pretraining: Pretraining = "separate",
        pretraining_beta: float = 1.0,
        pretraining_batch_size: int = 16,
        pretraining_steps: int = 1,
        clip_range: float = 1e-4,
        lr: float = 2e-6,
        weight_decay: float = 1e-2,
        guidance_scale: float = 7.0,
        timestep_fraction: float = 0.1,
        minibatch_order: MinibatchOrder = "timestep_major",
        step_choice: StepChoice = "shared",
        advantage_norm: AdvantageNorm = "batch",
        advantage_eps: float | None = 1e-7,
        std_unbiased: bool | None = True,
        adv_clip_max: float | None = 10.0,
        **options: Any,
    ) -> None:
        if (reward is None) == (not tasks):
            raise ValueError("Give LargeScaleRL either a `reward` or `tasks`.")
        scored = {name: task.reward for name, task in (tasks or {}).items()}
        super().__init__(
            policy, reward, {**scored, **(eval_rewards or {})}, lr=lr, weight_decay=weight_decay,
            guidance_scale=guidance_scale, timestep_fraction=timestep_fraction,
            minibatch_order=minibatch_order, step_choice=step_choice,
            advantage_norm=advantage_norm, advantage_eps=advantage_eps, std_unbiased=std_unbiased,
            adv_clip_max=adv_clip_max, **options,
        )  # fmt: skip
        check_choice("pretraining", pretraining, Pretraining)
        if clip_range <= 0:
            raise ValueError(f"`clip_range` must be positive, got {clip_range}.")
        self.clip_range, self.pretraining_beta = clip_range, pretraining_beta
        self.pretraining, self.pretraining_steps = pretraining, pretraining_steps
        self.pretraining_batch_size = pretraining_batch_size
        self.pairs: Any = None  # a `PairStream`, once there are loaders
        self.tasks, self.task, self.advantage_norm = tasks or {}, "", advantage_norm
        if tasks:
            self.trained_rewards = list(tasks)
            self.begin(next(iter(tasks)))

    def begin(self, name: str) -> None:
        """Make it a task's turn."""
        if task := self.tasks.get(name):
            self.task, self.reward, self.reward_name = name, task.reward, name
            self.normalizer.use(task.advantage_norm or self.advantage_norm)
            self.noise_key = f"rollout {name}"  # no two tasks share theirs

    @property
    def plans(self) -> dict[str, RoundPlan]:
        """The sizes and orders of the tasks' rounds, by name."""
        common = super().plan
        return {name: task.resize(common) for name, task in self.tasks.items()} or {"": common}

    @property
    def plan(self) -> RoundPlan:
        """Those of the task whose turn it is."""
        return self.plans[self.task]

    def compute_targets(self, trajectory: Trajectory) -> Trajectory:
        """Normalise the task's rewards of all processes into advantages."""
        return trajectory.replace(advantages=self.normalised_rewards(trajectory))

    def loss(self, minibatch: Transition | PairBatch) -> tuple[Tensor, Logs]:
        """Return the surrogate of a minibatch, or the pretraining loss, or both."""
        if isinstance(minibatch, PairBatch):
            return self._pretraining_loss(minibatch)
        step = self.policy.replay(minibatch, cfg_grad=self.cfg_grad)
        log_ratio = step.log_prob - minibatch.old_log_prob
        surrogate = clipped_surrogate(log_ratio.exp(), minibatch.advantages, self.clip_range)
        loss = (minibatch.weights * surrogate).mean()
        logs = ratio_diagnostics(log_ratio, self.clip_range)
        if minibatch.pairs is None:
            return loss, logs
        self._count(1, len(minibatch.pairs))
        pretraining, more = self._pretraining_loss(minibatch.pairs)
        return loss + pretraining, logs | more

    def _pretraining_loss(self, pairs: PairBatch) -> tuple[Tensor, Logs]:
        loss = denoising_loss(self.policy, pairs, self.seed).mean()
        return self.pretraining_beta * loss, {"train/pretraining_loss": loss}

    def minibatches(self, trajectory: Trajectory, round_index: int) -> Iterator[Any]:
        """Cut the task's round, with pairs in its minibatches or after those of the last task."""
        names, counts = list(self.plans), [plan.minibatches for plan in self.plans.values()]
        place = names.index(self.task)
        first = round_index * sum(counts) + sum(counts[:place])
        for number, transition in enumerate(super().minibatches(trajectory, round_index), first):
            pairs = self._draw(number) if self.pretraining == "weighted" else None
            yield transition.replace(pairs=pairs)
        if place == len(names) - 1:
            extra = self.pretraining_minibatches
            yield from map(self._draw, range(round_index * extra, (round_index + 1) * extra))

    def _draw(self, number: int) -> PairBatch:
        return cast(PairBatch, self.pairs.batch(number, self.pretraining_batch_size))

    @property
    def pretraining_minibatches(self) -> int:
        """Minibatches of pairs at a round's end."""
        separate = self.pretraining == "separate"
        return self.pretraining_steps * self.trainer.accumulate_grad_batches * separate

    def minibatches_of(self, task: str) -> int:
        """Return how many minibatches a task's turn yields."""
        last = list(self.plans)[-1]
        return self.plans[task].minibatches + self.pretraining_minibatches * (task == last)

    @property
    def minibatches_per_round(self) -> int:
        """How many there are in all turns."""
        return sum(map(self.minibatches_of, self.plans))

    def experience(self, loader: Any, pairs: PairStream | None = None) -> Any:
        """Return the loader of minibatches over prompts, by task, and pairs."""
        check_pairs(pairs, self.pretraining != "none", f"pretraining: {self.pretraining}")
        self.pairs = pairs
        return super().experience(loader)

    def _make_experience(self, loader: Any) -> Any:
        return chain_tasks(self, loader, self.pairs.fingerprint if self.pairs else "")
