"""Who samples what in a round of online training, and in which order it is trained on.

Prompts are dealt to lanes, and lanes to processes: prompt i of a round lies in lane i mod L, with
L the largest divisor of `prompts_per_round` up to 64, and lane l on process l mod W. The training
order takes one sample of each lane in turn. So any W processes with W dividing L see together, in
each of their minibatches, exactly the samples that one process with minibatches W times as large
sees, and take the same update. In "sample_major" order this asks for updates of whole samples: the
pairs of a process's update must be a multiple of the trained steps.

Methods that compare the images of a prompt within a minibatch set `whole_groups`: then all images
of a prompt are dealt as one, and what is said of samples above holds for these groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lit_align.data.prompts import PromptLoader
from lit_align.data.windows import StepWindow
from lit_align.functional.noise import keyed_generator
from lit_align.trajectory import PromptBatch

_MAX_LANES = 64

MinibatchOrder = Literal["sample_major", "timestep_major"]
StepChoice = Literal["per_sample", "shared", "denoising"]
Pool = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class RoundPlan:
    """The sizes and orders of a round.

    Attributes:
        prompts_per_round: Prompts P, over all processes.
        samples_per_prompt: Samples S per prompt.
        rollout_batch_size: Samples drawn at once, per process.
        minibatch_size: (sample, step) pairs per minibatch and process.
        num_inner_epochs: Passes over the pairs.
        steps: Indices of the denoising steps that may be trained on.
        trained_steps: How many of them each sample is trained on.
        minibatch_order: "sample_major" takes all steps of a sample together, "timestep_major" one
            step of every sample before the next.
        pools: Steps to choose from and how many of them; by default all `steps` are one pool.
        step_choice: Which steps, and in which order: "per_sample" draws both at random for each
            sample and pass, "shared" for each pass, the same for all samples; "denoising" draws
            the steps as "per_sample" does and takes them from noise to clean.
        window: Where steps add noise and are trained; None for all `steps`. It takes no `pools`.
        whole_groups: Keep the S samples of a prompt together, side by side and at the same step.
        kept_per_prompt: How many of a prompt's samples the targets keep for training; None for all.
        seed: Of all draws.
        rank: This process.
        world_size: Number of processes W.
    """

    prompts_per_round: int
    samples_per_prompt: int
    rollout_batch_size: int
    minibatch_size: int
    num_inner_epochs: int
    steps: tuple[int, ...]
    trained_steps: int
    minibatch_order: MinibatchOrder
    seed: int
    step_choice: StepChoice = "per_sample"
    pools: tuple[Pool, ...] = ()
    window: StepWindow | None = None
    whole_groups: bool = False
    kept_per_prompt: int | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def samples(self) -> int:
        """Samples per round and process."""
        return self.prompts_per_round * self.samples_per_prompt // self.world_size

    @property
    def kept(self) -> RoundPlan:
        """The plan of what is kept of the round, as if no more had been sampled."""
        count = self.kept_per_prompt or self.samples_per_prompt
        return replace(self, samples_per_prompt=count, kept_per_prompt=None)

    @property
    def minibatches(self) -> int:
        """Minibatches per round and process."""
        return self.kept.samples * self.trained_steps // self.minibatch_size * self.num_inner_epochs

    @property
    def positions(self) -> Tensor:
        """The places in the round [B] of this process's samples, increasing."""
        slots = torch.arange(self.rank, self.prompts_per_round, self.world_size)
        first = slots.repeat_interleave(self.samples_per_prompt) * self.samples_per_prompt
        return first + torch.arange(self.samples).remainder(self.samples_per_prompt)

    def check(self, accumulate_grad_batches: int) -> None:
        """Check that all sizes divide.

        Raises:
            ValueError: If one does not, or the window does not fit; the message lists values that
                do.
        """
        self.noisy_steps(0)
        if self._lanes % self.world_size:
            multiples = [self.world_size * n for n in range(1, self.prompts_per_round + 2)]
            raise ValueError(
                f"`prompts_per_round` ({self.prompts_per_round}) must be a multiple of the number "
                f"of processes ({self.world_size}); use "
                f"{_nearest(multiples, self.prompts_per_round)}."
            )
        kept = self.kept
        pairs, together = kept.samples * self.trained_steps, kept.unit
        product = f"{kept.samples} samples x {self.trained_steps} steps"
        if together > 1:
            product += f"; it keeps the {together} images of a prompt together"
        for name, value, total, unit, what in (
            ("rollout_batch_size", self.rollout_batch_size, self.samples, 1, "samples"),
            ("minibatch_size", self.minibatch_size, pairs, together, f"pairs ({product})"),
            (
                "trainer.accumulate_grad_batches",
                accumulate_grad_batches,
                self.minibatches,
                1,
                "minibatches",
            ),
        ):
            if value < 1 or total % value or value % unit:
                divisors = [d for d in range(unit, total + 1, unit) if total % d == 0]
                raise ValueError(
                    f"`{name}` ({value}) must {f'be a multiple of {unit} and ' * (unit > 1)}divide "
                    f"the {total} {what} per round and process; use {_nearest(divisors, value)}."
                )

    def describe(self, accumulate_grad_batches: int) -> str:
        """Return the round's arithmetic in words."""
        images = self.prompts_per_round * self.samples_per_prompt
        kept = f", of each prompt {self.kept_per_prompt} kept" * (self.kept_per_prompt is not None)
        return (
            f"A round: {self.prompts_per_round} prompts x {self.samples_per_prompt} = {images} "
            f"images{kept}; {self.trained_steps} trained steps x {self.num_inner_epochs} pass(es) "
            f"= {self.minibatches} minibatches of {self.minibatch_size} pairs per process; "
            f"{self.minibatches // accumulate_grad_batches} optimiser step(s)."
        )

    def deal(self, loader: PromptLoader, round_index: int) -> PromptBatch:
        """Draw the round's prompts and return this process's samples."""
        numbers = loader.take(self.prompts_per_round)
        slots = self.positions // self.samples_per_prompt
        batch = loader.batch([numbers[slot] for slot in slots.tolist()])
        return batch.replace(
            positions=self.positions,
            group_ids=round_index * self.prompts_per_round + slots,
        )

    def cut(self, round_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the minibatches' samples [N] (places in this process's batch) and steps [N]."""
        kept = self.kept
        for epoch in range(self.num_inner_epochs):
            first = kept._sample_order(round_index, epoch)
            steps = torch.stack([kept._step_order(round_index, epoch, int(s)) for s in first])
            first = first[:, None].expand_as(steps)  # [B / unit, trained steps]
            if self.minibatch_order == "timestep_major":
                first, steps = first.T, steps.T
            samples = first.flatten()[:, None] + torch.arange(kept.unit)
            yield from zip(
                samples.flatten().split(self.minibatch_size),
                steps.flatten().repeat_interleave(kept.unit).split(self.minibatch_size),
                strict=True,
            )

    def noisy_steps(self, round_index: int) -> tuple[int, ...] | None:
        """Return the steps that add noise in a round, those of its window; None for all that can.

        Raises:
            ValueError: If the window does not fit into `steps`.
        """
        window = self.window
        return None if window is None else window.steps(round_index, self.seed, self.steps)

    @property
    def unit(self) -> int:
        """How many samples are dealt as one."""
        return self.samples_per_prompt if self.whole_groups else 1

    @property
    def _lanes(self) -> int:
        return max(d for d in range(1, _MAX_LANES + 1) if self.prompts_per_round % d == 0)

    def _sample_order(self, round_index: int, epoch: int) -> Tensor:
        """Return the first sample of each unit, in the order of training."""
        units = self.samples_per_prompt // self.unit  # of each prompt
        depth = self.prompts_per_round // self._lanes * units
        lanes = range(self.rank, self._lanes, self.world_size)
        columns = [
            torch.randperm(
                depth, generator=keyed_generator("order", self.seed, round_index, epoch, lane)
            )
            for lane in lanes
        ]
        table = torch.stack(columns, dim=1)  # [depth, lanes]: the k-th unit of each lane
        prompts, repeats = table // units, table % units
        places = prompts * len(lanes) + torch.arange(len(lanes))
        return ((places * units + repeats) * self.unit).flatten()

    def _step_order(self, round_index: int, epoch: int, sample: int) -> Tensor:
        slot = self.rank + sample // self.samples_per_prompt * self.world_size
        position = slot * self.samples_per_prompt + sample % self.samples_per_prompt
        owner = -1 if self.step_choice == "shared" else position
        generator = keyed_generator("steps", self.seed, round_index, epoch, owner)
        steps = self.noisy_steps(round_index) or self.steps
        pools = self.pools or ((steps, self.trained_steps),)
        chosen = torch.cat(
            [
                torch.tensor(steps)[torch.randperm(len(steps), generator=generator)[:count]]
                for steps, count in pools
            ]
        )
        return chosen.sort().values if self.step_choice == "denoising" else chosen


def strata(steps: tuple[int, ...], fraction: float) -> tuple[Pool, ...]:
    """Return pools of one step each to draw: ``int(len(steps) * fraction)`` strata, and the last.

    Args:
        steps: Indices, increasing; the strata divide all but the last.
        fraction: In (0, 1].
    """
    others = steps[:-1]
    count = min(int(len(steps) * fraction), len(others))
    bounds = [len(others) * k // max(count, 1) for k in range(count + 1)]
    return (*((others[a:b], 1) for a, b in pairwise(bounds)), (steps[-1:], 1))


def _nearest(values: list[int], target: int, count: int = 5) -> str:
    """Return the `count` values nearest to `target`, increasing."""
    nearest = sorted(values, key=lambda value: abs(value - target))[:count]
    return ", ".join(map(str, sorted(nearest)))
