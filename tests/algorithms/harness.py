"""Short runs of an alignment method on tiny policies."""

import warnings

from lightning.pytorch import Trainer

from lit_align.algorithms import DDPO
from lit_align.data.prompts import PromptLoader
from lit_align.rewards import Colorfulness, ShapesVerifier
from tests.conftest import tiny_policy

PROMPTS = [
    "a red circle",
    "a blue square",
    "a triangle",
    "two circles",
    "a green square",
    "a circle and a square",
    "three red squares",
    "a small circle",
]


def make_ddpo(family="sd", train="lora", reward=None, policy_options=None, **options):
    defaults = {
        "num_inference_steps": 3,
        "guidance_scale": 1.0,
        "prompts_per_round": 4,
        "samples_per_prompt": 2,
        "rollout_batch_size": 8,
        "minibatch_size": 8,
        "clip_range": 1e-3,
        "advantage_norm": "batch",
        "lr": 1e-2,
    }
    policy = tiny_policy(family, train=train, **(policy_options or {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        return DDPO(
            policy,
            reward or Colorfulness(),
            {"gold": ShapesVerifier()},
            **{**defaults, **options},
        )


def make_trainer(**options):
    return Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )


def prompt_loader(**options):
    return PromptLoader([(p, None) for p in PROMPTS], 4, **{"shuffle": True, **options})


def fit(module, val=False, **options):
    trainer = make_trainer(**options)
    loader = prompt_loader(shuffle=False) if val else None
    trainer.fit(module, module.experience(prompt_loader()), loader)
    return trainer
