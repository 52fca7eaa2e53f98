"""Reward models on synthetic preferences: `python -m lit_align.benchmarks.reward_models`.

The annotators' utility is known, so what a model could reach at best is too. Everything about the
test pairs is an expectation over the annotators' noise: accuracies and likelihoods are computed
from the outcomes' true probabilities, not from drawn labels. The threshold of ties, and the scale
and theta that turn scores into probabilities of outcomes, are fitted for every model alike, on
drawn labels of validation pairs.
"""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lit_align.algorithms import RewardModeling
from lit_align.benchmarks.results import write_rows
from lit_align.benchmarks.synthetic_annotators import (
    Pool,
    draw_pool,
    indifference_for,
    judge,
    outcome_probabilities,
)
from lit_align.functional.noise import keyed_generator
from lit_align.functional.reward_modeling import (
    reliability,
    tie_probabilities,
    tie_threshold,
)
from lit_align.rewards import LearnedReward
from lit_align.rewards.towers import shapes_tower
from lit_align.trajectory import PreferenceBatch

# Noisier than the people of HPDv2, of whom one agrees with the others in 78 % of the cases.
TEMPERATURE, TASTE = 1.0, 0.25
TIE_SHARE = 0.25
BATCH = 64  # judgements
STEPS = {1000: 60, 4000: 125, 16000: 250}  # optimiser steps by the number of judgements
_TIED = 4000


@dataclass(frozen=True)
class Recipe:
    """What a run trains on and by what loss.

    Attributes:
        loss_type: Of `RewardModeling`.
        labels: Judgements, ties included.
        tie_share: Of ties among them.
        theta: Of "btt".
        freeze: Of `RewardModeling`.
        lr: Peak learning rate.
    """

    loss_type: str
    labels: int = _TIED
    tie_share: float = 0.0
    theta: float = 5.0
    freeze: float | str = "tower"
    lr: float = 1e-2


RECIPES = {
    **{f"bt_{size}": Recipe("bt", size) for size in STEPS},
    "tuned_16000": Recipe("bt", 16000, freeze=0.0, lr=3e-4),
    "ties_bt": Recipe("bt", tie_share=TIE_SHARE),
    "ties_soft": Recipe("soft", tie_share=TIE_SHARE),
    "ties_btt": Recipe("btt", tie_share=TIE_SHARE),
    "ties_btt_theta2": Recipe("btt", tie_share=TIE_SHARE, theta=2.0),
}


class Judged:
    """Judgements of a pool as single records, the preferred image first."""

    def __init__(self, pool: Pool, labels: Tensor) -> None:
        self.pool, self.labels = pool, labels

    def __len__(self) -> int:
        """Return the number of judgements."""
        return len(self.labels)

    def __getitem__(self, index: int) -> PreferenceBatch:
        """Return one judgement."""
        p = float(self.labels[index])
        images = self.pool.images[index] if p >= 0.5 else self.pool.images[index].flip(0)
        place = torch.tensor([index])
        return PreferenceBatch(
            images=images[None].float() / 255,
            prompts=[self.pool.prompts[index]],
            labels=torch.tensor([[max(p, 1 - p), min(p, 1 - p)]]),
            weights=torch.ones(1),
            positions=place,
            record_ids=place,
        )


@dataclass(frozen=True)
class World:
    """The pools and the annotators' noise.

    Attributes:
        train, val, test: Pools; the last two of held-out captions.
        tau: Threshold below which annotators call a pair a tie.
    """

    train: Pool
    val: Pool
    test: Pool
    tau: float

    def chances(self, pool: Pool) -> Tensor:
        """Return the probabilities of the outcomes [N, 3]."""
        return outcome_probabilities(self.delta(pool), TEMPERATURE, self.tau)

    def delta(self, pool: Pool) -> Tensor:
        """Return the true differences of utility [N]."""
        utilities = pool.utilities(TASTE, self.train)
        return utilities[:, 0] - utilities[:, 1]


def make_world(tie_share: float, cache: str | None) -> World:
    """Return the pools, from the cache if they are there."""
    train = draw_pool(max(STEPS), "train", 0, cache)
    world = World(
        train, draw_pool(600, "heldout", 1, cache), draw_pool(2000, "heldout", 2, cache), 0
    )
    tau = indifference_for(tie_share, world.delta(train), TEMPERATURE)
    return World(train, world.val, world.test, tau)


