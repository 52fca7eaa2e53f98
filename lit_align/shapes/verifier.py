"""The gold reward of the shapes world: segment an image and check every fact of its caption.

For each image: name the background, cut the rest into one-coloured connected components, fit
each with a circle, a square and a triangle of its own mass and centre, assign the components to
the caption's objects, and average over the facts

    background   1 if the named one, faded by its distance from the palette
    count        1 if as many objects as named
    each object  shape x colour x size, each in [0, 1], where stated
    relation     1 if it holds, 1/2 if only its direction does, times the weaker object

Shape and colour are graded, so that crisp pictures score above blurred ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.shapes.renderer import SIZE_BOUNDARY, coverage, relation_margin
from lit_align.shapes.scene import BACKGROUNDS, COLORS, SHAPES, Facts, ObjectFacts

MIN_MASS = 8.0  # pixels; the smallest drawn object covers 24
MAX_OBJECTS = 5  # components looked at, by mass

# Ramps: the value that scores 0 and the value that scores 1.
_SHAPE_RAMP = (0.78, 0.92)  # soft intersection over union with the ideal shape
_COLOR_RAMP = (0.45, 0.15)  # distance from the palette colour in RGB
_BACKGROUND_RAMP = (0.30, 0.10)

_COLOR_TABLE = torch.tensor(list(COLORS.values()))
_BACKGROUND_TABLE = torch.tensor(list(BACKGROUNDS.values()))


@dataclass(frozen=True)
class Detection:
    """One object found in an image.

    Attributes:
        color: The nearest of `COLORS`.
        purity: How close it is to that colour, in [0, 1].
        fits: How well each shape fits, in [0, 1]; 0 for all but the best.
        radius: Radius of the circle of equal area, in pixels.
        x: Horizontal centre, in pixels.
        y: Vertical centre, downwards, in pixels.
    """

    color: str
    purity: float
    fits: dict[str, float]
    radius: float
    x: float
    y: float

    def match(self, facts: ObjectFacts) -> float:
        """Return how well this object is the one the caption names, in [0, 1]."""
        if facts.color is not None and facts.color != self.color:
            return 0.0
        if facts.size is not None and (facts.size == "small") != (self.radius < SIZE_BOUNDARY):
            return 0.0
        return self.fits[facts.shape] * self.purity


def verify(images: Tensor, facts: Sequence[Facts]) -> Tensor:
    """Score images by the share of their caption's facts that hold.

    Args:
        images: [B, 3, H, W] in [0, 1].
        facts: What each caption states, B records.

    Returns:
        [B] float32 in [0, 1].
    """
    images = images.detach().float().cpu()
    grounds, found = _detect(images)
    return torch.tensor(
        [_score(g, d, fact) for g, d, fact in zip(grounds, found, facts, strict=True)]
    )


def detect(image: Tensor) -> list[Detection]:
    """Return the objects of one image [3, H, W] in [0, 1], largest first, at most five."""
    return detect_batch(image[None])[0]


def detect_batch(images: Tensor) -> list[list[Detection]]:
    """Return the objects of each of the images [B, 3, H, W], as `detect` does."""
    return _detect(images.detach().float().cpu())[1]


def _detect(images: Tensor) -> tuple[Tensor, list[list[Detection]]]:
    """Return the backgrounds [B, 3] and the objects of each image."""
    grounds, colors, opacity = _classify_pixels(images)
    labels = _label_components(colors, opacity > 0.5)
    owners, masks = _components(labels)
    found: list[list[Detection]] = [[] for _ in images]
    if len(owners):
        for owner, detection in zip(
            owners.tolist(), _measure(images, grounds, opacity, labels, owners, masks), strict=True
        ):
            if detection is not None:
                found[owner].append(detection)
    return grounds, found


def _classify_pixels(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the background [B, 3], each pixel's nearest colour and its opacity [B, H, W].

    A pixel on an object's edge is a mixture background + alpha (colour - background): the
    direction from the background names the colour and the length along it is alpha.
    """
    frame = torch.cat(
        [images[..., 0], images[..., -1], images[..., 0, :], images[..., -1, :]], dim=-1
    )
    grounds = frame.median(dim=-1).values
    offset = images - grounds[:, :, None, None]
    axes = _COLOR_TABLE - grounds[:, None]  # [B, colours, 3]
    along = torch.einsum("bchw,bkc->bkhw", offset, axes)
    cosine = along / axes.norm(dim=-1)[:, :, None, None]
    colors = cosine.argmax(dim=1)
    opacity = along / axes.square().sum(-1)[:, :, None, None]
    return grounds, colors, opacity.gather(1, colors[:, None])[:, 0]


def _label_components(colors: Tensor, mask: Tensor) -> Tensor:
    """Return a label per pixel [B, H, W]: equal within a connected component, 0 outside.

    Components are 4-connected pixels of one colour. A label spreads along whole runs of equal
    pixels at once, in rows and columns alternately, which settles in a few turns.
    """
    codes = (colors + 1) * mask
    rows = _runs(codes)
    columns = _runs(codes.transpose(1, 2).contiguous()).transpose(1, 2)
    labels = torch.arange(1, codes[0].numel() + 1).view_as(codes[0]) * mask
    while True:
        spread = _largest_in(columns, _largest_in(rows, labels))
        if torch.equal(spread, labels):
            return labels
        labels = spread


