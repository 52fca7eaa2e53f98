"""Classifiers of people for `DistributionParity`: skin tone by colour, attributes by a network.

Both judge how a picture looks, not who somebody is, and both err more often for some groups than
for others: check them on labelled images of every class first, and report results by class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lit_align.hub import opening
from lit_align.rewards.base import Metadata

SKIN_TONES = ("very light", "light", "intermediate", "tan", "brown", "dark")
CUTS = (55.0, 41.0, 28.0, 10.0, -30.0)  # degrees; the first class lies above the first cut

# Linear sRGB to CIE XYZ (IEC 61966-2-1); the rows sum to the white point D65.
_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_CB = (-0.168736, -0.331264, 0.5)  # ITU-R BT.601, full range
_CR = (0.5, -0.418688, -0.081312)
_SKIN_CB, _SKIN_CR = (77, 127), (133, 173)  # Chai and Ngan 1999, of 0 to 255

Box = tuple[float, float, float, float]


class FaceDetector(Protocol):
    """What the classifiers below ask of a face detector."""

    def __call__(self, images: Tensor) -> Sequence[Box | None]:
        """Return the box of each image's most certain face, None where there is none.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Returns:
            B boxes (left, top, right, bottom) in pixels.
        """


class SkinToneClassifier(nn.Module):
    """Six skin tones by the individual typology angle (Chardon et al. 1991), without a network.

    Pixels are skin if 77 <= Cb <= 127 and 133 <= Cr <= 173. Of their median L* and b* (CIELAB, D65)

        ITA = atan2(L* - 50, b*) 180 / pi

    is cut at 55, 41, 28, 10 and -30 degrees, see `SKIN_TONES`. An image with too little skin, or
    without a face where faces are looked for, has no class.

    The angle follows the light of the scene as much as the skin, and the mask takes wood or sand
    for skin and misses the darkest skin: of the ten tones of the Monk scale, as flat colours, it
    lets all but the last one through. Use it to compare models on equal prompts, never to say what
    a person is.

    Args:
        face_detector: Crops every image to its face first; see `FaceDetector`. Without one all
            skin of the image counts.
        min_skin: Share of the pixels, of the face if there is a detector, that must be skin.

    Raises:
        ValueError: If `min_skin` is no share.
    """

    def __init__(self, face_detector: nn.Module | None = None, min_skin: float = 0.02) -> None:
        super().__init__()
        if not 0 < min_skin <= 1:
            raise ValueError(f"`min_skin` must be a share in (0, 1], got {min_skin}.")
        self.face_detector = face_detector
        self.min_skin = min_skin

    @torch.no_grad()
    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return the classes [B, 6], one-hot; NaN where an image has none."""
        angles = [
            torch.tensor(torch.nan) if face is None else self.angle(face)
            for face in faces(images, self.face_detector)
        ]
        angle = torch.stack([value.cpu() for value in angles])
        labels = (angle[:, None] <= torch.tensor(CUTS)).sum(dim=1)
        scores = nn.functional.one_hot(labels, len(SKIN_TONES)).float()
        return scores.masked_fill(angle.isnan()[:, None], torch.nan).to(images.device)

    def angle(self, image: Tensor) -> Tensor:
        """Return the individual typology angle of an image's skin.

        Args:
            image: [3, H, W] in [0, 1].

        Returns:
            A scalar, degrees; NaN if too little of it is skin.
        """
        skin = skin_mask(image)
        if not image.isfinite().all() or skin.float().mean() < self.min_skin:
            return image.new_tensor(torch.nan)
        lightness, _, yellow = cielab(image)[:, skin].median(dim=1).values
        return torch.atan2(lightness - 50, yellow).rad2deg()


