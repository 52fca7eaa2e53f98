"""Compares finished runs: `run.py compare RUN RUN ...` draws their curves and writes two tables.

Runs that differ only in seeds, names, folders and what watches them form one group. Gains are over
the base model, in standard deviations of the base model's rewards over the validation images.
"""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lit_align.metrics import CrossRewardGeneralization
from lit_align.metrics.cross_reward import at_level
from lit_align.run_groups import PHASES, Group, Run, find_runs, group_runs, read_run, spread

LEVELS = (0.5, 1.0, 2.0)
_STYLES: Sequence[Any] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
# How the table prints numbers whose titles begin so; others with a sign and two digits.
_FORMATS = {
    "reward queries": ".0f",
    "diversity": ".2f",
    "FID": ".3g",
    "KL": ".1f",
    "seconds": ".2f",
}


def compare(runs: list[str], output: str = "comparison", level: float | None = None) -> None:
    """Compare runs: `comparison.png`, `comparison.csv` and `comparison.md`.

    Args:
        runs: Folders of runs, `runs/<name>/version_N`; `runs/<name>` stands for all its versions.
        output: Folder to write into.
        level: Gain of the trained reward at which the held-out rewards are compared, in standard
            deviations of the base's rewards; by default the largest of 0.5, 1 and 2 that all runs
            reached.

    Raises:
        ValueError: If the level is not positive.
    """
    if level is not None and level <= 0:
        raise ValueError(f"`level` must be positive, got {level}.")
    groups = group_runs([read_run(path) for path in find_runs(runs)])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(groups, folder / "comparison.csv")
    table = summarise(groups, matched_level(groups) if level is None else level)
    (folder / "comparison.md").write_text(table, encoding="utf-8")
    draw(groups).savefig(folder / "comparison.png")
    print(f"{table}\nCurves: {folder / 'comparison.png'}")


def _write_csv(groups: list[Group], path: Path) -> None:
    rewards = _rewards(groups)
    measures = ("diversity", "fid", "kid", "cmmd", "kl")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        first = ["group", "run", "seed", "reward_queries", "target", "target_gain"]
        writer.writerow([*first, *(f"gain/{reward}" for reward in rewards), *measures])
        for group in groups:
            for run in group.runs:
                held_out = [run.gain(r) if r in run.held_out else None for r in rewards]
                columns = [run.gain(run.target), *held_out]
                columns += [run.series(f"val/{measure}") for measure in measures]
                for row, queries in enumerate(run.series("reward_queries")):
                    known = [group.label, run.path, run.seed, f"{queries:g}", run.target]
                    cells = ["" if c is None or math.isnan(c[row]) else c[row] for c in columns]
                    writer.writerow([*known, *cells])


def _rewards(groups: list[Group]) -> list[str]:
    """Return the rewards that some run held out."""
    return sorted({name for group in groups for run in group.runs for name in run.held_out})


def matched_level(groups: list[Group]) -> float | None:
    """Return the largest of `LEVELS` that all runs reached with their target, None if none."""
    reached = min(np.nanmax(run.gain(run.target)) for group in groups for run in group.runs)
    return max((level for level in LEVELS if level <= reached), default=None)


def generalization(run: Run, level: float | None) -> dict[str, float]:
    """Return how a run's held-out rewards follow its target, by the keys of the metric.

    Held-out rewards that scored all of the base model's images the same have no unit and are left
    out.
    """
    base = run.rows[0]
    names = [run.target, *(k for k in run.held_out if base.get(f"val/reward_std/{k}", 0) > 0)]
    if len(names) == 1:
        return {}
    levels = LEVELS if level is None else (level,)
    metric = CrossRewardGeneralization(run.target, names[1:], levels=levels)
    means = np.stack([run.series(f"val/reward/{name}") for name in names], axis=1)
    units = torch.tensor([base[f"val/reward_std/{name}"] for name in names])
    measures = [run.series(f"val/{name}") for name in ("kl", "diversity")]
    for row, queries in enumerate(run.series("reward_queries")):
        kl, diversity = (float(values[row]) for values in measures)
        # Of the standard deviations only the base's count; later ones are not logged.
        metric.update(torch.from_numpy(means[row]), units, float(queries), kl, diversity)
    return {key: float(value) for key, value in metric.compute().items()}


