"""The loader that turns rollouts into minibatches: one Lightning epoch is one round.

    prompts --deal--> rollout --> rewards --> targets --> minibatches

When Lightning starts an epoch the loader asks its collector for one round of experience, then
yields the round's minibatches. It is lazy: the next round is sampled with updated weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch.distributed as dist

from lit_align.data.planner import RoundPlan
from lit_align.data.prompts import PromptLoader
from lit_align.trajectory import PromptBatch, Trajectory, restored


class Collector(Protocol):
    """What the loader needs of a module."""

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of a round."""

    @property
    def minibatches_per_round(self) -> int:
        """How many minibatches a round yields."""

    @property
    def minibatches_in_flight(self) -> int:
        """How many minibatches were handed out but not learned from yet: 0 or 1."""

    def collect(self, batch: PromptBatch, round_index: int) -> Any:
        """Return a `Trajectory` with targets, or the prompts of samples that are drawn later."""

    def minibatches(self, collected: Any, round_index: int) -> Iterator[Any]:
        """Cut a round into `minibatches_per_round` minibatches."""


class ExperienceLoader:
    """Yields the minibatches of one round per iteration.

    Its state is the round's number, the position in it, and the round itself, so that a
    checkpoint taken within a round resumes with the same samples.

    Args:
        collector: Samples and scores; an `OnlineModule`.
        prompts: The stream of prompts.
        beside: Fingerprint of what minibatches hold beside samples, so that a resumed run sees if
            it was changed.

    Raises:
        ValueError: If there are several streams.
    """

    def __init__(self, collector: Collector, prompts: PromptLoader, beside: str = "") -> None:
        if isinstance(prompts, dict):
            raise ValueError(
                f"`data.init_args.train` names prompt lists of tasks, {sorted(prompts)}, but "
                f"{type(collector).__name__} has no tasks; give it one list."
            )
        self.collector, self.prompts, self.beside = collector, prompts, beside
        self._round = -1
        self._served = 0
        self._collected: Trajectory | PromptBatch | None = None

    def __len__(self) -> int:
        """Return the number of minibatches per round and process."""
        return self.collector.minibatches_per_round

    @property
    def rounds_done(self) -> int:
        """How many rounds were handed out to their last minibatch."""
        return max(self._round + (self._served == len(self)), 0)

    def __iter__(self) -> Iterator[Any]:
        """Collect a round, unless one was restored, and yield its minibatches.

        Raises:
            RuntimeError: If the collector cuts another number than it promised.
        """
        if self._collected is None or self._served == len(self):
            self._collected = self._collect(self._round + 1)
            self._round, self._served = self._round + 1, 0
        minibatches = self.collector.minibatches(self._collected, self._round)
        pending = next(itertools.islice(minibatches, self._served, None), None)
        while pending is not None:
            # Code after the last yield never runs, so the count is checked one ahead.
            following = next(minibatches, None)
            self._served += 1
            if (following is None) != (self._served == len(self)):
                raise RuntimeError(f"The round has not the {len(self)} minibatches it promised.")
            yield pending
            pending = following

    def _collect(self, round_index: int) -> Any:
        drawn = self.prompts.state_dict()
        try:
            batch = self.collector.plan.deal(self.prompts, round_index)
            return self.collector.collect(batch, round_index)
        except BaseException:
            # A checkpoint written because of the failure asks for the same prompts again.
            self.prompts.load_state_dict(drawn)
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, the round in progress (of all processes), and the prompts' position.

        Called on every process. A minibatch in flight when training broke off is yielded again.
        """
        served = self._served - self.collector.minibatches_in_flight
        unfinished = self._collected if served < len(self) else None
        return {
            "round": self._round,
            "served": served,
            "trajectory": None if unfinished is None else _everywhere(unfinished).state_dict(),
            "prompts": self.prompts.state_dict(),
            "beside": self.beside,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, on as many processes or others.

        Raises:
            ValueError: If the prompts, or what minibatches hold beside, were changed.
        """
        if state["beside"] != self.beside:
            raise ValueError(
                "The image-text pairs are not those that the checkpoint was made with; restore "
                "them, or start a new run."
            )
        self._round, self._served = state["round"], state["served"]
        self.prompts.load_state_dict(state["prompts"])
        unfinished = state["trajectory"]
        if unfinished is not None:
            unfinished = restored(unfinished).select(self.collector.plan.kept.positions)
        self._collected = unfinished


class ChainedLoader:
    """Yields the rounds of several loaders in turn; each is collected when its turn comes.

    Args:
        parts: The loaders, in their order.
    """

    def __init__(self, parts: Sequence[ExperienceLoader]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        """Return the number of minibatches of all parts."""
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Any]:
        """Yield from each part, from where a restored one stopped."""
        done = [part.rounds_done for part in self.parts]
        turn = next((turn for turn, rounds in enumerate(done) if rounds < done[0]), 0)
        for part in self.parts[turn:]:
            yield from part

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states, which tell whose turn it is."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raises ValueError as the parts do."""
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


def _everywhere(collected: Trajectory | PromptBatch) -> Trajectory | PromptBatch:
    """Return the samples of all processes, on the CPU and in the order of their positions."""
    own: Any = collected.to("cpu")
    parts = [own]
    if dist.is_available() and dist.is_initialized():
        parts = [own] * dist.get_world_size()
        dist.all_gather_object(parts, own)
    together: Trajectory | PromptBatch = type(own).concatenate(parts)
    return together.select(together.positions.argsort())
