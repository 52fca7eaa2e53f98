"""The contract of a reward: images and prompts in, one float32 score per image out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Metadata = Sequence[dict[str, Any] | None]


class RewardModule(nn.Module, ABC):
    """Scores images; higher is better.

    A reward is frozen, float32, and kept outside the module tree of whoever uses it. An image
    that could not be scored (no face, no text found, server failed) gets NaN: it is masked and
    counted, never scored 0.

    Attributes:
        differentiable: Whether gradient flows from the score to the pixels.
        needs_prompt: Whether the score depends on the prompt.
        granularity: "pointwise" if each image is scored alone, "groupwise" if the images of one
            prompt are scored together, "batchwise" if the whole batch is.
        reads_videos: Whether it takes videos [B, F, 3, H, W] whole. Of any other reward the score
            of a video is the mean over its frames.
    """

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False
    granularity: ClassVar[Literal["pointwise", "groupwise", "batchwise"]] = "pointwise"
    reads_videos: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name in logs and tables: the class name."""
        return type(self).__name__

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Score images.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B prompts as the user wrote them.
            metadata: What is known of each prompt, B entries.
            group_ids: [B] int64, equal for images of one prompt draw.

        Returns:
            [B] float32; NaN where an image could not be scored.
        """

    def train(self, mode: bool = True) -> RewardModule:
        """Say whether scores are for training; networks inside stay in evaluation mode."""
        super().train(False)
        self.training = mode
        return self

    def statistics(self) -> dict[str, Tensor]:
        """Return what the reward learned from scores during training, for the checkpoint."""
        return {}

    def load_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Restore what `statistics` returned."""


def granularity_of(scope: str) -> Literal["groupwise", "batchwise"]:
    """Return the granularity of a reward that compares the images of a `scope`.

    Raises:
        ValueError: If it is neither "group" nor "batch".
    """
    if scope not in ("group", "batch"):
        raise ValueError(f"`scope` must be 'group' or 'batch', got {scope!r}.")
    return "groupwise" if scope == "group" else "batchwise"


def checked_scores(reward: RewardModule, scores: Any, batch: int) -> Tensor:
    """Return `scores` if they keep the contract.

    Raises:
        TypeError: If they are no float32 tensor.
        ValueError: If their shape is not [B].
    """
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32:
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{reward.name} must return a float32 tensor, got {kind}.")
    if scores.shape != (batch,):
        raise ValueError(
            f"{reward.name} must return one score per image, shape [{batch}], got "
            f"{list(scores.shape)}; a trailing dimension is removed by `.squeeze(-1)`."
        )
    return scores


def uint8_images(images: Tensor) -> Tensor:
    """Return images [..., 3, H, W] in [0, 1] as rounded uint8 [..., H, W, 3] on the CPU."""
    return (images.detach() * 255).round().clamp(0, 255).byte().movedim(-3, -1).cpu()


def quantize(images: Tensor) -> Tensor:
    """Round images in [0, 1] to the 256 levels that a file holds, so that scores refer to it."""
    return (images * 255).round() / 255
