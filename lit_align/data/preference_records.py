"""Records of human or machine preference, one JSON object per line: schema `lit_align/pref/1`.

    {"schema": "lit_align/pref/1", "id": "r3-17", "kind": "pair", "prompt": "a red circle",
     "items": [{"uid": "a1", "path": "img/a1.png", "model": "base", "seed": 11,
                "scores": {"pickscore": 21.4}},
               {"uid": "b7", "path": "img/b7.png"}],
     "label": [1.0, 0.0], "annotator": "u17", "weight": 1.0}

Of every record: `schema`, `id`, `kind`, `prompt` and `items`. Of every item: `uid`, unique in the
record, and `path`, relative to the record's file, or in parquet `bytes`; it may have `model`,
`seed`, `scores`, `metadata`, and a video `fps` and `num_frames`. What was judged, by kind:

pair      two items, `label` [p, 1 - p], the probabilities that each is preferred; a tie has 0.5
ranking   two items or more, `rank`, integers from 1, the best; equal for a tie
rating    one item, `label` [1.0] if it was liked, else [0.0]
invalid   not usable, kept for the records; may lack items

May be given: `media_type` (image, the default, or video), `axis` (overall by default), `pair_id`
(of a pair: equal in the records of all who judged it on this axis), `annotator`, `weight` (1 by
default), `round`, `rm_version`, `created_at` (ISO 8601) and `metadata`, an object of anything.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, Unpack

SCHEMA = "lit_align/pref/1"
KINDS = ("pair", "ranking", "rating", "invalid")
MEDIA = ("image", "video")
AXES = ("overall", "visual_quality", "motion_quality", "text_alignment", "aesthetics", "safety")

_JUDGED = {"pair": ("label",), "ranking": ("rank",), "rating": ("label",), "invalid": ()}
_MANY = math.inf
_ITEM_COUNTS = {"pair": (2, 2), "ranking": (2, _MANY), "rating": (1, 1), "invalid": (0, _MANY)}
_OPTIONAL = {"media_type", "axis", "pair_id", "annotator", "weight", "round", "rm_version",
             "created_at", "metadata"}  # fmt: skip
_OF_ITEMS = {"uid", "path", "bytes", "model", "seed", "scores", "fps", "num_frames", "metadata"}


class Details(TypedDict, total=False):
    """What every kind of record may say besides, see the module; None counts as not given."""

    media_type: str
    axis: str
    pair_id: str | None
    annotator: str | None
    weight: float
    round: int | None
    rm_version: str | None
    created_at: str | None
    metadata: dict[str, Any] | None


def pair_record(
    *,
    id: str,
    prompt: str,
    items: Sequence[dict[str, Any]],
    label: Sequence[float],
    **details: Unpack[Details],
) -> dict[str, Any]:
    """Return the record of a judgement between two images.

    Args:
        id: Names the record, once in its file.
        prompt: What both answer.
        items: The two, each with `uid` and `path`.
        label: The probabilities that each is preferred; they sum to 1.
        details: What else is known.

    Raises:
        ValueError: If the record is broken, see `check_record`.
    """
    return _record("pair", id, prompt, items, details, label=[float(p) for p in label])


def ranking_record(
    *,
    id: str,
    prompt: str,
    items: Sequence[dict[str, Any]],
    rank: Sequence[int],
    **details: Unpack[Details],
) -> dict[str, Any]:
    """Return the record of an order of several images; see `pair_record`.

    Args:
        id: Names the record, once in its file.
        prompt: What all answer.
        items: Two or more.
        rank: Of each item from 1, the best; equal for a tie.
        details: What else is known.

    Raises:
        ValueError: If the record is broken, see `check_record`.
    """
    return _record("ranking", id, prompt, items, details, rank=list(rank))


def rating_record(
    *, id: str, prompt: str, item: dict[str, Any], liked: bool, **details: Unpack[Details]
) -> dict[str, Any]:
    """Return the record of a judgement of one image; see `pair_record`.

    Args:
        id: Names the record, once in its file.
        prompt: What the image answers.
        item: The image.
        liked: Whether it was liked.
        details: What else is known.

    Raises:
        ValueError: If the record is broken, see `check_record`.
    """
    return _record("rating", id, prompt, [item], details, label=[float(liked)])


def invalid_record(
    *, id: str, prompt: str, items: Sequence[dict[str, Any]] = (), **details: Unpack[Details]
) -> dict[str, Any]:
    """Return the record of a judgement that cannot be used; see `pair_record`.

    Args:
        id: Names the record, once in its file.
        prompt: What the items answer.
        items: What was shown.
        details: What else is known.

    Raises:
        ValueError: If the record is broken, see `check_record`.
    """
    return _record("invalid", id, prompt, items, details)


def _record(
    kind: str,
    id: str,
    prompt: str,
    items: Sequence[dict[str, Any]],
    details: Details,
    **judged: list[Any],
) -> dict[str, Any]:
    head = {"schema": SCHEMA, "id": id, "kind": kind, "prompt": prompt, "items": list(items)}
    given = {key: value for key, value in details.items() if value is not None}
    record = {**head, **judged, **given}
    check_record(record)
    return record


def check_record(record: Any) -> None:
    """See that a record follows the schema.

    Raises:
        ValueError: If not; the message says what is wrong in it, and what is expected.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_shown(record)}")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"'schema' must be {SCHEMA!r}, got {_shown(record.get('schema'))}")
    _one_of("kind", record.get("kind"), KINDS)
    kind: str = record["kind"]
    known = {"schema", "id", "kind", "prompt", "items", *_JUDGED[kind], *_OPTIONAL}
    if unknown := sorted(set(record) - known):
        raise ValueError(f"unknown field {unknown[0]!r}; put what is your own into 'metadata'")
    for field in ("id", "prompt"):
        _text(field, record.get(field))
    _check_items(record.get("items"), kind)
    _check_judgement(record, len(record["items"]))
    _check_details(record)


