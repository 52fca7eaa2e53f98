"""What the callbacks measure on the validation prompts: the same prompts and noise every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lit_align.algorithms.base import AlignmentModule
from lit_align.callbacks.ema import AdapterEMA
from lit_align.data.prompts import PromptLoader
from lit_align.functional.frames import over_frames
from lit_align.functional.noise import sample_generators
from lit_align.metrics import DriftStatistics, PairwiseDiversity, VendiScore
from lit_align.metrics.base import Embedder
from lit_align.trajectory import PromptBatch


@dataclass
class Evaluation:
    """One pass over the validation prompts, of all processes and in the order of the prompts.

    Attributes:
        prompt_ids: [N].
        scores: [N, R], the trained reward first; NaN where an image could not be scored.
        embeddings: [N, D]; None without an embedder.
        figures: Scalars by the name they are logged under.
    """

    prompt_ids: Tensor
    scores: Tensor
    embeddings: Tensor | None
    figures: dict[str, float]


class EvaluationCollector:
    """Gathers what `AlignmentModule.evaluate` returns for each batch.

    Args:
        module: Names the rewards, and reaches the other processes.
        embedder: Images [B, 3, H, W] to embeddings [B, D].
    """

    def __init__(self, module: AlignmentModule, embedder: Embedder | None) -> None:
        self.module, self.embedder = module, embedder
        self._parts: dict[str, list[Tensor]] = {}
        self._drift = DriftStatistics().to(module.device)

    @torch.no_grad()
    def add(self, batch: PromptBatch, outputs: dict[str, Any]) -> None:
        """Take a batch."""
        parts = {
            "positions": batch.positions,
            "prompt_ids": batch.prompt_ids,
            "scores": torch.stack([outputs["scores"][name] for name in self.module.rewards], 1),
        }
        if self.embedder is not None:
            parts["embeddings"] = over_frames(self.embedder, outputs["images"]).float()
        for name, values in parts.items():
            self._parts.setdefault(name, []).append(values.to(self.module.device))
        self._drift.update(outputs["images"], outputs["latents"])

    def __bool__(self) -> bool:
        """Return whether there was any batch."""
        return bool(self._parts)

    def finish(self) -> Evaluation:
        """Return the evaluation, the same on every process."""
        whole = {n: self.module.gathered(torch.cat(parts)) for n, parts in self._parts.items()}
        order = whole.pop("positions").argsort()
        whole = {name: values[order].cpu() for name, values in whole.items()}
        drift = {f"val/drift/{name}": float(v) for name, v in self._drift.compute().items()}
        return Evaluation(whole["prompt_ids"], whole["scores"], whole.get("embeddings"), drift)


@torch.no_grad()
def evaluate(
    trainer: Trainer, module: AlignmentModule, embedder: Embedder | None
) -> EvaluationCollector:
    """Run the validation prompts outside Lightning's validation loop."""
    collector = EvaluationCollector(module, embedder)
    with evaluated_weights(trainer, module), evaluation_mode(module):
        for batch in module.validation_batches():
            moved = batch.to(module.device)
            with trainer.precision_plugin.forward_context():
                outputs = module.evaluate(moved)
            collector.add(moved, outputs)
    return collector


@torch.no_grad()
def diversity(
    trainer: Trainer,
    module: AlignmentModule,
    embedder: Embedder,
    num_prompts: int,
    samples_per_prompt: int,
) -> dict[str, float]:
    """Return the diversity of the images of a prompt, for the first validation prompts."""
    prompts = first_prompts(module, num_prompts, share=True)
    repeated = prompts.select(torch.arange(len(prompts)).repeat_interleave(samples_per_prompt))
    places = torch.arange(len(repeated)) % samples_per_prompt
    repeated = repeated.replace(positions=repeated.positions * samples_per_prompt + places)
    embeddings = []
    for part in repeated.split(max(len(prompts), 1)):
        with trainer.precision_plugin.forward_context():
            images, _ = module.generate(part.to(module.device), "diversity")
        embeddings.append(over_frames(embedder, images).float())
    everyone = module.gathered(torch.cat(embeddings))
    groups = module.gathered(repeated.prompt_ids.to(module.device))
    found = {}
    for metric_class, name in ((PairwiseDiversity, "diversity"), (VendiScore, "vendi")):
        metric = metric_class(sync_on_compute=False).to(module.device)
        metric.update(everyone, groups)
        found[f"val/{name}"] = float(metric.compute())
    return found


def path_kl(trainer: Trainer, module: AlignmentModule, num_prompts: int) -> float:
    """Return the divergence of the sampling path from the pretrained model's, in nats.

    The mean over samples; NaN for a sampler without stochastic steps.
    """
    batch = first_prompts(module, num_prompts, share=True)
    divergences = path_divergences(trainer, module, batch, "kl")
    return float(module.gathered(divergences).double().mean())


@torch.no_grad()
def path_divergences(
    trainer: Trainer, module: AlignmentModule, batch: PromptBatch, purpose: str
) -> Tensor:
    """Sample as in training; return the sum over steps [B] of `DiffusionPolicy.kl_to_reference`.

    Args:
        trainer: Its precision is that of a rollout.
        module: Names the sampler's options.
        batch: B prompts.
        purpose: Keys the noise.
    """
    policy = module.policy
    with trainer.precision_plugin.forward_context():
        trajectory = policy.sample(
            policy.encode_prompt(batch.prompts),
            num_inference_steps=module.num_inference_steps,
            guidance_scale=module.guidance_scale,
            generator=sample_generators(purpose, module.seed, 0, batch.positions.tolist()),
        )
        divergence = policy.kl_to_reference(trajectory)  # NaN where a step has no density
    has_density = bool(len(policy.scheduler.density_steps))
    return divergence.nansum(dim=1) if has_density else divergence.mean(dim=1)


def first_prompts(module: AlignmentModule, count: int, share: bool = False) -> PromptBatch:
    """Return the first `count` validation prompts.

    Args:
        module: Being trained.
        count: Or fewer, if there are not so many; with a loader of the user's own, at most its
            first batch.
        share: Return this process's share of them, of the same size on each.

    Raises:
        ValueError: If they cannot be shared evenly.
    """
    loader = module.validation_batches()
    if isinstance(loader, PromptLoader):
        batch = loader.batch(range(min(count, len(loader.prompts))))
    else:
        batch = next(iter(loader))
        batch = batch.select(torch.arange(min(count, len(batch))))
    if not share:
        return batch
    world, rank = module.trainer.world_size, module.trainer.global_rank
    if len(batch) % world:
        raise ValueError(
            f"{len(batch)} prompts cannot be shared by {world} processes; give the callback a "
            f"multiple of {world}."
        )
    return batch.select(torch.arange(rank, len(batch), world))


def evaluated_weights(trainer: Trainer, module: AlignmentModule) -> AbstractContextManager[None]:
    """Put the averaged weights in place where validation would."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdapterEMA) and callback.evaluate:
            return callback.applied(module)
    return nullcontext()


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, as Lightning's validation does."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