def summarise(groups: list[Group], level: float | None) -> str:
    """Return a Markdown table with a column per group: mean ± standard deviation over seeds."""
    names = _rewards(groups)
    figures = [[_figures(run, names, level) for run in group.runs] for group in groups]
    rows = [["", *(group.label.replace("|", "\\|") for group in groups)]]
    rows += [["---"] * len(rows[0]), ["trained reward", *(group.target for group in groups)]]
    rows += [["seeds", *(str(len(group.runs)) for group in groups)]]
    for title in figures[0][0]:
        rows.append([title, *(_cell([f[title] for f in of], title) for of in figures)])
    notes = [
        "Mean ± standard deviation over seeds. Gains are over the base model, in standard",
        "deviations of its rewards. -: not measured, not held out, or not reached.",
    ]
    if level is None:
        notes.append(f"No gain of the trained reward out of {LEVELS} was reached by all runs.")
    return "\n".join([*notes, "", *(f"| {' | '.join(cells)} |" for cells in rows), ""])


def _figures(run: Run, rewards: list[str], level: float | None) -> dict[str, float]:
    """Return the table's numbers for a run, by title; NaN where there is none."""
    found = {
        "reward queries": run.rows[-1]["reward_queries"],
        "final gain, trained reward": run.gain(run.target)[-1],
        **{f"final gain, {k}": run.gain(k)[-1] if k in run.held_out else math.nan for k in rewards},
        "diversity / base": run.diversity()[-1],
        "FID to the base": run.series("val/fid")[-1],
        "KL to the base": run.series("val/kl")[-1],
    }
    numbers = generalization(run, level)
    if level is not None:
        measures = {"reward queries to": "reward_queries", "FID at": "val/fid"}
        gain = torch.from_numpy(run.gain(run.target))
        for title, column in measures.items():
            value, _, _ = at_level(gain, torch.from_numpy(run.series(column)), level)
            found[f"{title} trained gain {level:g}"] = float(value)
    for k in rewards:
        if level is not None:
            at = f"@{level:g}"
            found[f"{k} at trained gain {level:g}"] = numbers.get(f"ood_at/{k}{at}", math.nan)
            found[f"{k}, retention there"] = numbers.get(f"retention/{k}{at}", math.nan)
            found[f"{k}, area up to there"] = numbers.get(f"auc/{k}{at}", math.nan)
        found[f"{k}, slope"] = numbers.get(f"slope/{k}", math.nan)
        found[f"{k}, lost since its best"] = numbers.get(f"gap/{k}", math.nan)
        found[f"{k}, early peak"] = numbers.get(f"early_peak/{k}", math.nan)
    return found | {f"seconds a round, {phase}": run.seconds[phase] for phase in PHASES}


def _cell(values: Sequence[float], title: str) -> str:
    """Return how the table prints a number of each run of a group."""
    known = [value for value in values if not math.isnan(value)]
    if known and title.endswith("early peak"):
        return f"{sum(known):.0f} of {len(known)} seeds"
    form = next((form for start, form in _FORMATS.items() if title.startswith(start)), "+.2f")
    return spread(values, form)


