"""Pairs made of a round's samples, and what an annotator says of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_align.algorithms.online import OnlineModule
from lit_align.functional.judging import best_and_worst
from lit_align.functional.noise import keyed_generator
from lit_align.functional.reward_modeling import bradley_terry, masked_mean
from lit_align.rewards.base import RewardModule, quantize
from lit_align.trajectory import ForwardPairs, Trajectory


def keep_best_and_worst(module: OnlineModule, trajectory: Trajectory, gap_min: float) -> Trajectory:
    """Return two samples of each prompt, with advantages +1 for the better and -1 for the worse.

    They are NaN where the prompt's rewards differ by no more than `gap_min`.
    """
    assert trajectory.rewards is not None
    count = module.samples_per_prompt
    places, signs = best_and_worst(trajectory.rewards.unflatten(0, (-1, count)), gap_min)
    pairs = module.gathered(signs[:, 0].isfinite().float()).sum()
    module.note("rollout/pairs", float(pairs))
    first = torch.arange(len(places), device=places.device)[:, None] * count
    return trajectory.select((first + places).flatten()).replace(advantages=signs.flatten())


class RewardRefresh:
    """Trains a reward model on an annotator's labels of pairs that were just sampled.

    Args:
        annotator: Tells each image's utility; kept out of the module tree.
        reward: What is trained, a LearnedReward.
        temperature: T of the annotator's doubt: the first of two images with utilities u_1 and u_2
            is preferred with probability sigmoid((u_1 - u_2) / T), and at 0 the better one.
        seed: Of its draws.

    Raises:
        ValueError: If the reward is none that can be trained.
    """

    def __init__(
        self, annotator: RewardModule, reward: RewardModule | None, temperature: float, seed: int
    ) -> None:
        trained: Any = reward
        if not hasattr(trained, "set_trainable"):
            raise ValueError("`annotator` refreshes a `reward` that is a LearnedReward.")
        trained.set_trainable()
        self.reward = trained
        self.annotator = annotator.requires_grad_(False).eval()
        self.temperature, self.seed = temperature, seed

    def annotate(self, module: OnlineModule, kept: Trajectory) -> Tensor:
        """Return whether the first of each pair is preferred [P]: 1, 0, 0.5 for a tie.

        NaN where an image could not be judged.
        """
        assert kept.batch is not None
        images = quantize(module.policy.decode(kept.latents[:, -1]))
        utilities = module.score(self.annotator.to(images.device), images, kept.batch)
        first, second = utilities.unflatten(0, (-1, 2)).unbind(1)
        keys = kept.batch.group_ids[::2].tolist()
        draws = [torch.rand((), generator=keyed_generator("label", self.seed, k)) for k in keys]
        doubt = self.temperature * torch.stack(draws).logit().to(first)
        return ((first - second - doubt).sign() + 1) / 2

    def loss(self, module: OnlineModule, minibatch: ForwardPairs, preferred: Tensor) -> Tensor:
        """Return the loss of Bradley and Terry over the pairs that were labelled; 0 if none was.

        Args:
            module: Decodes the images.
            minibatch: N samples, two of a pair side by side.
            preferred: Probabilities [N / 2] that the first is preferred, NaN for no label.
        """
        assert minibatch.batch is not None
        with torch.no_grad():
            images = quantize(module.policy.decode(minibatch.clean))
        # By `forward`, which gathers the weights where they are sharded; as trained, so unscaled.
        scores = self.reward(images, minibatch.batch.prompts) * self.reward.std
        scores = scores.unflatten(0, (-1, 2))
        known = preferred.isfinite()
        losses = bradley_terry(scores[:, 0] - scores[:, 1], preferred.where(known, 0.5))
        return masked_mean(losses, known.float(), float(len(known)))
