"""Scores the checkpoints of finished runs on prompts that training never saw, and draws them.

    python -m lit_align.benchmarks.checkpoints --runs '[runs/grid/tdpo_colorfulness_seed0, ...]' \
        --output configs/tdpo/results/unseen.csv --lists '[unseen]'

One row per checkpoint: the run, its reward queries, and the mean of every reward on every list,
by the deterministic sampler as in the run's validation; the base model's row comes first, with no
queries. Image k of prompt i starts from the noise of seed ``i + 10000 k``. With a `level`, it also
draws the checkpoints whose trained reward has gained about so much: runs at equal reward, side by
side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lit_align.algorithms.base import AlignmentModule
from lit_align.benchmarks.results import write_rows
from lit_align.callbacks.ema import stored_average
from lit_align.callbacks.sample_gallery import draw_rows
from lit_align.checkpoint_io import read_checkpoint
from lit_align.data.prompts import PromptFile
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import (
    Colorfulness,
    DistributionParity,
    RewardModule,
    ShapesCLIP,
    ShapesColor,
    ShapesVerifier,
)
from lit_align.rewards.base import quantize, uint8_images
from lit_align.run_groups import find_runs, read_run
from lit_align.verbs import Weights, load_module, sample_images

_BATCH = 96
_NEXT_IMAGE = 10_000  # from one image of a prompt to the next, more than there are prompts


class Listed(NamedTuple):
    """A prompt list, how much of it is drawn, and what is scored."""

    prompts: str
    size: int
    images_per_prompt: int
    rewards: tuple[str, ...]


LISTS = {
    "heldout": Listed("shapes-heldout", 192, 4, ("ShapesVerifier", "ShapesCLIP", "Colorfulness")),
    "unseen": Listed("shapes-unseen", 96, 1, ("ShapesVerifier", "ShapesCLIP", "Colorfulness")),
    "relations": Listed("shapes-relations-heldout", 192, 4, ("ShapesVerifier",)),
    "counts": Listed("shapes-counts-heldout", 27, 16, ("ShapesVerifier",)),
    "colored": Listed("shapes-colored-heldout", 192, 4, ("ShapesVerifier",)),
    "uncolored": Listed("shapes-uncolored-test", 496, 1, ("Parity", "ShapesVerifier")),
}


def checkpoints(
    runs: list[str],
    output: str,
    lists: list[str] | None = None,
    last_only: bool = False,
    level: float | None = None,
    weights: Weights = "trained",
) -> None:
    """Write the table, and with a `level` the picture beside it.

    Args:
        runs: Folders of runs.
        output: CSV file to write; the picture has its name with `.png`.
        lists: Names of `LISTS`; by default all.
        last_only: Score only each run's last checkpoint.
        level: Gain of the trained reward, in standard deviations of the base, to draw at.
        weights: "trained", or "ema" for the average that AdapterEMA kept.
    """
    chosen = {name: LISTS[name] for name in lists or LISTS}
    rows: list[dict[str, Any]] = []
    pictures: dict[str, Tensor] = {}
    for run in find_runs(runs):
        files = list(_checkpoints(run, last_only))
        module = load_module(str(files[-1]))
        assert isinstance(module, AlignmentModule)
        sampling = (module.eval_num_inference_steps, module.guidance_scale)
        if not rows:
            base = DiffusionPolicy.from_pretrained(module.policy.pretrained, train="none")
            rows.append({"run": "base", "reward_queries": 0, **_score(base, chosen, *sampling)})
            if level is not None:
                pictures["base"] = _draw(base, *sampling)
        nearest = None if level is None else _queries_at(run, level)
        for file in files:
            stored = read_checkpoint(str(file))
            found = stored["state_dict"] if weights == "trained" else stored_average(stored)
            module.load_state_dict(found, strict=False)
            queries = stored["lit_align"]["counters"]["reward_queries"]
            scores = _score(module.policy, chosen, *sampling)
            rows.append({"run": run.parent.name, "reward_queries": queries, **scores})
            if queries == nearest:
                label = f"{run.parent.name}_{queries}".replace("_", "\n")
                pictures[label] = _draw(module.policy, *sampling)
            print(rows[-1], flush=True)
    write_rows(Path(output), rows)
    if pictures:
        prompts = [text for text, _ in _drawn_prompts()]
        draw_rows(pictures, prompts).savefig(Path(output).with_suffix(".png"))


def _checkpoints(run: Path, last_only: bool) -> Iterator[Path]:
    """Yield a run's checkpoints by their rounds; the last one if there are no others."""
    folder = run / "checkpoints"
    found = {int(m[1]): path for path in sorted(folder.glob("*.ckpt"))
             if (m := re.search(r"epoch=(\d+)", path.name))}  # fmt: skip
    kept = [found[round_index] for round_index in sorted(found)] or [folder / "last.ckpt"]
    yield from kept[-1:] if last_only else kept


def _queries_at(run: Path, level: float) -> float:
    """Return the reward queries of the validation whose gain is nearest to `level`."""
    read = read_run(run)
    gains = read.gain(read.target)[1:]
    return float(read.series("reward_queries")[1:][abs(gains - level).argmin()])


def _score(
    policy: DiffusionPolicy,
    lists: dict[str, Listed],
    steps: int,
    guidance: float,
) -> dict[str, float]:
    """Return the mean of every reward on every list."""
    rewards: dict[str, RewardModule] = {
        "ShapesVerifier": ShapesVerifier(),
        "ShapesCLIP": ShapesCLIP(),
        "Colorfulness": Colorfulness(),
        "Parity": DistributionParity(ShapesColor()),
    }
    found = {}
    for name, listed in lists.items():
        prompts = PromptFile(listed.prompts)[: listed.size] * listed.images_per_prompt
        seeds = [
            number % listed.size + _NEXT_IMAGE * (number // listed.size)
            for number in range(len(prompts))
        ]
        images = _sample(policy, [text for text, _ in prompts], seeds, steps, guidance)
        texts, metadata = zip(*prompts, strict=True)
        for reward in listed.rewards:
            scores = rewards[reward](images, list(texts), list(metadata))
            found[f"{name}/{reward}"] = round(float(scores.nanmean()), 5)
    return found


def _sample(
    policy: DiffusionPolicy, prompts: list[str], seeds: list[int], steps: int, guidance: float
) -> Tensor:
    parts = [
        sample_images(policy, prompts[i : i + _BATCH], seeds[i : i + _BATCH], steps, guidance)
        for i in range(0, len(prompts), _BATCH)
    ]
    return quantize(torch.cat(parts))


def _drawn_prompts() -> list[Any]:
    """Return four held-out prompts of one object, four of several, four with unseen pairs."""
    held_out = PromptFile("shapes-heldout")[:192]
    single = [row for row in held_out if row[1]["kind"] == "single"][:4]
    several = [row for row in held_out if row[1]["kind"] != "single"][:4]
    return [*single, *several, *PromptFile("shapes-unseen")[:4]]


def _draw(policy: DiffusionPolicy, steps: int, guidance: float) -> Tensor:
    """Return uint8 images [12, H, W, 3] of the drawn prompts."""
    prompts = [text for text, _ in _drawn_prompts()]
    return uint8_images(_sample(policy, prompts, list(range(len(prompts))), steps, guidance))


if __name__ == "__main__":
    auto_cli(checkpoints, as_positional=False)
