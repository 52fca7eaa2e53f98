"""Prints what runs came to, from the table that `lit_align.benchmarks.checkpoints` wrote.

    python -m lit_align.benchmarks.outcomes --table configs/large_scale_rl/results/tasks.csv

A Markdown table: the base model, then the last checkpoint of each run, mean and standard deviation
over seeds, which run names end in: `tasks_seed0`.
"""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from jsonargparse import auto_cli

from lit_align.benchmarks.results import Rows
from lit_align.run_groups import spread


def outcomes(table: str) -> None:
    """Print the table.

    Args:
        table: CSV file of `lit_align.benchmarks.checkpoints`.
    """
    groups: dict[str, Rows] = {}
    for run, rows in read_table(table).items():
        groups.setdefault(run.split("_seed")[0], []).append(rows[-1])
    columns = list(groups["base"][0])
    print(f"| run | {' | '.join(name.replace('_', ' ') for name in columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, seeds in groups.items():
        cells = [_cell([row[column] for row in seeds], column) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def read_table(path: str) -> dict[str, Rows]:
    """Return the rows of each run by its name, the base model's under "base"."""
    found: dict[str, Rows] = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row.pop("run"), []).append({k: float(v) for k, v in row.items()})
    return found


def _cell(values: list[float], column: str) -> str:
    if column == "reward_queries":
        return f"{statistics.mean(values):.0f}"
    return spread(values, ".3f")


if __name__ == "__main__":
    auto_cli(outcomes, as_positional=False)
