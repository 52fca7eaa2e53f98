"""Compares a grid's runs at equal gain of the trained reward, from its committed tables.

    python -m lit_align.benchmarks.matched --runs configs/tdpo/runs.yaml --only colorfulness

Prints a Markdown table: a row per run and level, with the reward queries that it took, the
held-out rewards' gains and the distance from the base model there, mean and standard deviation over
seeds. Gains are over the base model, in standard deviations of its rewards. Given the table of
`lit_align.benchmarks.checkpoints`, also its columns, as changes from the base model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from omegaconf import OmegaConf

from lit_align.benchmarks.grid import Rows, read_results
from lit_align.benchmarks.outcomes import read_table, spread
from lit_align.metrics.cross_reward import at_level

_PREFIX = "val/reward/"


def matched(
    runs: str,
    levels: tuple[float, ...] = (0.5, 1.0),
    only: str = "",
    checkpoints: str | None = None,
) -> None:
    """Print the table.

    Args:
        runs: The grid's YAML file; its results lie in `results` beside it.
        levels: Gains of the trained reward, in standard deviations of the base.
        only: Only runs whose name contains this, all trained on the same reward.
        checkpoints: CSV file of `lit_align.benchmarks.checkpoints`.
    """
    path = Path(runs)
    listed: Any = OmegaConf.to_container(OmegaConf.load(path))
    others = read_table(checkpoints) if checkpoints else {}
    table: list[dict[str, str]] = []
    for level in levels:
        for name in listed["runs"]:
            if only in name:
                seeds = {
                    f"{name}_seed{seed}": rows
                    for seed in listed["seeds"]
                    for rows in read_results(path.parent / "results", name, [seed])
                }
                if seeds:
                    table.append(_row(name, level, seeds, others))
    columns = list(dict.fromkeys(column for row in table for column in row))
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in table:
        print(f"| {' | '.join(row.get(column, '-') for column in columns)} |")


def _row(
    name: str, level: float, seeds: dict[str, Rows], others: dict[str, Rows]
) -> dict[str, str]:
    """Return a row of the table, by column."""
    found: dict[str, list[float]] = {}
    for run, rows in seeds.items():
        rewards = [column for column in rows[0] if column.startswith(_PREFIX)]
        gains = {reward.removeprefix(_PREFIX): _gains(rows, reward) for reward in rewards}
        gain = gains.pop(_target(rows))
        series = {
            "reward queries": [row["reward_queries"] for row in rows],
            **gains,
            "FID": [row.get("val/fid", torch.nan) for row in rows],
        }
        if run in others:
            series |= _at_validations(others["base"][0], others[run], series["reward queries"])
        for column, values in series.items():
            value, _, _ = at_level(torch.tensor(gain), torch.tensor(values), level)
            found.setdefault(column, []).append(float(value))
    cells = {column: _spread(column, values) for column, values in found.items()}
    return {"run": name, "gain": f"{level:g}", **cells}


def _target(rows: Rows) -> str:
    """Return the trained reward: the one that no slope is measured of."""
    names = [n.removeprefix(_PREFIX) for n in rows[0] if n.startswith(_PREFIX)]
    return next(name for name in names if f"val/generalization/{name}" not in rows[0])


def _gains(rows: Rows, reward: str) -> list[float]:
    unit = rows[0][reward.replace("val/reward/", "val/reward_std/")]
    return [(row[reward] - rows[0][reward]) / unit for row in rows]


def _at_validations(
    base: dict[str, float], rows: Rows, queries: list[float]
) -> dict[str, list[float]]:
    """Return each column's change from the base at the run's validations, NaN where unknown."""
    known = {row["reward_queries"]: row for row in [base, *rows]}
    return {
        column: [known[q][column] - base[column] if q in known else torch.nan for q in queries]
        for column in base
        if column != "reward_queries"
    }


def _spread(column: str, values: list[float]) -> str:
    """Return mean ± standard deviation of the seeds that reached the level, and how many did."""
    known = [value for value in values if value == value]
    if not known:
        return "-"
    form = {"reward queries": ".0f", "FID": ".3f"}.get(column, "+.2f")
    form = "+.3f" if "/" in column else form
    text = spread(known, form)
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


if __name__ == "__main__":
    auto_cli(matched, as_positional=False)
