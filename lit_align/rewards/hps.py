"""HPSv2: a CLIP of open_clip tuned to human preferences (arXiv:2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lit_align.functional.pixels import normalise, padded_square
from lit_align.hub import CheckpointError, checkpoint_file
from lit_align.rewards.pretrained import Dtype, DualEncoderReward, load_strictly, read_weights

ARCHITECTURE = "ViT-H-14"
_FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}
_EXTRAS = ("logit_bias",)  # of contrastive losses other than CLIP's; no cosine reads it


class HPSv2(DualEncoderReward):
    """The cosine of an image's and its prompt's embedding, without a factor.

    Tables of the paper print 100 times as much. Figures of the two versions, and with and without
    antialiasing, must not be compared.

    Args:
        version: "v2.1" or "v2.0", the first release.
        checkpoint: The hub id of both, a folder, or the path of the version's file.
        antialias: Whether images are resized with antialiasing, as current installations of the
            authors' package do. The paper's tables are older than torchvision 0.17, which turned
            that on: "v2.1" is off them by some 2 points of 100 with it. The name in logs tells.
        dtype: Of the frozen encoders: "float32", "bfloat16" or "float16".
        model: Use this `open_clip.CLIP` instead, in place.

    Raises:
        CheckpointError: If the checkpoint is not there, is that of the other version by its name,
            or does not hold exactly the network's weights.
        ValueError: If `version` or `dtype` is none of the words above.
    """

    versions = ("v2.1", "v2.0")

    def __init__(
        self,
        version: Literal["v2.1", "v2.0"] = "v2.1",
        checkpoint: str = "xswu/HPSv2",
        antialias: bool = True,
        dtype: Dtype = "float32",
        model: Any = None,
    ) -> None:
        import open_clip

        super().__init__(dtype, version)
        self.antialias = antialias
        model = _load(version, checkpoint) if model is None else model
        self.model: Any = self.frozen(model)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
        self.image_size = int(model.visual.image_size[0])

    @property
    def name(self) -> str:
        """The name in logs: "HPSv2.1", or "HPSv2.1-aliased" without antialiasing."""
        return f"HPS{self.version}" + ("" if self.antialias else "-aliased")

    def embed_images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B, d] float32; see the base class."""
        pixels = normalise(padded_square(images.float(), self.image_size, self.antialias))
        return F.normalize(self.model.encode_image(pixels.to(self.dtype)).float(), dim=-1)

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B, d] float32; prompts are cut after 77 tokens."""
        tokens = self.tokenizer(list(prompts)).to(self.model.logit_scale.device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B]; see the base class."""
        return self.cosine(images, prompts)


def build_network() -> Any:
    """Return open_clip's ViT-H-14 with random weights; the original's are not fetched."""
    import open_clip

    return open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))


def _load(version: str, checkpoint: str) -> nn.Module:
    path = checkpoint_file(checkpoint, _FILES[version])
    other = {file: name for name, file in _FILES.items()}.get(path.name, version)
    if other != version:
        raise CheckpointError(f"{str(path)!r} is HPS {other}; set `version` to {other!r}.")
    stored = read_weights(path)
    if not isinstance(stored, dict) or "state_dict" not in stored:
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of HPSv2: it has no entry 'state_dict'; give "
            f"{_FILES[version]!r} of https://huggingface.co/xswu/HPSv2."
        )
    network: nn.Module = build_network()
    load_strictly(network, stored["state_dict"], repr(str(path)), _EXTRAS)
    return network
