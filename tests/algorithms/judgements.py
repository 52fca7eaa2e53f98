"""Judged images for tests, and short runs on them."""

import warnings

import torch
from lightning.pytorch import Trainer

from lit_align.algorithms import DiffusionDPO
from lit_align.rewards import CLIPRewardTower, LearnedReward, ShapesVerifier
from lit_align.rewards.shapes_clip import build_shapes_clip
from lit_align.trajectory import PreferenceBatch
from tests.conftest import tiny_policy

PROMPTS = ["a red circle", "a blue square", "a triangle", "two circles"]


def judgements(count=4, places=2, lap=0, label=None, images=None):
    """Return `count` judgements of `places` images each, pairs unless `label` says otherwise."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(count, places, 3, 32, 32, generator=generator) if images is None else images
    label = [1.0, 0.0] if label is None else label
    return PreferenceBatch(
        images=images,
        prompts=[PROMPTS[i % len(PROMPTS)] for i in range(count)],
        labels=torch.tensor([label] * count),
        weights=torch.ones(count),
        positions=torch.arange(count) + lap * count,
        record_ids=torch.arange(count),
    )


class Judgements:
    """A loader that yields the same judgements again and again."""

    def __init__(self, laps=2, held_out=None, rank=0, world_size=1, **options):
        self.laps, self.held_out, self.options = laps, held_out, options
        self.own = torch.arange(rank, 4, world_size)

    def __len__(self):
        return self.laps

    def __iter__(self):
        for lap in range(self.laps):
            yield judgements(lap=lap, **self.options).select(self.own)


def learned(head="cosine"):
    """Return a small reward model with random weights."""
    torch.manual_seed(1)
    encoder = build_shapes_clip(width=8, layers=1)
    return LearnedReward(CLIPRewardTower(model=encoder.model, tokenizer=encoder.tokenizer), head)


def make_dpo(family="sd", train="lora", method=DiffusionDPO, policy=None, **options):
    policy = policy or tiny_policy(family, train=train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        return method(
            policy, None, {"gold": ShapesVerifier()},
            **{"lr": 1e-2, "num_inference_steps": 3, "beta": 50.0, **options},
        )  # fmt: skip


def fit(module, loader=None, callbacks=(), **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    resume = options.pop("resume", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(callbacks=list(callbacks), **{**defaults, **options})
        trainer.fit(module, module.experience(loader or Judgements()), ckpt_path=resume)
    return trainer
