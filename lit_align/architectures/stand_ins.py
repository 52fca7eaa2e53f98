"""Rewards and towers without their weights: the networks of released ones, by what they stand for.

Classes of this package that open a checkpoint take their network as an argument, `model`. Meanwhile
they are given one on the meta device; those whose network is not known here, or is elsewhere,
become blank: they have no parameters and answer with made-up scores.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lit_align import policies, rewards
from lit_align.architectures import BlankTokenizer, build_part
from lit_align.rewards import (
    aesthetic,
    detectors,
    embedders,
    hps,
    image_reward,
    mps,
    ocr,
    skin_tone,
    towers,
)

_FOLDER = Path(__file__).parent / "backbones"
_CLIP_WIDTH = 768  # of the embeddings of CLIP ViT-L/14
_CLIP_TOKENS, _BERT_TOKENS = 77, 512
Arguments = dict[str, Any]


@cache
def backbones() -> dict[str, dict[str, Any]]:
    """Return the descriptions of networks of images and texts, by hub id."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.json"))]
    return {hub_id: description for description in read for hub_id in description["hub_ids"]}


def backbone(pretrained: str) -> Any:
    """Return the network of a hub id, or of a folder's `config.json`, on the meta device.

    Raises:
        ValueError: If it is neither; the message lists the known ids.
    """
    if pretrained in backbones():
        return build_part(backbones()[pretrained]["network"])
    path = Path(pretrained) / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        return build_part({**config, "_class_name": config["architectures"][0]})
    raise ValueError(
        f"The network of {pretrained!r} is not known here, and its files are not asked for. Give "
        "the path of a local folder with its `config.json`, or one of "
        f"{', '.join(sorted(backbones()))}."
    )


def _clip(given: Arguments, pretrained: str, *tokenized: str) -> Arguments:
    network = backbone(given.get("pretrained") or pretrained)
    return {"model": network, **{name: BlankTokenizer(_CLIP_TOKENS) for name in tokenized}}


def _aesthetic(given: Arguments) -> Arguments:
    version = given.get("version", "v2")
    widths = {"v1": (_CLIP_WIDTH, 1), "v2": (_CLIP_WIDTH, 1024, 128, 64, 16, 1)}[version]
    head: Arguments = {}
    for prefix, inner, outer in zip(
        aesthetic._LAYERS[version], widths[:-1], widths[1:], strict=True
    ):
        head |= {prefix + "weight": torch.zeros(outer, inner), prefix + "bias": torch.zeros(outer)}
    network = backbone(given.get("backbone") or "openai/clip-vit-large-patch14")
    return {"model": network, "head": head, "checkpoint": None}


def _hps(given: Arguments) -> Arguments:
    with torch.device("meta"):
        return {"model": hps.build_network()}


def _image_reward(given: Arguments) -> Arguments:
    with torch.device("meta"):
        network = image_reward.ImageRewardNetwork()
    return {"model": network, "tokenizer": BlankTokenizer(_BERT_TOKENS)}


def _mps(given: Arguments) -> Arguments:
    with torch.device("meta"):
        network = mps.MPSNetwork()
    return {"model": network, "tokenizer": BlankTokenizer(_CLIP_TOKENS)}


def _open_clip_tower(given: Arguments) -> Arguments:
    import open_clip

    with torch.device("meta"):
        config = open_clip.get_model_config(given.get("model_name") or "ViT-H-14")
        return {"model": open_clip.CLIP(**config)}


def _tower(given: Arguments, tokens: int) -> Arguments:
    if given.get("model") is not None:
        return {}
    network = backbone(given["pretrained"])
    return {"model": network, "pretrained": None, "tokenizer": BlankTokenizer(tokens)}


_KNOWN: dict[type, Callable[[Arguments], Arguments]] = {
    rewards.AestheticScore: _aesthetic,
    rewards.CLIPScore: lambda given: _clip(given, "openai/clip-vit-large-patch14", "tokenizer"),
    rewards.PickScore: lambda given: _clip(given, "yuvalkirstain/PickScore_v1", "tokenizer"),
    rewards.HPSv2: _hps,
    rewards.ImageReward: _image_reward,
    rewards.MPS: _mps,
    embedders.CLIPEmbedder: lambda given: _clip(given, "openai/clip-vit-large-patch14"),
    policies.CLIPTower: lambda given: _clip(given, "openai/clip-vit-large-patch14"),
    policies.OpenCLIPTower: _open_clip_tower,
    towers.CLIPRewardTower: lambda given: _tower(given, _CLIP_TOKENS),
    towers.BLIPRewardTower: lambda given: _tower(given, _BERT_TOKENS),
}
# Their networks are not described here.
_BLANK = (
    ocr.GOTOCRRecognizer, ocr.RapidOCRRecognizer, detectors.OpenVocabularyDetector,
    skin_tone.ImageClassifier,
)  # fmt: skip
_REMOTE = (rewards.RemoteReward, rewards.VLMJudge)


@contextmanager
def networks_without_weights() -> Iterator[None]:
    """Have rewards and towers that are made meanwhile open no checkpoint; see the module."""
    with ExitStack() as stack:
        for kind, arguments in _KNOWN.items():
            stack.enter_context(patch.object(kind, "__init__", _given(kind, arguments)))
        for blank in _BLANK:
            stack.enter_context(patch.object(blank, "__init__", _nothing))
        # Critics try their towers, and there is no autocast for the meta device.
        stack.enter_context(patch("torch.autocast", lambda *_, **__: nullcontext()))
        yield


def _given(kind: Any, arguments: Callable[[Arguments], Arguments]) -> Callable[..., None]:
    """Return the constructor of `kind`, with a network on the meta device unless it has one."""
    construct = kind.__init__
    signature = inspect.signature(construct)

    @wraps(construct)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        if given.get("model") is None:
            given |= arguments(given)
        construct(self, **given)
        self.to("meta")

    return made


def _nothing(self: nn.Module, *_: Any, **__: Any) -> None:
    nn.Module.__init__(self)


def is_blank(reward: nn.Module) -> bool:
    """Return whether a reward is elsewhere, or has a part whose network is not known here."""
    return isinstance(reward, _REMOTE) or any(isinstance(m, _BLANK) for m in reward.modules())


def made_up_scores(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values in [0, 1], no two of them equal."""
    return torch.linspace(0, 1, math.prod(shape), dtype=dtype).view(*shape)
