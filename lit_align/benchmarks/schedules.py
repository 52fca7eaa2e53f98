r"""Quality against denoising steps: fixed schedules, and learned ones beside them.

    python -m lit_align.benchmarks.schedules --pretrained shapes-sd3 \
        --learned '{gamma 0.9: [runs/grid/tpdm_0.9_seed0, ...]}' --output configs/tpdm/results/sd3

A fixed schedule of N steps goes through the noise levels u_0 = 1 > ... > u_N = 0 of

    uniform  u_k = 1 - k / N
    shifted  3 u_k / (1 + 2 u_k), which stays longer where there is much noise (arXiv:2403.03206)

by the same deterministic step that learned schedules take. Everything is drawn for the same
held-out prompts, with noise of its own for each seed; a learned schedule's k-th run has the k-th
seed. One row of the CSV is a schedule under a seed: its mean steps, also of single objects and of
compositions, and its mean rewards.

A learned schedule is compared, under each seed, with the better shape of fixed schedule at as many
mean steps, between whole steps by a straight line.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from torch import Tensor

from lit_align.algorithms.schedule_learning import ScheduleModule
from lit_align.benchmarks.results import write_rows
from lit_align.data.prompts import PromptFile
from lit_align.functional.noise import randn
from lit_align.policies import DiffusionPolicy
from lit_align.policies.base import Conditioning
from lit_align.rewards import RewardModule, ShapesCLIP, ShapesVerifier
from lit_align.rewards.base import quantize
from lit_align.run_folder import newest_checkpoint
from lit_align.run_groups import spread
from lit_align.verbs import load_module

STEPS = (3, 4, 5, 6, 8, 10, 15, 20)
MANY = 50
SHIFTS = {"uniform": 1.0, "shifted": 3.0}
REWARDS = {"verifier": "gold verifier", "clip": "ShapesCLIP"}
_BATCH = 96
_TYPES: dict[str, Callable[[str], Any]] = {"schedule": str, "seed": int}  # of columns, else float

Rows = list[dict[str, Any]]
Sampler = Callable[[Conditioning, list[torch.Generator]], tuple[Tensor, Tensor]]


def noise_levels(steps: int, shift: float = 1.0) -> Tensor:
    """Return the levels [N + 1] of a fixed schedule, from 1 to 0."""
    levels = torch.linspace(1, 0, steps + 1)
    return shift * levels / (1 + (shift - 1) * levels)


@torch.no_grad()
def walk(
    policy: DiffusionPolicy,
    conditioning: Conditioning,
    generators: list[torch.Generator],
    levels: Tensor,
    guidance_scale: float,
) -> Tensor:
    """Return clean latents [B, ...] by a fixed schedule's levels [N + 1]."""
    latents = randn(policy.latent_shape(), generators, policy.device)
    for level, following in pairwise(levels):
        now, then = (each.expand(len(generators)) for each in (level, following))
        times = policy.scheduler.network_times(now)
        output = policy.predict(latents, times, conditioning, guidance_scale)
        latents = policy.scheduler.advance(output, latents, now, then)
    return latents


