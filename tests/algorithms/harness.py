"""Short runs of an alignment method on tiny policies."""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import nn

from lit_align.algorithms import (
    AWM,
    CRD,
    D3PO,
    DDPO,
    DGPO,
    TDPO,
    TPDM,
    AdjointMatching,
    AlignProp,
    DiffusionNFT,
    DRaFT,
    DRTune,
    FlowGRPO,
    LargeScaleRL,
    NablaGFlowNet,
    OnlineDPO,
    ReFL,
    Task,
)
from lit_align.data.image_text import PairStream, ShapesPairs
from lit_align.data.prompts import PromptLoader
from lit_align.policies.heads import TemporalCritic
from lit_align.rewards import Colorfulness, JPEGCompressibility, ShapesVerifier
from lit_align.schedulers import StochasticFlowMatch
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


SIZES = {
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "prompts_per_round": 4,
    "samples_per_prompt": 2,
    "minibatch_size": 8,
    "lr": 1e-2,
}
GRADIENT = {**SIZES, "minibatch_size": 4}
ONLINE = {**SIZES, "rollout_batch_size": 8}
POLICY_GRADIENT = {**ONLINE, "clip_range": 1e-3, "advantage_norm": "batch"}


def make_ddpo(family="sd", train="lora", reward=None, policy_options=None, **options):
    policy = tiny_policy(family, train=train, **(policy_options or {}))
    return _make(DDPO, policy, reward or Colorfulness(), POLICY_GRADIENT, **options)


class TinyTower(nn.Module):
    """Embeds images by a random projection."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.projection = nn.Parameter(torch.randn(3 * 32 * 32, 8, generator=generator))

    def embed_images(self, images):
        return F.normalize(images.flatten(1) @ self.projection)


def tiny_critic():
    return TemporalCritic(TinyTower(), hidden=(16, 8), dropout=(0.2,))


def make_tdpo(family="sd", train="lora", reward=None, policy_options=None, **options):
    policy = tiny_policy(family, train=train, **(policy_options or {}))
    options = {"critic": tiny_critic(), "lr_critic": 1e-2, "minibatch_size": 4, **options}
    return _make(TDPO, policy, reward or Colorfulness(), POLICY_GRADIENT, **options)


def make_large_scale_rl(family="sd", train="lora", reward=None, policy_options=None, **options):
    """Two tasks of 8 images, of 4 prompts and of 2, and then 4 pairs; `reward` is the first's."""
    policy = tiny_policy(family, train=train, **(policy_options or {}))
    tasks = {
        "color": Task(reward or Colorfulness()),
        "size": Task(JPEGCompressibility(), prompts_per_round=2, samples_per_prompt=4),
    }
    sizes = {"timestep_fraction": 0.7, "minibatch_size": 4, "pretraining_batch_size": 4}
    options = {"tasks": tasks, **sizes, **options}
    return _make(LargeScaleRL, policy, None, POLICY_GRADIENT, **options)


def _make(method, policy, reward, defaults, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        return method(policy, reward, {"gold": ShapesVerifier()}, **{**defaults, **options})


def maker(method, defaults, memoryless=False):
    """Return a function that makes a method with these options."""

    def make(family="sd", train="lora", reward=None, policy_options=None, **options):
        chosen = {**(policy_options or {})}
        if memoryless and family != "sd":
            chosen.setdefault("scheduler", partial(StochasticFlowMatch, kind="memoryless"))
        policy = tiny_policy(family, train=train, **chosen)
        return _make(method, policy, reward or Colorfulness(), defaults, **options)

    return make


def make_tpdm(family="sd", train="none", reward=None, policy_options=None, **options):
    """The policy stays as it is, whatever `train` says; all images take all steps."""
    policy = tiny_policy(family, train="none", **(policy_options or {}))
    options = {"head_width": 8, "num_inner_epochs": 2, **options}
    return _make(TPDM, policy, reward or Colorfulness(), ONLINE, **options)


METHODS = {
    "DDPO": make_ddpo,
    "FlowGRPO": maker(FlowGRPO, POLICY_GRADIENT),
    "TDPO": make_tdpo,
    "LargeScaleRL": make_large_scale_rl,
    "ReFL": maker(ReFL, {**GRADIENT, "min_step": 1, "max_step": 1, "loss_scale": 1.0}),
    "DRaFT": maker(DRaFT, {**GRADIENT, "num_lv_samples": 1}),
    "AlignProp": maker(AlignProp, {**GRADIENT, "truncation": "uniform", "loss_scale": 1.0}),
    "DRTune": maker(DRTune, {**GRADIENT, "truncation_steps": 1, "beta": 0.1}),
    "NablaGFlowNet": maker(
        NablaGFlowNet,
        {**ONLINE, "minibatch_size": 4, "timestep_fraction": 0.4, "loss_weighting": "variance"},
        memoryless=True,
    ),
    "AdjointMatching": maker(AdjointMatching, {**ONLINE, "late_steps": 1}, memoryless=True),
    "TPDM": make_tpdm,
    "DiffusionNFT": maker(DiffusionNFT, ONLINE),
    "AWM": maker(
        AWM, {**ONLINE, "minibatch_size": 4, "trained_times": 1, "timestep_fraction": 1.0}
    ),
    "CRD": maker(CRD, ONLINE),
    "D3PO": maker(D3PO, ONLINE),
    "OnlineDPO": maker(OnlineDPO, {**ONLINE, "timestep_fraction": 0.7, "beta": 50.0}),
    "DGPO": maker(DGPO, {**ONLINE, "trained_times": 2, "timestep_fraction": 1.0}),
}


def make_method(name, family="sd", train="lora", **options):
    return METHODS[name](family, train, **options)


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


def prompt_loader(prompts=PROMPTS, **options):
    return PromptLoader([(p, None) for p in prompts], 4, **{"shuffle": True, **options})


def experience_of(module, rank=0, world_size=1):
    """Return the training loader of a method: over prompts, or those of its tasks, and pairs."""
    dealt = {"rank": rank, "world_size": world_size}
    tasks = getattr(module, "tasks", {})
    loaders = {
        task: prompt_loader(PROMPTS[number:], **dealt) for number, task in enumerate(tasks)
    } or prompt_loader(**dealt)
    if getattr(module, "pretraining", "none") == "none":
        return module.experience(loaders)
    return module.experience(loaders, PairStream(ShapesPairs(size=16, seed=0), 0, **dealt))


def fit(module, val=False, resume=None, **options):
    trainer = make_trainer(**options)
    loader = prompt_loader(shuffle=False) if val else None
    trainer.fit(module, experience_of(module), loader, ckpt_path=resume, weights_only=True)
    return trainer


class Recorder(Callback):
    """Keeps what each training step logged, and every gradient before the optimiser steps."""

    def __init__(self):
        self.metrics, self.gradients = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        )


def weights(module, trainable):
    return {n: p.clone() for n, p in module.named_parameters() if p.requires_grad == trainable}
