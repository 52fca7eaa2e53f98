"""Preferences told by a reward: AI feedback, and synthetic annotators whose taste is known.

Of two images with scores s_1 and s_2 an annotator of temperature T prefers the first with

    P(1 > 2) = sigmoid((s_1 - s_2) / T),

the model of Bradley and Terry, and at T = 0 always the better one. Several images are ranked by
s_k / T plus standard Gumbel noise, whose pairs have the same probabilities (Plackett-Luce). Scores
no more than `tie_threshold` apart are a tie.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

from lit_align.candidates import RECORDS, Candidates, Drawing, gather_candidates, images_key
from lit_align.data.preference_records import invalid_record, pair_record, ranking_record
from lit_align.functional.noise import keyed_generator
from lit_align.rewards import RewardModule, WeightedReward
from lit_align.rewards.scoring import call_reward
from lit_align.trajectory import PromptBatch


def label(
    reward: RewardModule,
    output: str = "preferences",
    unit: Literal["pairs", "rankings"] = "pairs",
    temperature: float = 0.0,
    tie_threshold: float = 0.0,
    annotator: str | None = None,
    seed: int = 42,
    batch_size: int = 64,
    **drawing: Unpack[Drawing],
) -> None:
    """Draw images of each prompt, and write which of them a reward prefers.

    `output` gets `images/`, `candidates.jsonl` and `preferences.jsonl`. A drawing that broke off is
    taken up where it stopped. Records whose images the reward could not score are kept as invalid.

    Args:
        reward: The judge. A WeightedReward that normalises takes mean and standard deviation of
            each term from these very images.
        output: Folder, without a `preferences.jsonl` yet.
        unit: "pairs" tells each two images of a prompt apart, "rankings" orders all of them.
        temperature: T, in units of the score, 0 or more.
        tie_threshold: Scores at most so far apart are a tie.
        annotator: Its name in the records; the reward's name if None.
        seed: Decides the images' noise and the annotator's choices.
        batch_size: Images drawn or scored at a time.
        drawing: Where the images come from.

    Raises:
        ValueError: If an argument is out of its range, or `output` has records already.
    """
    path = Path(output, RECORDS)
    if path.exists():
        raise ValueError(f"{str(path)!r} exists; give another `output`, or move the file away.")
    name = reward.name if annotator is None else annotator
    synthetic = SyntheticAnnotator(name, temperature, tie_threshold, seed)
    found = gather_candidates(Path(output), seed, batch_size, **drawing)
    totals = score_candidates(reward, found, Path(output), batch_size)
    records = [
        record
        for entry, scores in zip(found, totals, strict=True)
        for record in synthetic.judge(entry, scores, unit)
    ]
    _write(records, path)
    counts = Counter(_outcome(record) for record in records)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("decided", "tied", "invalid"))
    print(f"Wrote {path}: {len(records)} {unit}, of them {told}.")


@torch.no_grad()
def score_candidates(
    reward: RewardModule, found: list[Candidates], folder: Path, batch_size: int = 64
) -> list[list[float]]:
    """Score images, and keep every reward's scores in the items.

    Args:
        reward: The judge; of a WeightedReward every term is kept, and the sum.
        found: P prompts with their images.
        folder: What the images' paths are relative to.
        batch_size: Images at a time; those of one prompt stay together.

    Returns:
        P lists with a score per image; NaN where one could not be scored.
    """
    reward.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    terms = _terms(reward)
    step = max(1, batch_size // max(len(entry.items) for entry in found))
    batches = [
        _score(terms, found[start : start + step], folder, start)
        for start in range(0, len(found), step)
    ]
    scores = {name: torch.cat([batch[name] for batch in batches]) for name in terms}
    total = weighted_total(reward, scores)
    scores[reward.name] = total
    flat = [item for entry in found for item in entry.items]
    for i, item in enumerate(flat):
        known = {name: float(values[i]) for name, values in scores.items()}
        known = {name: value for name, value in known.items() if math.isfinite(value)}
        item["scores"] = {**item.get("scores", {}), **known}
    return [part.tolist() for part in total.split([len(entry.items) for entry in found])]


def _terms(reward: RewardModule) -> dict[str, RewardModule]:
    if not isinstance(reward, WeightedReward):
        return {reward.name: reward}
    terms = {name: term for name, term in reward.terms.items() if isinstance(term, RewardModule)}
    for name, term in terms.items():
        if isinstance(term, WeightedReward):
            raise ValueError(f"The term {name!r} is itself a WeightedReward; name its terms here.")
    return terms


def _score(
    terms: dict[str, RewardModule], found: list[Candidates], folder: Path, first: int
) -> dict[str, Tensor]:
    """Return the terms' scores [B] of all images of some prompts, the first of number `first`."""
    rows = [(n, entry, item) for n, entry in enumerate(found, first) for item in entry.items]
    images = [_pixels(folder / item["path"]) for _, _, item in rows]
    if len(sizes := {tuple(image.shape[1:]) for image in images}) > 1:
        raise ValueError(f"Images scored together must have one size, got {sorted(sizes)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = torch.tensor([number for number, _, _ in rows])
    batch = PromptBatch(
        [entry.prompt for _, entry, _ in rows],
        [entry.metadata for _, entry, _ in rows],
        numbers,
        numbers,
        numbers,
    ).to(device)
    stacked = torch.stack(images).to(device)
    return {name: call_reward(term, stacked, batch).cpu() for name, term in terms.items()}


def _pixels(path: Path) -> Tensor:
    """Return an image [3, H, W] in [0, 1] as its file holds it."""
    with Image.open(path) as image:
        return to_dtype(pil_to_tensor(image.convert("RGB")), torch.float32, scale=True)


def weighted_total(reward: RewardModule, scores: dict[str, Tensor]) -> Tensor:
    """Return the reward [N] float64 of its terms' scores, each [N].

    A WeightedReward's running statistics are those of these N images: there is no training here.
    """
    if not isinstance(reward, WeightedReward):
        return scores[reward.name].double()
    total = torch.zeros(len(next(iter(scores.values()))), dtype=torch.float64)
    for name, weight in reward.weights.items():
        values = scores[name].double()
        if reward.normalize == "running":
            known = values[~values.isnan()]
            std = known.std(correction=0) if len(known) > 1 else known.new_zeros(())
            values = (values - known.mean()) / (std if std > 0 else 1.0)
        total += weight * values
    return total


@dataclass(frozen=True)
class SyntheticAnnotator:
    """Judges by scores, with as much doubt as its temperature says.

    Attributes:
        name: In the records.
        temperature: T; 0 always prefers the better one.
        tie_threshold: Scores at most so far apart are a tie.
        seed: With name, prompt and images it decides the draws.

    Raises:
        ValueError: If temperature or threshold is negative.
    """

    name: str
    temperature: float = 0.0
    tie_threshold: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        """Check the ranges."""
        for option in ("temperature", "tie_threshold"):
            if not getattr(self, option) >= 0:  # nor NaN
                raise ValueError(f"`{option}` must be 0 or more, got {getattr(self, option)}.")

    def judge(
        self, entry: Candidates, scores: list[float], unit: Literal["pairs", "rankings"]
    ) -> list[dict[str, Any]]:
        """Return the records of one prompt's images.

        Args:
            entry: K images.
            scores: K scores.
            unit: "pairs" for K (K - 1) / 2 records, "rankings" for one.
        """
        everything = tuple(range(len(scores)))
        chosen = combinations(everything, 2) if unit == "pairs" else [everything]
        return [self._record(entry, scores, places, unit) for places in chosen]

    def _record(
        self, entry: Candidates, scores: list[float], places: tuple[int, ...], unit: str
    ) -> dict[str, Any]:
        items = [entry.items[place] for place in places]
        values = [scores[place] for place in places]
        key = images_key(items)
        common: dict[str, Any] = {
            "id": f"{self.name}:{key}",
            "prompt": entry.prompt,
            "items": items,
            "annotator": self.name,
            "metadata": {"prompt": entry.metadata} if entry.metadata else None,
        }
        if not all(math.isfinite(value) for value in values):
            return invalid_record(**common)
        generator = keyed_generator("label", self.seed, self.name, entry.prompt, key)
        if unit == "rankings":
            return ranking_record(rank=self.rank(values, generator), **common)
        told = self.prefer(values[0], values[1], generator)
        return pair_record(label=told, pair_id=key, **common)

    def prefer(self, first: float, second: float, generator: torch.Generator) -> list[float]:
        """Return the label of a pair: [1, 0], [0, 1], or [0.5, 0.5] for a tie."""
        gap = first - second
        if abs(gap) <= self.tie_threshold:
            return [0.5, 0.5]
        if self.temperature == 0:
            won = gap > 0
        else:
            logit = torch.tensor(gap / self.temperature, dtype=torch.float64)
            won = bool(torch.rand((), generator=generator, dtype=torch.float64) < logit.sigmoid())
        return [1.0, 0.0] if won else [0.0, 1.0]

    def rank(self, values: list[float], generator: torch.Generator) -> list[int]:
        """Return ranks from 1; who follows another within the tie threshold shares its rank."""
        keys = torch.tensor(values, dtype=torch.float64)
        if self.temperature > 0:
            uniform = torch.rand(len(values), generator=generator, dtype=torch.float64)
            keys = keys / self.temperature - (-uniform.log()).log()  # plus Gumbel noise
        order: list[int] = keys.argsort(descending=True, stable=True).tolist()
        ranks = [1] * len(values)
        for better, worse in pairwise(order):
            tied = abs(values[better] - values[worse]) <= self.tie_threshold
            ranks[worse] = ranks[better] + (not tied)
        return ranks


def _outcome(record: dict[str, Any]) -> str:
    if record["kind"] == "invalid":
        return "invalid"
    return "tied" if len(set(record.get("rank") or record["label"])) == 1 else "decided"


def _write(records: list[dict[str, Any]], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
