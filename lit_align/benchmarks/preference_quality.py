"""How imperfect the shipped preference model is: `python -m ...benchmarks.preference_quality`.

On pairs of rendered pictures of held-out captions, judged by the annotators it was trained on, and
on samples of a shipped pipeline, which it never saw.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lit_align.benchmarks.base_quality import score
from lit_align.benchmarks.reward_models import TASTE, TEMPERATURE, scores_of
from lit_align.benchmarks.synthetic_annotators import draw_pool, noise_ceiling
from lit_align.data.prompts import PromptFile
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import Colorfulness, LearnedReward, ShapesCLIP, ShapesPreference

_SEED = 777


@torch.no_grad()
def preference_quality(
    pretrained: str | None = None,
    pairs: int = 2000,
    pipeline: str = "shapes-sd",
    samples: int = 300,
    steps: int = 10,
    guidance_scale: float = 1.0,
) -> None:
    """Print the figures of configs/reward_modeling.

    Args:
        pretrained: Another model's folder or checkpoint; the shipped one if None.
        pairs: Of rendered pictures.
        pipeline: Whose samples are scored.
        samples: Number of them, one to a held-out caption, at most 600.
        steps: Denoising steps.
        guidance_scale: Weight of guidance.
    """
    reward = LearnedReward(pretrained=pretrained) if pretrained else ShapesPreference()
    pool = draw_pool(pairs, "heldout", _SEED)
    scores, utilities = scores_of(reward, pool), pool.utilities(TASTE)
    delta, truth = (values[:, 0] - values[:, 1] for values in (scores, utilities))
    agreed = ((truth * delta.sign()) / TEMPERATURE).sigmoid().mean()
    print(
        f"agreement with a judgement: {agreed:.3f}, ceiling {noise_ceiling(truth, TEMPERATURE):.3f}"
    )
    print(f"the truly better picture: {((delta > 0) == (truth > 0)).double().mean():.3f}")
    for name, other in {"the utility": utilities, "the verifier": pool.gold}.items():
        print(f"correlation with {name}: {correlation(scores.flatten(), other.flatten()):.3f}")
    rows = PromptFile("shapes-heldout")[:samples]
    policy = DiffusionPolicy.from_pretrained(pipeline, train="none")
    images, verified = score(policy, rows, steps, guidance_scale)
    prompts = [text for text, _ in rows]
    given = reward(images, prompts)
    print(f"{pipeline}, {steps} steps, guidance {guidance_scale}: mean {given.mean():.3f}")
    others = {"ShapesCLIP": ShapesCLIP(), "Colorfulness": Colorfulness()}
    found = {name: other(images, prompts) for name, other in others.items()}
    for name, values in {"the verifier": torch.tensor(verified), **found}.items():
        print(f"correlation with {name} on its samples: {correlation(given, values):.3f}")


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two lists of scores [N]."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


if __name__ == "__main__":
    auto_cli(preference_quality, as_positional=False)
