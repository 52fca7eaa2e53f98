"""Judged images noised alike, and what their errors weigh at the time they are noised to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_align.functional.choices import check_choice
from lit_align.functional.noise import keyed_generator
from lit_align.policies.base import DiffusionPolicy
from lit_align.schedulers.base import StochasticScheduler
from lit_align.trajectory import PreferenceBatch

BetaSchedule = Literal["constant", "one_minus_t_sq", "elbo"]
ErrorSpace = Literal["native", "eps", "x0"]


@dataclass(frozen=True)
class Sharing:
    """What the images of a judgement have in common.

    Attributes:
        noise: Whether they are noised alike.
        timestep: Whether they are noised to the same time.
        fixed: Whether a judgement is noised alike whenever it comes back.
        prompt_dropout: Share of judgements without a prompt, in [0, 1].
    """

    noise: bool = True
    timestep: bool = True
    fixed: bool = False
    prompt_dropout: float = 0.0


@dataclass(frozen=True)
class NoisedJudgements:
    """B judgements of K images as N = B K rows, those of a judgement side by side.

    Attributes:
        noised: [N, ...].
        target: What the network should say there [N, ...].
        timesteps: [N], as the network takes them.
        conditioning: Text embeddings, each [N, ...].
        labels: [B, K], as of `PreferenceBatch`.
    """

    noised: Tensor
    target: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor]
    labels: Tensor

    def grouped(self, values: Tensor) -> Tensor:
        """Return values [N, ...] as [B, K, ...]."""
        return values.unflatten(0, tuple(self.labels.shape))


@torch.no_grad()
def noise_judgements(
    policy: DiffusionPolicy,
    batch: PreferenceBatch,
    latents: Tensor,
    sharing: Sharing,
    purpose: str,
    seed: int,
) -> NoisedJudgements:
    """Return judgements noised by draws keyed by (purpose, seed, place in the stream).

    The draws of a judgement are its time, its noise, and whether it keeps its prompt.

    Args:
        policy: Noises, and encodes the prompts.
        batch: B judgements.
        latents: Clean [B, K, ...] of their images.
        sharing: What images of a judgement have in common.
        purpose: "heldout" is noised alike at every evaluation, and keeps its prompts.
        seed: Of the draws.
    """
    size, shape = latents.shape[1], latents.shape[2:]
    fixed = sharing.fixed or purpose == "heldout"
    times, noises, prompts = [], [], []
    keys = batch.record_ids if fixed else batch.positions
    for key, prompt in zip(keys.tolist(), batch.prompts, strict=True):
        generator = keyed_generator(purpose, seed, key)
        own_times = 1 if sharing.timestep else size
        drawn = policy.scheduler.sample_timesteps(own_times, generator)
        times.append(drawn.expand(size))
        noise = torch.randn(1 if sharing.noise else size, *shape, generator=generator)
        noises.append(noise.expand(size, *shape))
        dropped = torch.rand((), generator=generator) < sharing.prompt_dropout
        prompts.append("" if dropped and purpose != "heldout" else prompt)
    clean = latents.flatten(0, 1)
    timesteps = torch.cat(times).to(clean.device)
    noised, target = policy.scheduler.corrupt(clean, torch.cat(noises).to(clean.device), timesteps)
    encoded = policy.encode_prompt(prompts)
    conditioning = {
        name: value.repeat_interleave(size, dim=0)
        for name, value in encoded.items()
        if not name.startswith("negative_")
    }
    return NoisedJudgements(noised, target, timesteps, conditioning, batch.labels)


def check_weighting(space: ErrorSpace, schedule: BetaSchedule) -> None:
    """Check how errors are to be weighed.

    Raises:
        ValueError: If a word is unknown, or "elbo" is asked for in another space than that of the
            noise.
    """
    check_choice("error_space", space, ErrorSpace)
    check_choice("beta_schedule", schedule, BetaSchedule)
    if schedule == "elbo" and space != "eps":
        raise ValueError(
            "`beta_schedule: elbo` weighs errors of the noise: set `error_space: eps`, got "
            f"{space!r}."
        )


def error_weights(
    scheduler: StochasticScheduler,
    timesteps: Tensor,
    space: ErrorSpace = "native",
    schedule: BetaSchedule = "constant",
) -> Tensor:
    """Return what squared errors of the network's output are multiplied by [N].

    All targets are affine in one another at a given x_t, so that errors in another space differ by
    a factor: ``(d x0 / d output)^2`` in that of the clean latents, and the square of signal over
    noise times that in that of the noise. "one_minus_t_sq" multiplies by the squared share of
    signal. "elbo" multiplies errors of the noise by ``T / 2 (SNR(t - 1) / SNR(t) - 1)``, the weight
    of step t in the bound on the likelihood (arXiv:2107.00630).

    Args:
        scheduler: Of the family.
        timesteps: [N], any that `corrupt` takes.
        space: See above; `check_weighting` refuses what cannot be.
        schedule: See above.
    """
    weights = _ones(timesteps)
    if space != "native":
        unit, nothing = _flat(weights), _flat(torch.zeros_like(weights))
        clean = scheduler.clean(unit, nothing, timesteps) - scheduler.clean(
            nothing, nothing, timesteps
        )
        weights = clean.flatten().square()
    if space == "eps":
        weights = weights * signal_to_noise(scheduler, timesteps)
    if schedule == "one_minus_t_sq":
        weights = weights * _signal(scheduler, timesteps).square()
    if schedule == "elbo":
        later = timesteps.clamp(min=1)  # at 0 there is no earlier state
        ratio = signal_to_noise(scheduler, later - 1) / signal_to_noise(scheduler, later)
        weights = weights * _NUM_TIMES / 2 * (ratio - 1)
    return weights


_NUM_TIMES = 1000  # of both families' training schedules


def signal_to_noise(scheduler: StochasticScheduler, timesteps: Tensor) -> Tensor:
    """Return the ratio of squared shares of signal and noise [N] at any times."""
    return (_signal(scheduler, timesteps) / scheduler.noise_levels(timesteps)).square()


def _signal(scheduler: StochasticScheduler, timesteps: Tensor) -> Tensor:
    unit = _flat(_ones(timesteps))
    return scheduler.corrupt(unit, torch.zeros_like(unit), timesteps)[0].flatten()


def _ones(timesteps: Tensor) -> Tensor:
    """Return ones [N], in float32 or the precision of the times."""
    return torch.ones_like(timesteps, dtype=torch.promote_types(timesteps.dtype, torch.float32))


def _flat(values: Tensor) -> Tensor:
    """Return values [N] as latents of one element each."""
    return values.view(-1, 1, 1, 1)
