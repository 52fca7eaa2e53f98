r"""What learned schedules cost: `python -m lit_align.benchmarks.schedule_cost --run runs/tpdm_...`.

Draws the same images by the learned schedule and by fixed ones, turn by turn in one process, and
prints how many rows the network was given for each image (guidance makes two of a step), how long
an image took, and the share of that time that the head had. Finished images leave the batch, so
that rows follow the steps; smaller batches are less efficient, so that time follows them less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lit_align.benchmarks.schedules import learned_module, noise_levels, walk
from lit_align.data.prompts import PromptFile

FIXED = (5, 10, 20)


@dataclass
class _Meter:
    """Counts calls of a module and the time they take."""

    rows: int = 0
    seconds: float = 0.0


@contextmanager
def metered(module: torch.nn.Module) -> Iterator[_Meter]:
    """Count the rows that a module is given, and the seconds it takes."""
    meter, forward = _Meter(), module.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = forward(*args, **kwargs)
        meter.seconds += time.perf_counter() - started
        values = (*args, *kwargs.values())
        meter.rows += len(next(value for value in values if isinstance(value, Tensor)))
        return output

    module.forward = counted
    try:
        yield meter
    finally:
        module.forward = forward


def schedule_cost(
    run: str, images: int = 96, repeats: int = 5, fixed: tuple[int, ...] = FIXED
) -> None:
    """Print a table of the learned schedule and of fixed ones.

    Args:
        run: Folder of a finished run of TPDM.
        images: How many are drawn at a time.
        repeats: How often; medians are shown.
        fixed: Steps of the fixed schedules.
    """
    module = learned_module(run)
    schedule, policy = module.schedule, module.policy
    prompts = [text for text, _ in PromptFile("shapes-heldout")[:images]]
    conditioning = policy.encode_prompt(prompts)

    def learned(generators: list[torch.Generator]) -> float:
        taken = schedule.sample(policy, conditioning, generators).extras["alive"]
        return float(taken.sum(dim=1).double().mean())

    def by_levels(steps: int) -> Callable[[list[torch.Generator]], float]:
        def draw(generators: list[torch.Generator]) -> float:
            levels = noise_levels(steps)
            walk(policy, conditioning, generators, levels, schedule.guidance_scale)
            return float(steps)

        return draw

    samplers = {"learned": learned} | {f"{steps} fixed": by_levels(steps) for steps in fixed}
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in samplers}
    for repeat in range(repeats + 1):
        for name, draw in samplers.items():
            generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
            with metered(policy.denoiser) as network, metered(schedule.head) as head:
                started = time.perf_counter()
                steps = draw(generators)
                seconds = time.perf_counter() - started
            if repeat:  # the first one warms up
                rows = network.rows / len(prompts)
                measured[name].append((steps, rows, seconds / len(prompts), head.seconds / seconds))
    print(table(measured))


def table(measured: dict[str, list[tuple[float, ...]]]) -> str:
    """Return medians of (steps, rows, seconds, head's share), as Markdown; times of the first."""
    lines = [
        "| schedule | mean steps | rows / image | ms / image | time | head |",
        "|---" * 6 + "|",
    ]
    first = next(iter(measured.values()))
    unit = statistics.median(column[2] for column in first)
    for name, runs in measured.items():
        steps, rows, seconds, share = (statistics.median(c) for c in zip(*runs, strict=True))
        lines.append(
            f"| {name} | {steps:.2f} | {rows:.2f} | {1000 * seconds:.1f} | {seconds / unit:.2f} "
            f"| {share:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(schedule_cost, as_positional=False)
