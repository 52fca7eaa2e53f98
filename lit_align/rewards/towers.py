"""Towers of learned rewards: images and prompts in, features or a cosine out, differentiable.

A tower describes itself by `options`, plain values that `tower_from` builds an equal one of, so
that a reward opens from its own folder or checkpoint, without the model it was started from.
"""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from lit_align.functional.pixels import CLIP_MEAN, CLIP_STD, centre_square, normalise
from lit_align.hub import CheckpointError, opening
from lit_align.rewards.shapes_clip import ShapesCLIP, build_shapes_clip

_BLIP_TOKENS = 35  # as ImageReward cuts prompts


class RewardTower(nn.Module, ABC):
    """Features of images and their prompts.

    Args:
        model: The network, a transformers model.
        tokenizer: Of transformers, backed by a JSON description.
        mean, std: Of the network's pixels, by channel.
        max_tokens: Prompts are cut after as many; by default as the tokenizer says.

    Attributes:
        width: D of the features.
    """

    width: int

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mean: Sequence[float],
        std: Sequence[float],
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).float().eval()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens or int(tokenizer.model_max_length)
        self.mean, self.std = tuple(mean), tuple(std)

    @abstractmethod
    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return features [B, D] of images [B, 3, H, W] in [0, 1] and their B prompts."""

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine [B] of images and prompts; see `features`.

        Raises:
            ValueError: If the tower embeds them jointly only.
        """
        raise ValueError(
            f"{type(self).__name__} has no cosine of image and prompt; use the head 'linear' or "
            "'mlp', or a CLIPRewardTower."
        )

    @abstractmethod
    def stacks(self) -> list[list[nn.Module]]:
        """Return the encoders, each as its embeddings and then its layers, the lowest first."""

    def pixels(self, images: Tensor) -> Tensor:
        """Return what the network sees: the centre square, resized and normalised."""
        size = int(self.model.config.vision_config.image_size)
        return normalise(centre_square(images.float(), size), self.mean, self.std)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask [B, max_tokens], on the network's device."""
        found = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        device = self.model.device
        return found.input_ids.to(device), found.attention_mask.to(device)

    def options(self) -> dict[str, Any]:
        """Return plain values that `tower_from` builds an equal tower of."""
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # where it came from says nothing elsewhere
        return {
            "kind": type(self).__name__,
            "config": config,
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "pad_token": self.tokenizer.pad_token,
            "max_tokens": self.max_tokens,
            "mean": list(self.mean),
            "std": list(self.std),
        }


