"""Frozen records that flow from rollout to loss, batch first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Record:
    """A frozen dataclass whose tensors, dictionaries of tensors and records share the batch.

    Lists hold one item per sample; every other field belongs to the whole batch.
    """

    def __len__(self) -> int:
        """Return the batch size."""
        return next(len(v) for v in self._fields().values() if isinstance(v, Tensor))

    def to(self, device: torch.device | str) -> Self:
        """Return the record with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device), lambda items: items)

    def select(self, index: Tensor) -> Self:
        """Return the samples at the integer positions `index` [N]."""
        positions = index.tolist()
        return self._map(
            lambda tensor: tensor[index.to(tensor.device)],
            lambda items: [items[position] for position in positions],
        )

    def split(self, size: int) -> Iterator[Self]:
        """Yield the samples in their order, `size` at a time; the last part may be smaller."""
        for index in torch.arange(len(self)).split(size):
            yield self.select(index)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def concatenate(cls, records: Sequence[Self]) -> Self:
        """Join records along the batch; fields of the whole batch are the first record's."""

        def join(values: list[Any]) -> Any:
            first = values[0]
            if isinstance(first, Tensor):
                return torch.cat(values)
            if isinstance(first, Record):
                return type(first).concatenate(values)
            if isinstance(first, dict):
                return {key: torch.cat([v[key] for v in values]) for key in first}
            if isinstance(first, list):
                return [item for value in values for item in value]
            return first

        return cls(
            **{name: join([getattr(r, name) for r in records]) for name in records[0]._fields()}
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the fields as CPU tensors and plain values, for a checkpoint."""
        fields = self.to("cpu")._fields()
        return {k: v.state_dict() if isinstance(v, Record) else v for k, v in fields.items()}

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def _map(
        self, tensors: Callable[[Tensor], Tensor], lists: Callable[[list[Any]], list[Any]]
    ) -> Self:
        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                return tensors(value)
            if isinstance(value, Record):
                return value._map(tensors, lists)
            if isinstance(value, dict):
                return {key: tensors(item) for key, item in value.items()}
            return lists(value) if isinstance(value, list) else value

        return dataclasses.replace(self, **{k: convert(v) for k, v in self._fields().items()})


@dataclass(frozen=True)
class PromptBatch(Record):
    """B prompts to draw one sample each for.

    Attributes:
        prompts: B texts.
        metadata: B dictionaries or None, what is known of each prompt.
        prompt_ids: [B] int64, the prompt's number in its file.
        positions: [B] int64, the sample's place in the round or the evaluation; with the seed and
            the round it decides the sample's noise.
        group_ids: [B] int64, equal for samples of one prompt draw; unique over all processes.
    """

    prompts: list[str]
    metadata: list[dict[str, Any] | None]
    prompt_ids: Tensor
    positions: Tensor
    group_ids: Tensor


@dataclass(frozen=True)
class PairBatch(Record):
    """B image-text pairs.

    Attributes:
        images: [B, 3, H, W] in [0, 1].
        prompts: B texts.
        positions: [B] int64, the pair's place in the stream; with the seed it decides the noise.
    """

    images: Tensor
    prompts: list[str]
    positions: Tensor


@dataclass(frozen=True)
class PreferenceBatch(Record):
    """B judgements, each of K images of one prompt.

    K = 2 are pairs, with the preferred image first; more are rankings, with absent places at the
    end where they differ in length; K = 1 are single images that were liked or not.

    Attributes:
        images: [B, K, 3, H, W] in [0, 1], or [B, K, F, 3, H, W] for video.
        prompts: B texts.
        labels: [B, K] float32. Of a pair the probabilities (p, 1 - p) that each is preferred, p in
            [0.5, 1] and 0.5 for a tie; of a ranking the ranks from 1, the best, equal for a tie
            and 0 where there is no image; of a single image 1 if it was liked, else 0.
        weights: [B] float32, not negative.
        positions: [B] int64, the judgement's place in the stream; with the seed it decides the
            noise.
        record_ids: [B] int64, the judgement's number in its file.
        latents: [B, K, ...] float32, the clean latents of the images, if they were kept.
    """

    images: Tensor
    prompts: list[str]
    labels: Tensor
    weights: Tensor
    positions: Tensor
    record_ids: Tensor
    latents: Tensor | None = None


@dataclass(frozen=True)
class PromptMinibatch(Record):
    """N samples to be drawn with gradient.

    Attributes:
        batch: Their prompts.
        round_index: Of the round, which with the positions decides their noise.
        pairs: Image-text pairs to learn from beside.
    """

    batch: PromptBatch
    round_index: int
    pairs: PairBatch | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.batch)


@dataclass(frozen=True)
class Trajectory(Record):
    """B sampled trajectories of T denoising steps.

    Attributes:
        latents: [B, T + 1, ...] float32, from noise to clean.
        timesteps: [B, T], as the network takes them.
        log_probs: [B, T] float32; NaN at deterministic steps.
        conditioning: Text embeddings, each [B, ...].
        guidance_scale: Weight of classifier-free guidance.
        num_inference_steps: T, which names the schedule's timetable.
        batch: The prompts the samples answer.
        images: [B, 3, H, W] in [0, 1], dropped once scored.
        rewards: [B] float32, NaN where an image could not be scored.
        advantages: [B] float32, or [B, T] if every step has its own.
        weights: As the advantages; 0 for what must not count in the loss.
        extras: What a method adds or has kept of its steps, each [B, T, ...]; of each step it is
            the transition's.
    """

    latents: Tensor
    timesteps: Tensor
    log_probs: Tensor
    conditioning: dict[str, Tensor]
    guidance_scale: float
    num_inference_steps: int
    batch: PromptBatch | None = None
    images: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """The samples' places in the round [B]."""
        assert self.batch is not None
        return self.batch.positions

    def step(self, index: int) -> Transition:
        """Return the step of all samples, unweighted."""
        samples = torch.arange(len(self), device=self.log_probs.device)
        zeros = self.log_probs.new_zeros(len(self))
        unweighted = self.replace(advantages=zeros, weights=zeros, extras={})
        return unweighted.transitions(samples, torch.full_like(samples, index))

    def transitions(self, samples: Tensor, steps: Tensor) -> Transition:
        """Return the flat batch of (sample, step) pairs.

        Args:
            samples: [N] int64 positions in the batch.
            steps: [N] int64 step indices.

        Raises:
            ValueError: If advantages or weights have not been computed yet.
        """
        if self.advantages is None or self.weights is None:
            raise ValueError("`advantages` and `weights` must be set before minibatches are cut.")

        def of_pairs(values: Tensor) -> Tensor:
            return values[samples] if values.ndim == 1 else values[samples, steps]

        return Transition(
            latents=self.latents[samples, steps],
            next_latents=self.latents[samples, steps + 1],
            timesteps=self.timesteps[samples, steps],
            old_log_prob=self.log_probs[samples, steps],
            advantages=of_pairs(self.advantages),
            weights=of_pairs(self.weights),
            conditioning={key: value[samples] for key, value in self.conditioning.items()},
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            extras={key: value[samples, steps] for key, value in self.extras.items()},
            batch=None if self.batch is None else self.batch.select(samples),
        )


@dataclass(frozen=True)
class Transition(Record):
    """N (sample, step) pairs, what a policy-gradient loss sees.

    Attributes:
        latents: [N, ...] float32, before the step.
        next_latents: [N, ...] float32, after it.
        timesteps: [N], as the network takes them.
        old_log_prob: [N] float32, under the policy that sampled.
        advantages: [N] float32.
        weights: [N] float32, 0 for pairs that must not count.
        conditioning: Text embeddings, each [N, ...].
        guidance_scale: Weight of classifier-free guidance.
        num_inference_steps: The schedule's timetable.
        extras: What a method adds, each [N, ...].
        batch: The prompts of the pairs' samples.
        pairs: Image-text pairs to learn from beside.
    """

    latents: Tensor
    next_latents: Tensor
    timesteps: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    weights: Tensor
    conditioning: dict[str, Tensor]
    guidance_scale: float
    num_inference_steps: int
    extras: dict[str, Tensor] = field(default_factory=dict)
    batch: PromptBatch | None = None
    pairs: PairBatch | None = None


def restored(state: dict[str, Any]) -> Trajectory | PromptBatch:
    """Return the record whose `state_dict` it is."""
    if "latents" not in state:
        return PromptBatch(**state)
    return Trajectory(**{**state, "batch": PromptBatch(**state["batch"])})


@dataclass(frozen=True)
class ForwardPairs(Record):
    """N (sample, time) pairs.

    Attributes:
        clean: [N, ...] float32, latents of the samples.
        noise: [N, ...] float32, what they are noised with.
        timesteps: [N], the times they are noised to, as the network takes them.
        advantages: [N] float32.
        weights: [N] float32, 0 for pairs that must not count.
        conditioning: Text embeddings, each [N, ...].
        guidance_scale: Weight of classifier-free guidance.
        extras: What a method adds, each [N, ...].
        batch: The prompts of the pairs' samples.
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    advantages: Tensor
    weights: Tensor
    conditioning: dict[str, Tensor]
    guidance_scale: float
    extras: dict[str, Tensor]
    batch: PromptBatch | None = None


@dataclass(frozen=True)
class ForwardOutputs:
    """What networks say of N (sample, time) pairs, and what they should.

    Attributes:
        noised: The pairs' latents x_t [N, ...].
        target: What the network should say there [N, ...].
        output: What it says [N, ...], with gradient.
        averaged: What averaged weights say [N, ...], if there are any.
        reference: What the pretrained network says [N, ...], if it is asked.
    """

    noised: Tensor
    target: Tensor
    output: Tensor
    averaged: Tensor | None = None
    reference: Tensor | None = None