def train_model(recipe: Recipe, world: World, seed: int) -> tuple[RewardModeling, int]:
    """Return a trained model and how many judgements it was trained on.

    Args:
        recipe: What to train.
        world: The pools.
        seed: Decides labels and their order.
    """
    steps = STEPS[recipe.labels]
    chances = world.chances(world.train)[: recipe.labels]
    labels = judge(chances, keyed_generator("train labels", seed))
    kept = torch.arange(len(labels))
    if recipe.loss_type == "bt":
        kept = (labels != 0.5).nonzero().flatten()
    judged: Any = Judged(world.train, labels)
    generator = keyed_generator("order", seed)
    laps = [kept[torch.randperm(len(kept), generator=generator)] for _ in range(steps)]
    order = torch.cat(laps)[: steps * BATCH].tolist()
    loader = DataLoader(judged, BATCH, sampler=order, collate_fn=PreferenceBatch.concatenate)
    reward = LearnedReward(shapes_tower(), "linear")
    options: Any = {name: getattr(recipe, name) for name in ("loss_type", "theta", "freeze", "lr")}
    module = RewardModeling(reward, weight_decay=1e-2, warmup_steps=10, **options)
    val_labels = judge(world.chances(world.val), keyed_generator("val labels", seed))
    val: Any = Judged(world.val, val_labels)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, loader, DataLoader(val, 100, collate_fn=PreferenceBatch.concatenate))
    return module, len(kept)


@torch.no_grad()
def scores_of(reward: LearnedReward, pool: Pool) -> Tensor:
    """Return raw scores [N, 2] of a pool, as it lies."""
    found = []
    for start in range(0, len(pool), 100):
        images = pool.images[start : start + 100].flatten(0, 1).float() / 255
        prompts = [prompt for prompt in pool.prompts[start : start + 100] for _ in range(2)]
        found.append(reward.raw(images, prompts).view(-1, 2))
    return torch.cat(found)


