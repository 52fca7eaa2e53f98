"""ImageReward: a BLIP that reads the prompt while it looks at the image (arXiv:2304.05977).

    score = (w h_CLS + b - 0.1672) / 1.0333

h_CLS is the last hidden state of the first token, [CLS], of a BERT whose layers attend to the
tokens of a ViT-L/16; both are transformers' classes. The released head has five linear layers with
no activations between, so it is one affine map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from lit_align.functional.pixels import centre_square, normalise
from lit_align.hub import CheckpointError, checkpoint_file
from lit_align.rewards.aesthetic import fold
from lit_align.rewards.pretrained import Dtype, PretrainedReward, load_strictly, read_weights
from lit_align.rewards.towers import open_tokenizer

# Of the raw scores on the authors' training set, as in their code.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072

_VISION_PREFIX, _TEXT_PREFIX = "blip.visual_encoder.", "blip.text_encoder."
_HEAD_PREFIX, _HEAD_LAYERS = "mlp.layers.", (0, 2, 4, 6, 7)  # dropout lies between
_UNUSED_PREFIXES = ("blip.vision_proj.", "blip.text_proj.")  # no score depends on them
_TOKENIZER = "bert-base-uncased"

# The original's names of the image encoder, and transformers'.
_OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# The released sizes.
_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "is_decoder": True,
}


class ImageRewardNetwork(nn.Module):
    """The encoders of image and text, and the head, with random weights.

    Args:
        vision: Changes to the configuration of the released image encoder, as a
            `BlipVisionConfig` names it.
        text: The same for the text encoder and `BlipTextConfig`.
    """

    def __init__(
        self, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        seen, read = _VISION | (vision or {}), _TEXT | (text or {})
        self.image_size = int(seen["image_size"])
        self.vision = BlipVisionModel(BlipVisionConfig(**seen))
        # `is_decoder` makes the layers that attend to the image; the mask stays bidirectional.
        config = BlipTextConfig(encoder_hidden_size=seen["hidden_size"], **read)
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.head = nn.Linear(read["hidden_size"], 1)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the features [B, D] of the first token; pixels normalised, ids [B, T]."""
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        features: Tensor = read.last_hidden_state[:, 0]
        return features

    def load_original(self, weights: Any, source: str) -> None:
        """Load weights that have the original's names, all of them.

        Args:
            weights: A tensor by name; the head's layers are folded.
            source: What they came from, for messages.

        Raises:
            CheckpointError: If one is missing, unknown, or of another shape.
        """
        if isinstance(weights, Mapping):  # else refused by what follows
            weights = renamed(weights, source)
        load_strictly(self, weights, source)


class ImageReward(PretrainedReward):
    """ImageReward v1.0: a z-score of human preference, about -2.5 to 2.5 (arXiv:2304.05977).

    Prompts are cut after 35 tokens, as in training: what follows cannot be rewarded. TDPO's plots
    show the raw scores: standardised = (raw - 0.1672) / 1.0333.

    Args:
        pretrained: A hub id or folder that holds `ImageReward.pt`, or such a file.
        scale: "standardised" or "raw".
        max_tokens: Of a prompt; scores of longer prompts depend on it.
        dtype: Of the encoders; see `PretrainedReward`.
        model: Use this network instead of `pretrained`.
        tokenizer: A hub id or folder, or a tokenizer of transformers; BERT's.

    Raises:
        CheckpointError: If a file is not at hand or not of this network.
        ValueError: If an option is unknown.
    """

    needs_prompt = True
    scales = ("standardised", "raw")

    def __init__(
        self,
        pretrained: str = "THUDM/ImageReward",
        scale: Literal["standardised", "raw"] = "standardised",
        max_tokens: int = 35,
        dtype: Dtype = "float32",
        model: ImageRewardNetwork | None = None,
        tokenizer: Any = _TOKENIZER,
    ) -> None:
        super().__init__(dtype=dtype, scale=scale)
        if model is None:
            path = checkpoint_file(pretrained, "ImageReward.pt")
            weights = read_weights(path)  # first, as the file may be wrong
            model = ImageRewardNetwork()
            model.load_original(weights, repr(str(path)))
        longest = int(model.text.config.max_position_embeddings)
        if not 2 <= max_tokens <= longest:
            raise ValueError(f"`max_tokens` must be 2 to {longest}, got {max_tokens}.")
        self.max_tokens = max_tokens
        self.model = self.frozen(model)
        self.model.head.float()
        self.tokenizer = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [B]; see the base class."""
        pixels = normalise(centre_square(images, self.model.image_size))
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        ids, mask = (tokens[name].to(images.device) for name in ("input_ids", "attention_mask"))
        raw: Tensor = self.model.head(self.model(pixels, ids, mask).float()).squeeze(1)
        return raw if self.scale == "raw" else (raw - _MEAN) / _STD


def renamed(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the original's weights by the names of `ImageRewardNetwork`.

    Names that it does not know stay as they are, for `load_strictly` to refuse.
    """
    ours: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith(_VISION_PREFIX):
            ours["vision." + _vision_name(name.removeprefix(_VISION_PREFIX))] = weight
        elif name == _TEXT_PREFIX + "embeddings.position_ids":
            continue  # 0, 1, 2, ...
        elif name.startswith(_TEXT_PREFIX):
            ours["text." + name.removeprefix(_TEXT_PREFIX)] = weight
        elif name.startswith(_HEAD_PREFIX):
            head[name.removeprefix(_HEAD_PREFIX)] = weight
        elif not name.startswith(_UNUSED_PREFIXES):
            ours[name] = weight
    ours["head.weight"], ours["head.bias"] = _head(head, source)
    return ours


def _vision_name(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block and block[2] in _IN_BLOCK:
        return f"encoder.layers.{block[1]}.{_IN_BLOCK[block[2]]}.{block[3]}"
    for theirs, ours in _OUTSIDE_BLOCKS.items():
        if name == theirs or name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    return name


def _head(layers: Mapping[str, Tensor], source: str) -> tuple[Tensor, Tensor]:
    """Return weight [1, D] and bias [1] of the one linear layer that the head is.

    Raises:
        CheckpointError: If a weight is missing or unknown, or the layers do not follow each other.
    """
    needed = {f"{number}.{kind}" for number in _HEAD_LAYERS for kind in ("weight", "bias")}
    if wrong := needed ^ layers.keys():
        names = ", ".join(_HEAD_PREFIX + name for name in sorted(wrong))
        raise CheckpointError(f"{source} does not hold the head of ImageReward: {names}.")
    try:
        return fold([(layers[f"{n}.weight"], layers[f"{n}.bias"]) for n in _HEAD_LAYERS])
    except RuntimeError as error:
        shapes = ", ".join(str(list(layers[f"{n}.weight"].shape)) for n in _HEAD_LAYERS)
        raise CheckpointError(
            f"{source} does not hold the head of ImageReward: its weights have the shapes {shapes}."
        ) from error
