"""A one-dimensional policy whose gradients are known in closed form."""

import numpy as np
import torch
from torch import nn

from lit_align.policies.base import DiffusionPolicy
from lit_align.trajectory import Transition
from tests.schedulers.test_ddim import toy_scheduler


class Constant(nn.Module):
    """A denoiser that predicts theta, whatever it sees."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))


class ToyPolicy(DiffusionPolicy):
    """x_T ~ N(0, 1), three DDIM steps (667, 334, 1) at eta = 1, constant noise prediction."""

    def __init__(self, theta):
        nn.Module.__init__(self)
        self.denoiser = Constant(theta)
        self.scheduler = toy_scheduler()
        self.train_mode = "full"
        self._reference = None

    def forward(self, latents, timesteps, conditioning):
        return self.denoiser.theta.expand_as(latents)

    def predict(self, latents, timesteps, conditioning, guidance_scale, *, cfg_grad="both"):
        return self(latents, timesteps, conditioning)

    def encode_prompt(self, prompts):
        return {}


def quadrature_paths(policy, points=4):
    """Return latents [N, 4, 1] of all nodes of the tensor Gauss-Hermite rule, and weights [N].

    The rule integrates polynomials up to degree 2 * points - 1 in each of the four independent
    normals (x_T and the noise of three steps) exactly.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    grid = torch.from_numpy(np.stack(np.meshgrid(*[nodes] * 4, indexing="ij"), -1)).reshape(-1, 4)
    weight = torch.from_numpy(weights / weights.sum())
    mesh = torch.stack(torch.meshgrid(*[weight] * 4, indexing="ij"), -1).reshape(-1, 4).prod(dim=1)
    path = [grid[:, :1]]
    with torch.no_grad():
        for k, timestep in enumerate(policy.scheduler.timesteps):
            x, times = path[-1], timestep.expand(len(grid))
            step = policy.scheduler.step(policy(x, times, {}), times, x, x)
            path.append(step.mean + step.std[:, None] * grid[:, k + 1, None])
    return torch.stack(path, dim=1), mesh


def quadrature_transitions(policy, reward):
    """Return all (node, step) pairs with advantages = rewards, weighted to average exactly.

    The mean over pairs of ``weights * f`` is then a third of the expected sum of f over steps.
    """
    latents, weight = quadrature_paths(policy)
    count, steps = len(latents), len(policy.scheduler.timesteps)
    flat = latents.double()
    current, following = flat[:, :-1].reshape(-1, 1), flat[:, 1:].reshape(-1, 1)
    timesteps = policy.scheduler.timesteps.repeat(count)
    with torch.no_grad():
        old = policy.scheduler.step(
            policy(current, timesteps, {}), timesteps, current, following
        ).log_prob
    return Transition(
        latents=current,
        next_latents=following,
        timesteps=timesteps,
        old_log_prob=old,
        advantages=reward(latents[:, -1, 0]).repeat_interleave(steps),
        weights=weight.repeat_interleave(steps) * count,
        conditioning={},
        guidance_scale=1.0,
        num_inference_steps=steps,
    )