def fit_outcomes(delta: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the scale and theta that make labels [N] likeliest, on a grid.

    Args:
        delta: Differences of scores [N].
        labels: 1, 1/2 or 0 [N].
    """
    outcomes = (2 * (1 - labels)).long()[:, None]
    best, found = -torch.inf, (1.0, 2.0)
    for scale in torch.logspace(-1, 1, 61).tolist():
        for theta in torch.logspace(0.02, 1.5, 61).tolist():
            chances = tie_probabilities(scale * delta.double(), theta)
            likelihood = float(chances.gather(1, outcomes).log().mean())
            if likelihood > best:
                best, found = likelihood, (scale, theta)
    return found


def measure(module: RewardModeling, world: World, seed: int) -> dict[str, float]:
    """Return what the model is worth on the test pairs."""
    labels = judge(world.chances(world.val), keyed_generator("val labels", seed))
    val, scores = scores_of(module.reward, world.val), scores_of(module.reward, world.test)
    delta, val_delta = scores[:, 0] - scores[:, 1], val[:, 0] - val[:, 1]
    chances = world.chances(world.test).double()
    win, tie, loss = chances.unbind(1)
    chosen = torch.where(delta > 0, win, loss)
    best = torch.maximum(win, loss)
    decided = (win + loss).sum()
    found = {
        "accuracy": float(chosen.sum() / decided),
        "ceiling": float(best.sum() / decided),
        "truly_better": float(((delta > 0) == (win > loss)).double().mean()),
        "ece": reliability(delta, win / (win + loss)).error(),
    }
    if world.tau:
        threshold = tie_threshold(val_delta, labels).threshold
        called = torch.where(delta.abs() <= threshold, tie, chosen)
        scale, theta = fit_outcomes(val_delta, labels)
        likelihood = (chances * tie_probabilities(scale * delta.double(), theta).log()).sum(1)
        found |= {
            "accuracy_with_ties": float(called.mean()),
            "ceiling_with_ties": float(torch.maximum(best, tie).mean()),
            "log_likelihood": float(likelihood.mean()),
            "log_likelihood_ceiling": float((chances * chances.log()).nan_to_num().sum(1).mean()),
        }
    pairs = {"gold": world.test.gold, "utility": world.test.utilities(TASTE, world.train)}
    for name, truth in pairs.items():
        both = torch.stack([scores.flatten(), truth.flatten()])
        found[f"correlation_{name}"] = float(torch.corrcoef(both)[0, 1])
    return found


def reward_models(
    output: str = "configs/reward_modeling/results",
    seeds: list[int] | None = None,
    only: list[str] | None = None,
    cache: str = "runs/annotators",
) -> None:
    """Train every recipe with every seed, and write tables and a picture.

    Args:
        output: Folder: one CSV per run, `summary.md` and `accuracy.png`. Finished runs are skipped.
        seeds: By default 0, 1 and 2.
        only: Recipes; all by default.
        cache: A folder that keeps the rendered pools.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    worlds: dict[float, World] = {}
    for seed in seeds or [0, 1, 2]:
        for name in only or list(RECIPES):
            path = folder / f"{name}_seed{seed}.csv"
            if path.exists():
                continue
            recipe = RECIPES[name]
            if recipe.tie_share not in worlds:
                worlds[recipe.tie_share] = make_world(recipe.tie_share, cache)
            started = time.perf_counter()
            module, trained = train_model(recipe, worlds[recipe.tie_share], seed)
            found = measure(module, worlds[recipe.tie_share], seed)
            seconds = round(time.perf_counter() - started)
            row = {"judgements": recipe.labels, "trained": trained, **found}
            write_rows(path, [{k: _rounded(v) for k, v in row.items()}])
            print(f"{path}: accuracy {found['accuracy']:.4f}, {seconds} s", flush=True)
    summarise(folder)


def _rounded(value: float) -> float:
    return round(value, 5)


def read_runs(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return the rows of each recipe, one per seed."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in RECIPES:
        for path in sorted(folder.glob(f"{name}_seed*.csv")):
            with path.open(newline="", encoding="utf-8") as file:
                (row,) = csv.DictReader(file)
            found.setdefault(name, []).append({k: float(v) for k, v in row.items()})
    return found


def summarise(folder: Path) -> None:
    """Write `summary.md` and `accuracy.png` of the runs that there are."""
    runs = read_runs(folder)
    columns = list(dict.fromkeys(key for rows in runs.values() for key in rows[0]))
    lines = [f"| run | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, rows in runs.items():
        cells = [_cell([row[c] for row in rows]) if c in rows[0] else "" for c in columns]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    text = "Mean ± standard deviation over seeds.\n\n" + "\n".join(lines) + "\n"
    (folder / "summary.md").write_text(text, encoding="utf-8")
    _draw(runs, folder / "accuracy.png")
    print(text)


def _cell(values: list[float]) -> str:
    if all(value == round(value) for value in values):
        return f"{statistics.mean(values):,.0f}"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def _draw(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw accuracy against the number of labels, and how models deal with ties."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    grown = [rows for name, rows in runs.items() if name.startswith("bt_")]
    for rows in grown:
        left.scatter(
            [r["judgements"] for r in rows], [r["accuracy"] for r in rows], color="C0", s=14
        )
    if grown:
        means = [statistics.mean(r["accuracy"] for r in rows) for rows in grown]
        left.plot(
            [rows[0]["judgements"] for rows in grown], means, color="C0", label="Bradley-Terry"
        )
        left.axhline(grown[0][0]["ceiling"], color="k", ls="--", lw=1, label="noise ceiling")
        left.set(
            xscale="log", xlabel="judgements", ylabel="held-out accuracy", title="Without ties"
        )
        left.legend()
    tied = {name: rows for name, rows in runs.items() if name.startswith("ties_")}
    for place, rows in enumerate(tied.values()):
        values = [row["accuracy_with_ties"] for row in rows]
        right.scatter([place] * len(values), values, s=14, color=f"C{place}")
        right.plot([place - 0.2, place + 0.2], [statistics.mean(values)] * 2, color=f"C{place}")
        right.axhline(rows[0]["ceiling_with_ties"], color="k", ls="--", lw=1)
    right.set(xticks=range(len(tied)), ylabel="held-out accuracy with ties")
    right.set_xticklabels([name.removeprefix("ties_") for name in tied])
    right.set_title("25 % of the judgements are ties")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    auto_cli(reward_models, as_positional=False)
