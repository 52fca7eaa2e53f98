"""The vocabulary of the shapes world, and the records that the other modules exchange.

`Facts` is what a caption states; a `Scene` is one concrete picture of such facts, every
coordinate and colour decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

IMAGE_SIZE = 32

SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.12, 0.65, 0.20),
    "cyan": (0.10, 0.78, 0.85),
    "blue": (0.15, 0.25, 0.90),
    "purple": (0.70, 0.15, 0.75),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.06, 0.06, 0.06),
}
RELATIONS = ("left of", "right of", "above", "below")

# Colour-shape pairs that no denoiser is ever trained on: they measure composition.
UNSEEN_PAIRS = frozenset({("yellow", "triangle"), ("purple", "square"), ("cyan", "circle")})

KINDS = ("single", "pair", "relation", "count", "triple")


@dataclass(frozen=True)
class ObjectFacts:
    """What a caption says of one object; None where it is silent."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Facts:
    """What a caption states.

    Attributes:
        objects: One to three objects, in the order of the caption.
        relation: How the first of two objects lies to the second, one of `RELATIONS`.
        background: One of `BACKGROUNDS`.
    """

    objects: tuple[ObjectFacts, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def kind(self) -> str:
        """One of `KINDS`, by increasing difficulty."""
        if len(self.objects) == 1:
            return "single"
        if self.relation is not None:
            return "relation"
        if len(set(self.objects)) == 1:
            return "count"
        return "pair" if len(self.objects) == 2 else "triple"

    def to_metadata(self) -> dict[str, Any]:
        """Return the facts as plain JSON values."""
        return {
            "kind": self.kind,
            "objects": [{"shape": o.shape, "color": o.color, "size": o.size} for o in self.objects],
            "relation": self.relation,
            "background": self.background,
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> Facts:
        """Read what `to_metadata` wrote.

        Raises:
            KeyError: If `objects` or an object's `shape` is missing.
        """
        objects = tuple(
            ObjectFacts(o["shape"], o.get("color"), o.get("size")) for o in metadata["objects"]
        )
        return cls(objects, metadata.get("relation"), metadata.get("background"))


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: centre and radius in pixels, colour in [0, 1].

    `radius` is that of the circle of equal area, so that shapes of one size cover the same
    number of pixels.
    """

    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: the background's colour in [0, 1] and the objects."""

    background: tuple[float, float, float]
    objects: tuple[SceneObject, ...]
