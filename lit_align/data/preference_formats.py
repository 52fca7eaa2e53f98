"""How public data sets of preferences lie on disk, and the records that their rows become.

lit_align    .jsonl or .parquet of `preference_records`
pickapic     .parquet with the columns of Pick-a-Pic v1 and v2 (arXiv:2305.01569); weight 1 /
             `num_example_per_prompt`; rows without a label are left out
hpdv2        .json of HPD v2 (arXiv:2306.09341): `file_path` and `human_preference`, or
             `image_path` and `rank`, lower being better
imagereward  .json of ImageRewardDB (arXiv:2304.05977): `generations` and `ranking`, lower better
videoreward  .csv of VideoReward (arXiv:2501.13918): A, B or same on the axes VQ, MQ, TA; a cell of
             anything else is an invalid record
kto          .csv of Diffusion-KTO (arXiv:2404.04465): `label` exclusive_win or exclusive_lose
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.data.preference_records import (
    check_record,
    invalid_record,
    pair_record,
    ranking_record,
    rating_record,
)
from lit_align.data.preference_rows import (
    CsvRows,
    JsonArray,
    JsonLines,
    ParquetRows,
    Row,
    Rows,
    matching_files,
)

_AXES = {"VQ": "visual_quality", "MQ": "motion_quality", "TA": "text_alignment",
         "Overall": "overall"}  # fmt: skip
_CHOICES = {"A": (1, 0), "B": (0, 1), "same": (0.5, 0.5)}
_LIKED = {"exclusive_win": True, "exclusive_lose": False}


def _lit_align(row: Row, number: int) -> list[Row]:
    check_record(row)
    return [row]


def _pickapic(row: Row, number: int) -> list[Row]:
    if not row.get("has_label", True):
        return []
    labels = [_required(row, "label_0"), _required(row, "label_1")]
    items = [
        {"uid": row.get(f"image_{i}_uid", f"image_{i}"), "bytes": row.get(f"jpg_{i}")}
        | ({"model": row[f"model_{i}"]} if row.get(f"model_{i}") else {})
        for i in (0, 1)
    ]
    for i, item in enumerate(items):
        if item["bytes"] is None:
            raise ValueError(f"'jpg_{i}' holds no picture")
    named: dict[str, Any] = {"id": str(row.get("ranking_id", number)), "prompt": row.get("caption")}
    if items[0]["uid"] == items[1]["uid"]:  # one picture, shown twice
        return [invalid_record(**named)]
    judged_of_prompt = row.get("num_example_per_prompt", 1)
    if not isinstance(judged_of_prompt, int) or judged_of_prompt < 1:
        raise ValueError(
            f"'num_example_per_prompt' must be a positive integer, got {judged_of_prompt}"
        )
    annotator = str(row["user_id"]) if "user_id" in row else None
    return [
        pair_record(
            **named, items=items, label=labels, weight=1 / judged_of_prompt, annotator=annotator
        )
    ]


def _hpdv2(row: Row, number: int) -> list[Row]:
    named: dict[str, Any] = {"id": str(number), "prompt": row.get("prompt")}
    if "human_preference" in row:
        items = _items(_required(row, "file_path"))
        label = row["human_preference"]
        if not isinstance(label, list) or not all(type(v) in (int, float) for v in label):
            raise ValueError(f"'human_preference' must be numbers, got {label!r}")
        return [pair_record(**named, items=items, label=label)]
    items = _items(_required(row, "image_path"))
    return [ranking_record(**named, items=items, rank=_from_one(row, "rank"))]


def _imagereward(row: Row, number: int) -> list[Row]:
    items = _items(_required(row, "generations"))
    rank = _from_one(row, "ranking")
    return [ranking_record(id=str(number), prompt=row.get("prompt", ""), items=items, rank=rank)]


def _videoreward(row: Row, number: int) -> list[Row]:
    items = []
    for side in "AB":
        item: Row = {"uid": side, "path": row[f"path_{side}"]}
        if f"{side}_model" in row:
            item["model"] = row[f"{side}_model"]
        for name, kind in (("fps", float), ("num_frames", int)):
            if value := row.get(f"{name}_{side}", ""):
                item[name] = kind(float(value))
        items.append(item)
    records = []
    for column, axis in _AXES.items():
        if column not in row:
            continue
        named: dict[str, Any] = {"id": f"{number}-{column}", "prompt": row["prompt"],
                                 "items": items, "axis": axis, "media_type": "video"}  # fmt: skip
        label = _CHOICES.get(row[column])
        records.append(pair_record(**named, label=label) if label else invalid_record(**named))
    return records


def _kto(row: Row, number: int) -> list[Row]:
    if row["label"] not in _LIKED:
        raise ValueError(f"'label' must be one of {', '.join(_LIKED)}, got {row['label']!r}")
    item = {"uid": "0", "path": row["file_path"]}
    liked = _LIKED[row["label"]]
    return [rating_record(id=str(number), prompt=row["caption"], item=item, liked=liked)]


def _required(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"there is no {name!r}; it has {', '.join(row) or 'nothing'}")
    return row[name]


def _items(paths: Any) -> list[Row]:
    if not isinstance(paths, list):
        raise ValueError(f"the pictures must be a list of paths, got {str(paths)[:80]!r}")
    return [{"uid": str(number), "path": path} for number, path in enumerate(paths)]


def _from_one(row: Row, name: str) -> list[int]:
    """Return the ranks counted from 1; the files count from 0 or from 1."""
    ranks = _required(row, name)
    if not isinstance(ranks, list) or not ranks or not all(type(rank) is int for rank in ranks):
        raise ValueError(f"{name!r} must be integers, the lowest the best, got {str(ranks)[:80]}")
    return [rank - min(ranks) + 1 for rank in ranks]


class Format(NamedTuple):
    """A layout.

    Attributes:
        suffixes: How its files end.
        convert: Makes records of a row and its number; none if the row has no label. Raises
            ValueError if the row is broken.
        columns: What a table must have.
        blobs: The leaves of a parquet file that hold pictures.
    """

    suffixes: tuple[str, ...]
    convert: Callable[[Row, int], list[Row]]
    columns: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()

    def open(self, source: str | Path) -> tuple[Rows, Path]:
        """Return the rows of a source, and the folder that it lies in.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not of this layout.
        """
        paths = matching_files(source, self.suffixes)
        path = paths[0]
        if path.suffix == ".parquet":
            return ParquetRows(paths, self.columns, self.blobs), path.parent
        if len(paths) > 1:
            raise ValueError(
                f"{str(source)!r} names {len(paths)} files, which only parquet may; give one."
            )
        if path.suffix == ".csv":
            return CsvRows(path, self.columns), path.parent
        return (JsonLines(path) if path.suffix == ".jsonl" else JsonArray(path)), path.parent


FORMATS = {
    "lit_align": Format(
        (".jsonl", ".parquet"),
        _lit_align,
        ("schema", "id", "kind", "prompt", "items"),
        ("items.list.element.bytes", "items.list.item.bytes"),  # the latter by older writers
    ),
    "pickapic": Format(
        (".parquet",),
        _pickapic,
        ("caption", "jpg_0", "jpg_1", "label_0", "label_1"),
        ("jpg_0", "jpg_1"),
    ),
    "hpdv2": Format((".json",), _hpdv2),
    "imagereward": Format((".json",), _imagereward),
    "videoreward": Format(
        (".csv",), _videoreward, ("path_A", "path_B", "prompt", "VQ", "MQ", "TA")
    ),
    "kto": Format((".csv",), _kto, ("file_path", "caption", "label")),
}
