"""DDIM with noise level eta as a Gaussian policy, for epsilon-, v- and sample-prediction.

With abar the cumulative alphas, t the step's time and p the next one (arXiv:2010.02502,
Eq. (12) and (16)):

    epsilon:       x0 = (x - sqrt(1 - abar_t) m) / sqrt(abar_t)      e = m
    v_prediction:  x0 = sqrt(abar_t) x - sqrt(1 - abar_t) m          e = sqrt(abar_t) m + sqrt(1 - abar_t) x
    sample:        x0 = m                                            e = (x - sqrt(abar_t) x0) / sqrt(1 - abar_t)

    std  = eta sqrt((1 - abar_p) / (1 - abar_t) (1 - abar_t / abar_p))
    mean = sqrt(abar_p) x0 + sqrt(1 - abar_p - std^2) e

eta = 1 is ancestral (DDPM) sampling on the strided schedule. The last step goes to time 0 of the
table, never beyond it, so that its std stays positive.
"""  # noqa: E501 - the formulas read best in columns

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lit_align.functional.gaussian import at_least_float32, per_sample
from lit_align.schedulers.base import StochasticScheduler

# A transition narrower than this makes log-densities meaningless in float32.
_MIN_STD = 1e-4
_MIN_ABAR = 2.0**-24


