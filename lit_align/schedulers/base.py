"""One denoising step as a Gaussian policy: next_latents ~ N(mean, std^2 I)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_align.functional.gaussian import at_least_float32, gaussian_log_prob, sample_gaussian
from lit_align.functional.noise import randn


@dataclass(frozen=True)
class StepOutput:
    """One denoising step of B samples.

    Attributes:
        next_latents: [B, ...] float32, one step closer to data.
        mean: [B, ...] float32, of the transition.
        std: [B] float32, of the transition; 0 for a deterministic step.
        log_prob: [B] float32 log-density of `next_latents`, averaged over the non-batch
            dimensions; NaN for a deterministic step, which has none.
        pred_original: [B, ...] float32, the clean latents that the model output implies.
    """

    next_latents: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor
    pred_original: Tensor


class StochasticScheduler(ABC):
    """A sampling schedule whose steps have densities.

    All arithmetic is float32 (float64 if the latents are), and every sample of a batch may be at
    its own step.

    Attributes:
        timesteps: [T] as the network takes them, in sampling order; set by `set_timesteps`.
        density_steps: Indices of the steps with a usable density, increasing.
        is_flow: Whether states are ``(1 - t) x0 + t eps`` and the network says ``eps - x0``.
    """

    timesteps: Tensor
    density_steps: Sequence[int]
    is_flow: ClassVar[bool] = False

    def __init__(self) -> None:
        self._timetable: tuple[int, str] | None = None

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str = "cpu") -> None:
        """Choose the number of steps; calling it again with the same arguments costs nothing.

        Args:
            num_inference_steps: T, positive.
            device: Where the tables live.

        Raises:
            ValueError: If the schedule cannot be run in that many steps.
        """
        timetable = (num_inference_steps, str(device))
        if self._timetable != timetable:
            self._set_timesteps(num_inference_steps, torch.device(device))
            self._timetable = timetable

    def check_density(self, method: str) -> None:
        """Check that there are steps with a density.

        Raises:
            ValueError: If there is none, naming the method that learns from densities.
        """
        if not len(self.density_steps):
            raise ValueError(
                f"{method} needs a stochastic sampler: set `eta` above 0 (DDIM), or a `kind` other "
                "than 'ode' and a positive `noise_level` (flow matching)."
            )

    def check_memoryless(self, method: str) -> None:
        """Check that samples do not depend on the initial noise they started from.

        Raises:
            ValueError: If they do, naming the method that needs it.
        """
        if not self.memoryless:
            raise ValueError(
                f"{method} needs a memoryless sampler, or it aims at another distribution: set "
                "`eta: 1` (StochasticDDIM), or `kind: memoryless` (StochasticFlowMatch)."
            )

    @property
    @abstractmethod
    def memoryless(self) -> bool:
        """Whether its noise makes clean latents independent of the initial noise."""

    def step(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        latents: Tensor,
        next_latents: Tensor | None = None,
        *,
        generator: Sequence[torch.Generator] | None = None,
    ) -> StepOutput:
        """Take one step, or evaluate the density of one that was taken.

        Args:
            model_output: Network output [B, ...].
            timesteps: [B], members of `self.timesteps`.
            latents: [B, ...].
            next_latents: [B, ...]; if given, the step that was taken.
            generator: One generator per sample for the noise of a new step. A new step without
                generators is deterministic: it follows the probability-flow ODE.

        Raises:
            ValueError: If a timestep is not one of the schedule.
        """
        deterministic = next_latents is None and generator is None
        index = self.index(timesteps)
        mean, std, pred_original = self._transition(
            at_least_float32(model_output), index, at_least_float32(latents), deterministic
        )
        if deterministic:
            undefined = torch.full_like(std, torch.nan)
            return StepOutput(mean, mean, torch.zeros_like(std), undefined, pred_original)
        if next_latents is None:
            assert generator is not None
            noise = randn(latents.shape[1:], generator, latents.device)
            next_latents = sample_gaussian(mean, std, noise)
        log_prob = self._log_prob(next_latents, mean, std)
        next_latents = at_least_float32(next_latents)
        return StepOutput(next_latents, mean, std, log_prob, pred_original)

    def output_change(self, timesteps: Tensor, change: Tensor) -> Tensor:
        """Return the change of the network's output [B, ...] that changes `pred_original` so.

        Args:
            timesteps: [B], members of `self.timesteps`.
            change: Of the implied clean latents [B, ...], which are linear in the output.
        """
        unit, nothing = torch.ones_like(change), torch.zeros_like(change)
        return change / self.step(unit, timesteps, nothing).pred_original

    def step_sizes(self, timesteps: Tensor) -> Tensor:
        """Return each step's length h [B] in the time of flow matching.

        Args:
            timesteps: [B], members of `self.timesteps`.

        Raises:
            ValueError: If the family has no such time.
        """
        raise ValueError(
            f"{type(self).__name__} has no steps in the time of flow matching, which `kl: drift` "
            "and `ratio: norm` measure by; use a flow-matching model, or `kl: velocity` or "
            "gaussian and `ratio: plain`."
        )

    def gradient_weights(self, timesteps: Tensor) -> Tensor:
        """Return delta [B] of Eq. (12) of arXiv:2510.22319, ``1 / h``; raises as `step_sizes`."""
        return 1 / self.step_sizes(timesteps)

    @property
    @abstractmethod
    def signal_levels(self) -> Tensor:
        """Share of the clean latents in each state [T + 1], from noise to clean, in [0, 1]."""

    def index(self, timesteps: Tensor) -> Tensor:
        """Return the position [B] of each timestep in the schedule."""
        found = timesteps[:, None] == self.timesteps
        if not bool(found.any(dim=1).all()):
            raise ValueError(
                f"`timesteps` must be members of the schedule {self.timesteps.tolist()}, "
                f"got {timesteps.tolist()}."
            )
        return found.int().argmax(dim=1)

    def _log_prob(self, next_latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return gaussian_log_prob(next_latents, mean, std)

    @abstractmethod
    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw times [count] from the distribution that the family is trained on."""

    @abstractmethod
    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return noised latents and the network output that denoises them, each [B, ...].

        Args:
            latents: Clean latents [B, ...].
            noise: Standard normal [B, ...].
            timesteps: [B], as the network takes them; any time, not only those of the schedule.
        """

    @abstractmethod
    def noise_levels(self, timesteps: Tensor) -> Tensor:
        """Return the share of noise [B] in what `corrupt` returns at any times, in [0, 1]."""

    @abstractmethod
    def clean(self, model_output: Tensor, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Return the clean latents [B, ...] that an output implies; exact for that of `corrupt`.

        Args:
            model_output: Network output [B, ...]; what is returned is affine in it.
            latents: Noised latents [B, ...].
            timesteps: [B], any time that `corrupt` takes.
        """

    @abstractmethod
    def network_times(self, levels: Tensor) -> Tensor:
        """Return the times of noise levels [B], as the network takes them.

        Args:
            levels: From 1, pure noise, to 0, the image; any, not only those of the schedule.
        """

    @abstractmethod
    def advance(
        self, model_output: Tensor, latents: Tensor, levels: Tensor, next_levels: Tensor
    ) -> Tensor:
        """Take a deterministic step from any noise level to any other.

        Args:
            model_output: Network output [B, ...] at `network_times(levels)`.
            latents: [B, ...].
            levels: [B] in (0, 1], where every sample is.
            next_levels: [B] in [0, 1], where it goes; 0 ends at the image.

        Returns:
            [B, ...] float32, or float64 if the latents are.
        """

    @abstractmethod
    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        """Fill `timesteps`, `density_steps` and the tables of the schedule."""

    @abstractmethod
    def _transition(
        self, model_output: Tensor, index: Tensor, latents: Tensor, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the transition's mean [B, ...], std [B], and the implied clean latents."""