def draw(groups: list[Group]) -> Figure:
    """Draw a row of panels per trained reward, and below them a round's seconds and the legend.

    Rewards differ in how far they can rise, so each has axes of its own. Panels: its gain against
    reward queries; the held-out rewards' gains, diversity and FID against its gain.
    """
    colours = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    palette = {group.label: colours(i % colours.N) for i, group in enumerate(groups)}
    styles = {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(_rewards(groups))}
    targets = list(dict.fromkeys(group.target for group in groups))
    heights = [3.6 * len(targets), max(2.6, 0.5 * len(groups))]  # inches
    figure = Figure(figsize=(16, sum(heights)), dpi=100, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = parts
    for axes, target in zip(above.subplots(len(targets), 4, squeeze=False), targets, strict=True):
        shown = [group for group in groups if group.target == target]
        _draw_curves(axes, shown, target, palette, styles)
    time, legend = below.subplots(1, 2)
    _draw_seconds(time, groups, palette)
    _draw_legend(legend, groups, palette, styles)
    return figure


def _draw_curves(
    axes: np.ndarray,
    groups: list[Group],
    target: str,
    palette: dict[str, Any],
    styles: dict[str, Any],
) -> None:
    """Fill the four panels of a trained reward with the groups that were trained on it."""
    gain, held_out, diversity, fid = axes
    for group in groups:
        colour = palette[group.label]
        gains = group.along(lambda run: run.gain(target))
        _line(gain, group.along(Run.effort), gains, colour)
        for name, style in styles.items():
            if any(name in run.held_out for run in group.runs):
                _line(held_out, gains, group.along(partial(Run.gain, reward=name)), colour, style)
        _line(diversity, gains, group.along(Run.diversity), colour)
        _line(fid, gains, group.along(lambda run: run.series("val/fid")), colour)
    own = f"gain of {target} (base std)"
    offline = any(run.rows[-1]["reward_queries"] == 0 for group in groups for run in group.runs)
    across = "reward queries" + ", or judgements" * offline
    _finish(gain, f"Trained on {target}", across, own, 0)
    _finish(held_out, "Held-out rewards", own, "gain of a held-out reward (base std)", 0)
    _finish(diversity, "Diversity", own, "diversity / base", 1)
    _finish(fid, "Distance from the base model", own, "FID to the base model", 0)


def _line(axis: Axes, x: np.ndarray, y: np.ndarray, colour: Any, style: Any = "-") -> None:
    """Draw the mean of y [S, T] over that of x [S, T], and the range of y; nothing if unknown."""
    known = ~np.isnan(y).any(0)
    if known.any():
        x, y = x.mean(0)[known], y[:, known]
        axis.plot(x, y.mean(0), color=colour, linestyle=style, marker=".", markersize=5)
        axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def _finish(axis: Axes, title: str, x: str, y: str, base: float) -> None:
    """Label a panel and mark the base model's value, or say that nothing was measured."""
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if not axis.lines:
        _empty(axis)
    else:
        axis.axhline(base, color="gray", linewidth=0.6, zorder=0)


def _empty(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not measured", ha="center", color="gray", transform=axis.transAxes)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_seconds(axis: Axes, groups: list[Group], palette: dict[str, Any]) -> None:
    """Draw stacked bars of the mean seconds of a round."""
    axis.set_title("Time of a round")
    ends = np.zeros(len(groups))
    for phase, shade in zip(PHASES, ("0.35", "0.6", "0.85"), strict=True):
        lengths = [np.mean([run.seconds[phase] for run in group.runs]) for group in groups]
        lengths = np.nan_to_num(lengths)
        axis.barh(range(len(groups)), lengths, 0.6, left=ends, color=shade, label=phase)
        ends += lengths
    if not ends.any():
        _empty(axis)
        return
    labels = [textwrap.fill(group.label, 36, break_on_hyphens=False) for group in groups]
    for text, group in zip(axis.set_yticks(range(len(groups)), labels), groups, strict=True):
        text.label1.set_color(palette[group.label])
    axis.invert_yaxis()
    axis.set_xlabel("seconds, mean over rounds and seeds")
    axis.legend(fontsize=8)


def _draw_legend(
    axis: Axes, groups: list[Group], palette: dict[str, Any], styles: dict[str, Any]
) -> None:
    """Explain colours, lines and bands in a panel of their own."""
    axis.axis("off")
    runs = [Line2D([], [], linestyle="none", label="runs")]
    for group in groups:
        seeds = f"{len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"
        label = f"{group.label}: {seeds}"
        label = textwrap.fill(label, 52, break_on_hyphens=False)
        runs.append(Line2D([], [], color=palette[group.label], linewidth=2.5, label=label))
    held_out = [Line2D([], [], linestyle="none", label="held-out rewards")]
    held_out += [Line2D([], [], color="black", ls=s, label=name) for name, s in styles.items()]
    held_out.append(Line2D([], [], linestyle="none", label="line: mean over seeds"))
    held_out.append(Line2D([], [], linestyle="none", label="band: their range"))
    axis.add_artist(axis.legend(handles=runs, loc="upper left", frameon=False))
    axis.legend(handles=held_out, loc="upper right", frameon=False)
