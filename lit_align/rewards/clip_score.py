"""Cosines of transformers' CLIP models: CLIPScore, and PickScore, a CLIP tuned to preferences.

CLIPScore   cos, 100 cos, or 2.5 max(cos, 0)        arXiv:2104.08718
PickScore   exp(logit_scale) cos                    arXiv:2305.01569
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from lit_align.rewards.pretrained import Dtype, DualEncoderReward
from lit_align.rewards.towers import CLIPRewardTower

_HESSEL_PREFIX = "A photo depicts "
_HESSEL_FACTOR = 2.5
_FLOW_GRPO_DIVISOR = 26


class _CLIPReward(DualEncoderReward):
    """A `DualEncoderReward` whose two encoders are a `CLIPRewardTower`."""

    def _open(self, pretrained: str, model: Any, tokenizer: Any) -> None:
        self.tower = CLIPRewardTower(None if model is not None else pretrained, model, tokenizer)
        self.tower.cast(self.dtype)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, d] float32; see the base class."""
        return self.tower.embed_images(images)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B, d] float32; prompts are cut after 77 tokens."""
        return self.tower.embed_text(prompts)


class CLIPScore(_CLIPReward):
    """How well an image fits its prompt, by CLIP: the cosine of their embeddings.

    Args:
        pretrained: A hub id or folder of transformers' `CLIPModel`.
            "openai/clip-vit-base-patch32" with the scale "hessel" is the paper's.
        scale: "cosine"; "100", the cosine times 100, not clipped; or "hessel",
            ``2.5 max(cos, 0)``, which has no gradient where the cosine is negative
            (arXiv:2104.08718).
        prefix: Before each prompt; by default nothing, and "A photo depicts " for "hessel".
        dtype: Of the frozen encoders: "float32", "bfloat16" or "float16".
        model: Use this `CLIPModel` instead, in place, with `tokenizer`.
        tokenizer: Of transformers, or its hub id or folder; by default that of `pretrained`.

    Raises:
        CheckpointError: If the checkpoint is not there, or lacks weights.
        ValueError: If `scale` or `dtype` is none of the words above.
    """

    scales = ("cosine", "100", "hessel")

    def __init__(
        self,
        pretrained: str = "openai/clip-vit-large-patch14",
        scale: Literal["cosine", "100", 100, "hessel"] = "cosine",
        prefix: str | None = None,
        dtype: Dtype = "float32",
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(dtype, scale=str(scale))  # YAML reads 100 as a number
        default = _HESSEL_PREFIX if self.scale == "hessel" else ""
        self.prefix = default if prefix is None else prefix
        self._open(pretrained, model, tokenizer)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B, d] float32; with the prefix, cut after 77 tokens."""
        return super().embed_text([self.prefix + prompt for prompt in prompts])

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B]; see the base class."""
        cosine = self.cosine(images, prompts)
        if self.scale == "hessel":
            return _HESSEL_FACTOR * cosine.clamp(min=0)
        return 100 * cosine if self.scale == "100" else cosine


class PickScore(_CLIPReward):
    """Which of several images people pick for a prompt, by a CLIP tuned on Pick-a-Pic.

    The softmax over the logits of a prompt's images tells the probabilities (arXiv:2305.01569).
    Logits of real images are at about 20.

    Args:
        pretrained: A hub id or folder of transformers' `CLIPModel`.
        tokenizer: Of transformers, or its hub id or folder.
        scale: "logit", the paper's ``exp(logit_scale) cos``; "cosine", as TDPO trains on
            (arXiv:2402.08552); or "flow_grpo", the logit over 26 (arXiv:2505.05470).
        dtype: Of the frozen encoders: "float32", "bfloat16" or "float16".
        model: Use this `CLIPModel` instead, in place.

    Raises:
        CheckpointError: If the checkpoint is not there, or lacks weights.
        ValueError: If `scale` or `dtype` is none of the words above.
    """

    scales = ("logit", "cosine", "flow_grpo")

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        tokenizer: Any = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scale: Literal["logit", "cosine", "flow_grpo"] = "logit",
        dtype: Dtype = "float32",
        model: Any = None,
    ) -> None:
        super().__init__(dtype, scale=scale)
        self._open(pretrained, model, tokenizer)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B]; see the base class."""
        cosine = self.cosine(images, prompts)
        if self.scale == "cosine":
            return cosine
        logit = self.tower.logit_scale.float().exp() * cosine
        return logit / _FLOW_GRPO_DIVISOR if self.scale == "flow_grpo" else logit