class CLIPRewardTower(RewardTower):
    """Two encoders; the features are image and text embedding and their product.

    Unit embeddings of width d are multiplied by sqrt(d), so that entries are about 1.

    Args:
        pretrained: A hub id or folder of transformers' `CLIPModel`.
        model: Use this one instead, with `tokenizer`.
        tokenizer: Of transformers, or its hub id or folder; by default that of `pretrained`.
        mean, std: Of the network's pixels, by channel.
        max_tokens: Prompts are cut after as many; by default what tokenizer and network take.

    Raises:
        ValueError: If neither, or both, of `pretrained` and `model` are given.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        max_tokens: int | None = None,
    ) -> None:
        model, tokenizer = _given(CLIPModel, pretrained, model, tokenizer)
        positions = int(model.config.text_config.max_position_embeddings)
        max_tokens = max_tokens or min(positions, int(tokenizer.model_max_length))
        super().__init__(model, tokenizer, mean, std, max_tokens)
        self.width = 3 * int(model.config.projection_dim)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, d] float32 of images [B, 3, H, W] in [0, 1]."""
        return image_embeddings(self.model, self.pixels(images))

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B, d] float32; equal prompts are embedded once."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        ids, _ = self.tokens(list(places))
        pooled = self.model.text_model(input_ids=ids).pooler_output
        embeddings = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
        rows = torch.tensor([places[prompt] for prompt in prompts], device=embeddings.device)
        return embeddings[rows]

    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return features [B, 3 d]; see the base class."""
        scale = (self.width / 3) ** 0.5
        image, text = scale * self.embed_images(images), scale * self.embed_text(prompts)
        return torch.cat([image, text, image * text], dim=-1)

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine [B]; see the base class."""
        return (self.embed_images(images) * self.embed_text(prompts)).sum(dim=-1)

    def cast(self, dtype: torch.dtype) -> None:
        """Run the encoders in `dtype`; the logit scale and the embeddings stay float32."""
        for encoder in self.model.children():
            encoder.to(dtype)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature, a scalar."""
        scale: nn.Parameter = self.model.logit_scale
        return scale

    def stacks(self) -> list[list[nn.Module]]:
        """Return the two encoders; see the base class."""
        vision, text = self.model.vision_model, self.model.text_model
        first = nn.ModuleList([vision.embeddings, vision.pre_layrnorm])
        return [[first, *vision.encoder.layers], [text.embeddings, *text.encoder.layers]]


class BLIPRewardTower(RewardTower):
    """A text encoder that attends to the image; the features are its first token's (ImageReward).

    Args:
        pretrained: A hub id or folder of transformers' `BlipForImageTextRetrieval`.
        model: Use this one instead, with `tokenizer`.
        tokenizer: By default that of `pretrained`.
        mean, std: Of the network's pixels, by channel.
        max_tokens: Prompts are cut after as many.

    Raises:
        ValueError: If neither, or both, of `pretrained` and `model` are given.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        max_tokens: int | None = _BLIP_TOKENS,
    ) -> None:
        heads = ("vision_proj.", "text_proj.", "itm_head.")
        model, tokenizer = _given(BlipForImageTextRetrieval, pretrained, model, tokenizer, heads)
        # Heads that no score depends on would never get a gradient.
        model.vision_proj = model.text_proj = model.itm_head = nn.Identity()
        super().__init__(model, tokenizer, mean, std, max_tokens)
        self.width = int(model.config.text_config.hidden_size)

    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return features [B, D]; see the base class."""
        seen = self.model.vision_model(pixel_values=self.pixels(images)).last_hidden_state
        ids, mask = self.tokens(prompts)
        read = self.model.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, return_dict=True
        )
        hidden: Tensor = read.last_hidden_state[:, 0]
        return hidden

    def stacks(self) -> list[list[nn.Module]]:
        """Return the two encoders; see the base class."""
        vision, text = self.model.vision_model, self.model.text_encoder
        return [
            [vision.embeddings, *vision.encoder.layers],
            [text.embeddings, *text.encoder.layer],
        ]


def shapes_tower(pretrained: str | None = "shapes-clip", width: int = 64) -> CLIPRewardTower:
    """Return the tower of the shapes world.

    Args:
        pretrained: "shapes-clip" starts from the shipped dual encoder, a folder from that of
            `ShapesCLIP.save_pretrained`; None from random weights.
        width: Of the random weights' layers, a multiple of 4.
    """
    folder = None if pretrained == "shapes-clip" else pretrained
    encoder = build_shapes_clip(width) if pretrained is None else ShapesCLIP(folder)
    return CLIPRewardTower(
        model=encoder.model, tokenizer=encoder.tokenizer, mean=[0.5] * 3, std=[0.5] * 3
    )


def image_embeddings(model: Any, pixels: Tensor) -> Tensor:
    """Return unit embeddings [B, d] float32 of normalised pixels [B, 3, H, W].

    Args:
        model: A `CLIPModel`, or what has its `vision_model` and `visual_projection`.
        pixels: Are cast to the dtype of its weights.
    """
    projection: nn.Linear = model.visual_projection
    pooled = model.vision_model(pixel_values=pixels.to(projection.weight.dtype)).pooler_output
    return F.normalize(projection(pooled).float(), dim=-1)


def open_network(kind: Any, pretrained: str, unused: Sequence[str] = ()) -> Any:
    """Return a network of transformers, float32, with all of its weights.

    Args:
        kind: Its class.
        pretrained: A hub id or folder.
        unused: Prefixes of weights that nobody reads, so that they may be missing.

    Raises:
        CheckpointError: If it is not there, or others are missing, which transformers would leave
            random with no more than a warning.
    """
    with opening(pretrained, "model.safetensors"):
        network, told = kind.from_pretrained(
            pretrained, dtype=torch.float32, output_loading_info=True
        )
    lost = sorted(name for name in told["missing_keys"] if not name.startswith(tuple(unused)))
    if lost:
        raise CheckpointError(
            f"{pretrained!r} lacks {len(lost)} weights of a {kind.__name__}, such as {lost[0]!r}; "
            "give a checkpoint of the whole network."
        )
    return network


def open_tokenizer(pretrained: str) -> Any:
    """Return the tokenizer of a hub id or folder.

    Raises:
        CheckpointError: If it is not there.
    """
    with opening(pretrained, "tokenizer.json", whole=False):
        return AutoTokenizer.from_pretrained(pretrained)


def _given(
    kind: Any, pretrained: str | None, model: Any, tokenizer: Any, unused: Sequence[str] = ()
) -> tuple[Any, Any]:
    """Return the network and the tokenizer that the arguments name."""
    if (pretrained is None) == (model is None):
        raise ValueError("Give a tower either `pretrained` or `model`.")
    tokenizer = tokenizer or pretrained
    if tokenizer is None:
        raise ValueError("A tower made of a `model` needs its `tokenizer`.")
    if isinstance(tokenizer, str):  # first, as it is small and may be missing
        tokenizer = open_tokenizer(tokenizer)
    if pretrained is not None:
        model = open_network(kind, pretrained, unused)
    return model, tokenizer


# Class of the tower, and what makes its network of a configuration.
_KINDS: dict[str, tuple[Callable[..., RewardTower], Callable[[dict[str, Any]], Any]]] = {
    "CLIPRewardTower": (CLIPRewardTower, lambda config: CLIPModel(CLIPConfig.from_dict(config))),
    "BLIPRewardTower": (
        BLIPRewardTower,
        lambda config: BlipForImageTextRetrieval(BlipConfig.from_dict(config)),
    ),
}


def tower_from(options: dict[str, Any]) -> RewardTower:
    """Return a tower with random weights that is otherwise the one that `options` tell of.

    Raises:
        ValueError: If they name no tower of this package.
    """
    if options.get("kind") not in _KINDS:
        raise ValueError(
            f"There is no tower {options.get('kind')!r}; known are {', '.join(_KINDS)}."
        )
    tower, network = _KINDS[options["kind"]]
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer is read from a file only
        path = Path(folder, "tokenizer.json")
        path.write_text(options["tokenizer"], encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(path), pad_token=options["pad_token"]
        )
    given = {name: options[name] for name in ("mean", "std", "max_tokens")}
    return tower(model=network(options["config"]), tokenizer=tokenizer, **given)
