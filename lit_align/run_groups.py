"""Finished runs, read from their folders and gathered into groups that differ only in seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lit_align.run_folder import read_metrics, validation_rows

PHASES = ("rollout", "reward", "update")
_SEEDS = ("model.init_args.seed", "seed_everything")
# Options that do not change what is trained; callbacks only watch, but for `_RESETS`.
_NOT_TRAINING = re.compile(
    r"(seed_everything|name|runs_dir|ckpt_path|model\.init_args\.seed"
    r"|trainer\.(logger|callbacks|default_root_dir|enable_\w+|log_every_n_steps)(\..*)?)$"
)
_RESETS = "NeuronResetCallback"


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        path: The folder.
        options: Its configuration, by dotted names, without unset options.
        target: Name of the trained reward.
        rows: `reward_queries` and `val/...` of its validations, the base model first.
        seconds: Mean of a round's seconds per phase of `PHASES`; NaN if not measured.
    """

    path: Path
    options: dict[str, Any]
    target: str
    rows: list[dict[str, float]]
    seconds: dict[str, float]

    @property
    def name(self) -> str:
        """The configuration's name without its seed."""
        return re.sub(r"_seed\d+$", "", str(self.options.get("name", self.path.parent.name)))

    @property
    def seed(self) -> Any:
        """What decides its noise, None if the configuration has no seed."""
        return next((self.options[key] for key in _SEEDS if key in self.options), None)

    @property
    def held_out(self) -> list[str]:
        """Names of the rewards that it was not trained on."""
        names = [k.removeprefix("val/reward/") for k in self.rows[0] if k.startswith("val/reward/")]
        return [name for name in names if name != self.target]

    def series(self, column: str) -> np.ndarray:
        """Return a column [T] over the validations, NaN where it was not measured."""
        return np.array([row.get(column, math.nan) for row in self.rows])

    def effort(self) -> np.ndarray:
        """Return the reward queries [T], or the judgements of a method that asks no reward."""
        asks = self.rows[-1].get("reward_queries") or "judgements" not in self.rows[-1]
        return self.series("reward_queries" if asks else "judgements")

    def gain(self, reward: str) -> np.ndarray:
        """Return a reward's gains [T] over the base, in its standard deviations."""
        means = self.series(f"val/reward/{reward}")
        unit = self.rows[0].get(f"val/reward_std/{reward}", math.nan)
        return (means - means[0]) / (unit or math.nan)

    def diversity(self) -> np.ndarray:
        """Return diversity [T] as a ratio to the base's."""
        values = self.series("val/diversity")
        return values / (values[0] or math.nan)

    def training(self) -> dict[str, Any]:
        """Return the options that decide what is trained, but for the seed."""
        kept = {k: v for k, v in self.options.items() if not _NOT_TRAINING.match(k)}
        for name, value in self.options.items():
            place = name.removesuffix(".class_path")
            if place != name and str(value).endswith(_RESETS):
                own = _within(self.options, f"{place}.init_args.")
                kept |= {f"{_RESETS}.{k}": v for k, v in own.items() if own.get("mode") != "none"}
        return kept


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with different seeds, and what to call them."""

    label: str
    runs: list[Run]

    @property
    def target(self) -> str:
        """Name of the trained reward."""
        return self.runs[0].target

    def along(self, values: Callable[[Run], np.ndarray]) -> np.ndarray:
        """Return values [S, T] of its S runs at common efforts, cut to the shortest run."""
        common = min((run.effort() for run in self.runs), key=lambda effort: float(effort[-1]))
        found = []
        for run in self.runs:
            queries, series = run.effort(), values(run)
            same = np.array_equal(queries[: len(common)], common)
            found.append(series[: len(common)] if same else np.interp(common, queries, series))
        return np.stack(found)


def find_runs(folders: Sequence[str]) -> list[Path]:
    """Return the run folders, each once; a folder without metrics stands for its versions.

    Raises:
        FileNotFoundError: If there is no such run.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        versions = [p for p in folder.glob("version_*") if (p / "metrics.csv").is_file()]
        versions.sort(key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
        if (folder / "metrics.csv").is_file():
            versions = [folder]
        if not versions:
            what = "no metrics.csv" if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{str(folder)!r} is not a run: {what}.")
        found |= dict.fromkeys(versions)
    if not found:
        raise FileNotFoundError("Name the runs to compare: `run.py compare RUN [RUN ...]`.")
    return list(found)


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: If its configuration is missing.
        ValueError: If it was not validated, or not on the base model.
    """
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(f"{str(path)!r} has no config.yaml.")
    options = dict(_flatten(OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))))
    rows = validation_rows(path / "metrics.csv")
    if not rows:
        raise ValueError(f"{str(path)!r} has no validation of a reward in its metrics.csv.")
    metrics = read_metrics(path / "metrics.csv")
    trained = [k for k in metrics[0] if k.startswith("rollout/reward/")]
    names = [k.removeprefix("rollout/reward/") for k in trained]
    # Methods without rollouts log no such column.
    names += [str(options.get("model.init_args.reward.class_path", "")).rpartition(".")[2]]
    target = next((name for name in names if f"val/reward/{name}" in rows[0]), None)
    if target is None:
        raise ValueError(f"{str(path)!r} did not validate the reward that it was trained on.")
    if rows[0]["reward_queries"] or not rows[0].get(f"val/reward_std/{target}", math.nan) > 0:
        raise ValueError(f"{str(path)!r} does not begin with the base model's rewards and spread.")
    return Run(path, options, target, rows, {phase: _seconds(metrics, phase) for phase in PHASES})


def _within(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the options whose names begin so, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in options.items() if k.startswith(prefix)}


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings and lists, without what is unset."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for k, v in items for leaf in _flatten(v, f"{prefix}.{k}".lstrip("."))]
    return [] if value is None else [(prefix, value)]


def _seconds(metrics: list[dict[str, str]], phase: str) -> float:
    """Return the mean seconds of a phase over rounds; rows of a round repeat its value."""
    rows = [row for row in metrics if row.get(f"time/{phase}")]
    rounds = {row.get("epoch") or row["step"]: float(row[f"time/{phase}"]) for row in rows}
    return statistics.mean(rounds.values()) if rounds else math.nan


def spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation of the known values, and how many they are if not all.

    Args:
        values: One for each run of a group, NaN where it is not known; "-" if none is.
        form: Format of the mean; the deviation has no sign.
    """
    known = [float(value) for value in values if not math.isnan(value)]
    if not known:
        return "-"
    text = f"{statistics.mean(known):{form}}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):{form.lstrip('+')}}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Gather runs of one configuration, in order of appearance, under labels of their own."""
    gathered: dict[str, list[Run]] = {}
    for run in runs:
        gathered.setdefault(repr(sorted(run.training().items())), []).append(run)
    groups = list(gathered.values())
    names = [members[0].name for members in groups]
    labels = list(names)
    for name in names:
        alike = [i for i, other in enumerate(names) if other == name]
        if len(alike) > 1:
            told = _differences([groups[i][0].training() for i in alike])
            for i, difference in zip(alike, told, strict=True):
                labels[i] = f"{name} ({difference})"
    return [Group(label, members) for label, members in zip(labels, groups, strict=True)]


def _differences(configurations: list[dict[str, Any]]) -> list[str]:
    """Return per configuration what tells it from the others; at least three options, if so many.

    Options nearest to the root come first: they are the most telling.
    """
    names = {name for options in configurations for name in options}
    differing = [n for n in names if len({repr(o.get(n)) for o in configurations}) > 1]
    differing.sort(key=lambda name: (name.count("."), name))
    told: list[list[str]] = [[] for _ in configurations]
    for number, name in enumerate(differing):
        if number >= 3 and len(set(map(tuple, told))) == len(told):
            return [", ".join([*parts, "..."]) for parts in told]
        short = name.rpartition(".")[2]
        short = short if [n.rpartition(".")[2] for n in differing].count(short) == 1 else name
        for parts, options in zip(told, configurations, strict=True):
            value = options.get(name, "unset")
            parts.append(f"{short}={value:g}" if type(value) is float else f"{short}={value}")
    return [", ".join(parts) for parts in told]
