"""A float64 policy of a few weights, and the loops that its reward gradients are held against."""

import warnings

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from lit_align.functional.noise import randn, sample_generators
from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.trajectory import PromptBatch, PromptMinibatch
from tests.schedulers.test_ddim import make as make_ddim
from tests.schedulers.test_flow_match import make as make_flow

STEPS = 4
PROMPTS = ["a red circle", "two blue squares", "a tree", "seven green bees"]
SHAPE = (3, 2, 2)  # of the latents and of the images
SIZE = 12
RANGE = 64  # of latents that are pixels in [0, 1]


class Network(nn.Module):
    """Two layers over latents, time and prompt."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE + 3, 6), nn.Tanh(), nn.Linear(6, SIZE)).double()

    def forward(self, latents, times, prompts):
        seen = torch.cat([latents.flatten(1).double(), times[:, None] / 1000, prompts], dim=1)
        return self.layers(seen).view_as(latents)


class BlindNetwork(nn.Module):
    """Affine in its weights, and the same for all latents."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, SIZE).double()

    def forward(self, latents, times, prompts):
        return self.layer(torch.cat([times[:, None] / 1000, prompts], dim=1)).view_as(latents)


class GradientPolicy(DiffusionPolicy):
    """Latents [3, 2, 2] in float64; pixel = latent / 64 + 1/2.

    `calls` counts the latents that the network saw, also when it ran again in backward.
    """

    def __init__(self, family, network=Network, steps=STEPS):
        nn.Module.__init__(self)
        self.denoiser = network()
        self.vae = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.vae.weight.copy_(torch.eye(3)[..., None, None] / RANGE)
        self.vae.bias.fill_(0.5)
        self.text_encoders = nn.ModuleList()
        self.scheduler = (make_ddim if family == "ddim" else make_flow)(steps=steps)
        corrupt = self.scheduler.corrupt
        self.scheduler.corrupt = lambda latents, noise, times: corrupt(
            latents, noise.to(latents), times.to(latents) if times.is_floating_point() else times
        )
        self.pretrained, self.train_mode, self._reference = "toy", "full", None
        self.calls = 0

    def forward(self, latents, timesteps, conditioning):
        self.calls += len(latents)
        return self.denoiser(latents, timesteps, conditioning["prompt"])

    def predict(self, latents, timesteps, conditioning, guidance_scale, *, cfg_grad="both"):
        conditional = self(latents, timesteps, conditioning)
        if guidance_scale == 1:
            return conditional
        nothing = {"prompt": conditioning["negative_prompt"]}
        unconditional = self(latents, timesteps, nothing)
        if cfg_grad == "cond_only":
            unconditional = unconditional.detach()
        return unconditional + guidance_scale * (conditional - unconditional)

    def encode_prompt(self, prompts):
        counts = [[p.count("e") / 4, p.count("r") / 4] for p in prompts]
        prompt = torch.tensor(counts, dtype=torch.float64)
        return {"prompt": prompt, "negative_prompt": torch.zeros_like(prompt)}

    def truncated(self, prompts):
        return [False] * len(prompts)

    def latent_shape(self, height=None, width=None):
        return SHAPE

    def _decode(self, latents):
        return self.vae(latents)

    def encode(self, images):
        return (images - 0.5) * RANGE


class Score(RewardModule):
    """A function of images and prompts, by default linear in the pixels."""

    differentiable = True

    def __init__(self, function=None):
        super().__init__()
        # Of few bits, so that float32 rounds none of their products with powers of two.
        self.weight = nn.Parameter(torch.arange(-6.0, SIZE - 6).view(SHAPE) / 8)
        self.function = function or (lambda images, prompts: (images * self.weight).sum((1, 2, 3)))

    def forward(self, images, prompts, metadata=None, group_ids=None):
        return self.function(images, prompts)


class OneProcess:
    """Stands in for a trainer."""

    world_size, global_rank, global_step = 1, 0, 0


def make(method, family="ddim", score=None, network=Network, steps=STEPS, **options):
    """Return a method on the toy: without guidance, noise, early stop and hinge by default."""
    own = {
        "ReFL": {"min_step": steps - 1, "max_step": steps - 1, "hinge_margin": None},
        "DRTune": {"early_stop_ratio": 0.0, "truncation_steps": 1},
        "AlignProp": {"truncation": "fixed", "truncation_steps": 1},
    }.get(method.__name__, {})
    common = {"num_inference_steps": steps, "guidance_scale": 1.0, "loss_scale": 1.0}
    quiet = {"stochastic_sampling": False, "prompts_per_round": 4}
    policy = GradientPolicy(family, network, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules passed as arguments, which is meant
        module = method(policy, Score(score), **{**common, **quiet, **own, **options})
    module._trainer = OneProcess()
    return module


def minibatch(prompts=PROMPTS, first=0, pairs=None):
    """Return the samples of these prompts, from place `first` of round 0 on."""
    numbers = torch.arange(len(prompts))
    batch = PromptBatch(list(prompts), [None] * len(prompts), numbers, numbers + first, numbers)
    return PromptMinibatch(batch, 0, pairs)


def curved(latents):
    """Return a smooth function [B] of latents, in float64, with no two derivatives alike."""
    weight = torch.linspace(-1, 1.5, SIZE, dtype=torch.float64).view(SHAPE)
    return (weight * latents + (latents / 2).sin()).flatten(1).sum(1)


def gradient(module, values):
    """Return the derivative of the sum of `values` by all weights of the network, flat."""
    weights = list(module.policy.denoiser.parameters())
    return parameters_to_vector(torch.autograd.grad(values.sum(), weights))


def drawn_gradient(module, objective=curved, samples=None):
    """Return the derivative of the mean objective of what the method draws."""
    drawn = module.draw(samples or minibatch())
    return gradient(module, torch.stack([objective(x).sum() for x in drawn.latents]).mean())


def loss_gradient(module, samples=None):
    """Return the derivative of the method's loss."""
    loss, _ = module.loss(samples or minibatch())
    return gradient(module, loss)


def plain_loop(module, steps, see_through=True, total=None, cfg_grad="both"):
    """Sample with an ordinary graph.

    Args:
        module: A method.
        steps: Those whose network output keeps its gradient.
        see_through: Let gradient flow into the network's input.
        total: Stop after so many steps.
        cfg_grad: As of `DiffusionPolicy.predict`.

    Returns:
        The last state, the clean latents predicted last, and all inputs of the network.
    """
    policy, scheduler = module.policy, module.policy.scheduler
    generators = sample_generators("rollout", module.seed, 0, range(len(PROMPTS)))
    conditioning = policy.encode_prompt(PROMPTS)
    x, states = randn(SHAPE, generators), []
    noisy = scheduler.density_steps if module.stochastic_sampling else ()
    for index, time in enumerate(scheduler.timesteps[:total]):
        times = time.expand(len(PROMPTS))
        states.append(x.detach())
        seen = x if see_through else x.detach()
        output = policy.predict(seen, times, conditioning, module.guidance_scale, cfg_grad=cfg_grad)
        if index not in steps:
            output = output.detach()
        step = scheduler.step(output, times, x, generator=generators if index in noisy else None)
        x = step.next_latents
    return x, step.pred_original, states


def coefficients(policy, index):
    """Return a and b of the deterministic step ``x' = a x + b out``, which is linear in both."""
    times = policy.scheduler.timesteps[index : index + 1]
    zero = torch.zeros(1, dtype=torch.float64)
    a = policy.scheduler.step(zero, times, zero + 1).next_latents
    b = policy.scheduler.step(zero + 1, times, zero).next_latents
    return a.item(), b.item()
