"""Runs a list of configurations over seeds, and draws the curves and the table behind a README.

    python -m lit_align.benchmarks.grid --runs configs/ddpo/runs.yaml

Finished runs are skipped and broken ones resumed, so the command may be repeated. Each run leaves
one small CSV, `results/<run>_seed<N>.csv` beside the list: the validation rows of its metrics. If
the list names other columns under `columns`, a second one, `..._steps.csv`, holds their rows.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from matplotlib.figure import Figure

from lit_align.benchmarks.results import Rows, read_list, read_results, write_rows
from lit_align.run_folder import newest_checkpoint, read_metrics, validation_rows
from lit_align.run_groups import spread

_RUNS_DIR = "runs/grid"


def grid(runs: str, only: str | None = None, draw_only: bool = False, workers: int = 1) -> None:
    """Run what is missing, then draw.

    Args:
        runs: A YAML file with `seeds`, and under `runs` a configuration, options and, if they are
            others, seeds per name.
        only: Run only the names that contain this.
        draw_only: Run nothing.
        workers: Runs at a time, which share the processor's cores.
    """
    path = Path(runs)
    listed = read_list(path)
    results = path.parent / "results"
    results.mkdir(exist_ok=True)
    missing = [
        (f"{name}_seed{seed}", run, seed, results / f"{name}_seed{seed}.csv")
        for seed in listed["seeds"]
        for name, run in listed["runs"].items()
        if not (draw_only or (only and only not in name)) and seed in seeds_of(run, listed)
    ]
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    with ThreadPoolExecutor(workers) as pool:
        started = [
            pool.submit(_run, name, run, seed, table, listed.get("columns", []))
            for name, run, seed, table in missing
            if not table.exists()
        ]
        for future in started:
            future.result()
    curves = {name: read_results(results, name, listed["seeds"]) for name in listed["runs"]}
    summary = summarise(curves, listed["runs"])
    (results / "summary.md").write_text(summary, encoding="utf-8")
    print(summary)
    _draw(curves, listed["runs"]).savefig(results / "curves.png")


def _run(name: str, run: dict[str, Any], seed: int, table: Path, columns: list[str]) -> None:
    words = ["fit", "--config", run["config"], "--name", name, "--runs_dir", _RUNS_DIR]
    words += ["--seed_everything", str(seed), "--model.init_args.seed", str(seed)]
    words += ["--trainer.enable_progress_bar", "false", *run.get("options", [])]
    if newest_checkpoint(_RUNS_DIR, name):
        words += ["--ckpt_path", "last"]
    print(f"== {name}", flush=True)
    subprocess.run([sys.executable, "-m", "lit_align", *words], check=True)
    written = Path(_RUNS_DIR, name).glob("version_*/metrics.csv")
    metrics = max(written, key=lambda path: path.stat().st_mtime)
    if columns:
        rows = [{n: row.get(n, "") for n in ("step", *columns)} for row in read_metrics(metrics)]
        known = [row for row in rows if any(row[name] for name in columns)]
        write_rows(table.with_name(f"{name}_steps.csv"), known)
    write_rows(table, validation_rows(metrics))


def summarise(curves: dict[str, list[Rows]], runs: dict[str, Any]) -> str:
    """Return a Markdown table of each reward over seeds: base, last, gain (mean ± std)."""
    lines = [
        "| run | reward | seeds | queries | base | aligned | gain | gain / base std |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in curves.items():
        for reward in _rewards(seeds):
            first, last = ([rows[i][reward] for rows in seeds] for i in (0, -1))
            gains = [b - a for a, b in zip(first, last, strict=True)]
            unit = [rows[0][reward.replace("val/reward/", "val/reward_std/")] for rows in seeds]
            sizes = [own / std for own, std in zip(gains, unit, strict=True)]
            gain, size = spread(gains, "+.4f"), spread(sizes, "+.2f")
            lines.append(
                f"| {name} | {reward.removeprefix('val/reward/')} | {len(seeds)} "
                f"| {seeds[0][-1][effort_of(seeds[0])]:.0f} | {statistics.mean(first):.4f} "
                f"| {statistics.mean(last):.4f} | {gain} | {size} |"
            )
    return "\n".join(lines) + "\n"


def seeds_of(run: dict[str, Any], listed: dict[str, Any]) -> list[int]:
    """Return the seeds of a run: its own, or those of the list."""
    return list(run.get("seeds", listed["seeds"]))


def effort_of(rows: Rows) -> str:
    """Return the counter that tells how far a run has come: reward queries, if it asks any."""
    asks = "judgements" not in rows[-1] or rows[-1]["reward_queries"] > 0
    return "reward_queries" if asks else "judgements"


def _rewards(seeds: list[Rows]) -> list[str]:
    return [k for k in (seeds[0][0] if seeds else {}) if k.startswith("val/reward/")]


def _draw(curves: dict[str, list[Rows]], runs: dict[str, Any]) -> Figure:
    """Draw, per run, each reward's gain over the base in the figure's units, mean and range."""
    shown = [name for name, seeds in curves.items() if seeds]
    panels = max(1, len(shown))
    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), dpi=120, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis, name in zip(axes, shown, strict=False):
        seeds = curves[name]
        for reward in _rewards(seeds):
            shared = min(map(len, seeds))  # a run may have been stopped early
            effort = effort_of(seeds[0])
            queries = [row[effort] for row in seeds[0][:shared]]
            gains = [[row[reward] - seed[0][reward] for row in seed[:shared]] for seed in seeds]
            points = list(zip(*gains, strict=True))
            label = reward.removeprefix("val/reward/")
            (line,) = axis.plot(queries, [statistics.mean(p) for p in points], label=label)
            lows, highs = [min(p) for p in points], [max(p) for p in points]
            axis.fill_between(queries, lows, highs, color=line.get_color(), alpha=0.2)
        axis.axhline(0, color="gray", linewidth=0.5)
        axis.set_title(runs[name].get("title", name), fontsize=9)
        axis.set_xlabel(effort_of(seeds[0]).replace("_", " "))
        axis.legend(fontsize=7)
    figure.supylabel("gain over the base, held-out prompts", fontsize=9)
    return figure


if __name__ == "__main__":
    auto_cli(grid, as_positional=False)