def schedules(
    pretrained: str,
    output: str,
    learned: dict[str, list[str]] | None = None,
    prompts: str = "shapes-heldout",
    count: int = 384,
    seeds: int = 3,
    guidance_scale: float = 1.0,
) -> None:
    """Score them, print a table, and write it and a figure to `output`.csv and .png.

    Args:
        pretrained: The frozen model.
        output: Path without ending; rows that are there already are not computed again.
        learned: Folders of finished runs of TPDM by the name of their setting, a run for each seed.
        prompts: A list of captions of the shapes world.
        count: How many of them.
        seeds: Of the noise.
        guidance_scale: Weight of guidance of the fixed schedules.
    """
    policy = DiffusionPolicy.from_pretrained(pretrained, train="none")
    chosen = PromptFile(prompts)[:count]
    path = Path(f"{output}.csv")
    rows = _read(path)
    known = {(row["schedule"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for name, sampler in _samplers(policy, learned or {}, seed, guidance_scale, known):
            rows.append(_measure(name, seed, policy, sampler, chosen))
            print(rows[-1], flush=True)
            write_rows(path, rows)
    rows = _read(path)
    print(table(rows))
    for reward, title in REWARDS.items():
        print(f"\n{title}: as good as {MANY} fixed steps are {baseline(rows, reward)} of them\n")
        print(comparison(rows, reward))
    draw(rows).savefig(f"{output}.png")


def _samplers(
    policy: DiffusionPolicy,
    learned: dict[str, list[str]],
    seed: int,
    guidance_scale: float,
    known: set[tuple[str, int]],
) -> Iterator[tuple[str, Sampler]]:
    """Yield what is not known yet: the name of a schedule, and what samples by it."""
    for shape, shift in SHIFTS.items():
        for steps in (*STEPS, MANY):
            levels = noise_levels(steps, shift)

            def fixed(
                conditioning: Conditioning,
                generators: list[torch.Generator],
                levels: Tensor = levels,
            ) -> tuple[Tensor, Tensor]:
                latents = walk(policy, conditioning, generators, levels, guidance_scale)
                return latents, torch.full((len(latents),), len(levels) - 1)

            if (f"{shape} {steps}", seed) not in known:
                yield f"{shape} {steps}", fixed
    for name, runs in learned.items():
        if seed < len(runs) and (name, seed) not in known:
            yield name, _learned(policy, runs[seed])


def learned_module(run: str) -> ScheduleModule:
    """Return the method of a finished run of TPDM, as its newest checkpoint has it.

    Raises:
        FileNotFoundError: If the folder holds no checkpoint.
        ValueError: If the run learns no schedule.
    """
    checkpoint = newest_checkpoint(str(Path(run).parent), Path(run).name)
    if checkpoint is None:
        raise FileNotFoundError(f"{run!r} holds no checkpoint; give the folders of finished runs.")
    module = load_module(str(checkpoint))
    if not isinstance(module, ScheduleModule):
        raise ValueError(f"{run!r} is a run of {type(module).__name__}, which learns no schedule.")
    return module


def _learned(policy: DiffusionPolicy, run: str) -> Sampler:
    schedule = learned_module(run).schedule

    def sample(
        conditioning: Conditioning, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        trajectory = schedule.sample(policy, conditioning, generators)
        return trajectory.latents[:, -1], trajectory.extras["alive"].sum(dim=1)

    return sample


@torch.no_grad()
def _measure(
    name: str, seed: int, policy: DiffusionPolicy, sampler: Sampler, prompts: list[Any]
) -> dict[str, Any]:
    images, steps = [], []
    for start in range(0, len(prompts), _BATCH):
        texts = [text for text, _ in prompts[start : start + _BATCH]]
        places = range(start, start + len(texts))
        generators = [torch.Generator().manual_seed(seed * len(prompts) + k) for k in places]
        latents, taken = sampler(policy.encode_prompt(texts), generators)
        images.append(quantize(policy.decode(latents)))
        steps.append(taken)
    texts, metadata = (list(column) for column in zip(*prompts, strict=True))
    row: dict[str, Any] = {"schedule": name, "seed": seed}
    row |= _means("steps", torch.cat(steps).double(), metadata)
    rewards: dict[str, RewardModule] = {"verifier": ShapesVerifier(), "clip": ShapesCLIP()}
    for reward, module in rewards.items():
        scores = module(torch.cat(images), texts, metadata).double()
        row |= {reward: float(scores.mean()), f"{reward}_se": float(_error(scores))}
    return row


def _error(scores: Tensor) -> Tensor:
    return scores.std() / len(scores) ** 0.5


def _means(name: str, values: Tensor, metadata: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over all prompts, over single objects and over compositions."""
    single = torch.tensor([facts["kind"] == "single" for facts in metadata])
    parts = {"": single | True, "_single": single, "_composed": ~single}
    return {f"{name}{part}": float(values[where].mean()) for part, where in parts.items()}


def grouped(rows: Rows) -> dict[str, Rows]:
    """Return the rows of each schedule, by its name."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["schedule"], []).append(row)
    return found


def baseline(rows: Rows, reward: str) -> int:
    """Return the fewest fixed steps with a reward within one standard error of that of 50.

    The standard error is that of a mean over prompts, averaged over seeds; of the two shapes of
    schedule the better one counts, for the 50 steps too.
    """
    needed = good_enough(rows, reward)
    means = {name: _mean(own, reward) for name, own in grouped(rows).items()}
    return next(
        steps
        for steps in (*STEPS, MANY)
        if max(means[f"{shape} {steps}"] for shape in SHIFTS) >= needed
    )


def good_enough(rows: Rows, reward: str) -> float:
    """Return the reward of 50 fixed steps, less a standard error; see `baseline`."""
    groups = grouped(rows)
    many = [groups[f"{shape} {MANY}"] for shape in SHIFTS]
    error = statistics.mean(row[f"{reward}_se"] for own in many for row in own)
    return max(_mean(own, reward) for own in many) - error


def best_fixed(rows: Rows, reward: str, seed: int, steps: float) -> float:
    """Return the reward of the better shape of fixed schedule at mean steps, under a seed."""
    known = {row["schedule"]: row[reward] for row in rows if row["seed"] == seed}
    curves = ([known[f"{shape} {each}"] for each in STEPS] for shape in SHIFTS)
    return max(float(np.interp(steps, STEPS, curve)) for curve in curves)


def comparison(rows: Rows, reward: str) -> str:
    """Return learned schedules beside fixed ones of as many mean steps, as Markdown.

    Means ± standard deviations over seeds. `steps / baseline` is in brackets where the schedule is
    not as good as 50 fixed steps, within a standard error.
    """
    lines = [
        "| schedule | steps | learned | fixed | difference | steps / baseline | more if composed |",
        "|---" * 7 + "|",
    ]
    many, needed = baseline(rows, reward), good_enough(rows, reward)
    for name, own in _learned_rows(rows).items():
        fixed = [best_fixed(rows, reward, row["seed"], row["steps"]) for row in own]
        gaps = [row[reward] - other for row, other in zip(own, fixed, strict=True)]
        share = f"{_mean(own, 'steps') / many:.2f}"
        cells = [
            spread([row["steps"] for row in own], ".1f"),
            spread([row[reward] for row in own], ".3f"), spread(fixed, ".3f"),
            spread(gaps, "+.3f"), share if _mean(own, reward) >= needed else f"({share})",
            spread([row["steps_composed"] - row["steps_single"] for row in own], "+.2f"),
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _learned_rows(rows: Rows) -> dict[str, Rows]:
    fixed = {f"{shape} {steps}" for shape in SHIFTS for steps in (*STEPS, MANY)}
    return {name: own for name, own in grouped(rows).items() if name not in fixed}


def table(rows: Rows) -> str:
    """Return mean ± standard deviation over seeds of every schedule, as Markdown."""
    columns = ("steps", "verifier", "clip", "steps_single", "steps_composed")
    lines = [f"| schedule | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, own in grouped(rows).items():
        cells = [
            spread([row[column] for row in own], ".1f" if "steps" in column else ".3f")
            for column in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(rows: Rows, column: str) -> float:
    return statistics.mean(row[column] for row in rows)


def draw(rows: Rows) -> Figure:
    """Draw both rewards against mean steps; bars are standard deviations over seeds."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    for axis, reward in zip(figure.subplots(1, 2), REWARDS, strict=True):
        names = grouped(rows)
        for shape in SHIFTS:
            curve = [names[f"{shape} {steps}"] for steps in STEPS]
            axis.errorbar(
                STEPS, [_mean(own, reward) for own in curve],
                [_spread(own, reward) for own in curve],
                marker=".", capsize=2, label=f"{shape} steps",
            )  # fmt: skip
        best = max(_mean(names[f"{shape} {MANY}"], reward) for shape in SHIFTS)
        axis.axhline(best, color="gray", linewidth=0.8, linestyle="--", label=f"{MANY} steps")
        for number, (name, own) in enumerate(_learned_rows(rows).items()):
            axis.errorbar(
                _mean(own, "steps"), _mean(own, reward), _spread(own, reward),
                _spread(own, "steps"), marker="D", capsize=3, linestyle="", color=f"C{number + 2}",
                label=name,
            )  # fmt: skip
        axis.set(title=REWARDS[reward], xlabel="mean steps")
        axis.grid(alpha=0.2)
        axis.legend(fontsize=7)
    return figure


def _spread(rows: Rows, column: str) -> float:
    return statistics.stdev(row[column] for row in rows) if len(rows) > 1 else 0.0


def _read(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {k: _TYPES.get(k, float)(v) for k, v in row.items()} for row in csv.DictReader(file)
        ]


if __name__ == "__main__":
    auto_cli(schedules, as_positional=False)
