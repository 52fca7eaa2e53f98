"""MPS, the multi-dimensional preference score, its released overall head (CVPR 2024).

    score = cos(EOS, fused_0)

EOS is CLIP's embedding of the prompt. fused_0 is the first token of the image after four layers
in which the image's tokens attend to those tokens j of the prompt that concern quality: where

    max_i <condition_i, text_j>, over its maximum, is above a threshold,

with the tokens i of a fixed list of words, `CONDITION`. The authors' code takes the maximum over
the batch, so that scores depend on what else is scored; here it is the prompt's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from lit_align.functional.pixels import centre_square, normalise
from lit_align.hub import CheckpointError, checkpoint_file
from lit_align.rewards.pretrained import (
    Dtype,
    PretrainedReward,
    PromptCache,
    load_strictly,
    read_weights,
)
from lit_align.rewards.towers import open_tokenizer

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
_THRESHOLD = 0.3  # of the authors' evaluation; their model's own code has 0.01
_PROMPTS_KEPT = 256  # 78 vectors of 1024 numbers each, 320 kB

# CLIP ViT-H/14, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K".
_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "hidden_act": "gelu",
}
_VISION: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
_WIDTH = 1024


class MPSNetwork(nn.Module):
    """CLIP and the layers that join its tokens, with random weights.

    Args:
        width: Of CLIP's joint space.
        heads: Of the joining layers.
        head_width: Of each.
        layers: How many join.
        vision: Changes to the configuration of the released image encoder.
        text: The same for the text encoder.
    """

    def __init__(
        self,
        width: int = _WIDTH,
        heads: int = 16,
        head_width: int = 64,
        layers: int = 4,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        joint = {"projection_dim": width}
        seen, read = _VISION | (vision or {}) | joint, _TEXT | (text or {}) | joint
        self.image_size = int(seen["image_size"])
        self.max_tokens = int(read["max_position_embeddings"])
        self.clip = CLIPModel(
            CLIPConfig(vision_config=seen, text_config=read, projection_dim=width)
        )
        self.cross = CrossModel(width, heads, head_width, layers)

    def text_features(self, ids: Tensor) -> Tensor:
        """Return the features [B, T + 1, D] of tokens [B, T], and of their end as the last one."""
        read = self.clip.text_model(input_ids=ids)
        tokens, end = read.last_hidden_state, read.pooler_output[:, None]
        features: Tensor = self.clip.text_projection(torch.cat([tokens, end], dim=1))
        return features

    def forward(self, pixels: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """Return the fused features [B, D].

        Args:
            pixels: [B, 3, H, W], normalised.
            tokens: [B, T, D] features of the prompts' tokens.
            seen: [B, T] which of them the image attends to.
        """
        dtype = self.clip.visual_projection.weight.dtype
        # Without the encoder's last normalisation, as the joining layers were trained.
        image = self.clip.vision_model(pixel_values=pixels.to(dtype)).last_hidden_state
        fused: Tensor = self.cross(self.clip.visual_projection(image), tokens.to(dtype), seen)
        return fused[:, 0]

    def load_original(self, weights: Any, source: str) -> None:
        """Load weights that have the original's names, all of them.

        Args:
            weights: A tensor by name.
            source: What they came from, for messages.

        Raises:
            CheckpointError: If one is missing, unknown, or of another shape.
        """
        if isinstance(weights, dict):  # else refused by what follows
            weights = {
                renamed(name): weight for name, weight in weights.items() if not _constant(name)
            }
        load_strictly(self, weights, source)


class CrossModel(nn.Module):
    """Layers in which tokens of an image attend to a text's, and then to each other.

    Queries have several heads, keys and values one (arXiv:1911.02150); beside each attention
    stands a SwiGLU network (arXiv:2002.05202).

    Args:
        width: Of the tokens.
        heads: Of the queries.
        head_width: Of each.
        layers: How many.
    """

    def __init__(self, width: int, heads: int, head_width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [_CrossBlock(width, heads, head_width), _SelfBlock(width, heads, head_width)]
            )
            for _ in range(layers)
        )

    def forward(self, image: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        """Return image tokens [B, N, D]; text tokens [B, T, D] count where seen [B, T]."""
        for layer in self.layers:
            across, among = layer.children()
            image = image + across(image, text, seen)
            image = image + among(image)
        return image


class _SwiGLU(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        values, gate = values.chunk(2, dim=-1)
        return F.silu(gate) * values


class _CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 8 * width, bias=False),
            _SwiGLU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, image: Tensor, text: Tensor, seen: Tensor) -> Tensor:
        image = self.norm(image)
        keys, values = self.to_kv(text).chunk(2, dim=-1)
        attended = _attention(self.to_q(image), keys, values, self.heads, seen)
        out: Tensor = self.to_out(attended) + self.ff(image)
        return out


class _SelfBlock(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = (heads * head_width, head_width, head_width, 8 * width)
        self.norm = nn.LayerNorm(width, bias=False)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * head_width, width, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, image: Tensor) -> Tensor:
        inner = self.fused_attn_ff_proj(self.norm(image))
        queries, keys, values, wide = inner.split(self.parts, dim=-1)
        turned = rotary(queries.unflatten(-1, (self.heads, -1)), dim=1).flatten(-2)
        attended = _attention(turned, rotary(keys, dim=1), values, self.heads)
        out: Tensor = self.attn_out(attended) + self.ff_out(wide)
        return out


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, heads: int, seen: Tensor | None = None
) -> Tensor:
    """Return [B, N, heads d] of queries [B, N, heads d]; keys and values [B, T, d]."""
    split = queries.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, N, d]
    mask = None if seen is None else seen[:, None, None]
    keys, values = (part[:, None].expand(-1, heads, -1, -1) for part in (keys, values))
    attended = F.scaled_dot_product_attention(split, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).flatten(-2)


def rotary(values: Tensor, dim: int) -> Tensor:
    """Return values [..., d] turned by their position along `dim` (arXiv:2104.09864).

    The pair (k, k + d / 2) is turned by position / 10000^(2 k / d).
    """
    half = values.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, device=values.device, dtype=torch.float32) / half)
    places = torch.arange(values.shape[dim], device=values.device, dtype=torch.float32)
    angles = places.view(-1, *[1] * (values.ndim - dim - 1)) * rates
    cos, sin = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    first, second = values.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class MPS(PretrainedReward):
    """The multi-dimensional preference score of an image, its overall quality for its prompt.

    Args:
        checkpoint: A hub id or folder that holds `model.safetensors`, or a file of weights by
            name, such as "MPS_overall.pth". The authors' own file is a pickled module and is
            refused: opening it would run its code.
        threshold: Below which a word of the prompt is not looked at, relative to the one that
            concerns quality most; the authors evaluate with 0.3, their model's code has 0.01.
        scale: "cosine", or "logit", the cosine times CLIP's exp(logit_scale), about 100.
        dtype: Of the network; see `PretrainedReward`.
        model: Use this network instead of `checkpoint`.
        tokenizer: A hub id or folder, or a tokenizer of transformers. Padding is looked at as
            well, so that it matters what the tokenizer pads with.

    Raises:
        CheckpointError: If a file is not at hand or not of this network.
        ValueError: If an option is unknown or out of its range.
    """

    needs_prompt = True
    scales = ("cosine", "logit")

    def __init__(
        self,
        checkpoint: str = "RE-N-Y/mpsv1",
        threshold: float = _THRESHOLD,
        scale: Literal["cosine", "logit"] = "cosine",
        dtype: Dtype = "float32",
        model: MPSNetwork | None = None,
        tokenizer: Any = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ) -> None:
        super().__init__(dtype=dtype, scale=scale)
        if not 0 <= threshold < 1:
            raise ValueError(f"`threshold` must be in [0, 1), got {threshold}.")
        self.threshold = threshold
        if model is None:
            path = checkpoint_file(checkpoint, "model.safetensors")
            weights = _weights(path)  # first, as the file may be wrong
            model = MPSNetwork()
            model.load_original(weights, repr(str(path)))
        self.model = self.frozen(model)
        self.tokenizer = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.texts = PromptCache(_PROMPTS_KEPT)

    @property
    def name(self) -> str:
        """The name in logs; with the scale and the threshold if they are not the default."""
        default = self.threshold == _THRESHOLD
        return super().name if default else f"{super().name}-{self.threshold:g}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B]; see the base class."""
        text = self.texts([*prompts, CONDITION], self._encode, images.device)
        tokens, end = text[:-1, :-1], text[:-1, -1]
        seen = relevance(tokens, text[-1, :-1]) > self.threshold
        fused = self.model(normalise(centre_square(images, self.model.image_size)), tokens, seen)
        cosine = F.cosine_similarity(end.float(), fused.float(), dim=1)
        if self.scale == "cosine":
            return cosine
        return self.model.clip.logit_scale.float().exp() * cosine

    def _encode(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.model.max_tokens,
            return_tensors="pt",
        )
        return self.model.text_features(tokens.input_ids.to(self.model.clip.device))


def relevance(tokens: Tensor, condition: Tensor) -> Tensor:
    """Return how much tokens [B, T, D] concern a condition [C, D]: [B, T], at most 1.

    Each is its largest product with a token of the condition, over the prompt's largest.
    """
    largest = (tokens.float() @ condition.float().T).amax(dim=2)
    return largest / largest.amax(dim=1, keepdim=True)


def renamed(name: str) -> str:
    """Return the name of a weight of the authors' in `MPSNetwork`."""
    name = name.removeprefix("mps.")  # of the hub's copy
    name = re.sub(r"^cross_model\.(.*)", lambda m: "cross." + m[1].replace(".fn.", "."), name)
    return re.sub(r"^model\.", "clip.", name)


def _constant(name: str) -> bool:
    """Return whether a weight is none: rates, zeros, and 0, 1, 2, ..."""
    return name.endswith(("rotary_emb.inv_freq", ".fn.norm.bias", "embeddings.position_ids"))


def _weights(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return read_weights(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} If it is the authors' file of MPS, a pickled module, give a file of its "
            "weights by name, such as the hub's RE-N-Y/mpsv1."
        ) from error
