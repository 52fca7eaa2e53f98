"""Linear-Gaussian chains: a model that knows its Gaussian data, and the tilt in closed form.

States are x = signal x0 + noise e, and the data x0 ~ N(MEAN, VARIANCE) in every element. With
exact posterior means, and w = (signal / signal') noise'^2 / noise, a memoryless (ancestral) step is

    mean = signal' E[x0 | x] + w E[e | x]        std^2 = noise'^2 - w^2

which is linear in x. For the reward r = c x_T, log E[exp(beta r) | x_i] = beta c P_i x + const with
P_i the product of the slopes from step i on, so the chain of p(x_T) exp(beta r) has all its means
shifted by std_i^2 beta c P_{i+1}, and its other moments unchanged.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from lit_align.policies.base import DiffusionPolicy
from lit_align.rewards.base import RewardModule
from lit_align.schedulers import StochasticDDIM, StochasticFlowMatch
from lit_align.trajectory import PromptBatch
from tests.schedulers.test_ddim import SD_SCHEDULE

MEAN, VARIANCE = 0.7, 0.25
SHAPE = (3, 1, 1)
# Reward gradients are float32 by contract: what must vanish does so to a part in 2^24 of the
# slope, and its square to a part in 2^48.
ROUNDING = 2.0**-22


class Chain:
    """``x' = slope x + offset + response shift + std z`` for a shift of the network's output.

    Attributes:
        signal, noise: Of each state [T + 1].
        ahead: P of each state [T + 1].
        clean_slope: d E[x0 | x] / d x of each state [T + 1].
        last: The last state that has a density: its flow is the reward of what follows.
    """

    def __init__(self, signal, noise, predicts_noise):
        self.signal, self.noise = signal, noise
        spread = signal**2 * VARIANCE + noise**2
        self.clean_slope = signal * VARIANCE / spread
        s, n, next_s, next_n = signal[:-1], noise[:-1], signal[1:], noise[1:]
        kept = s / next_s * next_n**2 / n
        to_clean, to_noise = self.clean_slope[:-1], n / spread[:-1]
        self.slope = next_s * to_clean + kept * to_noise
        self.offset = MEAN * (next_s * (1 - to_clean * s) - kept * to_noise * s)
        # Noise prediction: x0 = (x - n out) / s. Velocity: x0 = x - n out, e = x + s out.
        self.response = kept - next_s * n / s if predicts_noise else kept * s - next_s * n
        self.std = (next_n**2 - kept**2).sqrt()
        self.ahead = torch.cat([self.slope, torch.ones(1).double()]).flip(0).cumprod(0).flip(0)
        self.steps = len(self.slope)
        self.last = self.steps if predicts_noise else self.steps - 1
        self.noisy = torch.arange(self.last)

    def tilt(self, scale, flow=None):
        """Return the shifts [T] of the network's output at the optimum for beta c = `scale`."""
        flow = scale * self.ahead[1:] if flow is None else flow
        return self.std**2 * flow / self.response

    def terminal(self, shift):
        """Return mean and variance of the last state."""
        mean, variance = 0.0, 1.0
        for i in range(self.steps):
            mean = self.slope[i] * mean + self.offset[i] + self.response[i] * shift[i]
            variance = self.slope[i] ** 2 * variance + self.std[i] ** 2
        return float(mean), float(variance)

    def gamma(self, mode):
        """Return the share of signal [T + 1] that the gradient at E[x0 | x] is multiplied by."""
        gamma = self.signal ** {"alpha_bar": 2, "sqrt": 1, "one": 0}[mode]
        return torch.cat([gamma[: self.last], torch.ones(self.steps + 1 - self.last)])

    def seen(self, mode):
        """Return gamma times the slope of the reward that a state sees [T + 1], for c = 1."""
        slope = self.clean_slope.clone()
        slope[self.steps] = 1  # the last state is scored as it is
        return self.gamma(mode) * slope


class Shifts(nn.Module):
    """What is learned: one number per step, added to the exact prediction; and a fixed slope."""

    def __init__(self, count):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self.slope = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)


