"""The gold reward of the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_align.rewards.base import Metadata, RewardModule
from lit_align.shapes import grammar
from lit_align.shapes.scene import Facts
from lit_align.shapes.verifier import verify


class ShapesVerifier(RewardModule):
    """Share of the caption's facts that hold in the image, in [0, 1].

    The facts come from the metadata if there is any, else from the prompt. A prompt outside the
    caption grammar gets NaN.
    """

    needs_prompt = True

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores [B]; see the base class."""
        metadata = metadata or [None] * len(prompts)
        facts = [_facts(prompt, known) for prompt, known in zip(prompts, metadata, strict=True)]
        scores = torch.full((len(images),), torch.nan)
        scored = [i for i, fact in enumerate(facts) if fact is not None]
        if scored:
            scores[scored] = verify(images[scored], [f for f in facts if f is not None])
        return scores.to(images.device)


def _facts(prompt: str, metadata: dict[str, Any] | None) -> Facts | None:
    if metadata and "objects" in metadata:
        return Facts.from_metadata(metadata)
    return grammar.parse_if_caption(prompt)
