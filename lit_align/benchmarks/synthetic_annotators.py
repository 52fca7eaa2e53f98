"""Annotators of the shapes world with a known utility: `python -m ...synthetic_annotators`.

Each prompt gets two rendered pictures, each with equal chances of its own caption or of another's.
An annotator's utility is the gold verifier's score plus a taste for colour, each standardised over
the pool:

    u = z(ShapesVerifier) + taste z(Colorfulness)

With logistic noise e of scale `temperature` T the annotator prefers the first of two images if
u_1 - u_2 + e > tau, the second if it is < -tau, and calls the rest a tie. For tau = 0 these are
Bradley-Terry labels, P(1) = sigmoid((u_1 - u_2) / T); for tau > 0 they follow Bradley-Terry with
ties, theta = exp(tau / T).

Run as a program it writes a folder of preferences that `PreferenceDataModule` reads.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor

from lit_align.data.preference_records import append_record, pair_record
from lit_align.functional.noise import keyed_generator
from lit_align.rewards import Colorfulness, ShapesVerifier
from lit_align.rewards.base import quantize, uint8_images
from lit_align.shapes import grammar, renderer
from lit_align.shapes.scene import Facts


@dataclass(frozen=True)
class Pool:
    """N prompts with K pictures each.

    Attributes:
        images: [N, K, 3, H, W] uint8.
        prompts: N captions.
        gold: [N, K] float32, the verifier's scores.
        color: [N, K] float32, colourfulness.
    """

    images: Tensor
    prompts: list[str]
    gold: Tensor
    color: Tensor

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    def utilities(self, taste: float, like: Pool | None = None) -> Tensor:
        """Return the annotators' utilities [N, K].

        Args:
            taste: Weight of the taste for colour.
            like: The pool whose means and spreads standardise; by default this one.
        """
        like = like or self
        gold = (self.gold - like.gold.mean()) / like.gold.std()
        return gold + taste * (self.color - like.color.mean()) / like.color.std()


def draw_pool(count: int, split: str, seed: int, cache: str | Path | None = None) -> Pool:
    """Render a pool of pairs of pictures.

    Args:
        count: Prompts N, at least 1.
        split: Of the captions: "train", "heldout" or "unseen".
        seed: Decides captions and pictures.
        cache: A folder that keeps the pool, and gives it back the next time.
    """
    path = Path(cache or ".") / f"{split}-{count}-seed{seed}.pt"
    if cache and path.is_file():
        return Pool(**torch.load(path, weights_only=True))
    rng = random.Random(f"{split} {seed}")
    facts: list[Facts] = []
    while len(facts) < count:
        drawn = grammar.sample_facts(rng)
        if grammar.split_of(drawn) == split:
            facts.append(drawn)
    shown = [own if rng.random() < 0.5 else rng.choice(facts) for own in facts for _ in range(2)]
    images = quantize(renderer.render([renderer.sample_scene(f, rng) for f in shown]))
    prompts = [grammar.caption(own) for own in facts]
    repeated = [prompt for prompt in prompts for _ in range(2)]
    gold, color = ShapesVerifier()(images, repeated), Colorfulness()(images, repeated)
    pixels = uint8_images(images).permute(0, 3, 1, 2).unflatten(0, (count, 2))
    pool = Pool(pixels, prompts, gold.view(count, 2), color.view(count, 2))
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(pool), path)
    return pool


def outcome_probabilities(delta: Tensor, temperature: float, indifference: float = 0.0) -> Tensor:
    """Return the probabilities [N, 3] that the first wins, of a tie, and that the second wins.

    Args:
        delta: Differences of utility [N], first minus second.
        temperature: T, positive: the scale of the logistic noise.
        indifference: tau, not negative.
    """
    win = ((delta - indifference) / temperature).sigmoid()
    loss = ((-delta - indifference) / temperature).sigmoid()
    return torch.stack([win, (1 - win - loss).clamp(min=0), loss], dim=-1)


def indifference_for(share: float, delta: Tensor, temperature: float) -> float:
    """Return the threshold tau at which a `share` of the judgements are ties, by bisection.

    Args:
        share: In [0, 1).
        delta: Differences of utility [N].
        temperature: T, positive.
    """
    low, high = 0.0, float(delta.abs().max()) + 50 * temperature
    for _ in range(60):
        middle = (low + high) / 2
        ties = outcome_probabilities(delta.double(), temperature, middle)[:, 1].mean()
        low, high = (middle, high) if ties < share else (low, middle)
    return (low + high) / 2 if share > 0 else 0.0


def judge(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Return labels [N]: 1 where the first image won, 1/2 for a tie, 0 where the second won.

    Args:
        probabilities: Of the outcomes [N, 3].
        generator: Decides the noise.
    """
    drawn = torch.multinomial(probabilities.float(), 1, generator=generator).flatten()
    return 1 - drawn.float() / 2


def noise_ceiling(delta: Tensor, temperature: float) -> float:
    """Return how often a label agrees with the truly better image, without ties, in [1/2, 1]."""
    return float((delta.double().abs() / temperature).sigmoid().mean())


def write_preferences(
    output: str,
    pairs: int = 2000,
    val_pairs: int = 400,
    temperature: float = 1.0,
    taste: float = 0.25,
    tie_share: float = 0.25,
    seed: int = 0,
) -> None:
    """Write `train.jsonl` and `val.jsonl` (schema lit_align/pref/1) and their images.

    Args:
        output: Folder.
        pairs: Judgements to train on, of the captions of the training split.
        val_pairs: Judgements to validate on, of held-out captions.
        temperature: T of the annotators' noise, in standard deviations of the verifier.
        taste: Weight of their taste for colour.
        tie_share: Of the judgements, in [0, 1).
        seed: Decides images and noise.
    """
    train = draw_pool(pairs, "train", seed)
    for name, pool in (("train", train), ("val", draw_pool(val_pairs, "heldout", seed))):
        utilities = pool.utilities(taste, train)
        delta = utilities[:, 0] - utilities[:, 1]
        tau = indifference_for(tie_share, delta, temperature)
        chances = outcome_probabilities(delta, temperature, tau)
        labels = judge(chances, keyed_generator("labels", name, seed))
        _write(Path(output), name, pool, labels, seed)
    print(f"Wrote {output}/")


def _write(folder: Path, name: str, pool: Pool, labels: Tensor, seed: int) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (prompt, label) in enumerate(zip(pool.prompts, labels.tolist(), strict=True)):
        items = []
        for k, pixels in enumerate(pool.images[number].permute(0, 2, 3, 1)):
            path = f"{name}/{number:05d}_{k}.png"
            Image.fromarray(pixels.numpy()).save(folder / path)
            scores = {"verifier": round(float(pool.gold[number, k]), 4)}
            items.append({"uid": f"{name}-{number}-{k}", "path": path, "scores": scores})
        record = pair_record(
            id=f"{name}-{number:05d}",
            prompt=prompt,
            items=items,
            label=[label, 1 - label],
            annotator=f"synthetic-{seed}",
        )
        append_record(folder / f"{name}.jsonl", record)


if __name__ == "__main__":
    auto_cli(write_preferences, as_positional=False)
