"""Writes the shipped prompt lists: `python -m lit_align.benchmarks.shapes_prompts`.

shapes-train    2,000 different captions of the train split
shapes-mixture  2,000 captions of the train split in the mixture of the training pictures, half
                of them single objects, drawn with repetition
shapes-heldout  600 captions of the held-out split, drawn with repetition: it has few single objects
shapes-unseen   200 different captions that name a colour-shape pair no denoiser was trained on
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_align.shapes.grammar import caption, sample_split
from lit_align.shapes.scene import Facts

FOLDER = Path(__file__).parent.parent / "data" / "prompts"


def prompt_lists() -> dict[str, list[Facts]]:
    """Return the facts of every list by name."""
    return {
        "shapes-train": list(_different(sample_split("train", 20_000, seed=100), 2_000)),
        "shapes-mixture": sample_split("train", 2_000, seed=400),
        "shapes-heldout": sample_split("heldout", 600, seed=200),
        "shapes-unseen": list(_different(sample_split("unseen", 5_000, seed=300), 200)),
    }


def _different(facts: Iterable[Facts], count: int) -> Iterator[Facts]:
    yield from list(dict.fromkeys(facts))[:count]


def lines(facts: Iterable[Facts]) -> str:
    """Return the JSON lines of a list."""
    rows = ({"prompt": caption(f), "metadata": f.to_metadata()} for f in facts)
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


if __name__ == "__main__":
    for name, facts in prompt_lists().items():
        (FOLDER / f"{name}.jsonl").write_text(lines(facts), encoding="utf-8")
