"""The colour of a picture of the shapes world, as a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.rewards.base import Metadata
from lit_align.rewards.composition import named_objects
from lit_align.shapes.scene import COLORS
from lit_align.shapes.verifier import detect_batch


class ShapesColor(nn.Module):
    """Classifies images by the colour of their largest object.

    It measures the choice that a caption leaves open, so an image whose caption states the colour
    of any object is not classified; a prompt that is no caption states none.

    Attributes:
        classes: The names of the K = 6 classes.
    """

    classes = tuple(COLORS)

    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return one-hot scores [B, K] float32, NaN rows where there is no object or no choice.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B prompts.
            metadata: What is known of each prompt, B entries; "objects" go before the prompt.
        """
        metadata = metadata or [None] * len(prompts)
        scores = torch.zeros(len(images), len(self.classes))
        found = detect_batch(images)
        for row, seen, prompt, known in zip(scores, found, prompts, metadata, strict=True):
            if not seen or _states_color(prompt, known):
                row.fill_(torch.nan)
            else:
                row[self.classes.index(seen[0].color)] = 1.0
        return scores.to(images.device)


def _states_color(prompt: str, metadata: dict[str, Any] | None) -> bool:
    objects = named_objects(prompt, metadata) or []
    return any(isinstance(o, dict) and o.get("color") is not None for o in objects)
