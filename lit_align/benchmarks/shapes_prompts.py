"""Writes the shipped prompt lists: `python -m lit_align.benchmarks.shapes_prompts`.

shapes-train    2,000 different captions of the train split
shapes-mixture  2,000 captions of the train split in the mixture of the training pictures, half
                of them single objects, drawn with repetition
shapes-heldout  600 captions of the held-out split, drawn with repetition: it has few single objects
shapes-unseen   200 different captions that name a colour-shape pair no denoiser was trained on

For relations, for numbers, and for colours that the caption leaves open:

shapes-relations          1,000 different captions of the train split that state a relation
shapes-relations-heldout  192 of the held-out split
shapes-counts             the different captions of the train split that name a number of objects
shapes-counts-heldout     those of the held-out split
shapes-uncolored          two in three captions of one object, or of equal ones, of the train split
                          that state no colour
shapes-uncolored-test     the third one, and all of the held-out split, each 16 times in a row
shapes-colored-heldout    192 captions of the held-out split that state the colour of every object,
                          drawn with repetition
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lit_align.shapes.grammar import caption, sample_split, states_colors
from lit_align.shapes.scene import Facts

FOLDER = Path(__file__).parent.parent / "data" / "prompts"
REPEATS = 16  # of a prompt whose images are compared with each other


def prompt_lists() -> dict[str, list[Facts]]:
    """Return the facts of every list by name."""
    uncolored = list(_uncolored("train", seed=700))
    return {
        "shapes-train": list(_different(sample_split("train", 20_000, seed=100), 2_000)),
        "shapes-mixture": sample_split("train", 2_000, seed=400),
        "shapes-heldout": sample_split("heldout", 600, seed=200),
        "shapes-unseen": list(_different(sample_split("unseen", 5_000, seed=300), 200)),
        "shapes-relations": list(
            _different(sample_split("train", 5_000, seed=500, kind="relation"), 1_000)
        ),
        "shapes-relations-heldout": list(
            _different(sample_split("heldout", 1_000, seed=600, kind="relation"), 192)
        ),
        "shapes-counts": list(
            dict.fromkeys(sample_split("train", 20_000, seed=1000, kind="count"))
        ),
        "shapes-counts-heldout": list(
            dict.fromkeys(sample_split("heldout", 2_000, seed=1100, kind="count"))
        ),
        "shapes-uncolored": [f for number, f in enumerate(uncolored) if number % 3 != 2],
        "shapes-uncolored-test": [
            facts
            for facts in (*uncolored[2::3], *_uncolored("heldout", seed=800))
            for _ in range(REPEATS)
        ],
        "shapes-colored-heldout": list(
            islice(filter(states_colors, sample_split("heldout", 1_000, seed=900)), 192)
        ),
    }


def _different(facts: Iterable[Facts], count: int) -> Iterator[Facts]:
    yield from list(dict.fromkeys(facts))[:count]


def _uncolored(split: str, seed: int) -> Iterator[Facts]:
    """Yield the split's captions of equal objects that state no colour, each once."""
    for kind in ("single", "count"):
        drawn = dict.fromkeys(sample_split(split, 10_000, seed, kind))
        yield from (f for f in drawn if all(item.color is None for item in f.objects))


def lines(facts: Iterable[Facts]) -> str:
    """Return the JSON lines of a list."""
    rows = ({"prompt": caption(f), "metadata": f.to_metadata()} for f in facts)
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


if __name__ == "__main__":
    for name, facts in prompt_lists().items():
        (FOLDER / f"{name}.jsonl").write_text(lines(facts), encoding="utf-8")
