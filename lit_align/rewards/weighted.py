"""A weighted sum of rewards, each brought to a common scale first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lit_align.rewards.base import Metadata, RewardModule, checked_scores


class WeightedReward(RewardModule):
    """``sum_k w_k (r_k - mean_k) / std_k``, NaN where any term is.

    Args:
        rewards: The terms by name.
        weights: A weight per name.
        normalize: "running" takes mean and std from all training samples so far (of all
            processes; evaluation leaves them alone), "none" uses 0 and 1.

    Raises:
        ValueError: If rewards and weights have different names.
    """

    def __init__(
        self,
        rewards: dict[str, RewardModule],
        weights: dict[str, float],
        normalize: Literal["running", "none"] = "running",
    ) -> None:
        super().__init__()
        if not rewards or rewards.keys() != weights.keys():
            raise ValueError(
                f"`rewards` and `weights` must name the same terms, got {sorted(rewards)} and "
                f"{sorted(weights)}."
            )
        if normalize not in ("running", "none"):
            raise ValueError(f"`normalize` must be 'running' or 'none', got {normalize!r}.")
        self.terms = torch.nn.ModuleDict(rewards).eval()
        self.weights = weights
        self.normalize = normalize
        self.differentiable = all(r.differentiable for r in rewards.values())  # type: ignore[misc]
        self.needs_prompt = any(r.needs_prompt for r in rewards.values())  # type: ignore[misc]
        scopes = {r.granularity for r in rewards.values()}
        self.granularity = next(  # type: ignore[misc]
            s for s in ("batchwise", "groupwise", "pointwise") if s in scopes
        )
        # Per term: count, sum and sum of squares of the scores seen in training.
        self.moments = torch.zeros(len(rewards), 3, dtype=torch.float64)
        self.eval()

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted sum [B]; see the base class."""
        # A gradient through some of the terms only would optimise something else.
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            scores = torch.stack(
                [
                    checked_scores(term, term(images, prompts, metadata, group_ids), len(images))
                    for term in self._terms()
                ]
            )  # [terms, B]
        if self.normalize == "running":
            if self.training:
                self._observe(scores.detach())
            mean, std = self._mean_and_std()
            scores = (scores - mean.to(scores)[:, None]) / std.to(scores)[:, None]
        weights = torch.tensor([self.weights[name] for name in self.terms])
        return weights.to(scores) @ scores

    def _terms(self) -> list[RewardModule]:
        return [term for term in self.terms.values() if isinstance(term, RewardModule)]

    def _observe(self, scores: Tensor) -> None:
        valid = ~scores.isnan()
        known = scores.where(valid, 0.0).double()
        new = torch.stack([valid.sum(1).double(), known.sum(1), known.square().sum(1)], dim=1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(new)
        self.moments += new.cpu()

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Return mean and std per term; 0 and 1 before two scores were seen."""
        count, total, squares = self.moments.unbind(1)
        mean = total / count.clamp(min=1)
        variance = squares / count.clamp(min=1) - mean.square()
        std = variance.clamp(min=0).sqrt()
        return mean, std.where((count > 1) & (std > 0), 1.0)

    def statistics(self) -> dict[str, Tensor]:
        """Return the moments of the terms' scores."""
        return {"moments": self.moments.clone()}

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Restore the moments."""
        self.moments = statistics["moments"].clone()
