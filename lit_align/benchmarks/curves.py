r"""Draws runs of committed tables against each other: speed, trade-offs, generalization.

    python -m lit_align.benchmarks.curves --runs configs/tdpo/runs.yaml \
        --names '[ddpo_colorfulness, tdpo_colorfulness]' --y '[gain, diversity]' --output curves.png

A panel for each quantity, a colour for each run: a thick line through the means over seeds at each
validation, thin ones for the seeds. Runs of another list are written `LIST:NAME`.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_align.benchmarks.results import (
    Rows,
    gains_of,
    measure_of,
    read_list,
    results_of,
    target_of,
)

_TITLES = {
    "gain": "gain of the trained reward / base std",
    "diversity": "pairwise diversity",
    "vendi": "Vendi score",
    "fid": "FID to the base",
    "kl": "KL to the base, nats",
}


def curves(
    runs: str,
    names: list[str],
    output: str,
    y: list[str],
    x: str = "reward_queries",
    x_max: float | None = None,
) -> None:
    """Write the figure.

    Args:
        runs: The grid's YAML file; its results lie in `results` beside it.
        names: Runs in their order, also of other lists.
        output: PNG file to write.
        y: "gain" (of the trained reward), names of held-out rewards, measures of `val/`, counters.
        x: One of the same.
        x_max: Where the axis ends.
    """
    columns = min(len(y), 3)
    rows = math.ceil(len(y) / columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colors = colormaps["tab20" if len(names) > 10 else "tab10"].colors  # type: ignore[attr-defined]
    for axis, measure in zip(axes, y, strict=False):
        for number, name in enumerate(names):
            seeds = list(results_of(runs, name).values())
            _draw_run(axis, seeds, x, measure, colors[number], _title(runs, name))
        axis.set_xlabel(_TITLES.get(x, x.replace("_", " ")))
        axis.set_title(_TITLES.get(measure, f"gain of {measure} / base std"), fontsize=10)
        _frame(axis, x_max, logarithmic=measure == "kl")
        axis.grid(alpha=0.2)
    for axis in axes[len(y) :]:
        axis.remove()
    axes[0].legend(fontsize=7)
    figure.savefig(output)
    print(f"Wrote {output}")


def _frame(axis: Axes, x_max: float | None, logarithmic: bool) -> None:
    """End the axis at `x_max`, and let the other show what lies before it."""
    if logarithmic:
        axis.set_yscale("symlog", linthresh=1)
    if x_max is None:
        return
    points = [p for line in axis.lines for p in np.asarray(line.get_xydata()) if p[0] <= x_max]
    low, high = (f(p[1] for p in points) for f in (min, max))
    margin = 0.05 * (high - low)
    axis.set_xlim(right=x_max)
    axis.set_ylim(low - (0 if logarithmic else margin), high + margin)


def _title(runs: str, name: str) -> str:
    other, _, own = name.rpartition(":")
    title: str = read_list(other or Path(runs))["runs"][own].get("title", own)
    return title.removesuffix(", colourfulness").removesuffix(", ShapesCLIP")


def _draw_run(
    axis: Axes, seeds: list[Rows], x: str, y: str, color: tuple[float, ...], label: str
) -> None:
    pairs = [(_series(rows, x), _series(rows, y)) for rows in seeds]
    for across, up in pairs:
        axis.plot(across, up, color=color, linewidth=0.6, alpha=0.4)
    length = min((len(across) for across, _ in pairs), default=0)
    across, up = (
        [statistics.mean(pair[side][k] for pair in pairs) for k in range(length)] for side in (0, 1)
    )
    axis.plot(across, up, color=color, linewidth=2, marker=".", label=label)


def _series(rows: Rows, name: str) -> list[float]:
    gains = gains_of(rows)
    if name == "gain":
        return gains[target_of(rows)]
    return gains[name] if name in gains else measure_of(rows, name)


if __name__ == "__main__":
    auto_cli(curves, as_positional=False)
