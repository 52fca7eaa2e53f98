"""Which learning rate a beta of Flow-DPO bears: `python -m lit_align.benchmarks.preference_rates`.

Reads the committed grid of `beta<B>_lr<LR>` runs. A rate is stable if training ends better than it
began: the mean loss of the last third of the steps is below log 2, that of an untrained network.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from pathlib import Path

from jsonargparse import auto_cli

from lit_align.benchmarks.results import read_list, read_results

_NAME = re.compile(r"beta(?P<beta>[\d.]+)_lr(?P<lr>[\d.e-]+)")


def preference_rates(
    runs: str = "configs/flow_dpo/runs.yaml", accuracy: float = 0.58, batch_size: int = 32
) -> None:
    """Print a table: for each beta its largest stable rate, and how soon that learns.

    Args:
        runs: The list's YAML file; its results lie in `results` beside it.
        accuracy: Implicit accuracy on held-out pairs that is to be reached.
        batch_size: Judgements of a step.
    """
    listed, results = read_list(runs), Path(runs).parent / "results"
    grid: dict[float, dict[float, str]] = {}
    for name in listed["runs"]:
        match = _NAME.fullmatch(name)
        if match:
            grid.setdefault(float(match["beta"]), {})[float(match["lr"])] = name
    print(
        f"| beta | largest stable rate | steps to {accuracy} | best accuracy | loss at each rate |"
    )
    print("|---|---|---|---|---|")
    for beta, rates in sorted(grid.items()):
        losses = {lr: final_loss(results, name) for lr, name in sorted(rates.items())}
        told = ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in losses.items())
        stable = [lr for lr, loss in losses.items() if loss < math.log(2)]
        if not stable:
            print(f"| {beta:g} | none | | | {told} |")
            continue
        rate = max(stable)
        curve = accuracies(results, rates[rate], batch_size)
        reached = next((step for step, value in curve if value >= accuracy), None)
        best = max(value for _, value in curve)
        print(f"| {beta:g} | {rate:g} | {reached or 'not reached'} | {best:.3f} | {told} |")


def final_loss(results: Path, name: str, seed: int = 0) -> float:
    """Return the mean training loss of the last third of a run's steps; infinite if it broke."""
    path = results / f"{name}_seed{seed}_steps.csv"
    with path.open(newline="", encoding="utf-8") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    last = losses[-len(losses) // 3 :]
    return statistics.mean(last) if all(map(math.isfinite, last)) else math.inf


def accuracies(results: Path, name: str, batch_size: int) -> list[tuple[int, float]]:
    """Return (step, accuracy on held-out pairs) at each validation of a run's first seed."""
    (rows,) = read_results(results, name, [0])
    return [
        (int(row["judgements"] / batch_size), row["val/implicit_acc"])
        for row in rows
        if not math.isnan(row["val/implicit_acc"])
    ]


if __name__ == "__main__":
    auto_cli(preference_rates, as_positional=False)
