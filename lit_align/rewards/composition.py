"""Compositionality: does the image show every object that its prompt names?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_align.rewards.base import Metadata, RewardModule
from lit_align.shapes import grammar
from lit_align.shapes.scene import Facts
from lit_align.shapes.verifier import assign, detect_batch


class Detector(Protocol):
    """What `Composition` asks of its detector."""

    def __call__(self, images: Tensor, objects: Sequence[list[Any]]) -> Sequence[Sequence[float]]:
        """Return how sure it is of each object of each image.

        Args:
            images: [B, 3, H, W] in [0, 1].
            objects: B lists of at least one object, as the prompts' metadata name them.

        Returns:
            B lists of confidences in [0, 1], one per object: the largest if several boxes show
            it, 0 if none does; NaN if the image could not be looked at.
        """


class Composition(RewardModule):
    """Mean of a detector's confidence over the objects of the prompt (arXiv:2401.12244).

    The objects are those of ``metadata["objects"]``, any JSON values that the detector reads:
    names for an open-vocabulary detector, facts in the shapes world. A prompt without them is
    parsed as a caption of the shapes world; any other prompt, and one that names no object, gets
    NaN. Range [0, 1].

    Args:
        detector: See `Detector`; by default that of the shapes world. For photographs and any
            other picture `detectors.OpenVocabularyDetector`, whose objects are names.
    """

    needs_prompt = True

    def __init__(self, detector: nn.Module | None = None) -> None:
        super().__init__()
        detector = ShapesDetector() if detector is None else detector
        self.detector = detector.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        group_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the scores [B]; see the base class."""
        metadata = metadata or [None] * len(prompts)
        named = [named_objects(p, known) for p, known in zip(prompts, metadata, strict=True)]
        scores = torch.full((len(images),), torch.nan)
        scored = [i for i, objects in enumerate(named) if objects]
        if scored:
            detect: Detector = self.detector
            objects = [named[i] or [] for i in scored]
            found = detect(images[scored], objects)
            scores[scored] = torch.tensor(self._means(found, objects))
        return scores.to(images.device)

    def _means(self, found: Sequence[Sequence[float]], objects: Sequence[list[Any]]) -> list[float]:
        """Return the mean confidence of each image, after a check of the detector's answer."""
        name = type(self.detector).__name__
        if len(found) != len(objects):
            raise ValueError(
                f"The detector {name} must return one list of confidences per image, got "
                f"{len(found)} for {len(objects)} images."
            )
        means = []
        for confidences, wanted in zip(found, objects, strict=True):
            values = [float(confidence) for confidence in confidences]
            if len(values) != len(wanted):
                raise ValueError(
                    f"The detector {name} must return one confidence per object, got "
                    f"{len(values)} for {wanted}; return 0 for an object that was not found."
                )
            if any(value < 0 or value > 1 for value in values):
                raise ValueError(
                    f"The detector {name} must return confidences in [0, 1], got {values} for "
                    f"{wanted}; turn logits into probabilities by a sigmoid."
                )
            means.append(sum(values) / len(values))
        return means


class ShapesDetector(nn.Module):
    """The detector of the shapes world: how well the best fitting drawn object matches.

    The match is `Detection.match`, in [0, 1]. A drawn object serves one named object only, by the
    assignment of the largest sum: "two red circles" need two.
    """

    def forward(self, images: Tensor, objects: Sequence[list[Any]]) -> list[list[float]]:
        """Return the matches of each image's objects.

        Args:
            images: [B, 3, H, W] in [0, 1].
            objects: B lists of dictionaries, see `Facts.to_metadata`.

        Raises:
            ValueError: If an object is no such dictionary.
        """
        wanted = [_facts(named).objects for named in objects]
        found = detect_batch(images)
        return [assign(seen, items)[0] for seen, items in zip(found, wanted, strict=True)]


def named_objects(prompt: str, metadata: dict[str, Any] | None) -> list[Any] | None:
    """Return the objects that a prompt names, by its metadata or else the captions' grammar.

    Returns:
        None if there is no such metadata and the prompt is no caption of the shapes world.

    Raises:
        TypeError: If ``metadata["objects"]`` is no list.
    """
    if metadata and "objects" in metadata:
        objects = metadata["objects"]
        if not isinstance(objects, list):
            raise TypeError(
                f"The metadata 'objects' of {prompt!r} must be a list, got {objects!r}; put a "
                "single object into a list."
            )
        return objects
    facts = grammar.parse_if_caption(prompt)
    return None if facts is None else list(facts.to_metadata()["objects"])


def _facts(objects: list[Any]) -> Facts:
    try:
        return Facts.from_metadata({"objects": objects})
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The shapes world has no objects {objects!r}; name them as in {{'shape': 'circle', "
            "'color': 'red'}, or give `Composition` a detector that reads these."
        ) from error
