"""How well the shapes world's judges and VAE work: `python -m lit_align.benchmarks.judge_quality`.

On rendered pairs of held-out captions: what the verifier and ShapesCLIP give a picture with its own
caption and with another's, and what the verifier gives the VAE's reconstructions.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli
from torch.utils.data import default_collate

from lit_align.data.image_text import ShapesPairs
from lit_align.policies import DiffusionPolicy
from lit_align.rewards import ShapesCLIP, ShapesVerifier

_RIVALS = 100


@torch.no_grad()
def judge_quality(pairs: int = 1000, seed: int = 777) -> None:
    """Print the figures of configs/pretraining.

    Args:
        pairs: Rendered pairs, a multiple of 100.
        seed: Decides captions and pictures.
    """
    drawn = ShapesPairs(pairs, seed, ("heldout",))
    batch = default_collate([drawn[i] for i in range(pairs)])
    images, prompts = batch["image"], batch["prompt"]
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [prompts[i] for i in order]
    verifier, clip = ShapesVerifier(), ShapesCLIP()
    for name, judge in {"verifier": verifier, "ShapesCLIP": clip}.items():
        own, other = judge(images, prompts), judge(images, shuffled)
        print(f"{name}: own caption {own.mean():.4f}, shuffled {other.mean():.4f}")
    different = torch.tensor([a != b for a, b in zip(prompts, shuffled, strict=True)])
    wins = (own > other)[different].float().mean()  # of ShapesCLIP, the last judge
    print(f"ShapesCLIP prefers the own caption to a different one: {wins:.3f}")
    cosines = clip.embed_images(images) @ clip.embed_text(prompts).T
    best = [int(cosines[i, i // _RIVALS * _RIVALS :][:_RIVALS].argmax()) for i in range(pairs)]
    found = [prompts[i // _RIVALS * _RIVALS + k] == prompts[i] for i, k in enumerate(best)]
    print(f"ShapesCLIP finds it among {_RIVALS}: {sum(found) / pairs:.3f}")
    policy = DiffusionPolicy.from_pretrained("shapes-sd", train="none")
    rebuilt = policy.decode(policy.encode(images))
    print(f"verifier on the VAE's reconstructions: {verifier(rebuilt, prompts).mean():.4f}")


if __name__ == "__main__":
    auto_cli(judge_quality, as_positional=False)