class StochasticDDIM(StochasticScheduler):
    """DDIM(eta) with the log-density of each step.

    Args:
        scheduler: A diffusers scheduler of the DDPM family; its configuration decides the noise
            schedule, the prediction type and the spacing of the timesteps.
        eta: Noise level in [0, 1]; 0 leaves no density and serves for evaluation only.

    Raises:
        ValueError: If eta lies outside [0, 1], or the configuration clips or thresholds the
            clean sample, which latent models must not.
    """

    def __init__(self, scheduler: Any, eta: float = 1.0) -> None:
        super().__init__()
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1], got {eta}.")
        config = dict(scheduler.config)
        # Configurations of other classes often leave `clip_sample` out, and DDIM's default is True.
        config.setdefault("clip_sample", False)
        for option in ("clip_sample", "thresholding"):
            if config.get(option):
                raise ValueError(f"StochasticDDIM needs `{option}: false`: latents are unbounded.")
        if config.get("rescale_betas_zero_snr") and config["prediction_type"] == "epsilon":
            raise ValueError(
                "A schedule of zero terminal SNR needs `prediction_type: v_prediction`."
            )
        self.eta = eta
        self.scheduler = DDIMScheduler.from_config(config)
        self.prediction_type: str = self.scheduler.config["prediction_type"]

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw integer times [count], uniform over the training schedule."""
        steps: int = self.scheduler.config["num_train_timesteps"]
        return torch.randint(steps, (count,), generator=generator)

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``sqrt(abar) x0 + sqrt(1 - abar) eps`` and its target; see the base class."""
        noised = self.scheduler.add_noise(latents, noise, timesteps)
        if self.prediction_type == "epsilon":
            return noised, noise
        if self.prediction_type == "v_prediction":
            return noised, self.scheduler.get_velocity(latents, noise, timesteps)
        return noised, latents

    def noise_levels(self, timesteps: Tensor) -> Tensor:
        """Return ``sqrt(1 - abar)``; see the base class."""
        return (1 - self._abar_at(timesteps)).sqrt()

    def clean(self, model_output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return x0 of the table above; see the base class."""
        abar = per_sample(self._abar_at(timesteps), latents)
        output, latents = at_least_float32(model_output), at_least_float32(latents)
        return self._split(output, latents, abar, 1 - abar)[0]

    def _abar_at(self, timesteps: Tensor) -> Tensor:
        table: Tensor = self.scheduler.alphas_cumprod
        return table.to(timesteps.device)[timesteps]

    def network_times(self, levels: Tensor) -> Tensor:
        """Return k = 999 u for levels u, a real number; see the base class."""
        last = len(self.scheduler.alphas_cumprod) - 1
        return levels * last

    def advance(
        self, model_output: Tensor, latents: Tensor, levels: Tensor, next_levels: Tensor
    ) -> Tensor:
        """Return ``sqrt(abar') x0 + sqrt(1 - abar') e``, DDIM of eta = 0; see the base class.

        With S = sqrt((1 - abar) / abar) it is Euler's step of x / sqrt(abar) in S, whose logarithm
        is interpolated linearly between the integer times of the table. At level 0 abar is 1.
        """
        latents = at_least_float32(latents)
        log_snr, next_log_snr = (
            per_sample(self._log_snr(each), latents) for each in (levels, next_levels)
        )
        original, epsilon = self._split(
            at_least_float32(model_output), latents, log_snr.sigmoid(), (-log_snr).sigmoid()
        )
        signal, noise = next_log_snr.sigmoid().sqrt(), (-next_log_snr).sigmoid().sqrt()
        following: Tensor = signal * original + noise * epsilon
        return following

    def _log_snr(self, levels: Tensor) -> Tensor:
        """Return ``log(abar / (1 - abar)) = -2 log S`` [B]; infinite at level 0."""
        # A schedule of zero terminal SNR has abar = 0 at its end, where S would be infinite.
        table = self.scheduler.alphas_cumprod.to(levels).logit(eps=_MIN_ABAR)
        times = self.network_times(levels)
        below = times.long().clamp(max=len(table) - 2)
        between = torch.lerp(table[below], table[below + 1], times - below)
        return between.where(levels > 0, torch.inf)

    @property
    def memoryless(self) -> bool:
        """See the base class."""
        return self.eta == 1

    @property
    def signal_levels(self) -> Tensor:
        """``sqrt(abar)`` of each state; see the base class."""
        return torch.cat([self._abar, self._abar_next[-1:]]).sqrt()

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        train_steps: int = self.scheduler.config["num_train_timesteps"]
        if not 1 <= num_inference_steps <= train_steps:
            raise ValueError(
                f"`num_inference_steps` must lie in [1, {train_steps}], got {num_inference_steps}."
            )
        self.scheduler.set_timesteps(num_inference_steps)
        current = self.scheduler.timesteps
        if int(current.max()) >= train_steps:
            raise ValueError(
                f"`num_inference_steps` ({num_inference_steps}) needs timestep {int(current.max())}"
                f", but the schedule ends at {train_steps - 1}; use fewer steps."
            )
        stride = train_steps // num_inference_steps
        following = torch.cat([current[1:], (current[-1:] - stride).clamp(min=0)])
        abar = self.scheduler.alphas_cumprod
        self._abar, self._abar_next = abar[current].to(device), abar[following].to(device)
        spread = (1 - self._abar_next) / (1 - self._abar) * (1 - self._abar / self._abar_next)
        self._std = self.eta * spread.clamp(min=0).sqrt()
        if self.eta > 0 and float(self._std.min()) < _MIN_STD:
            raise ValueError(
                f"`num_inference_steps` ({num_inference_steps}) leaves a step without noise (std "
                f"{float(self._std.min()):.1e}), so it has no density; use `steps_offset: 1` in "
                "the scheduler's config or another number of steps."
            )
        self.timesteps = current.to(device)
        self.density_steps = range(num_inference_steps) if self.eta > 0 else ()

    def _transition(
        self, model_output: Tensor, index: Tensor, latents: Tensor, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        abar = per_sample(self._abar[index], latents)
        abar_next = per_sample(self._abar_next[index], latents)
        std = torch.zeros_like(self._std[index]) if deterministic else self._std[index]
        original, epsilon = self._split(model_output, latents, abar, 1 - abar)
        towards = (1 - abar_next - per_sample(std, latents).square()).clamp(min=0).sqrt()
        return abar_next.sqrt() * original + towards * epsilon, std, original

    def _split(
        self, model_output: Tensor, latents: Tensor, abar: Tensor, rest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the clean latents and the noise that the output implies; `rest` is 1 - abar."""
        signal, noise = abar.sqrt(), rest.sqrt()
        if self.prediction_type == "epsilon":
            return (latents - noise * model_output) / signal, model_output
        if self.prediction_type == "v_prediction":
            original = signal * latents - noise * model_output
            return original, signal * model_output + noise * latents
        return model_output, (latents - signal * model_output) / noise
