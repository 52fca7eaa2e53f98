"""OWLv2 for named objects and faces, tiny and random: what it sees, is asked, and answers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection

from lit_align.functional.pixels import normalise
from lit_align.hub import CheckpointError
from lit_align.rewards import Composition
from lit_align.rewards.detectors import OpenVocabularyDetector, OpenVocabularyFaces
from lit_align.rewards.skin_tone import SkinToneClassifier
from lit_align.shapes.tokens import tokenizer_options
from tests.rewards.plain_values import from_yaml


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer(**tokenizer_options())


@pytest.fixture(scope="module")
def network(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    config = Owlv2Config(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = Owlv2ForObjectDetection(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def detector(network, tokenizer):
    return OpenVocabularyDetector(model=network, tokenizer=tokenizer)


def close(found, expected):
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6, nan_ok=True)


def test_confidences_are_the_largest_of_the_networks_boxes(network, detector, tokenizer):
    images = torch.rand(2, 3, 32, 32)
    objects = [["red circle", "blue square"], ["blue square", "green triangle"]]
    queries = [f"a photo of a {name}" for row in objects for name in row]
    tokens = tokenizer(queries, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = network(pixel_values=normalise(images), **tokens).logits
    expected = logits.sigmoid().amax(dim=1).tolist()
    close(detector(images, objects), expected)
    assert len({round(value, 5) for row in expected for value in row}) == 4


def test_an_answer_depends_on_its_image_and_object_only(network, tokenizer):
    images = torch.rand(5, 3, 24, 40)
    objects = [["circle"], ["circle", "red square", "blue"], ["square"], ["circle"], ["a", "b"]]
    detector = OpenVocabularyDetector(model=network, tokenizer=tokenizer, batch_size=2)
    alone = [detector(images[i : i + 1], objects[i : i + 1])[0] for i in range(5)]
    close(detector(images, objects), alone)
    assert alone[0] != alone[3]


def test_an_image_that_cannot_be_looked_at_is_not_scored(detector):
    images = torch.rand(3, 3, 32, 32)
    whole = detector(images, [["circle", "square"]] * 3)
    images[1, 2, 4, 4] = torch.inf
    expected = [whole[0], [torch.nan] * 2, whole[2]]
    close(detector(images, [["circle", "square"]] * 3), expected)
    scores = Composition(detector)(
        images, ["", "", "no caption"], [{"objects": ["circle", "square"]}] * 2 + [None]
    )
    means = torch.tensor([sum(whole[0]) / 2, torch.nan, torch.nan])
    torch.testing.assert_close(scores, means, equal_nan=True)


def test_the_network_sees_a_square_with_grey_below_or_beside(network, detector, monkeypatch):
    seen = []
    forward = network.forward
    monkeypatch.setattr(
        network,
        "forward",
        lambda **inputs: seen.append(inputs["pixel_values"]) or forward(**inputs),
    )
    images = torch.rand(1, 3, 16, 32)
    detector(images, [["circle"]])
    expected = torch.cat([images, torch.full((1, 3, 16, 32), 0.5)], dim=2)
    torch.testing.assert_close(seen[0], normalise(expected))


def test_boxes_are_pixels_of_the_image(detector, network, tokenizer):
    images = torch.rand(1, 3, 24, 48)
    confidences, boxes = detector.look(images, [["circle"]])
    assert confidences.shape == (1, 16, 1)
    tokens = tokenizer("a photo of a circle", padding="max_length", max_length=16,
                       return_tensors="pt")  # fmt: skip
    square = F.pad(images, (0, 0, 0, 24), value=0.5)
    resized = F.interpolate(square, (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        x, y, width, height = network(pixel_values=normalise(resized), **tokens).pred_boxes.unbind(
            2
        )
    expected = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 2) * 48
    torch.testing.assert_close(boxes, expected)


def test_objects_are_names(detector):
    with pytest.raises(TypeError, match="reads names, such as 'red bicycle', got"):
        detector(torch.rand(1, 3, 32, 32), [[{"shape": "circle"}]])


def test_faces_are_the_most_certain_boxes(network, tokenizer):
    images = torch.rand(3, 3, 24, 40)
    images[1] = torch.nan
    detector = OpenVocabularyDetector(model=network, tokenizer=tokenizer, batch_size=2)
    confidences, boxes = detector.look(images, [["a face"]] * 3)
    best, place = confidences.squeeze(2).max(dim=1)
    found = OpenVocabularyFaces(detector, "a face", threshold=0.0)(images)
    assert found[1] is None
    for number in (0, 2):
        assert list(found[number]) == boxes[number, place[number]].tolist()
    between = (best[0] + best[2]).item() / 2
    strict = OpenVocabularyFaces(detector, "a face", threshold=between)(images)
    assert [box is None for box in strict] == [best[0] < between, True, best[2] < between]
    scores = SkinToneClassifier(OpenVocabularyFaces(detector, "a face", 1.0))(images, [""] * 3)
    assert scores.isnan().all()


def test_a_folder_is_opened(network, tokenizer, detector, tmp_path):
    network.save_pretrained(tmp_path / "net")
    tokenizer.save_pretrained(tmp_path / "net")
    images = torch.rand(1, 3, 32, 32)
    opened = OpenVocabularyDetector(str(tmp_path / "net"))
    close(opened(images, [["circle"]]), detector(images, [["circle"]]))


def test_the_command_line_opens_them_from_plain_values(network, tokenizer, detector, tmp_path):
    network.save_pretrained(tmp_path / "net")
    tokenizer.save_pretrained(tmp_path / "net")
    options = f"{{pretrained: {tmp_path}/net}}"
    opened = f"{{class_path: detectors.OpenVocabularyDetector, init_args: {options}}}"
    images, known = torch.rand(2, 3, 32, 32), [{"objects": ["circle"]}] * 2
    shown = from_yaml(f"{{class_path: Composition, init_args: {{detector: {opened}}}}}")
    expected = Composition(detector)(images, [""] * 2, known)
    torch.testing.assert_close(shown(images, [""] * 2, known), expected)
    faces = f"{{class_path: detectors.OpenVocabularyFaces, init_args: {{detector: {opened}}}}}"
    tones = f"{{class_path: skin_tone.SkinToneClassifier, init_args: {{face_detector: {faces}}}}}"
    parity = from_yaml(f"{{class_path: DistributionParity, init_args: {{classifier: {tones}}}}}")
    assert parity(images, [""] * 2).shape == (2,)


def test_bad_options_are_refused(network, tokenizer):
    options = {"model": network, "tokenizer": tokenizer}
    with pytest.raises(CheckpointError, match="hf download google/owlv2-base-patch16-ensemble"):
        OpenVocabularyDetector()
    with pytest.raises(ValueError, match="needs its `tokenizer`"):
        OpenVocabularyDetector(model=network)
    with pytest.raises(ValueError, match="`template` must hold '{}'"):
        OpenVocabularyDetector(template="a photo", **options)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        OpenVocabularyDetector(batch_size=0, **options)
    with pytest.raises(ValueError, match="`threshold` must be in"):
        OpenVocabularyFaces(OpenVocabularyDetector(**options), threshold=1.1)
