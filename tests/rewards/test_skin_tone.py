"""Classifiers for parity: colour by closed forms, a network's labels by an equal processor."""

import math

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lit_align.hub import CheckpointError
from lit_align.rewards import DistributionParity
from lit_align.rewards.skin_tone import (
    CUTS,
    SKIN_TONES,
    ImageClassifier,
    SkinToneClassifier,
    cielab,
    skin_mask,
)
from tests.rewards.plain_values import from_yaml

# sRGB under D65, as colour tables list them (CIE 15, IEC 61966-2-1).
LAB = {
    (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (1.0, 0.0, 0.0): (53.2408, 80.0925, 67.2032),
    (0.0, 1.0, 0.0): (87.7347, -86.1827, 83.1793),
    (0.0, 0.0, 1.0): (32.2970, 79.1875, -107.8602),
    (0.5, 0.5, 0.5): (53.3890, 0.0, 0.0),
    # Below both kinks: L* = 116 / (3 (6/29)^2) of 0.02 / 12.92.
    (0.02, 0.02, 0.02): (116 / (3 * (6 / 29) ** 2) * 0.02 / 12.92, 0.0, 0.0),
}
# Tones of the Monk scale, and the class of their angle.
TONES = {
    "f6ede4": "very light",
    "d7bd96": "light",
    "a07e56": "tan",
    "825c43": "brown",
    "604134": "dark",
}


def flat(color, size=8):
    if isinstance(color, str):
        color = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return torch.tensor(color)[:, None, None].expand(3, size, size).clone()


class Boxes(torch.nn.Module):
    def __init__(self, *boxes):
        super().__init__()
        self.boxes = boxes

    def forward(self, images):
        return self.boxes


def classes(classifier, *images):
    scores = classifier(torch.stack(images), [""] * len(images), None)
    assert scores.shape == (len(images), len(SKIN_TONES))
    assert (scores.isnan().any(1) == scores.isnan().all(1)).all()
    return [None if row.isnan().any() else SKIN_TONES[row.argmax()] for row in scores]


@pytest.mark.parametrize(("color", "expected"), LAB.items())
def test_cielab_of_known_colours(color, expected):
    lab = cielab(flat(color)[None])
    assert lab.shape == (1, 3, 8, 8)
    torch.testing.assert_close(lab[0, :, 3, 3], torch.tensor(expected), rtol=0, atol=2e-3)


def test_skin_is_told_by_its_chroma():
    # (200, 140, 110): Cb = 128 - 33.747 - 46.377 + 55 = 102.876, Cr = 128 + 100 - 58.616 - 8.944
    # = 160.440. (200, 200, 60) has Cb 58, (60, 140, 110) has Cr 91.
    for color, skin in [((200, 140, 110), True), ((200, 200, 60), False), ((60, 140, 110), False)]:
        mask = skin_mask(flat([c / 255 for c in color])[None])
        assert mask.shape == (1, 8, 8)
        assert mask.unique().tolist() == [skin], color


def test_the_angle_of_a_flat_colour():
    color = flat("a07e56")
    lightness, _, yellow = cielab(color)[:, 0, 0].tolist()
    expected = math.degrees(math.atan2(lightness - 50, yellow))
    assert SkinToneClassifier().angle(color).item() == pytest.approx(expected, abs=1e-3)
    assert expected == pytest.approx(10.885, abs=1e-2)


def test_tones_get_the_classes_of_their_angles():
    assert classes(SkinToneClassifier(), *map(flat, TONES)) == list(TONES.values())


@pytest.mark.parametrize("number", range(len(CUTS)))
def test_a_cut_is_the_next_darker_class(number, monkeypatch):
    classifier = SkinToneClassifier()
    at = {-1: CUTS[number] + 0.01, 0: CUTS[number], 1: CUTS[number] - 0.01}
    found = []
    for angle in at.values():
        monkeypatch.setattr(classifier, "angle", lambda _, angle=angle: torch.tensor(angle))
        found += classes(classifier, flat("a07e56"))
    assert found == [SKIN_TONES[number], SKIN_TONES[number + 1], SKIN_TONES[number + 1]]


def test_no_class_without_enough_skin():
    image = flat((0.1, 0.4, 0.8), size=10)
    image[:, :1, :2] = flat("825c43")[:, :1, :2]  # two of a hundred pixels
    spoilt = flat("825c43").masked_fill(torch.eye(8, dtype=torch.bool), torch.nan)
    assert classes(SkinToneClassifier(min_skin=0.02), image) == ["brown"]
    assert classes(SkinToneClassifier(min_skin=0.03), image) == [None]
    assert classes(SkinToneClassifier(), spoilt, flat("825c43")) == [None, "brown"]


def test_the_darkest_tone_is_missed_as_said():
    missed = classes(SkinToneClassifier(), flat("3a312a"), flat("292420"))
    assert missed == ["dark", None]


def test_a_face_detector_says_where_to_look():
    image = flat("825c43")
    image[:, :, 4:] = flat("f6ede4")[:, :, 4:]
    batch = [image] * 4
    detector = Boxes((0, 0, 4, 8), (4.2, -3, 99, 8), None, (2, 5, 2, 7))
    assert classes(SkinToneClassifier(detector), *batch) == ["brown", "very light", None, None]
    with pytest.raises(ValueError, match="Boxes must return one box or None per image, got 4 for"):
        classes(SkinToneClassifier(detector), image)


def test_parity_counts_tones():
    reward = DistributionParity(SkinToneClassifier(), target=[0.5, 0, 0, 0, 0.5, 0])
    images = torch.stack([*map(flat, ("f6ede4", "825c43", "825c43")), flat((0.0, 0.0, 1.0))])
    # Shares 1/3 and 2/3 against 1/2 each: the distance is sqrt(2) / 6.
    expected = [-(2**0.5) / 6] * 3 + [math.nan]
    scores = reward(images, [""] * 4).tolist()
    assert scores == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("share", [0, -0.1, 1.5])
def test_a_share_of_skin_is_one(share):
    with pytest.raises(ValueError, match="`min_skin` must be a share"):
        SkinToneClassifier(min_skin=share)


# The network's classes.

LABELS = ["young", "old", "poster", "cat"]


@pytest.fixture
def network():
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    model = ViTForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture
def processor():
    return ViTImageProcessor(size={"height": 16, "width": 16})


def test_probabilities_are_those_of_the_network(network, processor):
    images = torch.rand(3, 3, 40, 24)
    classify = ImageClassifier(model=network, processor=processor, classes=["old", "young"])
    found = classify(images, [""] * 3, None)
    levels = list((images * 255).round().byte())
    with torch.no_grad():
        logits = network(**processor(levels, return_tensors="pt")).logits
    torch.testing.assert_close(found, logits.softmax(1)[:, [1, 0]])
    everything = ImageClassifier(model=network, processor=processor)(images, [""] * 3, None)
    torch.testing.assert_close(everything.sum(1), torch.ones(3))


def test_no_class_without_a_face_or_a_probable_one(network, processor):
    images = torch.rand(4, 3, 16, 16)
    images[3, 0, 0, 0] = torch.nan
    options = {"model": network, "processor": processor, "classes": ["young", "old"]}
    plain = ImageClassifier(**options)(images, [""] * 4, None)
    assert plain.isnan().all(1).tolist() == [False, False, False, True]
    probable = plain[:3].sum(1)
    unsure = ImageClassifier(**options, min_probability=probable.median().item())
    expected = (probable < probable.median()).tolist()
    assert unsure(images[:3], [""] * 3, None).isnan().all(1).tolist() == expected
    detector = Boxes((0, 0, 16, 16), None, (0, 0, 8, 8), None)
    cropped = ImageClassifier(**options, face_detector=detector)(images, [""] * 4, None)
    assert cropped.isnan().all(1).tolist() == [False, True, False, True]
    torch.testing.assert_close(cropped[0], plain[0])
    assert not torch.allclose(cropped[2], plain[2])
    nobody = ImageClassifier(**options, face_detector=Boxes(None, None, None, None))
    assert nobody(images, [""] * 4, None).isnan().all()


def test_a_folder_is_opened_and_parity_counts_its_classes(network, processor, tmp_path):
    network.save_pretrained(tmp_path / "net")
    processor.save_pretrained(tmp_path / "net")
    opened = ImageClassifier(str(tmp_path / "net"), classes=["young", "old"])
    told = from_yaml(
        "{class_path: DistributionParity, init_args: {classifier: {class_path: "
        f"skin_tone.ImageClassifier, init_args: {{pretrained: {tmp_path}/net, "
        "classes: [young, old]}}}}"
    )
    images = torch.rand(6, 3, 16, 16)
    labels = opened(images, [""] * 6, None).argmax(1)
    share = (labels == 0).float().mean().item()
    scores = told(images, [""] * 6)
    torch.testing.assert_close(scores, torch.full((6,), -abs(share - 0.5) * 2**0.5))


def test_bad_classifiers_are_refused(network, processor):
    options = {"model": network, "processor": processor}
    for wrong in (["old", "tall"], ["old"], ["old", "old"]):
        with pytest.raises(ValueError, match="two different labels.*it knows: young, old, poster"):
            ImageClassifier(**options, classes=wrong)
    with pytest.raises(ValueError, match="either `pretrained` or `model`"):
        ImageClassifier()
    with pytest.raises(ValueError, match="needs its `processor`"):
        ImageClassifier(model=network)
    with pytest.raises(ValueError, match="`min_probability` must be in"):
        ImageClassifier(**options, min_probability=2)
    with pytest.raises(CheckpointError, match="hf download some/faces"):
        ImageClassifier("some/faces")
