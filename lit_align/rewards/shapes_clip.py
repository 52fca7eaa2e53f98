"""A small dual encoder of images and captions: the CLIP score of the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer

from lit_align.rewards.base import Metadata, RewardModule
from lit_align.shapes import ASSETS
from lit_align.shapes.scene import IMAGE_SIZE
from lit_align.shapes.tokens import MAX_TOKENS, tokenizer_options


class ShapesCLIP(RewardModule):
    """Cosine similarity of image and caption embeddings, in [-1, 1].

    Args:
        pretrained: A folder written by `save_pretrained`, the shipped encoder if None.
        model: Use this dual encoder instead (with the tokenizer of the shapes world).

    Attributes:
        model: The `CLIPModel`, frozen unless it is being pretrained.
    """

    differentiable = True
    needs_prompt = True

    def __init__(self, pretrained: str | None = None, model: CLIPModel | None = None) -> None:
        super().__init__()
        if model is None:
            folder = pretrained or str(ASSETS / "shapes-clip")
            model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = CLIPTokenizer(**tokenizer_options())

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the cosines [B]; see the base class."""
        with torch.no_grad():
            text = self.embed_text(prompts)
        return (self.embed_images(images) * text).sum(dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, D] of images [B, 3, H, W] in [0, 1]."""
        size = (IMAGE_SIZE, IMAGE_SIZE)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        pooled = self.model.vision_model(pixel_values=images.float() * 2 - 1).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B, D]; prompts are cut after 14 words."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(self.model.device)
        pooled = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the inverse temperature, a scalar parameter."""
        scale: Tensor = self.model.logit_scale
        return scale

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `ShapesCLIP(path)` and transformers' `CLIPModel` read."""
        self.model.to(dtype or torch.float32).save_pretrained(path)
        self.model.float()
        self.tokenizer.save_pretrained(path)


def build_shapes_clip(width: int = 64, layers: int = 3) -> ShapesCLIP:
    """Return a dual encoder with random weights and a `width`-dimensional embedding."""
    tokenizer = CLIPTokenizer(**tokenizer_options())
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    vision = {"image_size": IMAGE_SIZE, "patch_size": 4, "num_hidden_layers": layers, **sizes}
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=width)
    return ShapesCLIP(model=CLIPModel(config))
