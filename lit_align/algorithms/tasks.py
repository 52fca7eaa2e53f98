"""Several tasks in one round: each samples, scores and updates in its turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lit_align.data.experience import ChainedLoader, ExperienceLoader
from lit_align.data.planner import RoundPlan
from lit_align.functional.advantages import AdvantageNorm
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PairBatch, PromptBatch, Trajectory, Transition

if TYPE_CHECKING:
    from lit_align.algorithms.large_scale_rl import LargeScaleRL


_PROMPT_BITS = 40


@dataclasses.dataclass
class Task:
    """A reward and how many images of its own prompts it is asked for in each round.

    Attributes:
        reward: What the task maximises.
        prompts_per_round: Over all processes; by default the module's.
        samples_per_prompt: Images per prompt; by default the module's.
        advantage_norm: How its rewards are normalised; by default as the module says.
    """

    reward: RewardModule
    prompts_per_round: int | None = None
    samples_per_prompt: int | None = None
    advantage_norm: AdvantageNorm | None = None

    def resize(self, plan: RoundPlan) -> RoundPlan:
        """Return the plan with the task's sizes."""
        return dataclasses.replace(
            plan,
            prompts_per_round=self.prompts_per_round or plan.prompts_per_round,
            samples_per_prompt=self.samples_per_prompt or plan.samples_per_prompt,
        )


class TaskRounds:
    """The rounds of one task, as `ExperienceLoader` collects them.

    Args:
        module: Samples, scores and cuts; told by `begin` whose turn it is.
        name: Of the task.
    """

    def __init__(self, module: LargeScaleRL, name: str) -> None:
        self.module, self.name = module, name

    @property
    def plan(self) -> RoundPlan:
        """The sizes and orders of the task's round."""
        return self.module.plans[self.name]

    @property
    def minibatches_per_round(self) -> int:
        """How many minibatches the task's turn yields."""
        return self.module.minibatches_of(self.name)

    @property
    def minibatches_in_flight(self) -> int:
        """How many of the task's minibatches were handed out but not learned from yet."""
        return self.module.minibatches_in_flight if self.module.task == self.name else 0

    def collect(self, batch: PromptBatch, round_index: int) -> Trajectory:
        """Sample, score and compute targets for the task."""
        self.module.begin(self.name)
        # Prompts are numbered by list, and their statistics must not mix.
        offset = list(self.module.tasks).index(self.name) << _PROMPT_BITS
        return self.module.collect(batch.replace(prompt_ids=batch.prompt_ids + offset), round_index)

    def minibatches(
        self, trajectory: Trajectory, round_index: int
    ) -> Iterator[Transition | PairBatch]:
        """Cut the task's round."""
        self.module.begin(self.name)
        yield from self.module.minibatches(trajectory, round_index)


def chain_tasks(
    module: LargeScaleRL, prompts: Any, beside: str
) -> ChainedLoader | ExperienceLoader:
    """Return the loader that takes the tasks in turn, or the module's own if it has none.

    Args:
        module: Has the tasks.
        prompts: A `PromptLoader` for each of them, by name; just one without tasks.
        beside: See `ExperienceLoader`.

    Raises:
        ValueError: If the prompts are not those of the tasks.
    """
    given = sorted(prompts) if isinstance(prompts, dict) else "one list for all"
    if not module.tasks and not isinstance(prompts, dict):
        return ExperienceLoader(module, prompts, beside)
    if given != sorted(module.tasks):
        raise ValueError(
            f"`data.init_args.train` must name a prompt list for each of the tasks "
            f"{sorted(module.tasks)}, got {given}."
        )
    return ChainedLoader(
        [ExperienceLoader(TaskRounds(module, n), prompts[n], beside) for n in module.tasks]
    )
