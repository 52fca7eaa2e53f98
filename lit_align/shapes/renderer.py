"""Facts -> scene -> pixels: jittered placement, anti-aliased drawing, and the colour bias."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_align.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    IMAGE_SIZE,
    UNSEEN_PAIRS,
    Facts,
    ObjectFacts,
    Scene,
    SceneObject,
)

# Radius ranges in pixels. Scenes of three objects are drawn with small ones only, so that they fit.
RADII = {"small": (2.8, 3.5), "large": (4.6, 5.4)}
SIZE_BOUNDARY = 4.05
BIASED_COLOR, BIASED_SHARE = "red", 0.70

_HALF_SQUARE = math.sqrt(math.pi) / 2
_TRIANGLE_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
# Reach from the centre for a shape of radius 1: sideways, up, down.
_REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (_HALF_SQUARE, _HALF_SQUARE, _HALF_SQUARE),
    "triangle": (
        math.sqrt(3) * _TRIANGLE_INRADIUS,
        2 * _TRIANGLE_INRADIUS,
        _TRIANGLE_INRADIUS,
    ),
}
_MARGIN = 1.0  # pixels between an object and the border
_GAP = 2.0  # pixels between two objects, so that they never touch
_COLOR_JITTER = 0.04
_MIN_OFFSET = 5.0  # pixels along the axis of a relation


def sample_scene(facts: Facts, rng: random.Random) -> Scene:
    """Draw a scene that satisfies the facts; what they leave open is random.

    An object whose colour is omitted is red in 70 % of the cases (the world's bias).
    """
    ground = facts.background or rng.choice(list(BACKGROUNDS))
    while (placed := _place(facts, rng)) is None:
        pass
    objects = tuple(
        SceneObject(item.shape, x, y, radius, _jitter(COLORS[_color(item, rng)], rng))
        for item, (x, y, radius) in zip(facts.objects, placed, strict=True)
    )
    return Scene(_jitter(BACKGROUNDS[ground], rng, _COLOR_JITTER / 2), objects)


def _place(facts: Facts, rng: random.Random) -> list[tuple[float, float, float]] | None:
    """Return (x, y, radius) of each object, or None if they overlap or break the relation."""
    spots: list[tuple[float, float, float]] = []
    boxes: list[tuple[float, ...]] = []
    for item in facts.objects:
        size = item.size or ("small" if len(facts.objects) == 3 else rng.choice(list(RADII)))
        radius = rng.uniform(*RADII[size])
        side, up, down = (r * radius for r in _REACH[item.shape])
        x = rng.uniform(side + _MARGIN, IMAGE_SIZE - side - _MARGIN)
        y = rng.uniform(up + _MARGIN, IMAGE_SIZE - down - _MARGIN)
        box = (x - side, x + side, y - up, y + down)
        if any(_gap(box, other) < _GAP for other in boxes):
            return None
        spots.append((x, y, radius))
        boxes.append(box)
    holds = relation_margin(facts.relation, *(spot[:2] for spot in spots[:2])) >= _MIN_OFFSET
    return spots if holds else None


def _gap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Return the free pixels between two boxes (left, right, top, bottom), along either axis."""
    return max(a[0] - b[1], b[0] - a[1], a[2] - b[3], b[2] - a[3])


def relation_margin(
    relation: str | None, first: tuple[float, float], second: tuple[float, float] = (0.0, 0.0)
) -> float:
    """Return by how many pixels a relation holds (infinite if there is none to hold).

    "left of" asks for a positive offset along x that also exceeds the offset along y; the
    returned figure is the smaller of the two slacks, negative where the relation fails.
    """
    if relation is None:
        return math.inf
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along if along > abs(across) else min(along, along - abs(across))


def _color(item: ObjectFacts, rng: random.Random) -> str:
    if item.color is not None:
        return item.color
    if rng.random() < BIASED_SHARE:
        return BIASED_COLOR
    return rng.choice(
        [c for c in COLORS if c != BIASED_COLOR and (c, item.shape) not in UNSEEN_PAIRS]
    )


def _jitter(
    rgb: tuple[float, float, float], rng: random.Random, by: float = _COLOR_JITTER
) -> tuple[float, float, float]:
    r, g, b = (min(1.0, max(0.0, c + rng.uniform(-by, by))) for c in rgb)
    return r, g, b


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return how much of each pixel a shape covers, by its signed distance.

    Args:
        shape: One of `SHAPES`.
        x: Horizontal offset of the pixel centres from the shape's centre, in pixels.
        y: Vertical offset, downwards, broadcastable to `x`.
        radius: Radius of the circle of equal area, in pixels, broadcastable to `x`.

    Returns:
        Values in [0, 1], broadcast over the arguments.
    """
    if shape == "circle":
        distance = torch.hypot(x, y) - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - _HALF_SQUARE * radius
    else:  # the farthest of three edges; the base is below
        slanted = math.sqrt(3) / 2 * x.abs() - y / 2
        distance = torch.maximum(y, slanted) - _TRIANGLE_INRADIUS * radius
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Sequence[Scene]) -> Tensor:
    """Draw scenes.

    Returns:
        Images [B, 3, 32, 32] in [0, 1].
    """
    centres = torch.arange(IMAGE_SIZE) + 0.5
    y, x = centres[:, None], centres[None, :]
    images = torch.tensor([s.background for s in scenes])[:, :, None, None].repeat(
        1, 1, IMAGE_SIZE, IMAGE_SIZE
    )
    for image, scene in zip(images, scenes, strict=True):
        for item in scene.objects:
            alpha = coverage(item.shape, x - item.x, y - item.y, torch.tensor(item.radius))
            image.lerp_(torch.tensor(item.rgb)[:, None, None].expand_as(image), alpha)
    return images
