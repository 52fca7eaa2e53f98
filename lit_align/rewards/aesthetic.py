"""LAION's aesthetic predictors: an affine function of a CLIP image embedding.

    score = w . e / |e| + b,  e the embedding of CLIP ViT-L/14

v1  one linear layer, github.com/LAION-AI/aesthetic-predictor
v2  five linear layers with nothing between them but dropout, so that in use they are one:
    "sac+logos+ava1-l14-linearMSE", github.com/christophschuhmann/improved-aesthetic-predictor
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from lit_align.functional.pixels import centre_square, normalise
from lit_align.hub import CheckpointError, checkpoint_file
from lit_align.rewards.pretrained import Dtype, PretrainedReward, read_weights
from lit_align.rewards.towers import image_embeddings, open_network

_HUB = "trl-lib/ddpo-aesthetic-predictor"
_FILES = {"v2": "aesthetic-model.pth", "v1": "sa_0_4_vit_l_14_linear.pth"}
_V1_ADDRESS = "https://github.com/LAION-AI/aesthetic-predictor"
_LAYERS = {"v2": tuple(f"layers.{n}." for n in (0, 2, 4, 6, 7)), "v1": ("",)}
_UNUSED = ("text_model.", "text_projection.", "logit_scale")


class AestheticScore(PretrainedReward):
    """How beautiful people find an image, about 1 to 10; about 5 is common. Reads no prompt.

    Args:
        version: "v2", which DDPO, TDPO and AlignProp train on, or "v1".
        checkpoint: The head: a hub id, a folder, or a file; for "v2" by default that of the hub's
            "trl-lib/ddpo-aesthetic-predictor". "v1" is not on the hub and needs the path of
            `sa_0_4_vit_l_14_linear.pth`. The file `*-reluMSE.pth` beside v2's, which has the same
            shapes, is a network with activations and is refused by its name.
        backbone: A hub id or folder of transformers' `CLIPModel`, the one that the head was
            trained on.
        dtype: Of the frozen backbone: "float32", "bfloat16" or "float16".
        model: Use this `CLIPModel` or `CLIPVisionModelWithProjection` instead, in place.
        head: Use these weights by name instead of `checkpoint`.

    Attributes:
        head: The head as one linear layer, float32.

    Raises:
        CheckpointError: If a checkpoint is not there, or is no such head.
        ValueError: If `version` or `dtype` is none of the words above, both `checkpoint` and `head`
            are given, or the head does not fit the backbone.
    """

    versions = ("v2", "v1")

    def __init__(
        self,
        version: Literal["v2", "v1"] = "v2",
        checkpoint: str | None = None,
        backbone: str = "openai/clip-vit-large-patch14",
        dtype: Dtype = "float32",
        model: Any = None,
        head: Any = None,
    ) -> None:
        super().__init__(dtype, version)
        if head is not None and checkpoint is not None:
            raise ValueError("Give the head either by `checkpoint` or as `head`, not both.")
        source = "`head`"
        if head is None:
            path = _head_file(version, checkpoint)
            head, source = read_weights(path), repr(str(path))
        weight, bias = _folded(version, head, source)
        model = open_network(CLIPModel, backbone, _UNUSED) if model is None else model
        if (width := model.visual_projection.out_features) != weight.shape[1]:
            raise ValueError(
                f"The head of {source} reads {weight.shape[1]} numbers and the backbone gives "
                f"{width}; use the backbone that it was trained on, CLIP ViT-L/14 for the files of "
                "LAION."
            )
        self.vision_model: Any = self.frozen(model.vision_model)
        self.visual_projection: Any = self.frozen(model.visual_projection)
        self.head = nn.Linear(width, 1)
        self.head.load_state_dict({"weight": weight, "bias": bias})
        self.head.requires_grad_(False)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, d] float32 of images [B, 3, H, W] in [0, 1]."""
        size = int(self.vision_model.config.image_size)
        return image_embeddings(self, normalise(centre_square(images.float(), size)))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B]; see the base class."""
        return F.linear(self.embed_images(images), self.head.weight, self.head.bias).squeeze(1)


def fold(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, of the one linear layer that does what a stack does.

    Args:
        layers: Weight [out, in] and bias [out] of each, the first one first.
    """
    weight, bias = (tensor.double() for tensor in layers[0])
    for above, shift in layers[1:]:
        weight, bias = above.double() @ weight, above.double() @ bias + shift.double()
    return weight, bias


def _head_file(version: str, checkpoint: str | None) -> Path:
    if checkpoint is None and version == "v1":
        raise CheckpointError(
            f"The head of AestheticScore v1 is not on the hub: fetch {_FILES['v1']} from "
            f"{_V1_ADDRESS} and give its path as `checkpoint`."
        )
    path = checkpoint_file(checkpoint or _HUB, _FILES[version])
    if "relu" in path.name.lower():
        raise CheckpointError(
            f"{str(path)!r} is a network with activations, not AestheticScore v2; give "
            "'sac+logos+ava1-l14-linearMSE.pth', or leave `checkpoint` out."
        )
    return path


def _folded(version: str, head: Any, source: str) -> tuple[Tensor, Tensor]:
    """Return weight [1, d] and bias [1], float64, of a head, if it is one of its version."""
    needed = [prefix + kind for prefix in _LAYERS[version] for kind in ("weight", "bias")]
    if not isinstance(head, Mapping) or set(head) != set(needed):
        found = ", ".join(sorted(head)[:4]) if isinstance(head, Mapping) else type(head).__name__
        raise CheckpointError(
            f"{source} is no head of AestheticScore {version}: it must hold exactly "
            f"{', '.join(needed)}, and holds {found or 'nothing'}."
        )
    shapes = ", ".join(str(list(head[name].shape)) for name in needed)
    wrong = f"{source} holds no linear layers that end in one number, but the shapes {shapes}."
    try:
        weight, bias = fold([(head[p + "weight"], head[p + "bias"]) for p in _LAYERS[version]])
    except RuntimeError as error:  # they do not chain
        raise CheckpointError(wrong) from error
    if weight.shape[:-1] != (1,) or bias.shape != (1,):
        raise CheckpointError(wrong)
    return weight, bias