def _check_items(items: Any, kind: str) -> None:
    least, most = _ITEM_COUNTS[kind]
    if not isinstance(items, list) or not least <= len(items) <= most:
        wanted = f"{least}" if least == most else f"at least {least}"
        got = f"{len(items)}" if isinstance(items, list) else _shown(items)
        raise ValueError(f"'items' of a record of kind {kind!r} must be {wanted}, got {got}")
    for number, item in enumerate(items):
        place = f"items[{number}]"
        if not isinstance(item, dict):
            raise ValueError(f"'{place}' must be an object, got {_shown(item)}")
        if unknown := sorted(set(item) - _OF_ITEMS):
            raise ValueError(f"unknown field '{place}.{unknown[0]}'; put it into 'metadata'")
        _text(f"{place}.uid", item.get("uid"))
        if item.get("bytes") is None:
            _text(f"{place}.path", item.get("path"))
        elif not isinstance(item["bytes"], bytes):
            raise ValueError(f"'{place}.bytes' must be bytes, got {_shown(item['bytes'])}")
    uids = [item["uid"] for item in items]
    if len(set(uids)) < len(uids):
        raise ValueError(f"the items' 'uid' must differ, got {_shown(uids)}")


def _check_judgement(record: dict[str, Any], count: int) -> None:
    kind = record["kind"]
    if kind == "invalid":
        return
    name = _JUDGED[kind][0]
    values = record.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"'{name}' must have one value per item ({count}), got {_shown(values)}")
    if kind == "ranking":
        if not all(type(v) is int for v in values) or min(values) != 1:
            raise ValueError(f"'rank' must be integers from 1, the best, got {_shown(values)}")
    elif not all(_is_number(v) and 0 <= v <= 1 for v in values):
        raise ValueError(f"'label' must lie in [0, 1], got {_shown(values)}")
    elif kind == "pair" and abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"'label' of a pair must sum to 1, got {_shown(values)}")
    elif kind == "rating" and values[0] not in (0, 1):
        raise ValueError(f"'label' of a rating must be [1.0] or [0.0], got {_shown(values)}")


def _check_details(record: dict[str, Any]) -> None:
    _one_of("media_type", record.get("media_type", "image"), MEDIA)
    _one_of("axis", record.get("axis", "overall"), AXES)
    weight = record.get("weight", 1.0)
    if not _is_number(weight) or weight < 0:
        raise ValueError(f"'weight' must be a number from 0, got {_shown(weight)}")
    for name in ("pair_id", "annotator", "rm_version"):
        if record.get(name) is not None:
            _text(name, record[name])
    if record.get("pair_id") is not None and record["kind"] not in ("pair", "invalid"):
        raise ValueError(f"'pair_id' belongs to pairs, but the record is a {record['kind']}")
    if (number := record.get("round")) is not None and type(number) is not int:
        raise ValueError(f"'round' must be an integer, got {_shown(number)}")
    if (created := record.get("created_at")) is not None:
        try:
            datetime.fromisoformat(created)
        except (TypeError, ValueError):
            raise ValueError(f"'created_at' must be ISO 8601, got {_shown(created)}") from None
    if not isinstance(record.get("metadata") or {}, dict):
        raise ValueError(f"'metadata' must be an object, got {_shown(record['metadata'])}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{name}' must be a text that is not empty, got {_shown(value)}")


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"'{name}' must be one of {', '.join(known)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def append_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record as the last line of a file, and see it onto the disk.

    A process killed meanwhile leaves at most a cut last line. Whoever writes next begins a new
    line, so that the cut one remains the only broken one.

    Raises:
        ValueError: If the record is broken, or an item has no `path`: JSON holds no bytes.
    """
    check_record(record)
    if any(item.get("bytes") is not None for item in record["items"]):
        raise ValueError("an item with 'bytes' cannot be written as JSON; give a file's 'path'")
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    with Path(path).open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)  # one write at the end of the file, whoever else appends
        file.flush()
        os.fsync(file.fileno())


def parse_record(line: bytes) -> dict[str, Any]:
    """Return the record of one line of a file.

    Raises:
        ValueError: If it is broken, or cut.
    """
    try:
        record = json.loads(line)
    except ValueError:
        cut = not line.endswith(b"\n") and line.lstrip().startswith(b"{")
        what = (
            "the last line is cut, as by a killed process; delete it"
            if cut
            else (f"expected a JSON object, got {_shown(line.decode(errors='replace').strip())}")
        )
        raise ValueError(what) from None
    check_record(record)
    checked: dict[str, Any] = record
    return checked