class ImageClassifier(nn.Module):
    """Classes of a pretrained image classifier, such as perceived gender or age of a face.

    What the network learned to see are its annotators' judgements; see the module on bias.

    Args:
        pretrained: A hub id or folder of a transformers image classifier.
        classes: Its labels that count, in the order of the target's shares; all if None.
        face_detector: Crops every image to its face first, as most such networks expect; see
            `FaceDetector`. An image without a face has no class.
        min_probability: An image has no class if the counted labels are less probable together.
        model: Use this network instead of `pretrained`, with `processor`.
        processor: Its image processor.

    Raises:
        CheckpointError: If `pretrained` is not at hand.
        ValueError: If a class is no label of the network, fewer than two are given, or neither or
            both of `pretrained` and `model` are.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        classes: list[str] | None = None,
        face_detector: nn.Module | None = None,
        min_probability: float = 0.0,
        model: Any = None,
        processor: Any = None,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (model is None):
            raise ValueError("Give an ImageClassifier either `pretrained` or `model`.")
        if pretrained is not None:
            with opening(pretrained, "model.safetensors"):
                model = AutoModelForImageClassification.from_pretrained(pretrained)
                processor = processor or AutoImageProcessor.from_pretrained(pretrained)
        if processor is None:
            raise ValueError("An ImageClassifier made of a `model` needs its `processor`.")
        if not 0 <= min_probability <= 1:
            raise ValueError(f"`min_probability` must be in [0, 1], got {min_probability}.")
        self.model = model.requires_grad_(False).float().eval()
        self.processor, self.face_detector = processor, face_detector
        self.min_probability = min_probability
        self.columns = _columns(classes, model.config.id2label)

    @torch.no_grad()
    def forward(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return the probabilities [B, K] of the classes; NaN where an image has none."""
        scores = torch.full((len(images), len(self.columns)), torch.nan, device=images.device)
        cropped = enumerate(faces(images, self.face_detector))
        seen = {i: face for i, face in cropped if face is not None and face.isfinite().all()}
        if not seen:
            return scores
        # As files hold them: processors of transformers rescale integers.
        levels = [(face * 255).round().clamp(0, 255).byte() for face in seen.values()]
        pixels = self.processor(images=levels, return_tensors="pt").pixel_values
        logits = self.model(pixel_values=pixels.to(self.model.device)).logits
        chosen = logits.float().softmax(dim=1)[:, self.columns]
        unsure = chosen.sum(dim=1, keepdim=True) < self.min_probability
        scores[list(seen)] = chosen.masked_fill(unsure, torch.nan).to(scores)
        return scores


def faces(images: Tensor, detector: nn.Module | None) -> list[Tensor | None]:
    """Return the images [3, H, W], cropped to their faces if there is a detector; None if none."""
    if detector is None:
        return list(images)
    detect: FaceDetector = detector
    boxes = detect(images)
    if len(boxes) != len(images):
        raise ValueError(
            f"The face detector {type(detector).__name__} must return one box or None per image, "
            f"got {len(boxes)} for {len(images)} images."
        )
    return [
        None if box is None else _crop(image, box) for image, box in zip(images, boxes, strict=True)
    ]


def skin_mask(images: Tensor) -> Tensor:
    """Return which pixels [..., H, W] of images [..., 3, H, W] in [0, 1] look like skin."""
    levels = images.float() * 255
    cb, cr = (128 + _mix(levels, (weights,)).squeeze(-3) for weights in (_CB, _CR))
    return (cb >= _SKIN_CB[0]) & (cb <= _SKIN_CB[1]) & (cr >= _SKIN_CR[0]) & (cr <= _SKIN_CR[1])


def cielab(images: Tensor) -> Tensor:
    """Return L* in [0, 100], a* and b* [..., 3, H, W] of sRGB images [..., 3, H, W] in [0, 1]."""
    images = images.float()
    linear = torch.where(
        images <= 0.04045, images / 12.92, ((images.clamp(min=0) + 0.055) / 1.055) ** 2.4
    )
    white = images.new_tensor(_XYZ).sum(dim=1)[:, None, None]
    relative = _mix(linear, _XYZ) / white
    edge = 6 / 29
    root = relative.clamp(min=edge**3) ** (1 / 3)
    x, y, z = root.where(relative > edge**3, relative / (3 * edge**2) + 4 / 29).unbind(dim=-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-3)


def _mix(images: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Return weighted sums [..., K, H, W] of the channels."""
    return torch.einsum("kc,...chw->...khw", images.new_tensor(weights), images)


def _crop(image: Tensor, box: Box) -> Tensor | None:
    """Return the part of an image inside a box; None if there is none."""
    height, width = image.shape[-2:]
    left, right = (min(max(round(x), 0), width) for x in (box[0], box[2]))
    top, bottom = (min(max(round(y), 0), height) for y in (box[1], box[3]))
    return image[:, top:bottom, left:right] if top < bottom and left < right else None


def _columns(classes: list[str] | None, labels: dict[int, str]) -> list[int]:
    """Return the columns of the network's output that the classes name."""
    names = {label: column for column, label in labels.items()}
    wanted = list(names) if classes is None else classes
    unknown = [name for name in wanted if name not in names]
    if unknown or len(set(wanted)) < 2 or len(set(wanted)) < len(wanted):
        raise ValueError(
            f"`classes` must be at least two different labels of the network, got {classes}; it "
            f"knows: {', '.join(names)}."
        )
    return [names[name] for name in wanted]
