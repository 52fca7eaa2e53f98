"""Methods that learn in rounds: prompts, what is made of them, minibatches, loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_align.algorithms.base import AlignmentModule
from lit_align.algorithms.checkpoint import PostponedSaves
from lit_align.data.experience import ExperienceLoader
from lit_align.data.image_text import PairStream
from lit_align.data.planner import RoundPlan
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.rewards.scoring import check_differentiable
from lit_align.trajectory import PromptBatch

Logs = dict[str, Tensor]


class RoundModule(AlignmentModule, ABC):
    """Deal prompts, make minibatches of them and update; one Lightning epoch is one round.

    Args:
        prompts_per_round: Prompts per round, over all processes.
        samples_per_prompt: Images per prompt.
        minibatch_size: Items of a minibatch, per process.
    """

    minibatch_types: ClassVar[tuple[type, ...]]
    follows_gradient: ClassVar[bool] = False  # of the reward, which must then have one

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardModule | None = None,
        eval_rewards: dict[str, RewardModule] | None = None,
        prompts_per_round: int = 256,
        samples_per_prompt: int = 1,
        minibatch_size: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(policy, reward, eval_rewards, **options)
        self.prompts_per_round, self.samples_per_prompt = prompts_per_round, samples_per_prompt
        self.minibatch_size = minibatch_size
        self.reward_name = reward.name if reward is not None else ""
        self.stateful: dict[str, Any] = {}  # what else a checkpoint keeps, by name
        self._round_logs: dict[str, float] = {}
        self._window: list[Logs] = []
        self._experience: Any = None
        self._experience_state: Any = None

    @abstractmethod
    def collect(self, batch: PromptBatch, round_index: int) -> Any:
        """Return what a round's minibatches are cut from: a `Trajectory`, or the prompts."""

    @abstractmethod
    def minibatches(self, collected: Any, round_index: int) -> Iterator[Any]:
        """Cut the round into minibatches."""

    @abstractmethod
    def loss(self, minibatch: Any) -> tuple[Tensor, Logs]:
        """Return the loss of a minibatch and what to log of it, scalars by name."""

    def count_calls(self, minibatch: Any) -> None:
        """Count what every minibatch costs; here `loss` counts."""

    @property
    def idle(self) -> tuple[str, ...]:
        """How the names of trained tensors begin that the round leaves alone; here none."""
        return ()

    def note(self, name: str, value: float) -> None:
        """Have a value of the round logged at each of its steps."""
        self._round_logs[name] = value

    @property
    @abstractmethod
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round."""

    @property
    def plans(self) -> dict[str, RoundPlan]:
        """The plan of each part of a round, by name."""
        return {"": self.plan}

    def begin(self, name: str) -> None:
        """Make it the turn of a part of `plans`; here it is always that of the only one."""

    @property
    def minibatches_per_round(self) -> int:
        """How many minibatches a round yields."""
        return self.plan.minibatches

    @property
    def minibatches_in_flight(self) -> int:
        """How many minibatches were handed out but not learned from yet: 0 or 1."""
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(current.ready - current.processed)

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

    def setup(self, stage: str) -> None:
        """Check that the reward has a gradient, if it is followed; see the base class."""
        super().setup(stage)
        if stage == "fit" and self.follows_gradient and self.reward is not None:
            check_differentiable(self.reward, type(self).__name__)

    def configure_callbacks(self) -> list[Callback]:
        """Return what keeps every checkpoint of a round resumable."""
        return [PostponedSaves()]

    def on_train_start(self) -> None:
        """Print the arithmetic of a round once."""
        for name, plan in self.plans.items():
            arithmetic = self.describe(plan, self.trainer.accumulate_grad_batches)
            self.print(f"{name}: {arithmetic}" if name else arithmetic)

    def describe(self, plan: RoundPlan, accumulate_grad_batches: int) -> str:
        """Return the round's arithmetic in words."""
        return plan.describe(accumulate_grad_batches)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a minibatch.

        Raises:
            TypeError: If the batch holds bare prompts.
        """
        expected = isinstance(batch, self.minibatch_types)
        if not expected:
            raise TypeError(
                f"{type(self).__name__} trains on its own samples, but the loader yields "
                f"{type(batch).__name__}; use a PromptDataModule, or wrap a PromptLoader: "
                "`trainer.fit(module, module.experience(loader))`."
            )
        loss, logs = self.loss(batch)
        self.count_calls(batch)
        logs = {"train/loss": loss, **logs}
        self._window.append({name: value.detach() for name, value in logs.items()})
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
        rows = latents * self.policy.branches(guidance_scale)
        self.counters["denoiser_calls"] += rows * self.trainer.world_size
