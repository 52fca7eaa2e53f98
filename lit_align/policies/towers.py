"""Frozen image towers of CLIP models, for critics that look at intermediate images."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_align.functional.pixels import CLIP_MEAN, CLIP_STD, centre_square, normalise
from lit_align.hub import opening
from lit_align.policies.loading import Dtype, torch_dtype


class ImageTower(nn.Module, ABC):
    """Images in, unit embeddings out; a subclass sets `image_size` and implements `features`.

    Args:
        mean: Of the pixels in training, per channel.
        std: The same of their standard deviation.

    Attributes:
        image_size: Side of the square images that the network reads.
    """

    image_size: int

    def __init__(self, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Return embeddings [B, D] of normalised `pixels` in the weights' dtype."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, D] float32 of images [B, 3, H, W] in [0, 1].

        The short side is scaled to `image_size`, the long one cropped in the centre, as in CLIP.
        """
        pixels = normalise(centre_square(images.float(), self.image_size), self.mean, self.std)
        embeddings = self.features(pixels.to(next(self.parameters()).dtype))
        return F.normalize(embeddings.float(), dim=-1)

    def _freeze(self, dtype: Dtype, image_size: Any) -> None:
        sides = {image_size} if isinstance(image_size, int) else set(image_size)
        if len(sides) != 1:
            raise ValueError(f"The tower must read square images, but reads {image_size}.")
        (self.image_size,) = sides
        self.requires_grad_(False).eval().to(torch_dtype(dtype))


class CLIPTower(ImageTower):
    """The image tower of a transformers `CLIPModel`.

    "openai/clip-vit-large-patch14" (D = 768) is the critic's tower for the aesthetic score in
    arXiv:2402.08552, "yuvalkirstain/PickScore_v1" (ViT-H, D = 1024) the one for PickScore.

    Args:
        pretrained: A hub id, or a folder written by `save_pretrained`.
        dtype: Of the frozen weights.
        model: Use this `CLIPModel` or `CLIPVisionModelWithProjection` instead, in place.

    Raises:
        ValueError: If `pretrained` lacks weights of such a tower.
    """

    def __init__(
        self,
        pretrained: str = "openai/clip-vit-large-patch14",
        dtype: Dtype = "float32",
        model: Any = None,
    ) -> None:
        super().__init__()
        model = _load_clip(pretrained) if model is None else model
        self.vision_model: Any = model.vision_model
        self.visual_projection: Any = model.visual_projection
        self._freeze(dtype, self.vision_model.config.image_size)

    def features(self, pixels: Tensor) -> Tensor:
        """Return embeddings [B, D]; see the base class."""
        pooled = self.vision_model(pixel_values=pixels).pooler_output
        projected: Tensor = self.visual_projection(pooled)
        return projected


def _load_clip(pretrained: str) -> Any:
    from transformers import CLIPModel

    load: Any = CLIPModel.from_pretrained
    with opening(pretrained, "config.json"):
        model, told = load(pretrained, dtype=torch.float32, output_loading_info=True)
    # transformers only warns of these, and leaves them random.
    parts = ("vision_model.", "visual_projection.")
    lost = sorted(name for name in told["missing_keys"] if name.startswith(parts))
    if lost:
        raise ValueError(
            f"{pretrained!r} lacks {len(lost)} weights of a CLIP image tower, such as {lost[0]!r}; "
            "give a whole CLIPModel, or use OpenCLIPTower for a checkpoint of open_clip."
        )
    return model


class OpenCLIPTower(ImageTower):
    """The image tower of an open_clip model, by default that of HPSv2 before its fine-tuning.

    For HPSv2 itself (D = 1024) download its checkpoint, such as "HPS_v2_compressed.pt", and give
    the path as `pretrained`.

    Args:
        model_name: As in `open_clip.list_models()`.
        pretrained: A checkpoint file, or a tag as in `open_clip.list_pretrained()`.
        dtype: Of the frozen weights.
        model: Use this open_clip model instead, in place.

    Raises:
        ValueError: If the model's name or its weights are unknown, or do not fit together.
    """

    def __init__(
        self,
        model_name: str = "ViT-H-14",
        pretrained: str = "laion2b_s32b_b79k",
        dtype: Dtype = "float32",
        model: Any = None,
    ) -> None:
        import open_clip

        model = _open(model_name, pretrained) if model is None else model
        config = open_clip.get_model_preprocess_cfg(model)
        super().__init__(config.get("mean", CLIP_MEAN), config.get("std", CLIP_STD))
        self.visual: Any = model.visual
        self._freeze(dtype, self.visual.image_size)

    def features(self, pixels: Tensor) -> Tensor:
        """Return embeddings [B, D]; see the base class."""
        embeddings: Tensor = self.visual(pixels)
        return embeddings


def _open(model_name: str, pretrained: str) -> Any:
    import open_clip

    config = open_clip.get_model_config(model_name)
    if config is None:
        near = difflib.get_close_matches(model_name, open_clip.list_models(), n=5, cutoff=0.4)
        raise ValueError(f"open_clip has no model {model_name!r}; near: {', '.join(near)}.")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if Path(pretrained).is_file():
        # Only the image tower is loaded, so the smallest of text towers will do.
        text = {"context_length": 1, "vocab_size": 2, "width": 1, "heads": 1, "layers": 1}
        quick_gelu = config.get("quick_gelu", False)
        model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text, quick_gelu)
        _load_visual(model.visual, model_name, pretrained)
        return model
    if pretrained not in tags:
        raise ValueError(
            f"`pretrained`: there is no file {pretrained!r}, and {model_name} has no such tag; "
            f"give the path of a checkpoint, or one of: {', '.join(tags) or 'none'}."
        )
    source = open_clip.get_pretrained_cfg(model_name, pretrained).get("hf_hub") or pretrained
    try:
        return open_clip.create_model(model_name, pretrained=pretrained)
    except RuntimeError as error:  # how open_clip tells that it could not fetch a file
        with opening(source.strip("/"), "open_clip_model.safetensors"):
            raise OSError(str(error)) from error


def _load_visual(visual: nn.Module, model_name: str, path: str) -> None:
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("state_dict", stored)
    named = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    mark = "visual."
    found = {n.removeprefix(mark): tensor for n, tensor in named.items() if n.startswith(mark)}
    try:
        visual.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(
            f"{path!r} does not hold the image tower of {model_name}; set `model_name` to the "
            f"architecture that it was trained with ({str(error)[:400]})."
        ) from error
