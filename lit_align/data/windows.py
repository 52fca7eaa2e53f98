"""Windows of denoising steps: noise and training in a few neighbouring steps of a trajectory.

Outside the window the sampler is deterministic, so that rewards depend on what happened inside it,
and only its steps cost a training forward (Flow-GRPO-Fast, MixGRPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lit_align.functional.noise import keyed_generator

WindowStrategy = Literal["random", "progressive"]


@dataclass(frozen=True)
class StepWindow:
    """Neighbouring denoising steps, in each round at one place of a range.

    Attributes:
        size: Steps in the window, positive.
        start: First step of the range, counted from noise.
        stop: The step after its last; None for the end of those with a density.
        strategy: "random" draws the place for each round, the same for all samples and processes
            (Flow-GRPO-Fast); "progressive" moves from noise to clean, and begins anew when the next
            place is none (Algorithm 1, arXiv:2507.21802).
        every: Rounds at one place, for "progressive".
        stride: Steps from one place to the next, for "progressive".

    Raises:
        ValueError: If a number is out of range or the strategy unknown.
    """

    size: int
    start: int = 0
    stop: int | None = None
    strategy: WindowStrategy = "random"
    every: int = 25
    stride: int = 1

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.strategy not in get_args(WindowStrategy):
            words = " or ".join(map(repr, get_args(WindowStrategy)))
            raise ValueError(f"`strategy` of a window must be {words}, got {self.strategy!r}.")
        if min(self.size, self.every, self.stride) < 1 or self.start < 0:
            raise ValueError(
                "`size`, `every` and `stride` of a window must be positive and `start` not "
                f"negative, got {self.size}, {self.every}, {self.stride} and {self.start}."
            )

    def steps(self, round_index: int, seed: int, trainable: Sequence[int]) -> tuple[int, ...]:
        """Return the window's steps in a round, `size` of them.

        Args:
            round_index: Of the round.
            seed: Of the random place.
            trainable: Indices of the steps that may be trained, increasing.

        Raises:
            ValueError: If the range has fewer steps than the window.
        """
        stop = self.stop
        inside = [k for k in trainable if k >= self.start and (stop is None or k < stop)]
        last = len(inside) - self.size
        if last < 0:
            raise ValueError(
                f"A window of {self.size} steps does not fit into the {len(inside)} of its range "
                f"that can be trained, {inside}; use a smaller `size`, a wider range from `start` "
                "to `stop`, or more `num_inference_steps`."
            )
        if self.strategy == "random":
            generator = keyed_generator("window", seed, round_index)
            place = int(torch.randint(last + 1, (), generator=generator))
        else:
            place = round_index // self.every % (last // self.stride + 1) * self.stride
        return tuple(inside[place : place + self.size])
