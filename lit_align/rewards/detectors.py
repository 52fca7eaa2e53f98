"""Detectors of named objects and of faces by OWLv2 (arXiv:2306.09683), of transformers.

Its confidences are not calibrated and differ between kinds of objects: compare models on equal
prompts, and images of equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Owlv2ForObjectDetection

from lit_align.functional.pixels import normalise
from lit_align.rewards.towers import open_network, open_tokenizer

_MODEL = "google/owlv2-base-patch16-ensemble"
_MAX_TOKENS = 16  # of a query, as the network was trained
_GREY = 0.5

Box = tuple[float, float, float, float]


class OpenVocabularyDetector(nn.Module):
    """How sure OWLv2 is of each object that an image should show; for `Composition`.

    Objects are named by words, in the metadata of a prompt: {"objects": ["red bicycle", "dog"]}.
    The confidence of an object is that of its most certain box: it tells presence, not number. An
    image that is not finite gets NaN.

    Args:
        pretrained: A hub id or folder of transformers' `Owlv2ForObjectDetection`.
        template: Of a query; "{}" is where the name stands.
        batch_size: How many images the network sees at once.
        model: Use this network instead of `pretrained`, with `tokenizer`.
        tokenizer: Of transformers; by default that of `pretrained`.

    Raises:
        CheckpointError: If `pretrained` is not at hand.
        ValueError: If an option is out of its range, or a `model` has no `tokenizer`.
    """

    def __init__(
        self,
        pretrained: str = _MODEL,
        template: str = "a photo of a {}",
        batch_size: int = 8,
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        if "{}" not in template:
            raise ValueError(f"`template` must hold '{{}}', where the name goes, got {template!r}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if model is None:
            model = open_network(Owlv2ForObjectDetection, pretrained)
            tokenizer = tokenizer or open_tokenizer(pretrained)
        if tokenizer is None:
            raise ValueError("A detector made of a `model` needs its `tokenizer`.")
        self.model = model.requires_grad_(False).float().eval()
        self.tokenizer = tokenizer
        self.template, self.batch_size = template, batch_size

    def forward(self, images: Tensor, objects: Sequence[list[Any]]) -> list[list[float]]:
        """Return the confidences of each image's objects, see `Detector`.

        Args:
            images: [B, 3, H, W] in [0, 1].
            objects: B lists of at least one name.

        Raises:
            TypeError: If an object is no name.
        """
        for named in objects:
            if not all(isinstance(name, str) for name in named):
                raise TypeError(
                    f"The detector reads names, such as 'red bicycle', got {named!r}; give the "
                    "prompt's metadata 'objects' as a list of strings."
                )
        found: list[list[float]] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            confidences, _ = self.look(images[part], objects[part])
            best = confidences.amax(dim=1).tolist()
            found += [row[: len(named)] for row, named in zip(best, objects[part], strict=True)]
        return found

    @torch.no_grad()
    def look(self, images: Tensor, names: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Return the confidences [B, P, K] of K names in P boxes, and the boxes [B, P, 4].

        Args:
            images: [B, 3, H, W] in [0, 1].
            names: Up to K for each image; what is missing is filled up with some query.

        Returns:
            Confidences in [0, 1], NaN for an image that is not finite; boxes as left, top, right
            and bottom in pixels.
        """
        widest = max(map(len, names))
        queries = [
            self.template.format(name)
            for row in names
            for name in [*row, *[""] * (widest - len(row))]
        ]
        tokens = self.tokenizer(
            queries,
            padding="max_length",
            truncation=True,
            max_length=_MAX_TOKENS,
            return_tensors="pt",
        )
        device = self.model.device
        output = self.model(
            pixel_values=self._pixels(images.to(device)),
            input_ids=tokens.input_ids.to(device),
            attention_mask=tokens.attention_mask.to(device),
        )
        finite = images.isfinite().flatten(1).all(dim=1).to(device)
        confidences = output.logits.float().sigmoid().where(finite[:, None, None], torch.nan)
        centre, size = output.pred_boxes.float().chunk(2, dim=-1)
        corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        return confidences, corners * max(images.shape[-2:])  # relative to the padded square

    def _pixels(self, images: Tensor) -> Tensor:
        """Return what the network sees: a square, grey below or to the right of the image."""
        height, width = images.shape[-2:]
        side = max(height, width)
        square = F.pad(images.float(), (0, side - width, 0, side - height), value=_GREY)
        size = int(self.model.config.vision_config.image_size)
        resized = F.interpolate(square, (size, size), mode="bilinear", antialias=True)
        return normalise(resized.nan_to_num())


class OpenVocabularyFaces(nn.Module):
    """The most certain face of each image, by an `OpenVocabularyDetector`; for `skin_tone`.

    Args:
        detector: By default one of the default network.
        query: What is looked for.
        threshold: Smallest confidence of a face.

    Raises:
        ValueError: If the threshold is no confidence.
    """

    def __init__(
        self,
        detector: OpenVocabularyDetector | None = None,
        query: str = "human face",
        threshold: float = 0.2,
    ) -> None:
        super().__init__()
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be in [0, 1], got {threshold}.")
        self.detector = detector or OpenVocabularyDetector()
        self.query, self.threshold = query, threshold

    def forward(self, images: Tensor) -> list[Box | None]:
        """Return B boxes (left, top, right, bottom) in pixels, None where there is no face."""
        found: list[Box | None] = []
        for part in images.split(self.detector.batch_size):
            confidences, boxes = self.detector.look(part, [[self.query]] * len(part))
            best, place = confidences.squeeze(2).max(dim=1)
            for sure, row, number in zip(best.tolist(), boxes, place.tolist(), strict=True):
                left, top, right, bottom = row[number].tolist()
                found.append((left, top, right, bottom) if sure >= self.threshold else None)
        return found
