"""Advantages from rewards: over the batch, over a group, or against a prompt's history.

Rewards may hold NaN for images that could not be scored: they are left out of every statistic
and their advantage is NaN.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor

from lit_align.functional.choices import check_choice

AdvantageNorm = Literal["per_prompt", "batch", "group", "group_mean"]


def batch_advantages(rewards: Tensor, eps: float = 1e-8, correction: int = 0) -> Tensor:
    """Return ``(r - mean) / (std + eps)`` over the batch [B], in float64.

    Args:
        rewards: [B].
        eps: Added to the standard deviation.
        correction: Subtracted from the count in the variance; 1 for the unbiased one.
    """
    rewards = rewards.double()
    valid = rewards[~rewards.isnan()]
    return (rewards - valid.mean()) / (_std(valid, correction) + eps)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    eps: float = 1e-8,
    correction: int = 1,
    global_std: bool = False,
) -> Tensor:
    """Return ``(r - mean of its group) / (std + eps)`` [B], in float64.

    The standard deviation is the group's (arXiv:2505.07818), or that of all rewards if
    `global_std` (as in Flow-GRPO's code). A group of equal rewards gets advantages 0.

    Args:
        rewards: [B].
        group_ids: [B] integers, equal within a group.
        eps: Added to the standard deviation.
        correction: Subtracted from the count in the variance; 1 for the unbiased one.
        global_std: Divide by the standard deviation of the whole batch.
    """
    rewards = rewards.double()
    advantages = torch.full_like(rewards, torch.nan)
    everywhere = _std(rewards[~rewards.isnan()], correction)
    for group in group_ids.unique():
        member = (group_ids == group) & ~rewards.isnan()
        values = rewards[member]
        std = everywhere if global_std else _std(values, correction)
        advantages[member] = (values - values.mean()) / (std + eps)
    return advantages


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return ``r_i - mean of the group's other rewards`` [B], in float64 (arXiv:2402.14740).

    It is ``k / (k - 1) (r_i - mean)`` for k rewards of the group that are not NaN, and NaN where
    there is only one of them, which has nothing to be compared with.

    Args:
        rewards: [B].
        group_ids: [B] integers, equal within a group.
    """
    rewards, valid = rewards.double(), ~rewards.isnan()
    groups, places = group_ids.unique(return_inverse=True)
    sums = rewards.new_zeros(2, len(groups))  # of each group, its rewards and their number
    sums.index_add_(1, places, torch.stack([rewards.where(valid, 0.0), valid.double()]))
    total, count = sums[:, places]
    baseline: Tensor = (total - rewards) / (count - 1)  # of a single one 0 / 0, which is NaN
    return rewards - baseline


def step_discount(steps: Tensor, gamma: float) -> Tensor:
    """Return ``c(N) = (1 / N) sum_{i < N} gamma^i = (1 - gamma^N) / (N (1 - gamma))``, in float64.

    The share of a final reward that is left if step n of N gets ``gamma^(N - n)`` of it and the
    steps are averaged (arXiv:2412.01243): 1 for one step, less for each further one.

    Args:
        steps: Numbers of steps N, positive.
        gamma: In (0, 1].
    """
    steps = steps.double()
    if gamma == 1:
        return torch.ones_like(steps)
    return -(steps * math.log(gamma)).expm1() / (steps * (1 - gamma))


def zero_std_fraction(rewards: Tensor, group_ids: Tensor) -> float:
    """Return the share of groups whose known rewards are all equal, and which so teach nothing.

    Args:
        rewards: [B].
        group_ids: [B] integers, equal within a group.
    """
    groups = [rewards[group_ids == group] for group in group_ids.unique()]
    return sum(len(r[~r.isnan()].unique()) <= 1 for r in groups) / len(groups)


def _std(values: Tensor, correction: int) -> Tensor:
    """Return the standard deviation, 0 where there are too few values."""
    if len(values) <= correction:
        return values.new_zeros(())
    return values.std(correction=correction)


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Return ``G_k = r_k + gamma G_{k+1}`` [B, T].

    Args:
        rewards: r [B, T] of the T steps in order.
        gamma: Discount per step, in [0, 1].
    """
    returns = rewards.clone()
    for step in reversed(range(rewards.shape[1] - 1)):
        returns[:, step] += gamma * returns[:, step + 1]
    return returns


class PromptStatistics:
    """Recent rewards of each prompt, to normalise new ones by (arXiv:2305.13301, App. C).

    Args:
        buffer_size: Rewards kept per prompt.
        min_count: With fewer, the statistics of the whole batch serve.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"`min_count` must lie in [1, buffer_size = {buffer_size}], got {min_count}."
            )
        self.buffer_size, self.min_count = buffer_size, min_count
        self._history: dict[int, deque[float]] = {}

    def advantages(self, rewards: Tensor, prompt_ids: Tensor, eps: float = 1e-6) -> Tensor:
        """Record rewards and return ``(r - mean) / (std + eps)`` [B], in float64.

        Mean and (population) standard deviation are those of the prompt's history, which already
        holds the new rewards.

        Args:
            rewards: [B].
            prompt_ids: [B] integers.
            eps: Added to the standard deviation.
        """
        rewards = rewards.double()
        advantages = torch.full_like(rewards, torch.nan)
        valid = ~rewards.isnan()
        for prompt in prompt_ids.unique().tolist():
            member = (prompt_ids == prompt) & valid
            history = self._history.setdefault(prompt, deque(maxlen=self.buffer_size))
            history.extend(rewards[member].tolist())
            known = rewards[valid] if len(history) < self.min_count else rewards.new_tensor(history)
            advantages[member] = (rewards[member] - known.mean()) / (_std(known, 0) + eps)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """Return the histories as tensors."""
        return {
            "prompts": torch.tensor(list(self._history), dtype=torch.int64),
            "rewards": [torch.tensor(list(h), dtype=torch.float64) for h in self._history.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._history = {
            prompt: deque(rewards.tolist(), maxlen=self.buffer_size)
            for prompt, rewards in zip(state["prompts"].tolist(), state["rewards"], strict=True)
        }


class RewardNormalizer:
    """Turns rewards into advantages in the chosen way.

    Args:
        kind: "per_prompt" takes mean and std of the prompt's recent rewards (`PromptStatistics`),
            "batch" those of all rewards, "group" those of the images of one prompt draw, and
            "group_mean" the mean there and the std of all rewards.
        eps: Added to the standard deviation; by default 1e-6 for "per_prompt", else 1e-8.
        std_unbiased: Whether the variance is divided by the count less one; by default only for
            groups. "per_prompt" is never.
        buffer_size: Rewards kept per prompt, for "per_prompt".
        min_count: With fewer, the statistics of the whole batch serve.
    """

    def __init__(
        self,
        kind: AdvantageNorm,
        eps: float | None = None,
        std_unbiased: bool | None = None,
        buffer_size: int = 32,
        min_count: int = 16,
    ) -> None:
        self._eps, self._unbiased = eps, std_unbiased
        self.statistics = PromptStatistics(buffer_size, min_count)
        self.use(kind)

    def use(self, kind: AdvantageNorm) -> None:
        """Normalise in this way from now on.

        Raises:
            ValueError: If the way is unknown, or has no unbiased variance and that was asked for.
        """
        check_choice("advantage_norm", kind, AdvantageNorm)
        if kind == "per_prompt" and self._unbiased:
            raise ValueError(
                "`std_unbiased` is for `advantage_norm: batch`, group or group_mean; "
                "'per_prompt' takes the population's standard deviation."
            )
        self.kind = kind
        default = 1e-6 if kind == "per_prompt" else 1e-8
        self.eps = default if self._eps is None else self._eps
        grouped = kind.startswith("group")
        self.correction = int(grouped if self._unbiased is None else self._unbiased)

    def check(self, samples_per_prompt: int) -> None:
        """Refuse groups of one image.

        Raises:
            ValueError: If groups are compared within and hold one image each.
        """
        if self.kind.startswith("group") and samples_per_prompt < 2:
            raise ValueError(
                f"`advantage_norm: {self.kind}` needs `samples_per_prompt` of at least 2, got "
                f"{samples_per_prompt}."
            )

    def __call__(self, rewards: Tensor, prompt_ids: Tensor, group_ids: Tensor) -> Tensor:
        """Return advantages [B] in float64, NaN where the reward is.

        Args:
            rewards: [B].
            prompt_ids: [B] integers.
            group_ids: [B] integers.
        """
        if self.kind == "per_prompt":
            return self.statistics.advantages(rewards, prompt_ids, self.eps)
        if self.kind == "batch":
            return batch_advantages(rewards, self.eps, self.correction)
        everywhere = self.kind == "group_mean"
        return group_advantages(rewards, group_ids, self.eps, self.correction, everywhere)
