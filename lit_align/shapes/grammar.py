"""Captions of the shapes world: facts -> caption, caption -> facts, and the prompt splits."""

from __future__ import annotations

import hashlib
import random
import re

from lit_align.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    UNSEEN_PAIRS,
    Facts,
    ObjectFacts,
)

NUMBERS = {2: "two", 3: "three"}

# Single objects are common and compositions rare: the base models learn the former well and
# leave room for alignment in the latter.
KIND_WEIGHTS = {"single": 0.50, "pair": 0.18, "relation": 0.14, "count": 0.10, "triple": 0.08}

_STATES_COLOR = 0.75
_STATES_SIZE = 0.30
_STATES_BACKGROUND = 0.60
_HELD_OUT_SHARE = 10  # one caption in ten


def caption(facts: Facts) -> str:
    """Write the caption that states exactly these facts."""
    if facts.kind == "count":
        first = facts.objects[0]
        subject = " ".join(
            filter(None, (NUMBERS[len(facts.objects)], first.size, first.color, f"{first.shape}s"))
        )
    elif facts.kind == "triple":
        one, two, three = map(_noun, facts.objects)
        subject = f"{one}, {two} and {three}"
    else:
        joint = f" {facts.relation or 'and'} "
        subject = joint.join(map(_noun, facts.objects))
    ground = f" on a {facts.background} background" if facts.background else ""
    return subject + ground


def _noun(item: ObjectFacts) -> str:
    return " ".join(filter(None, ("a", item.size, item.color, item.shape)))


def vocabulary() -> list[str]:
    """Return every word and sign that a caption may contain."""
    words = {"a", "and", "on", "background", ",", *NUMBERS.values(), *SIZES, *COLORS, *BACKGROUNDS}
    words |= {name for shape in SHAPES for name in (shape, f"{shape}s")}
    return sorted(words.union(*(relation.split() for relation in RELATIONS)))


_OBJECT = (
    rf"(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<shape>{'|'.join(SHAPES)})"
)
_GROUND = re.compile(rf" on a (?P<background>{'|'.join(BACKGROUNDS)}) background$")
_COUNT = re.compile(rf"(?P<number>{'|'.join(NUMBERS.values())}) {_OBJECT}s")
_NOUN = re.compile(rf"a {_OBJECT}")
_JOINT = re.compile(rf", | and | ({'|'.join(RELATIONS)}) ")


def parse(text: str) -> Facts:
    """Read the facts out of a caption; the inverse of `caption`.

    Raises:
        ValueError: If the text is not a caption of this grammar.
    """
    ground = _GROUND.search(text)
    background = ground["background"] if ground else None
    subject = text[: ground.start()] if ground else text
    if count := _COUNT.fullmatch(subject):
        number = next(n for n, word in NUMBERS.items() if word == count["number"])
        item = ObjectFacts(count["shape"], count["color"], count["size"])
        return Facts((item,) * number, background=background)
    relation = next((r for r in RELATIONS if f" {r} " in subject), None)
    nouns = [
        _NOUN.fullmatch(part) for part in _JOINT.split(subject) if part not in (None, relation)
    ]
    if None in nouns or not 1 <= len(nouns) <= 3:
        raise ValueError(
            f"{text!r} is not a caption of the shapes world; try 'a red circle' or "
            "'a small red circle left of a blue square on a white background'."
        )
    items = tuple(ObjectFacts(m["shape"], m["color"], m["size"]) for m in nouns if m)
    facts = Facts(items, relation, background)
    if caption(facts) != text:
        raise ValueError(f"{text!r} is not a caption of the shapes world; say {caption(facts)!r}.")
    return facts


def parse_if_caption(text: str) -> Facts | None:
    """Return the facts of a caption, None for any other text."""
    try:
        return parse(text)
    except ValueError:
        return None


def states_colors(facts: Facts) -> bool:
    """Return whether a caption of the facts states the colour of every object."""
    return all(item.color is not None for item in facts.objects)


def sample_facts(rng: random.Random, kind: str | None = None) -> Facts:
    """Draw facts as a caption would state them, some of them omitted.

    Args:
        rng: Source of randomness.
        kind: One of `KINDS`; drawn by `KIND_WEIGHTS` if None.
    """
    kind = kind or rng.choices(KINDS, [KIND_WEIGHTS[k] for k in KINDS])[0]
    background = rng.choice(list(BACKGROUNDS)) if rng.random() < _STATES_BACKGROUND else None
    if kind == "single":
        return Facts((_sample_object(rng),), background=background)
    if kind == "count":
        number = rng.choice(list(NUMBERS))
        return Facts((_sample_object(rng, sized=number < 3),) * number, background=background)
    if kind == "triple":  # without a background: a caption has at most 14 words
        items = tuple(_sample_object(rng, sized=False) for _ in range(3))
        return Facts(items) if len(set(items)) == 3 else sample_facts(rng, kind)
    items = (_sample_object(rng), _sample_object(rng))
    if items[0] == items[1]:
        return sample_facts(rng, kind)
    return Facts(items, rng.choice(RELATIONS) if kind == "relation" else None, background)


def _sample_object(rng: random.Random, sized: bool = True) -> ObjectFacts:
    color = rng.choice(list(COLORS)) if rng.random() < _STATES_COLOR else None
    size = rng.choice(SIZES) if sized and rng.random() < _STATES_SIZE else None
    return ObjectFacts(rng.choice(SHAPES), color, size)


def split_of(facts: Facts) -> str:
    """Return the prompt split: "train", "heldout" or "unseen".

    "unseen" captions name a pair of `UNSEEN_PAIRS`; of the others one in ten is held out, by a
    hash of the caption.
    """
    if any((item.color, item.shape) in UNSEEN_PAIRS for item in facts.objects):
        return "unseen"
    digest = hashlib.md5(caption(facts).encode(), usedforsecurity=False).digest()
    return "heldout" if digest[0] * 256 + digest[1] < 65536 // _HELD_OUT_SHARE else "train"


def sample_split(split: str, count: int, seed: int, kind: str | None = None) -> list[Facts]:
    """Draw `count` facts of one prompt split, in a fixed order for a fixed seed.

    Args:
        split: "train", "heldout" or "unseen".
        count: How many, repetitions possible.
        seed: Decides all draws.
        kind: One of `KINDS`, or None for the mixture of `KIND_WEIGHTS`.
    """
    rng = random.Random(seed)
    drawn: list[Facts] = []
    while len(drawn) < count:
        facts = sample_facts(rng, kind)
        if split_of(facts) == split:
            drawn.append(facts)
    return drawn
