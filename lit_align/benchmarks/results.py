"""The committed tables of a grid's runs, and what is read off them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

Rows = list[dict[str, float]]
_PREFIX = "val/reward/"


def read_list(path: str | Path) -> dict[str, Any]:
    """Return a list of runs: `seeds`, and under `runs` a configuration and options per name."""
    listed: Any = OmegaConf.to_container(OmegaConf.load(path))
    return dict(listed)


def read_results(results: Path, name: str, seeds: Sequence[int]) -> list[Rows]:
    """Return the validation rows of each seed of a run that has finished."""
    found = []
    for seed in seeds:
        path = results / f"{name}_seed{seed}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                found.append(
                    [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
                )
    return found


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table with the columns of its first row; without rows just the column "step"."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["step"])
        writer.writeheader()
        writer.writerows(rows)


def results_of(runs: str, name: str) -> dict[str, Rows]:
    """Return the validation rows of a run by `<name>_seed<N>`.

    Args:
        runs: The list's YAML file; its results lie in `results` beside it.
        name: Of the run; `LIST:NAME` for one of another list.
    """
    other, _, own = name.rpartition(":")
    path = Path(other or runs)
    return {
        f"{own}_seed{seed}": rows
        for seed in read_list(path)["seeds"]
        for rows in read_results(path.parent / "results", own, [seed])
    }


def target_of(rows: Rows) -> str:
    """Return the trained reward: the one that no slope is measured of."""
    names = [name.removeprefix(_PREFIX) for name in rows[0] if name.startswith(_PREFIX)]
    return next(name for name in names if f"val/generalization/{name}" not in rows[0])


def gains_of(rows: Rows) -> dict[str, list[float]]:
    """Return each reward's gain over the base, in standard deviations of the base's rewards."""
    found = {}
    for column in rows[0]:
        if column.startswith(_PREFIX):
            unit = rows[0][column.replace(_PREFIX, "val/reward_std/")]
            gains = [(row[column] - rows[0][column]) / unit for row in rows]
            found[column.removeprefix(_PREFIX)] = gains
    return found


def measure_of(rows: Rows, name: str) -> list[float]:
    """Return a counter, or `val/<name>`, at each validation; NaN where it was not measured."""
    column = name if name in rows[0] else f"val/{name}"
    return [row.get(column, math.nan) for row in rows]
