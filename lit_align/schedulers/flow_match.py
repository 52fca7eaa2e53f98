"""Flow-matching samplers as Gaussian policies.

With x_t = (1 - t) x0 + t eps, v = eps - x0, a step from t to t' (dt = t' - t < 0) and noise level
s, every SDE with the marginals of the ODE dx = v dt has the Euler-Maruyama step (Eq. (9) of
arXiv:2505.05470)

    mean = x (1 + s^2 dt / (2 t)) + v (1 + s^2 (1 - t) / (2 t)) dt        std = s sqrt(-dt)

    flow   s = a sqrt(t / (1 - t)); at t = 1 the next time stands for t in 1 - t
    dance  s = a                                                         arXiv:2505.07818
    cps    mean = x0 (1 - t') + eps t' cos(a pi / 2),  std = t' sin(a pi / 2)   arXiv:2509.05952
    memoryless  s = sqrt(2 t / (1 - t)), after which the clean latents do not depend on the initial
           noise (arXiv:2409.08861); by the ancestral step of DDIM with eta = 1, exact given x0,
           where Euler's first steps would double the variance:
           std^2 = (t' / t)^2 (t^2 - ((1 - t) / (1 - t'))^2 t'^2)
           mean = x0 (1 - t') + eps sqrt(t'^2 - std^2)
    ode    s = 0, no density

where a is `noise_level`. The last step (t' = 0) is deterministic and has no density: there the
noise of `flow` and `dance` would stay in the image, and `cps` has none.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_align.functional.choices import check_choice
from lit_align.functional.gaussian import at_least_float32, gaussian_log_prob, per_sample
from lit_align.schedulers.base import StochasticScheduler

FlowKind = Literal["flow", "dance", "cps", "memoryless", "ode"]
CPSLogProb = Literal["unnormalised", "gaussian"]


class StochasticFlowMatch(StochasticScheduler):
    """Stochastic Euler steps of a flow-matching model, with the log-density of each.

    Args:
        scheduler: diffusers' `FlowMatchEulerDiscreteScheduler`; its configuration decides the
            times (shift and their number).
        kind: "flow" (Flow-GRPO), "dance" (DanceGRPO), "cps" (coefficients-preserving),
            "memoryless" (Adjoint Matching), "ode".
        noise_level: The a above: 0.7 for "flow", 0.3 for "dance", 0.8 for "cps" in the papers;
            positive, and at most 1 for "cps". Unused by "memoryless" and "ode".
        cps_log_prob: "unnormalised" is ``-mean((x' - mean)^2)`` as in the official code,
            "gaussian" the density itself.

    Raises:
        ValueError: If a word is unknown or the noise level out of range.
    """

    is_flow: ClassVar[bool] = True

    def __init__(
        self,
        scheduler: Any,
        kind: FlowKind = "flow",
        noise_level: float = 0.7,
        cps_log_prob: CPSLogProb = "unnormalised",
    ) -> None:
        super().__init__()
        check_choice("kind", kind, FlowKind)
        check_choice("cps_log_prob", cps_log_prob, CPSLogProb)
        if noise_level < 0 or (kind == "cps" and noise_level > 1):
            raise ValueError(
                f"`noise_level` must be at least 0, and at most 1 for 'cps', got {noise_level}."
            )
        self.kind = kind
        self.noise_level = noise_level
        self.cps_log_prob = cps_log_prob
        self.scheduler = copy.deepcopy(scheduler)

    @property
    def sigmas(self) -> Tensor:
        """Times t [T + 1], from 1 down to 0."""
        return self._sigmas

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw times [count] in (0, 1000): the logistic of a standard normal (arXiv:2403.03206)."""
        steps: int = self.scheduler.config["num_train_timesteps"]
        normal = torch.randn(count, generator=generator, dtype=torch.float32)
        return normal.sigmoid() * steps

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(1 - t) x0 + t eps`` and the velocity ``eps - x0``; see the base class."""
        t = per_sample(self.noise_levels(timesteps), latents)
        return torch.lerp(latents, noise, t), noise - latents

    def noise_levels(self, timesteps: Tensor) -> Tensor:
        """Return t; see the base class."""
        steps: int = self.scheduler.config["num_train_timesteps"]
        return timesteps / steps

    def clean(self, model_output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return ``x - t v``; see the base class."""
        t = per_sample(self.noise_levels(timesteps), latents)
        return at_least_float32(latents) - t * at_least_float32(model_output)

    def network_times(self, levels: Tensor) -> Tensor:
        """Return 1000 t, where the level is t itself; see the base class."""
        steps: int = self.scheduler.config["num_train_timesteps"]
        return levels * steps

    def advance(
        self, model_output: Tensor, latents: Tensor, levels: Tensor, next_levels: Tensor
    ) -> Tensor:
        """Return ``x + (t' - t) v``; see the base class."""
        change = per_sample(next_levels - levels, latents)
        return at_least_float32(latents) + change * at_least_float32(model_output)

    @property
    def memoryless(self) -> bool:
        """See the base class."""
        return self.kind == "memoryless"

    def step_sizes(self, timesteps: Tensor) -> Tensor:
        """Return ``t - t'`` [B]; see the base class."""
        index = self.index(timesteps)
        return self._sigmas[index] - self._sigmas[index + 1]

    def gradient_weights(self, timesteps: Tensor) -> Tensor:
        """Return delta [B], for "dance" times ``1 + s^2 (1 - t) / (2 t)``; see the base class."""
        weights = super().gradient_weights(timesteps)
        if self.kind != "dance":
            return weights
        t = self._sigmas[self.index(timesteps)]
        return weights * (1 + self.noise_level**2 * (1 - t) / (2 * t))

    @property
    def signal_levels(self) -> Tensor:
        """``1 - t`` of each state; see the base class."""
        return 1 - self._sigmas

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        train_steps: int = self.scheduler.config["num_train_timesteps"]
        if not 1 <= num_inference_steps <= train_steps:
            raise ValueError(
                f"`num_inference_steps` must lie in [1, {train_steps}], got {num_inference_steps}."
            )
        self.scheduler.set_timesteps(num_inference_steps)
        self._sigmas: Tensor = self.scheduler.sigmas.float().to(device)
        self.timesteps = self.scheduler.timesteps.float().to(device)
        noisy = self.kind == "memoryless" or (self.kind != "ode" and self.noise_level > 0)
        self.density_steps = range(num_inference_steps - 1) if noisy else ()

    def _transition(
        self, model_output: Tensor, index: Tensor, latents: Tensor, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        now, following = self._sigmas[index], self._sigmas[index + 1]
        t, t_next = per_sample(now, latents), per_sample(following, latents)
        original = latents - t * model_output
        if deterministic or self.kind == "ode":
            return latents + (t_next - t) * model_output, torch.zeros_like(now), original
        if self.kind == "cps":
            angle = self.noise_level * math.pi / 2
            noise = latents + (1 - t) * model_output
            mean = original * (1 - t_next) + noise * t_next * math.cos(angle)
            return mean, following * math.sin(angle), original
        if self.kind == "memoryless":
            kept = (1 - now) / (1 - following) * following
            std = following / now * (now.square() - kept.square()).sqrt()
            noise = latents + (1 - t) * model_output
            towards = per_sample((following.square() - std.square()).clamp(min=0).sqrt(), latents)
            return original * (1 - t_next) + noise * towards, std, original
        level = self._level(now)
        drift = per_sample(level.square() / (2 * now), latents)
        dt = t_next - t
        mean = latents * (1 + drift * dt) + model_output * (1 + drift * (1 - t)) * dt
        return mean, level * (now - following).sqrt(), original

    def _level(self, t: Tensor) -> Tensor:
        """Return the diffusion coefficient s [B] at times t [B]."""
        if self.kind == "dance":
            return torch.full_like(t, self.noise_level)
        remaining = torch.where(t == 1, 1 - self._sigmas[1], 1 - t)
        return self.noise_level * (t / remaining).sqrt()

    def _log_prob(self, next_latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self.kind == "cps" and self.cps_log_prob == "unnormalised":
            return -(next_latents.detach() - mean).square().flatten(1).mean(1)
        return gaussian_log_prob(next_latents, mean, std)
