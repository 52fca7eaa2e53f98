"""Diversity as a reward: how different is an image from the others of its prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lit_align.rewards.base import Metadata, RewardModule, granularity_of


class PairwiseDiversityReward(RewardModule):
    """Mean of 1 - cos of an image's embedding and those of the other images.

    Its mean over a group is the mean over all pairs of the group. Range [0, 2]; NaN for an image
    that has no other image, or whose embedding is not finite.

    Args:
        embedder: Maps images [B, 3, H, W] in [0, 1] to embeddings [B, D], by `embed_images` if it
            has that, else by its forward: `ShapesCLIP` in the shapes world, else
            `embedders.CLIPEmbedder` or `embedders.DreamSimEmbedder`.
        scope: "group" compares the images of one prompt draw (all images if there are no groups),
            "batch" those of the whole batch, over all processes, whose batches must be of one
            size.

    Raises:
        ValueError: If the scope is unknown.
    """

    def __init__(self, embedder: nn.Module, scope: Literal["group", "batch"] = "group") -> None:
        super().__init__()
        self.embedder = embedder.requires_grad_(False)
        self.scope = scope
        self.granularity = granularity_of(scope)  # type: ignore[misc]
        self.eval()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores [B]; see the base class."""
        own = self._embed(images)
        everyone, rank = (own, 0) if self.scope == "group" else _gather(own)
        others = torch.ones(len(own), len(everyone), dtype=torch.bool, device=own.device)
        others[:, rank * len(own) :].fill_diagonal_(False)
        if group_ids is not None and self.scope == "group":
            group_ids = group_ids.to(own.device)
            others &= group_ids[:, None] == group_ids
        others &= everyone.isfinite().all(dim=1)  # an image that failed spoils no other score
        cosines = own @ everyone.nan_to_num(0, 0, 0).T
        scores = 1 - cosines.where(others, 0).sum(dim=1) / others.sum(dim=1)
        return scores.where(others.any(dim=1), torch.nan).float().to(images.device)

    def _embed(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, D] in float64.

        Raises:
            ValueError: If the embedder does not return one vector per image.
        """
        embeddings: Tensor = getattr(self.embedder, "embed_images", self.embedder)(images)
        if embeddings.ndim != 2 or len(embeddings) != len(images):
            raise ValueError(
                f"The embedder {type(self.embedder).__name__} must return embeddings "
                f"[{len(images)}, D], got {list(embeddings.shape)}; flatten each image's."
            )
        return F.normalize(embeddings.double(), dim=1)


def _gather(own: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes, rank by rank, and this process's rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return own, 0
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.contiguous())
    return torch.cat(parts), dist.get_rank()
