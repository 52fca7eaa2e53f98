"""Rewards that were learned from preferences: an image-text tower and a head.

cosine   exp(logit_scale) cos(image, prompt)        PickScore, HPS (arXiv:2305.01569, 2306.09341)
linear   w features(image, prompt) + b
mlp      five linear layers, dropout and no activations between       ImageReward (2304.05977)
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_align.rewards.base import Metadata, RewardModule
from lit_align.rewards.towers import RewardTower, tower_from
from lit_align.shapes import ASSETS

Head = Literal["cosine", "linear", "mlp"]

_SCHEMA = "lit_align/reward/1"
_HIDDEN = (1024, 128, 64, 16)
_DROPOUT = (0.2, 0.2, 0.1)
_MAX_LOGIT_SCALE = math.log(100)


class LearnedReward(RewardModule):
    """The score of a trained tower and head, standardised: (raw - mean) / std.

    Trained by `RewardModeling`, and then opened from its checkpoint or an exported folder by path,
    as any other reward. The head and the standardisation are float32. A score that is not finite is
    NaN.

    Args:
        tower: Of a new reward.
        head: Of a new reward, see the module; "cosine" if not said.
        pretrained: Instead of both: a folder that `save_pretrained` or `run.py export` wrote, or a
            checkpoint of `RewardModeling`.
        name: In logs and tables; by default the class name.
        version: A number for who refreshes a reward and must tell the versions apart; by default
            what is stored, else 0.

    Attributes:
        mean: Subtracted from the raw score, a scalar.
        std: That it is then divided by, a scalar.

    Raises:
        ValueError: If a new reward and `pretrained` are mixed, neither is given, or the file is no
            learned reward.
        FileNotFoundError: If `pretrained` does not exist.
    """

    differentiable = True
    needs_prompt = True

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: RewardTower | None = None,
        head: Head | None = None,
        pretrained: str | None = None,
        name: str | None = None,
        version: int | None = None,
    ) -> None:
        super().__init__()
        stored, tensors = ({}, {}) if pretrained is None else _read(Path(pretrained))
        if pretrained is not None:
            if tower is not None or head is not None:
                raise ValueError("Give either `pretrained`, or `tower` and `head`, not both.")
            tower, head = tower_from(stored["tower"]), stored["head"]
        if tower is None:
            raise ValueError("Give `pretrained`, or a `tower` for a new reward.")
        self.head = head or "cosine"
        self._name, self.version = name, stored.get("version", 0) if version is None else version
        self.tower = tower
        self.layers = _layers(self.head, tower.width)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        if tensors:
            self.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
        self.requires_grad_(False).eval()

    @property
    def name(self) -> str:
        """The name in logs and tables."""
        return self._name or type(self).__name__

    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the standardised scores [B]; see the base class."""
        scores = (self.raw(images, prompts) - self.mean) / self.std
        return scores.where(scores.isfinite(), torch.nan)

    def raw(
        self, images: Tensor, prompts: Sequence[str], dropout_keys: Tensor | None = None
    ) -> Tensor:
        """Return the scores [B] float32 as they are trained.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B prompts.
            dropout_keys: [B] int64, what seeds each row's dropout in the head "mlp"; without them
                nothing is dropped.
        """
        if self.head == "cosine":
            cosine = self.tower.similarity(images, prompts).float()
            return self.logit_scale.exp() * cosine
        values = self.tower.features(images, prompts)
        keep = [] if dropout_keys is None or self.head == "linear" else self._keep(dropout_keys)
        with torch.autocast(values.device.type, enabled=False):
            values = values.float()
            for number, layer in enumerate(self.layers):
                values = layer(values)
                values = values * keep[number].to(values) if number < len(keep) else values
        return values.squeeze(1)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of what the cosine is multiplied by, a scalar."""
        scale: Any = self.tower.logit_scale
        assert isinstance(scale, nn.Parameter)
        return scale

    def _keep(self, keys: Tensor) -> list[Tensor]:
        """Return what the outputs [B, width] of the first layers are multiplied by."""
        widths = _HIDDEN[: len(_DROPOUT)]
        rows = [
            torch.rand(sum(widths), generator=torch.Generator().manual_seed(key))
            for key in keys.tolist()
        ]
        parts = torch.stack(rows).split(widths, dim=1)
        return [(part >= share) / (1 - share) for part, share in zip(parts, _DROPOUT, strict=True)]

    def set_trainable(self, freeze: float | Literal["tower"] = 0.0) -> None:
        """Say what is trained: the head always, and the tower from a layer on.

        Args:
            freeze: Share of the layers of each encoder that stay as they are, the lowest first,
                with the embeddings below them (`fix_rate` of ImageReward); "tower" for all.

        Raises:
            ValueError: If it is no such share, or nothing would be left to train.
        """
        if freeze != "tower" and not (isinstance(freeze, int | float) and 0 <= freeze <= 1):
            raise ValueError(f"`freeze` must be a share in [0, 1] or 'tower', got {freeze!r}.")
        self.layers.requires_grad_(True)
        self.tower.requires_grad_(freeze != "tower")
        for embeddings, *blocks in self.tower.stacks() if freeze != "tower" else []:
            count = int(len(blocks) * float(freeze))
            for part in [embeddings, *blocks[:count]] if freeze else []:
                part.requires_grad_(False)
        if hasattr(self.tower, "logit_scale"):  # no other head reads it
            self.logit_scale.requires_grad_(self.head == "cosine")

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the cosine's factor in [1, 100], as CLIP and HPS do after each step."""
        if self.head == "cosine":
            self.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)

    @torch.no_grad()
    def standardise(self, mean: Tensor | float, std: Tensor | float) -> None:
        """Set what scores are standardised by, from the raw scores of a fixed set.

        Args:
            mean: Of the raw scores.
            std: Of the raw scores, positive.

        Raises:
            ValueError: If they are not finite, or std is not positive: all scores are equal.
        """
        mean, std = float(mean), float(std)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(
                f"A reward is standardised by a finite mean and a positive std of its raw scores, "
                f"got {mean} and {std}; look at what it gives the images."
            )
        self.mean.fill_(mean)
        self.std.fill_(std)

    def options(self) -> dict[str, Any]:
        """Return all but the tensors, in plain values: what a folder and a checkpoint hold."""
        return {
            "schema": _SCHEMA,
            "head": self.head,
            "version": self.version,
            "tower": self.tower.options(),
        }

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a folder of config.json, tokenizer.json and model.safetensors.

        Args:
            path: The folder; `LearnedReward(pretrained=path)` reads it.
            dtype: Of the stored weights, float32 by default; it computes in float32.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        options = self.options()
        tokenizer = options["tower"].pop("tokenizer")
        text = json.dumps(options, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        tensors = {
            key: (tensor if key in ("mean", "std") else _stored_as(tensor, dtype)).contiguous()
            for key, tensor in self.state_dict().items()
        }
        save_file(tensors, folder / "model.safetensors")


class ShapesPreference(LearnedReward):
    """The shipped preference model of the shapes world: the ImageReward of this world.

    Learned from few and noisy judgements of synthetic annotators, who like captions kept and
    colours strong; deliberately imperfect.

    Args:
        pretrained: A folder or checkpoint of another one, see `LearnedReward`; the shipped one if
            None.
        name: In logs and tables; by default the class name.
    """

    def __init__(self, pretrained: str | None = None, name: str | None = None) -> None:
        super().__init__(
            pretrained=pretrained or str(ASSETS / "shapes-preference"),
            name=name or "ShapesPreference",
        )


def _layers(head: str, width: int) -> nn.ModuleList:
    """Return the linear layers of a head; none for the cosine."""
    if head == "cosine":
        return nn.ModuleList()
    if head == "linear":
        layer = nn.Linear(width, 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return nn.ModuleList([layer])
    if head != "mlp":
        raise ValueError(f"`head` must be 'cosine', 'linear' or 'mlp', got {head!r}.")
    layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((width, *_HIDDEN, 1)))
    for name, parameter in layers.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            generator = torch.Generator().manual_seed(0)  # the start does not depend on the run
            nn.init.normal_(parameter, std=1 / (width + 1), generator=generator)
    return layers


def _stored_as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype or torch.float32) if tensor.is_floating_point() else tensor


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the options and the tensors of a folder or a checkpoint."""
    if path.is_dir():
        missing = [name for name in _FILES if not (path / name).is_file()]
        if missing:
            raise ValueError(
                f"{str(path)!r} lacks {missing[0]}: it is no folder that `save_pretrained` or "
                "`run.py export` wrote of a learned reward."
            )
        options = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if options.get("schema") != _SCHEMA:
            raise ValueError(
                f"{str(path)!r} does not hold a learned reward: 'schema' must be {_SCHEMA!r}, got "
                f"{options.get('schema')!r}."
            )
        options["tower"]["tokenizer"] = (path / "tokenizer.json").read_text(encoding="utf-8")
        return options, load_file(path / "model.safetensors")
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no learned reward {str(path)!r}; give a folder that `run.py export` wrote, "
            "or a checkpoint of RewardModeling."
        )
    return _read_checkpoint(path)


_FILES = ("config.json", "tokenizer.json", "model.safetensors")


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged or no checkpoint ({type(error).__name__}: "
            f"{str(error)[:80]})."
        ) from error
    options = stored.get("lit_align", {}).get("reward")
    if not isinstance(options, dict) or options.get("schema") != _SCHEMA:
        raise ValueError(
            f"{str(path)!r} holds no learned reward; give a checkpoint of RewardModeling, or the "
            "folder that `run.py export` made of it."
        )
    prefix, state = "reward.", stored["state_dict"]
    return options, {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
