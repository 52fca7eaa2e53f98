"""Compares a grid's runs at equal gain of the trained reward, from its committed tables.

    python -m lit_align.benchmarks.matched --runs configs/tdpo/runs.yaml --only colorfulness

Prints a Markdown table: a row per run and level, with the reward queries that it took, the
held-out rewards' gains and the distance from the base model there, mean and standard deviation over
seeds. Gains are over the base model, in standard deviations of its rewards. Given the table of
`lit_align.benchmarks.checkpoints`, also its columns, as changes from the base model. Run names of
another list are written `LIST:NAME`, as in `configs/tdpo/runs.yaml:tdpo_colorfulness`.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli

from lit_align.benchmarks.outcomes import read_table
from lit_align.benchmarks.results import (
    Rows,
    gains_of,
    measure_of,
    read_list,
    results_of,
    target_of,
)
from lit_align.metrics.cross_reward import at_level
from lit_align.run_groups import spread


def matched(
    runs: str,
    levels: tuple[float, ...] = (0.5, 1.0),
    only: str = "",
    checkpoints: str | None = None,
    names: list[str] | None = None,
    measures: tuple[str, ...] = (),
) -> None:
    """Print the table.

    Args:
        runs: The grid's YAML file; its results lie in `results` beside it.
        levels: Gains of the trained reward, in standard deviations of the base.
        only: Only runs whose name contains this, all trained on the same reward.
        checkpoints: CSV file of `lit_align.benchmarks.checkpoints`.
        names: Runs in their order, also of other lists; by default all of `runs`.
        measures: Further columns: of `val/`, such as "diversity", or counters.
    """
    others = read_table(checkpoints) if checkpoints else {}
    chosen = names or [name for name in read_list(runs)["runs"] if only in name]
    table = [
        _row(name.split(":")[-1], level, seeds, others, measures)
        for level in levels
        for name in chosen
        if (seeds := results_of(runs, name))
    ]
    columns = list(dict.fromkeys(column for row in table for column in row))
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in table:
        print(f"| {' | '.join(row.get(column, '-') for column in columns)} |")


def _row(
    name: str,
    level: float,
    seeds: dict[str, Rows],
    others: dict[str, Rows],
    measures: tuple[str, ...],
) -> dict[str, str]:
    """Return a row of the table, by column."""
    found: dict[str, list[float]] = {}
    for run, rows in seeds.items():
        gains = gains_of(rows)
        gain = gains.pop(target_of(rows))
        series = {
            "reward queries": measure_of(rows, "reward_queries"),
            **gains,
            "FID": measure_of(rows, "fid"),
            **{measure.replace("_", " "): measure_of(rows, measure) for measure in measures},
        }
        if run in others:
            series |= _at_validations(others["base"][0], others[run], series["reward queries"])
        for column, values in series.items():
            value, _, _ = at_level(torch.tensor(gain), torch.tensor(values), level)
            found.setdefault(column, []).append(float(value))
    cells = {column: _cell(column, values) for column, values in found.items()}
    return {"run": name, "gain": f"{level:g}", **cells}


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


def _cell(column: str, values: list[float]) -> str:
    """Return mean ± standard deviation of the seeds that reached the level, and how many did."""
    plain = {"FID": ".3f", "diversity": ".3f", "vendi": ".2f", "kl": ".1f"}
    counters = dict.fromkeys(("reward queries", "gradient queries", "denoiser calls"), ".0f")
    form = {**plain, **counters}.get(column, "+.2f")
    return spread(values, "+.3f" if "/" in column else form)


if __name__ == "__main__":
    auto_cli(matched, as_positional=False)