class ChainPolicy(DiffusionPolicy):
    """The exact predictor of Gaussian data; latents are pixels."""

    image_size = SHAPE[1:]

    def __init__(self, kind, steps):
        nn.Module.__init__(self)
        self.scheduler, signal, noise = SCHEDULES[kind](steps)
        self.chain = Chain(signal, noise, kind == "ddim")
        self.denoiser, self.kind = Shifts(steps), kind
        self.vae = nn.Linear(1, 1, bias=False).requires_grad_(False)
        self.vae.weight.fill_(1.0)
        self.train_mode, self.pretrained, self._reference = "full", "chain", None
        self.guidance_scales = []

    def set(self, shift):
        with torch.no_grad():
            self.denoiser.shift.copy_(torch.as_tensor(shift))

    def forward(self, latents, timesteps, conditioning):
        index = self.scheduler.index(timesteps)
        s, n, shift = (
            table[index].view(-1, 1, 1, 1)
            for table in (self.chain.signal, self.chain.noise, self.denoiser.shift)
        )
        shift = shift + self.denoiser.slope * latents
        scaled = (latents - s * MEAN) / (s**2 * VARIANCE + n**2)
        clean = MEAN + s * VARIANCE * scaled
        return n * scaled + shift if self.kind == "ddim" else n * scaled - clean + shift

    def predict(self, latents, timesteps, conditioning, guidance_scale, *, cfg_grad="both"):
        self.guidance_scales.append(guidance_scale)
        return self(latents, timesteps, conditioning)

    def encode_prompt(self, prompts):
        return {"prompt_embeds": torch.zeros(len(prompts), 1, 1)}

    def decode(self, latents, batch_size=None, clamp=True):
        return self.vae.weight * latents

    def latent_shape(self, height=None, width=None):
        return SHAPE

    def truncated(self, prompts):
        return [False] * len(prompts)


def ddim(steps):
    """Return Stable Diffusion's schedule at eta = 1 with tables in float64, and its levels."""
    scheduler = StochasticDDIM(DDIMScheduler(**SD_SCHEDULE))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = torch.from_numpy(np.cumprod(1 - betas))
    scheduler.scheduler.alphas_cumprod = abar
    scheduler.set_timesteps(steps)
    times = [*range(1, 1000, 1000 // steps)][::-1]
    assert scheduler.timesteps.tolist() == times
    levels = abar[[*times, 0]]
    return scheduler, levels.sqrt(), (1 - levels).sqrt()


def flow(steps):
    """Return the memoryless sampler of flow matching with tables in float64, and its levels."""
    scheduler = StochasticFlowMatch(FlowMatchEulerDiscreteScheduler(shift=3.0), "memoryless")
    scheduler.set_timesteps(steps)
    scheduler._sigmas = scheduler.sigmas.double()
    return scheduler, 1 - scheduler.sigmas, scheduler.sigmas


SCHEDULES = {"ddim": ddim, "flow": flow}


class Linear(RewardModule):
    """The prompt, a number, times the sum of the pixels."""

    differentiable = True
    needs_prompt = True

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images, prompts, metadata=None, group_ids=None):
        slopes = torch.tensor([float(prompt or 0) for prompt in prompts])
        return self.gain * slopes * images.sum(dim=(1, 2, 3))


class Table(nn.Module):
    """A correction of the flow that is one number per state."""

    def __init__(self, policy, values=0.0):
        super().__init__()
        times = policy.scheduler.timesteps
        self.times = torch.cat([times, torch.zeros_like(times[:1])])
        self.values = nn.Parameter(torch.zeros(len(self.times)).double() + torch.as_tensor(values))

    def forward(self, latents, timesteps, prompt_embeds):
        index = (timesteps[:, None] == self.times).int().argmax(dim=1)
        return self.values[index].view(-1, 1, 1, 1).expand_as(latents)


def attach(module):
    """Give a module what it needs of a trainer outside of `fit`."""
    plugin = SimpleNamespace(forward_context=nullcontext)
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=0, precision_plugin=plugin, progress_bar_callback=None
    )
    return module


def prompt_batch(prompts):
    ids = torch.arange(len(prompts))
    return PromptBatch(prompts, [None] * len(prompts), ids, ids, ids)


def all_steps(module, *prompts):
    """Sample, and return the noisy steps of all samples in order, [samples * steps] pairs."""
    trajectory = module.collect(prompt_batch(list(prompts)), 0)
    steps = module.policy.chain.noisy
    samples = torch.arange(len(prompts)).repeat_interleave(len(steps))
    return trajectory.transitions(samples, steps.repeat(len(prompts)))


def each(module, minibatch):
    """Return the loss of every pair on its own."""
    ones = torch.arange(len(minibatch)).split(1)
    return torch.stack([module.loss(minibatch.select(one))[0].detach() for one in ones])


def shift_gradient(module, minibatch):
    """Return d loss / d shift of every noisy step, for one pair of each: not their mean's."""
    module.zero_grad()
    loss, _ = module.loss(minibatch)
    loss.backward()
    return len(minibatch) * module.policy.denoiser.shift.grad[module.policy.chain.noisy]


def sampled_mean(module, count=2000):
    """Return the mean over fresh samples, with a standard error of 0.006."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    with torch.no_grad():
        trajectory = module.policy.sample(
            module.policy.encode_prompt(["1"] * count),
            num_inference_steps=module.num_inference_steps,
            guidance_scale=1.0,
            generator=generators,
        )
    return trajectory.latents[:, -1].mean().item()
