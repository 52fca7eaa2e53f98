"""How good the shipped pipelines are: `python -m lit_align.benchmarks.base_quality`.

Scores the held-out captions by the gold verifier, by kind of caption and number of steps, and
draws a grid of samples.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from lit_align.callbacks.sample_gallery import draw_rows
from lit_align.data.prompts import PromptFile
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import ShapesVerifier
from lit_align.rewards.base import uint8_images
from lit_align.shapes.scene import KINDS
from lit_align.verbs import sample_images

_BATCH = 100


def base_quality(
    pipelines: list[str] | None = None,
    steps: list[int] | None = None,
    captions: int = 600,
    guidance_scale: float = 3.0,
    output: str | None = None,
) -> None:
    """Print a table per pipeline and write `<pipeline>.png`.

    Args:
        pipelines: Names or folders; by default the shipped ones.
        steps: Numbers of denoising steps; by default 3, 4, 5, 6, 8, 10, 20, 50.
        captions: The first so many held-out captions, at most 600.
        guidance_scale: Weight of guidance.
        output: Folder for the pictures; none if None.
    """
    rows = PromptFile("shapes-heldout")[:captions]
    kinds = [metadata["kind"] for _, metadata in rows]
    for name in pipelines or ["shapes-sd", "shapes-sd3"]:
        policy = DiffusionPolicy.from_pretrained(name, train="none")
        print(f"\n{name}, guidance {guidance_scale}, {len(rows)} held-out captions\n")
        print(f"| steps | all | {' | '.join(KINDS)} | compositions |")
        print("|---" * (len(KINDS) + 3) + "|")
        for number in steps or [3, 4, 5, 6, 8, 10, 20, 50]:
            images, scores = score(policy, rows, number, guidance_scale)
            paired = list(zip(scores, kinds, strict=True))
            columns = [scores, *([s for s, own in paired if own == kind] for kind in KINDS)]
            columns.append([s for s, own in paired if own != "single"])
            means = " | ".join(f"{statistics.mean(c):.3f}" if c else "-" for c in columns)
            print(f"| {number} | {means} |", flush=True)
            if output and number == 20:
                _draw(Path(output, f"{Path(name).name}.png"), images, rows, kinds)


def score(
    policy: DiffusionPolicy, rows: list[tuple[str, dict[str, object]]], steps: int, guidance: float
) -> tuple[Tensor, list[float]]:
    """Return one image [N, 3, H, W] per prompt, image i from seed i, and the verifier's scores."""
    reward = ShapesVerifier()
    images: list[Tensor] = []
    scores: list[float] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        prompts = [text for text, _ in part]
        seeds = list(range(start, start + len(part)))
        drawn = sample_images(policy, prompts, seeds, steps, guidance)
        images.append(drawn)
        scores += reward(drawn, prompts, [metadata for _, metadata in part]).tolist()
    return torch.cat(images), scores


def _draw(path: Path, images: Tensor, rows: list[tuple[str, object]], kinds: list[str]) -> None:
    """Draw the first eight samples of each kind of caption."""
    pixels = uint8_images(images)
    for kind in KINDS:
        chosen = [i for i, own in enumerate(kinds) if own == kind][:8]
        if chosen:
            figure = draw_rows({kind: pixels[chosen]}, [rows[i][0] for i in chosen])
            figure.savefig(path.with_name(f"{path.stem}_{kind}.png"))


if __name__ == "__main__":
    auto_cli(base_quality, as_positional=False)