def _runs(codes: Tensor) -> Tensor:
    """Number the runs of equal codes along the last dimension [B, H, W]."""
    starts = torch.ones_like(codes, dtype=torch.bool)
    starts[..., 1:] = codes[..., 1:] != codes[..., :-1]
    return starts.flatten().cumsum(0).view_as(codes) - 1


def _largest_in(runs: Tensor, labels: Tensor) -> Tensor:
    flat = runs.flatten()
    largest = torch.zeros(int(flat.max()) + 1, dtype=labels.dtype)
    return largest.scatter_reduce(0, flat, labels.flatten(), "amax")[runs]


def _components(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each component's image [K] and its mask [K, H, W], largest first within an image."""
    batch, height, width = labels.shape
    keys = labels + torch.arange(batch)[:, None, None] * (height * width + 1)
    names, counts = keys[labels > 0].unique(return_counts=True)
    owners = names // (height * width + 1)
    order = (owners * (height * width + 1) - counts).argsort(stable=True)
    kept = torch.cat([order[owners[order] == image][:MAX_OBJECTS] for image in range(batch)])
    return owners[kept], keys[owners[kept]] == names[kept, None, None]


def _measure(
    images: Tensor, grounds: Tensor, opacity: Tensor, labels: Tensor, owners: Tensor, masks: Tensor
) -> list[Detection | None]:
    """Return what each component [K] is, None for those too small to be an object."""
    pixels, ground = images[owners], grounds[owners][:, :, None, None]
    # The most opaque pixels name the colour: the others may be mixed with the background.
    solid = opacity[owners] * masks
    solid = solid >= 0.9 * solid.amax(dim=(1, 2), keepdim=True)
    rgb = (pixels * solid[:, None]).sum(dim=(2, 3)) / solid.sum(dim=(1, 2))[:, None]
    axis = rgb[:, :, None, None] - ground
    alpha = ((pixels - ground) * axis).sum(dim=1) / axis.square().sum(dim=1)
    grown = F.max_pool2d(masks[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    alpha = alpha.clamp(0, 1) * (grown & ((labels[owners] == 0) | masks))
    mass = alpha.sum(dim=(1, 2)).clamp(min=1e-6)
    xs, ys = torch.arange(alpha.shape[2]) + 0.5, torch.arange(alpha.shape[1]) + 0.5
    x, y = (alpha.sum(1) @ xs) / mass, (alpha.sum(2) @ ys) / mass
    radius = (mass / torch.pi).sqrt()
    dx, dy = xs[None, None, :] - x[:, None, None], ys[None, :, None] - y[:, None, None]
    ideal = torch.stack([coverage(shape, dx, dy, radius[:, None, None]) for shape in SHAPES])
    shared, joint = torch.minimum(alpha, ideal), torch.maximum(alpha, ideal)
    ious = shared.sum(dim=(2, 3)) / joint.sum(dim=(2, 3))  # [shapes, K]
    distance, color = torch.cdist(rgb, _COLOR_TABLE).min(dim=1)
    columns = (mass, color, distance, ious.T, radius, x, y)
    return [_describe(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _describe(
    mass: float,
    color: int,
    distance: float,
    ious: list[float],
    radius: float,
    x: float,
    y: float,
) -> Detection | None:
    if mass < MIN_MASS:
        return None
    fits = {
        shape: _ramp(iou, _SHAPE_RAMP) if iou == max(ious) else 0.0
        for shape, iou in zip(SHAPES, ious, strict=True)
    }
    purity = _ramp(distance, _COLOR_RAMP)
    return Detection(list(COLORS)[color], purity, fits, radius, x, y)


def _ramp(value: float, ends: tuple[float, float]) -> float:
    zero, one = ends
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def _score(ground: Tensor, found: list[Detection], facts: Facts) -> float:
    matches, assigned = assign(found, facts.objects)
    scores = [*matches, float(len(found) == len(facts.objects))]
    if facts.background is not None:
        distance = (_BACKGROUND_TABLE - ground).norm(dim=-1)
        named = list(BACKGROUNDS)[int(distance.argmin())] == facts.background
        scores.append(named * _ramp(float(distance.min()), _BACKGROUND_RAMP))
    if facts.relation is not None:
        scores.append(min(matches) * _relation_holds(facts.relation, assigned))
    return sum(scores) / len(scores)


def assign(
    found: list[Detection], wanted: tuple[ObjectFacts, ...]
) -> tuple[list[float], tuple[Detection | None, ...]]:
    """Return the matches of the best one-to-one assignment, and the objects assigned.

    Args:
        found: What an image shows.
        wanted: What its caption names.

    Returns:
        For each object named, its match in [0, 1] and the object assigned, None if there is none.
    """
    pool: list[Detection | None] = [*found, *[None] * len(wanted)]
    best: tuple[list[float], tuple[Detection | None, ...]] = ([-1.0], ())
    for picked in itertools.permutations(pool, len(wanted)):
        matches = [d.match(w) if d else 0.0 for d, w in zip(picked, wanted, strict=True)]
        if sum(matches) > sum(best[0]):
            best = matches, picked
    return best


def _relation_holds(relation: str, assigned: tuple[Detection | None, ...]) -> float:
    first, second = assigned
    if first is None or second is None:
        return 0.0
    margin = relation_margin(relation, (first.x, first.y), (second.x, second.y))
    if margin > 0:
        return 1.0
    flipped = {"left of": "x", "right of": "x", "above": "y", "below": "y"}[relation]
    along = getattr(second, flipped) - getattr(first, flipped)
    return 0.5 if (along > 0) == (relation in ("left of", "above")) and along else 0.0
