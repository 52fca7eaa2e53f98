"""Image embeddings in which images can be compared: for diversity, as a reward and as a metric.

Both are used as ``embedder(images)`` by the metrics and as ``embedder.embed_images(images)`` by
`PairwiseDiversityReward`; images are [B, 3, H, W] in [0, 1], embeddings unit vectors [B, D].
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from lit_align.functional.pixels import centre_square, normalise, resize
from lit_align.hub import CheckpointError
from lit_align.rewards.towers import image_embeddings, open_network

_DREAMSIM_SIZE = 224
_KINDS = (
    "ensemble",
    "dino_vitb16",
    "dinov2_vitb14",
    "clip_vitb32",
    "open_clip_vitb32",
    "synclr_vitb16",
)


class CLIPEmbedder(nn.Module):
    """Embeddings of CLIP's image encoder: what an image shows, more than how.

    Args:
        pretrained: A hub id or folder of a transformers CLIP model.
        model: Use this `CLIPVisionModelWithProjection` or `CLIPModel` instead.

    Raises:
        CheckpointError: If `pretrained` is not at hand or lacks weights.
    """

    def __init__(
        self, pretrained: str = "openai/clip-vit-large-patch14", model: Any = None
    ) -> None:
        super().__init__()
        if model is None:
            model = open_network(CLIPVisionModelWithProjection, pretrained)
        self.vision_model: Any = model.vision_model.requires_grad_(False).eval()
        self.visual_projection: Any = model.visual_projection.requires_grad_(False)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, D] float32; gradients reach the pixels."""
        size = int(self.vision_model.config.image_size)
        return image_embeddings(self, normalise(centre_square(images.float(), size)))

    forward = embed_images


class DreamSimEmbedder(nn.Module):
    """Embeddings of DreamSim, tuned to what people find alike; the extra `dreamsim`.

    The mean of 1 - cos over the pairs of a prompt's images is the diversity of arXiv:2306.09344.
    The package fetches its weights from GitHub on the first use, and keeps them in a folder.

    Args:
        kind: "ensemble", of three encoders, or a single one: "dino_vitb16", "dinov2_vitb14",
            "clip_vitb32", "open_clip_vitb32" or "synclr_vitb16".
        cache_dir: The folder with the weights.
        model: Use this DreamSim model instead.

    Raises:
        CheckpointError: If the weights are not at hand and cannot be fetched.
        ImportError: If the extra is not installed.
        ValueError: If the kind is unknown.
    """

    def __init__(
        self, kind: str = "ensemble", cache_dir: str = "./models", model: Any = None
    ) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(_KINDS)}, got {kind!r}.")
        model = _dreamsim(kind, cache_dir) if model is None else model
        self.model = model.requires_grad_(False).eval()

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, D] float32; gradients reach the pixels."""
        pixels = resize(images.float(), _DREAMSIM_SIZE, _DREAMSIM_SIZE)
        for part in self.model.modules():  # the package's encoders remember where they were made
            if "device" in vars(part):
                part.device = pixels.device
        # The package squeezes what the encoders return: a single image may lose its first axis.
        embeddings: Tensor = self.model.embed(pixels).reshape(len(images), -1)
        return F.normalize(embeddings.float(), dim=1)

    forward = embed_images


def _dreamsim(kind: str, cache_dir: str) -> Any:
    """Return the model of the package, on the CPU.

    Raises:
        CheckpointError: If its weights cannot be had.
        ImportError: If it is not installed.
    """
    try:
        from dreamsim import dreamsim
    except ImportError as error:
        raise ImportError(
            'DreamSimEmbedder needs dreamsim: pip install "lit-align[dreamsim]"; or use '
            "CLIPEmbedder."
        ) from error
    try:
        model, _ = dreamsim(device="cpu", cache_dir=cache_dir, dreamsim_type=kind)
    except OSError as error:
        raise CheckpointError(
            f"DreamSim {kind!r} is not in {cache_dir!r} and could not be fetched ({error}). Run it "
            "once where there is a network, from dreamsim import dreamsim; dreamsim("
            f"cache_dir={cache_dir!r}, dreamsim_type={kind!r}), and copy the folder."
        ) from error
    return model
