import random
from collections import Counter

import pytest
import torch

from lit_align.shapes import grammar
from lit_align.shapes.renderer import coverage, relation_margin, render, sample_scene
from lit_align.shapes.scene import (
    COLORS,
    KINDS,
    SHAPES,
    UNSEEN_PAIRS,
    Facts,
    ObjectFacts,
    Scene,
)
from lit_align.shapes.tokens import MAX_TOKENS, byte_pair_tables
from lit_align.shapes.verifier import detect, verify


def facts_of(text):
    return grammar.parse(text)


def scenes_of(facts, seed=0):
    rng = random.Random(seed)
    return [sample_scene(f, rng) for f in facts]


def test_captions_and_facts_are_inverse():
    rng = random.Random(0)
    for _ in range(3000):
        facts = grammar.sample_facts(rng)
        assert grammar.parse(grammar.caption(facts)) == facts
        assert Facts.from_metadata(facts.to_metadata()) == facts


@pytest.mark.parametrize(
    ("text", "kind", "objects"),
    [
        ("a circle on a white background", "single", [("circle", None, None)]),
        ("a small red square", "single", [("square", "red", "small")]),
        ("three blue circles", "count", [("circle", "blue", None)] * 3),
        ("a red circle and a square", "pair", [("circle", "red", None), ("square", None, None)]),
        (
            "a red circle left of a large blue square on a gray background",
            "relation",
            [("circle", "red", None), ("square", "blue", "large")],
        ),
        (
            "a circle, a red square and a triangle",
            "triple",
            [("circle", None, None), ("square", "red", None), ("triangle", None, None)],
        ),
    ],
)
def test_parsing_by_hand(text, kind, objects):
    facts = facts_of(text)
    assert facts.kind == kind
    assert [(o.shape, o.color, o.size) for o in facts.objects] == objects
    assert facts.to_metadata()["kind"] == kind


@pytest.mark.parametrize(
    "text", ["", "a dog", "red circle", "a red circle left of", "two circle", "a circle on white"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        grammar.parse(text)


def test_splits_are_disjoint_and_stable():
    drawn = {s: grammar.sample_split(s, 500, seed=1) for s in ("train", "heldout", "unseen")}
    captions = {s: {grammar.caption(f) for f in facts} for s, facts in drawn.items()}
    assert not captions["train"] & captions["heldout"]
    for facts in drawn["unseen"]:
        assert any((o.color, o.shape) in UNSEEN_PAIRS for o in facts.objects)
    for facts in drawn["train"] + drawn["heldout"]:
        assert not any((o.color, o.shape) in UNSEEN_PAIRS for o in facts.objects)
    assert grammar.split_of(facts_of("a red circle on a white background")) == "train"
    share = Counter(grammar.split_of(grammar.sample_facts(random.Random(i))) for i in range(4000))
    assert share["heldout"] / (share["heldout"] + share["train"]) == pytest.approx(0.1, abs=0.03)


def test_omitted_colours_are_biased_and_never_make_an_unseen_pair():
    facts = [facts_of(f"a {shape}") for shape in SHAPES for _ in range(400)]
    images = render(scenes_of(facts))
    seen = Counter()
    for image, fact in zip(images, facts, strict=True):
        (found,) = detect(image)
        assert (found.color, fact.objects[0].shape) not in UNSEEN_PAIRS
        seen[found.color] += 1
    assert seen["red"] / len(facts) == pytest.approx(0.70, abs=0.05)
    assert set(seen) == set(COLORS)


def test_images_are_in_range_and_deterministic():
    facts = grammar.sample_split("train", 20, seed=3)
    images = render(scenes_of(facts))
    assert images.shape == (20, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, render(scenes_of(facts)))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_radius_cover_one_area(shape):
    centres = torch.arange(64) + 0.5 - 32
    drawn = coverage(shape, centres[None, :], centres[:, None], torch.tensor(12.0))
    assert drawn.sum().item() == pytest.approx(torch.pi * 144, rel=0.01)
    assert (drawn.sum(0) @ centres / drawn.sum()).item() == pytest.approx(0, abs=1e-3)
    assert (drawn.sum(1) @ centres / drawn.sum()).item() == pytest.approx(0, abs=0.1)


def test_relation_margins():
    left, right = (5.0, 10.0), (20.0, 12.0)
    assert relation_margin("left of", left, right) == 15
    assert relation_margin("right of", right, left) == 15
    assert relation_margin("right of", left, right) < 0
    assert relation_margin("above", left, right) == 2 - 15
    assert relation_margin(None, left, right) == float("inf")


def test_verifier_knows_rendered_images_from_shuffled_captions():
    facts = grammar.sample_split("heldout", 1000, seed=0)
    images = render(scenes_of(facts, seed=1))
    shuffled = facts[:]
    random.Random(2).shuffle(shuffled)
    assert verify(images, facts).mean() >= 0.98
    assert verify(images, shuffled).mean() <= 0.35
    for kind in KINDS:
        of_kind = [i for i, f in enumerate(facts) if f.kind == kind]
        assert verify(images[of_kind], [facts[i] for i in of_kind]).mean() >= 0.97


SCENE = "a red circle left of a large blue square on a white background"


@pytest.mark.parametrize(
    ("claim", "score"),
    [
        (SCENE, 1.0),
        # five facts: count, two objects, background, relation
        ("a red circle left of a large blue square on a black background", 4 / 5),
        ("a red circle right of a large blue square on a white background", 4 / 5),
        ("a green circle left of a large blue square on a white background", 3 / 5),
        ("a red circle left of a small blue square on a white background", 3 / 5),
        ("a red circle and a large blue square", 1.0),
        ("a red circle", 1 / 2),  # the object is there, the count is wrong
        ("three red circles", 1 / 4),
    ],
)
def test_each_false_fact_costs_its_share(claim, score):
    image = render(scenes_of([facts_of(SCENE)]))
    assert verify(image, [facts_of(claim)]).item() == pytest.approx(score, abs=0.01)


def test_half_credit_for_a_relation_that_holds_in_direction_only():
    scene = scenes_of([facts_of("a red circle and a blue square on a white background")])[0]
    circle, square = scene.objects
    moved = Scene(
        scene.background,
        (
            type(circle)(circle.shape, 8, 8, 3.2, circle.rgb),
            type(square)(square.shape, 14, 24, 3.2, square.rgb),
        ),
    )
    claim = facts_of("a red circle left of a blue square on a white background")
    assert verify(render([moved]), [claim]).item() == pytest.approx(4.5 / 5, abs=0.01)


def test_blur_and_washed_out_colours_lower_the_score():
    facts = grammar.sample_split("train", 50, seed=5)
    images = render(scenes_of(facts))
    blurred = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
    washed = images.lerp(images.mean(dim=1, keepdim=True).expand_as(images), 0.5)
    clear = verify(images, facts).mean()
    assert verify(blurred, facts).mean() < clear - 0.2
    assert verify(washed, facts).mean() < clear - 0.2


def test_flat_and_noisy_images_do_not_break_the_verifier():
    facts = [facts_of("a red circle")] * 3
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.rand(3, 32, 32)])
    scores = verify(images, facts)
    assert scores.dtype == torch.float32
    assert scores[:2].tolist() == [0, 0]
    assert scores.isfinite().all()


def test_every_word_is_one_token_and_captions_fit():
    vocabulary, merges = byte_pair_tables()
    for word in grammar.vocabulary():
        assert f"{word}</w>" in vocabulary
    assert len(vocabulary) == 512 + len(merges) + 2
    longest = max(len(grammar.caption(f).replace(",", " ,").split())
                  for f in grammar.sample_split("train", 5000, 0))  # fmt: skip
    assert longest == MAX_TOKENS - 2


def test_object_match_needs_every_stated_fact():
    (found,) = detect(render(scenes_of([facts_of("a small red circle")]))[0])
    assert found.match(ObjectFacts("circle")) == pytest.approx(1, abs=0.02)
    assert found.match(ObjectFacts("circle", "red", "small")) == pytest.approx(1, abs=0.02)
    assert found.match(ObjectFacts("circle", "blue")) == 0
    assert found.match(ObjectFacts("circle", size="large")) == 0
    assert found.match(ObjectFacts("square")) == 0
